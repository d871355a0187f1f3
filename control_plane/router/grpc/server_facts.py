"""What a router may tell of itself beside its model's card: composition hands it to the gRPC services."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """Empty and 0: not known."""

    version: str = ""
    model_dtype: str = ""  # of weights and KV
    block_size: int = 0  # tokens in one block of KV
    codecs: tuple[str, ...] = ()  # that a request may name
    codec: str = ""  # of requests that name none
    tokenizer: Path | None = None  # the folder with its files, for those who may fetch it
