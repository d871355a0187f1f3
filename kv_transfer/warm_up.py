"""Warming up: the machine code of a codec is there before the first frame needs it.

Kernels are compiled at their first call, for the types that they are called with, or loaded from what an earlier
process compiled (`engine.base.jit`): seconds or a tenth of one, which in the middle of a transfer would be silence.
Types follow from the stream and the codec alone, so KV of zeros has those of any other.
"""

from contextlib import suppress
from typing import Final

import numpy as np

from engine.kv.arena import Range
from kv_transfer.codecs import Atom, AtomShape, CodecSet, Unencodable

# What kernels see lies in memory another way where the first tokens of a sequence stay raw, and again in a panel of 128
# tokens (`transform`): these two atoms have every way there is, or the test of this module fails.
_ATOMS: Final[tuple[Range, ...]] = ((0, 256), (16, 32))


def warm_up(codecs: CodecSet, name: str) -> None:
    """An atom at the start of a sequence and one that is not, through this codec and back."""
    codec, stream = codecs.get(name), codecs.stream
    level = codec.levels[0]
    for tokens in _ATOMS:
        shape = AtomShape(stream, (0, stream.layers), tokens, (0, stream.heads))
        with suppress(Unencodable):  # then the encoder is there; no codec here refuses zeros
            payload = codec.encode(Atom(shape, np.zeros(shape.LHPTX, np.uint8)), level)
            codec.decode_untrusted(memoryview(payload).toreadonly(), shape, level)
