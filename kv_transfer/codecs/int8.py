"""Int8: every number as one of 256 steps between its group's smallest and largest: 8.5 bits for a head dim of 64.

No token stays raw as in codecs of fewer bits: a sink's grid is its own in V, and in K it costs its 64 neighbours two
bits of eight. Asymmetric for one quarter of a bit more than a symmetric grid with one bound, at a fifth of its KL.
"""

from typing import ClassVar

from kv_transfer.codecs import codecs
from kv_transfer.codecs.grouped import Grouped


@codecs.register("int8")
class Int8(Grouped):
    """Asymmetric eight-bit quantisation: K per channel over 64 tokens, V per token and head."""

    bits: ClassVar[int] = 8
    raw_tokens: ClassVar[int] = 0
    loses: ClassVar[str] = "half a step of 1/255 of the range of the numbers that share a grid"
