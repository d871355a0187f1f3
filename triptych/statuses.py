"""How commands end: 2 for what the person at the terminal can mend, 1 for a failure, and what shells call a signal.

The processes of a cluster end alike (`control_plane.lifecycle`), so that a launcher can pass a status on.
"""

import signal
from typing import Final

from control_plane.lifecycle import STATUS_BUG, STATUS_MISTAKE

FAILED: Final = STATUS_BUG
MISTAKE: Final = STATUS_MISTAKE
INTERRUPTED: Final = 128 + signal.SIGINT
BROKEN_PIPE: Final = 128 + signal.SIGPIPE
