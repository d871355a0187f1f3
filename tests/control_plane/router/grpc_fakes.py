"""A real gRPC server on loopback with the scripted core behind it, and keys of three tenants."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from control_plane.router.access.tenants import Keys, Tenant
from control_plane.router.grpc.server_facts import ServerFacts
from control_plane.router.grpc.services import add_services
from tests.control_plane.router.edge_fakes import Router, turns

KEYS = Keys({"sk-acme": Tenant("acme"), "sk-other": Tenant("other"), "sk-ops": Tenant("ops", admin=True)})
ACME = (("authorization", "Bearer sk-acme"),)
OTHER = (("authorization", "Bearer sk-other"),)
OPS = (("authorization", "Bearer sk-ops"),)


class Server:
    def __init__(self, router: Router, keys: Keys | None = None, facts: ServerFacts | None = None) -> None:
        self.router = router
        self.server = grpc.aio.server()
        self.health = add_services(
            self.server,
            edge=router.edge,
            validator=router.validator,
            state=router.state,
            wall_s=lambda: 0.0,
            keys=keys,
            facts=facts,
        )
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        self.channel = grpc.aio.insecure_channel(self.address)

    async def unwatched(self) -> None:
        """Returns once nobody watches the health any more, which the server learns from the network."""
        while True:
            waiting = asyncio.create_task(self.health.watched())
            await turns(1)
            if not waiting.done():
                waiting.cancel()
                return


@asynccontextmanager
async def running(router: Router, **options: Any) -> AsyncIterator[Server]:
    server = Server(router, **options)
    await server.server.start()
    try:
        yield server
    finally:
        await server.channel.close()
        await server.server.stop(grace=None)


def refusal(error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str]:
    return error.code(), error.details() or ""
