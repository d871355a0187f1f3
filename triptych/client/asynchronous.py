"""`AsyncClient`: for event loops. `synchronous` is the same for threads."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from control_plane.wire import inference_pb2 as pb
from control_plane.wire import inference_pb2_grpc as pb_grpc
from engine.base.errors import Cancelled, FailedPrecondition, Unavailable
from triptych.client.connection import CLIENT_CLOSED, TIMEOUT_S, Terms, Tls, error_of
from triptych.client.requests import Options, Prompt, generate_request
from triptych.client.values import Completion, Delta, Loads, ModelInfo, ServerInfo


class AsyncStream(AsyncIterator[Delta]):
    """One answer as it comes. To stop reading ends the request: by `close`, by leaving an `async with` block, by
    cancelling the reading task, or when nobody holds the stream any more, as after a `break`."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def __anext__(self) -> Delta:
        with _telling():
            message = await self._call.read()
        if message is grpc.aio.EOF:
            raise StopAsyncIteration
        return Delta.of(message)

    def close(self) -> None:
        """Idempotent; without effect on an answer that is over."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        """gRPC's call would be cancelled too, but not before the garbage collector has found its cycle."""
        if not self._call.done():
            self._call.cancel()


class AsyncClient:
    """Talks to one router, on one event loop; use it as an async context manager, or `close` it."""

    def __init__(
        self, address: str, *, api_key: str | None = None, tls: Tls | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        """`address`: host:port of the router's gRPC port. `timeout_s`: of each call that names no other."""
        self._terms = Terms(api_key=api_key, timeout_s=timeout_s)
        self._closed = False
        self._channel = (
            grpc.aio.insecure_channel(address) if tls is None else grpc.aio.secure_channel(address, tls.credentials())
        )
        self._inference: Any = pb_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    async def close(self) -> None:
        """Idempotent. Calls that are under way end, with `Cancelled`."""
        self._closed = True
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- requests ------------------------------------------------------------------------------------------------------
    def generate(self, prompt: Prompt, *, timeout_s: float | None = None, **options: Unpack[Options]) -> AsyncStream:
        """The answer as it comes. Errors are raised where it is read."""
        request = generate_request(prompt, options)
        self._require_open()
        return AsyncStream(self._inference.Generate(request, **self._terms.of(timeout_s)))

    async def complete(
        self, prompt: Prompt, *, timeout_s: float | None = None, **options: Unpack[Options]
    ) -> Completion:
        """The whole answer."""
        async with self.generate(prompt, timeout_s=timeout_s, **options) as stream:
            return Completion.of([delta async for delta in stream])

    async def abort(self, id: str, *, timeout_s: float | None = None) -> None:
        """End a request by the `id` of its deltas. One that is unknown or over is no error."""
        await self._ask(self._inference.Abort, pb.AbortRequest(id=id), timeout_s)

    # -- facts ---------------------------------------------------------------------------------------------------------
    async def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        return ModelInfo.of(await self._ask(self._inference.GetModelInfo, pb.GetModelInfoRequest(), timeout_s))

    async def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        return ServerInfo.of(await self._ask(self._inference.GetServerInfo, pb.GetServerInfoRequest(), timeout_s))

    async def loads(self, *, timeout_s: float | None = None) -> Loads:
        return Loads.of(await self._ask(self._inference.GetLoads, pb.GetLoadsRequest(), timeout_s))

    async def ready(self, role: str = "", *, timeout_s: float | None = None) -> bool:
        """Whether requests succeed, or whether some worker serves in this role; False when nobody answers."""
        try:
            health = await self._ask(self._health.Check, health_pb2.HealthCheckRequest(service=role), timeout_s)
        except Unavailable:
            return False
        return bool(health.status == health_pb2.HealthCheckResponse.SERVING)

    async def _ask(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        self._require_open()
        with _telling():
            return await method(request, **self._terms.of(timeout_s))

    def _require_open(self) -> None:
        if self._closed:
            raise FailedPrecondition(CLIENT_CLOSED)


@contextmanager
def _telling() -> Iterator[None]:
    """What a call met, in our words. gRPC cancels whoever awaits a call that was closed: nobody cancelled that task."""
    try:
        yield
    except grpc.RpcError as failed:
        raise error_of(failed) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Cancelled("the call is closed") from None
