"""`triptych router`: one router, for clusters that are started by parts."""

from typing import TYPE_CHECKING

import typer

from control_plane.options import RouterOptions
from triptych.flags import configured_by

if TYPE_CHECKING:
    from triptych.sources import Configured


@configured_by(RouterOptions)
def router(configured: "Configured[RouterOptions]") -> None:
    """Run one router: HTTP and gRPC in front, a controller's workers behind.

    \b
    triptych router --controller 10.0.0.5:50050 --api-key-file keys.txt
    """
    options = configured.options
    from control_plane.router.server import main as run

    raise typer.Exit(run(options))
