"""CacheSchema: what a cached token holds, as data that arena, codecs and frames all read.

A schema says nothing about blocks, devices or workers, so two workers with equal schema digests can exchange KV
whatever their block sizes are. Latent, hidden-state and embedding streams are schemas too, not special cases.

Legend: L layers, H kv heads, D head dim.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property

from engine.base.errors import InvalidArgument

ITEM_BYTES = {"uint8": 1, "bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One kind of per-token tensor. For grouped-query attention: [parts=2 (K then V), heads, head_dim] per layer.

    `position_encoding` is "none", "rope_applied" (keys are stored rotated, at their original positions) or
    "rope_pending". `role` is "kv", "latent", "hidden" or "embedding".
    """

    name: str
    layers: int
    heads: int
    head_dim: int
    dtype: str
    parts: int = 2
    position_encoding: str = "rope_applied"
    role: str = "kv"

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise InvalidArgument(f"dtype: one of {sorted(ITEM_BYTES)}, got {self.dtype!r}", field="dtype")
        if min(self.layers, self.heads, self.head_dim, self.parts) < 1:
            raise InvalidArgument(f"stream {self.name}: every dimension must be >= 1", field="streams")

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def token_layer_bytes(self) -> int:
        """Bytes of one token in one layer, all heads and parts."""
        return self.parts * self.heads * self.head_dim * self.item_bytes


@dataclass(frozen=True)
class CacheSchema:
    """Ordered streams plus the fingerprint of the model that fills them."""

    model: str
    streams: tuple[Stream, ...]

    @property
    def kv(self) -> Stream:
        """The key/value stream (the only one of today's models)."""
        return self.streams[0]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all streams and layers."""
        return sum(stream.layers * stream.token_layer_bytes for stream in self.streams)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that differ whenever KV of one schema must not be read under the other."""
        text = json.dumps([self.model, [asdict(stream) for stream in self.streams]], sort_keys=True)
        return hashlib.sha256(text.encode()).digest()[:16]
