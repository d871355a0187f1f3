"""Int3: every number as one of 8 steps between its group's smallest and largest, sinks raw: 3.5 bits per number."""

from typing import ClassVar

from kv_transfer.codecs import codecs
from kv_transfer.codecs.grouped import SINK_TOKENS, Grouped


@codecs.register("int3")
class Int3(Grouped):
    """Asymmetric three-bit quantisation: K per channel over 64 tokens, V per token and head."""

    bits: ClassVar[int] = 3
    raw_tokens: ClassVar[int] = SINK_TOKENS
    loses: ClassVar[str] = (
        "half a step of 1/7 of the range of the numbers that share a grid; nothing of the first 4 positions"
    )
