"""`triptych serve`: a whole cluster on this machine."""

from typing import TYPE_CHECKING

import typer

from deploy.options import ServeOptions
from triptych.flags import configured_by

if TYPE_CHECKING:
    from triptych.sources import Configured


@configured_by(ServeOptions, positional="model")
def serve(configured: "Configured[ServeOptions]") -> None:
    """Run a whole cluster on this machine: controller, router and workers. SIGTERM or Ctrl-C drains and ends it.

    \b
    triptych serve                                one prefill, one decode worker
    triptych serve ./checkpoint --prefill 2
    triptych serve demo-vlm                       one encode worker, too: this model sees
    triptych serve --config my.yaml --port 9000   the flag wins
    """
    options = configured.options
    from deploy.local import serve as run

    raise typer.Exit(run(options))
