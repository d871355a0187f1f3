"""`triptych controller`: what workers and routers register with."""

from typing import TYPE_CHECKING

import typer

from control_plane.options import ControllerOptions
from triptych.flags import configured_by

if TYPE_CHECKING:
    from triptych.sources import Configured


@configured_by(ControllerOptions)
def controller(configured: "Configured[ControllerOptions]") -> None:
    """Run the controller that workers and routers register with.

    \b
    triptych controller --listen 0.0.0.0:50050
    """
    options = configured.options
    from control_plane.controller.server import main as run

    raise typer.Exit(run(options))
