"""The controller's process: one loop, one machine, one gRPC port. Starts without torch and holds nothing on disk."""

import asyncio
import logging

from control_plane import addresses
from control_plane.controller.core import ControllerCore
from control_plane.lifecycle import Shutdown
from control_plane.logs import configure_logging
from control_plane.options import ControllerOptions
from engine.base.asyncio_host import AsyncioHost
from kv_transfer.transports.grpc import GrpcTransport

log = logging.getLogger("triptych.controller")


def main(options: ControllerOptions) -> int:
    configure_logging("controller", options.log_level, options.log_format)
    with addresses.hold("listen", *addresses.split(options.listen)):  # before gRPC finds out, at greater length
        return asyncio.run(_serve(options))


async def _serve(options: ControllerOptions) -> int:
    shutdown = Shutdown()
    shutdown.install()
    transport = GrpcTransport()
    host = AsyncioHost(ControllerCore(), transport, on_crash=shutdown.crash)
    transport.listen(options.listen, host.accept)
    await transport.start()
    host.start()
    log.info("controller listens", extra={"at": options.listen})
    await shutdown.wait()
    await host.close("shutdown")
    await transport.close()
    return shutdown.exit_status
