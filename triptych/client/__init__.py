"""A client for Triptych's own gRPC service, `triptych.v1.Inference`.

    from triptych.client import Client

    with Client("127.0.0.1:50051") as client:
        for delta in client.generate("Once upon a time", max_tokens=32):
            print(delta.text, end="", flush=True)

`AsyncClient` is the same with `await`. Every error is a `TriptychError`, of the class that the server raised.
"""

from engine.base.errors import (
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    TriptychError,
    Unauthenticated,
    Unavailable,
)
from triptych.client.asynchronous import AsyncClient, AsyncStream
from triptych.client.connection import Tls
from triptych.client.requests import Message, Options, Part, Prompt
from triptych.client.synchronous import Client, Stream
from triptych.client.values import (
    Choice,
    Completion,
    Delta,
    Loads,
    ModelInfo,
    ServerInfo,
    Stats,
    TokenLogprob,
    WorkerLoad,
)

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Choice",
    "Client",
    "Completion",
    "DataLoss",
    "DeadlineExceeded",
    "Delta",
    "FailedPrecondition",
    "Internal",
    "InvalidArgument",
    "Loads",
    "Message",
    "ModelInfo",
    "NotFound",
    "Options",
    "Part",
    "PermissionDenied",
    "Prompt",
    "ResourceExhausted",
    "ServerInfo",
    "Stats",
    "Stream",
    "Tls",
    "TokenLogprob",
    "TriptychError",
    "Unauthenticated",
    "Unavailable",
    "WorkerLoad",
]
