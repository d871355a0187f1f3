"""Raw: the bytes as they are. Loses nothing, saves nothing, always available.

No copy in either direction: the payload is a view of the atom, the decoded atom a view of the payload.
"""

from typing import ClassVar

import numpy as np

from engine.base.errors import FrameError
from engine.kv.arena import Bytes
from engine.kv.schema import ITEM_BYTES
from kv_transfer.codecs import RAW, Atom, AtomShape, Payload, codecs


@codecs.register(RAW)
class Raw:
    """Identity."""

    paper: ClassVar[str] = "none: the baseline"
    loses: ClassVar[str] = "nothing"
    needs: ClassVar[tuple[str, ...]] = ()
    composes_with: ClassVar[str] = "everything"
    lossless: ClassVar[bool] = True
    profiled: ClassVar[bool] = False
    dtypes: ClassVar[frozenset[str]] = frozenset(ITEM_BYTES)
    levels: ClassVar[tuple[int, ...]] = (0,)
    token_multiple: ClassVar[int] = 1
    block_local: ClassVar[bool] = True
    cuts_layers: ClassVar[bool] = True
    cuts_heads: ClassVar[bool] = True

    def encode(self, atom: Atom, level: int) -> Payload:
        return atom.bytes_LHPTX.reshape(-1).data

    def decode_untrusted(self, payload: memoryview, shape: AtomShape, level: int) -> Bytes:
        if len(payload) != shape.raw_bytes:
            raise FrameError("length")
        return np.frombuffer(payload, np.uint8).reshape(shape.LHPTX)

    def payload_bytes_max(self, shape: AtomShape) -> int:
        return shape.raw_bytes

    def error_bound(self, shape: AtomShape, level: int, largest: float) -> float:
        return 0.0
