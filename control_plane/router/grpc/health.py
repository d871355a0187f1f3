"""grpc.health.v1, for probes and for gateways that pick by role.

    ""                          does the router take requests? Liveness is the process, and HTTP's /health
    each service's full name    likewise
    "encode", "prefill",        does a worker that serves hold that role?
    "decode"

No key is asked for: a probe has none, and an answer is one bit.
"""

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from control_plane.router.dispatch.workers import SERVING
from control_plane.router.edge import RouterState
from control_plane.router.grpc.calls import Context
from control_plane.router.requests import WorkerView
from engine.types import Role

HEALTH_NAME: Final[str] = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
ROLES: Final = tuple(role.value for role in Role)


class ReadinessHealth(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the base is untyped
    """Answered from the router's state. While it is `watched` its owner calls `refresh` often; a router that nobody
    watches is left to sleep."""

    def __init__(self, state: RouterState, services: Iterable[str] = ()) -> None:
        self._state = state
        self._services = ("", *services)
        self._statuses = self._all()
        self._changed = asyncio.Event()
        self._watchers = 0
        self._watched = asyncio.Event()

    async def watched(self) -> None:
        """Returns when, or as soon as, somebody watches."""
        await self._watched.wait()

    def refresh(self) -> None:
        statuses = self._all()
        if statuses != self._statuses:
            self._statuses = statuses
            self._changed.set()
            self._changed = asyncio.Event()

    async def Check(self, request: Any, context: Context) -> Any:
        status = self._all().get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: Any, context: Context) -> None:
        if request.service not in self._statuses:
            await context.write(health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN))
            return
        with self._watching():
            told = None
            while True:
                changed = self._changed
                if self._statuses[request.service] != told:
                    told = self._statuses[request.service]
                    await context.write(health_pb2.HealthCheckResponse(status=told))
                await changed.wait()  # as long as the client watches: it ends the call, or the server does

    @contextmanager
    def _watching(self) -> Iterator[None]:
        self.refresh()  # nobody has for as long as nobody watched
        self._watchers += 1
        self._watched.set()
        try:
            yield
        finally:
            self._watchers -= 1
            if not self._watchers:
                self._watched.clear()

    def _all(self) -> dict[str, int]:
        ready, held = self._state.ready, held_roles(self._state.workers())
        known = dict.fromkeys(self._services, _status(ready))
        return known | {role: _status(role in held) for role in ROLES}


def serves(worker: WorkerView) -> bool:
    return worker.connected and worker.state == SERVING


def held_roles(workers: Iterable[WorkerView]) -> frozenset[str]:
    """By workers that serve."""
    return frozenset(role for worker in workers if serves(worker) for role in worker.roles)


def _status(serving: bool) -> int:
    response = health_pb2.HealthCheckResponse
    return response.SERVING if serving else response.NOT_SERVING  # type: ignore[no-any-return]
