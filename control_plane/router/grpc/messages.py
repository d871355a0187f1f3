"""Received bytes that are no message: the client's mistake, and told as such.

gRPC would call that UNKNOWN, name a Python class to the client and write a traceback into the log, once for every
packet of garbage. Here such a call reaches its handler with `None` for a request, which `grpc_calls.answered` refuses.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError

Parse = Callable[[bytes], Any]


class CarefulServer:
    """What generated code needs of a server to add a service to it."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self._server.add_generic_rpc_handlers([CarefulHandler(handler) for handler in handlers])

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """The same methods again, found by a table: not taken, for the table would come before the handlers above."""


class CarefulHandler(grpc.GenericRpcHandler):
    def __init__(self, handler: grpc.GenericRpcHandler) -> None:
        self._handler = handler

    def service(self, call: grpc.HandlerCallDetails) -> Any:
        found: Any = self._handler.service(call)
        if found is None:
            return None
        return found._replace(request_deserializer=_message_or_none_untrusted(found.request_deserializer))


def _message_or_none_untrusted(parse: Parse) -> Parse:
    def read(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return None

    return read
