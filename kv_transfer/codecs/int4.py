"""Int4: every number as one of 16 steps between its group's smallest and largest, sinks raw: 4.5 bits per number."""

from typing import ClassVar

from kv_transfer.codecs import codecs
from kv_transfer.codecs.grouped import SINK_TOKENS, Grouped


@codecs.register("int4")
class Int4(Grouped):
    """Asymmetric four-bit quantisation: K per channel over 64 tokens, V per token and head."""

    bits: ClassVar[int] = 4
    raw_tokens: ClassVar[int] = SINK_TOKENS
    loses: ClassVar[str] = (
        "half a step of 1/15 of the range of the numbers that share a grid; nothing of the first 4 positions"
    )
