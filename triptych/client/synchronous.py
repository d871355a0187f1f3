"""`Client`: for threads. `asynchronous` is the same for event loops."""

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from control_plane.wire import inference_pb2 as pb
from control_plane.wire import inference_pb2_grpc as pb_grpc
from engine.base.errors import FailedPrecondition, Unavailable
from triptych.client.connection import CLIENT_CLOSED, TIMEOUT_S, Terms, Tls, error_of
from triptych.client.requests import Options, Prompt, generate_request
from triptych.client.values import Completion, Delta, Loads, ModelInfo, ServerInfo


class Stream(Iterator[Delta]):
    """One answer as it comes. To stop reading ends the request: by `close`, by leaving a `with` block, or when nobody
    holds the stream any more, as after a `break`."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __next__(self) -> Delta:
        try:
            return Delta.of(next(self._call))
        except grpc.RpcError as failed:
            raise error_of(failed) from None

    def close(self) -> None:
        """Idempotent; without effect on an answer that is over."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Client:
    """Talks to one router. Thread-safe; use it as a context manager, or `close` it."""

    def __init__(
        self, address: str, *, api_key: str | None = None, tls: Tls | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        """`address`: host:port of the router's gRPC port. `timeout_s`: of each call that names no other."""
        self._terms = Terms(api_key=api_key, timeout_s=timeout_s)
        self._closed = False
        self._channel = (
            grpc.insecure_channel(address) if tls is None else grpc.secure_channel(address, tls.credentials())
        )
        self._inference: Any = pb_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def close(self) -> None:
        """Idempotent. Calls that are under way end, with `Cancelled`."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- requests ------------------------------------------------------------------------------------------------------
    def generate(self, prompt: Prompt, *, timeout_s: float | None = None, **options: Unpack[Options]) -> Stream:
        """The answer as it comes. Errors are raised where it is read."""
        request = generate_request(prompt, options)
        self._require_open()
        return Stream(self._inference.Generate(request, **self._terms.of(timeout_s)))

    def complete(self, prompt: Prompt, *, timeout_s: float | None = None, **options: Unpack[Options]) -> Completion:
        """The whole answer."""
        with self.generate(prompt, timeout_s=timeout_s, **options) as stream:
            return Completion.of(list(stream))

    def abort(self, id: str, *, timeout_s: float | None = None) -> None:
        """End a request by the `id` of its deltas. One that is unknown or over is no error."""
        self._ask(self._inference.Abort, pb.AbortRequest(id=id), timeout_s)

    # -- facts ---------------------------------------------------------------------------------------------------------
    def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        return ModelInfo.of(self._ask(self._inference.GetModelInfo, pb.GetModelInfoRequest(), timeout_s))

    def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        return ServerInfo.of(self._ask(self._inference.GetServerInfo, pb.GetServerInfoRequest(), timeout_s))

    def loads(self, *, timeout_s: float | None = None) -> Loads:
        return Loads.of(self._ask(self._inference.GetLoads, pb.GetLoadsRequest(), timeout_s))

    def ready(self, role: str = "", *, timeout_s: float | None = None) -> bool:
        """Whether requests succeed, or whether some worker serves in this role; False when nobody answers."""
        try:
            health = self._ask(self._health.Check, health_pb2.HealthCheckRequest(service=role), timeout_s)
        except Unavailable:
            return False
        return bool(health.status == health_pb2.HealthCheckResponse.SERVING)

    def _ask(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        self._require_open()
        try:
            return method(request, **self._terms.of(timeout_s))
        except grpc.RpcError as failed:
            raise error_of(failed) from None

    def _require_open(self) -> None:
        if self._closed:
            raise FailedPrecondition(CLIENT_CLOSED)
