"""`triptych worker`: one worker, for clusters that are started by parts."""

from typing import TYPE_CHECKING

import typer

from control_plane.options import WorkerOptions
from triptych.flags import configured_by

if TYPE_CHECKING:
    from triptych.sources import Configured


@configured_by(WorkerOptions)
def worker(configured: "Configured[WorkerOptions]") -> None:
    """Run one worker and register it with a controller.

    \b
    triptych worker --name p0 --role prefill --controller 10.0.0.5:50050
    """
    options = configured.options
    from control_plane.agent.process import main as run

    raise typer.Exit(run(options))
