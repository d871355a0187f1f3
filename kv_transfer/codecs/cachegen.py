"""CacheGen: quantised per token, coded with frequencies that were profiled once per model.

Liu et al., "CacheGen: KV Cache Compression and Streaming for Fast Large Language Model Serving" (arXiv 2310.07240). Per
layer, part and token, the largest magnitude over all heads is the scale; numbers become whole steps of scale / limit;
symbols are coded with the distribution of their layer, part and channel, known to both ends from the profile and named
by its digest. Where this differs from the paper:

- *No anchor deltas*: the paper codes nine tokens of ten as differences to the first. On SmolLM2-135M such differences
  vary 1.6 (K) to 1.9 (V) times as much as the numbers around their channel's mean, and cost .17 to .46 bits more at an
  equal step. What tokens have in common is the channel's mean, and a table per channel knows that.
- *Keys stay rotated*: without rotation they take .4 bits less, but centred and rotated back, their KL was twice as
  large.
- *Tables are never sent*: with 256 tokens they would take 2 bits per number. A few are shared by many channels, in
  classes, and a row's scale takes part in choosing (`cachegen_tables`).
- *Scales are coded as well*: .02 bits per number, where a bfloat16 of each took .08.
- *The first 4 positions of a sequence are raw*: attention sinks, whose scale is no other token's.

    payload    raw tokens | rANS stream (`rans`): per layer, part and token: scale, then channels, heads in order

Loses half a step of 1 / limit of a row's largest number, rounded up by at most 1 / 16; magnitudes below 1.5e-36.

What a level costs for a model is measured and in its profile: METHODS.md.

Legend: i layers of the atom, H kv heads, P parts, T tokens, D head dim.
"""

from typing import Any, ClassVar, Final

import numpy as np

from engine.base.errors import FrameError
from engine.kv.schema import Stream
from kv_transfer.calibration import Calibration
from kv_transfer.codecs import AtomShape, Unencodable, cachegen_kernels, cachegen_tables, codecs, elements, rans
from kv_transfer.codecs.cachegen_kernels import FAILED, ROW_EXTRA_WORDS, SCALE_SHIFT
from kv_transfer.codecs.cachegen_tables import BINS
from kv_transfer.codecs.elements import Numbers
from kv_transfer.codecs.row_coded import Layout, RowCoded
from kv_transfer.profile import Tables

_SCALE_ROUNDING: Final = 1 + 2.0**-4  # a scale code has four bits of mantissa
_NUMBER_ROUNDING: Final = 2.0**-8  # of bfloat16, the coarsest dtype
_SMALLEST: Final = {"bfloat16": 2.0**-119, "float16": 2.0**-24, "float32": 2.0**-119}


@codecs.register("cachegen")
class CacheGen(RowCoded):
    """Per-token quantisation and static entropy coding. A level is the number of bins for K."""

    paper: ClassVar[str] = "CacheGen: KV Cache Compression and Streaming for Fast LLM Serving (arXiv 2310.07240)"
    loses: ClassVar[str] = "half a step of the largest number of a token's K or V in a layer; magnitudes below 1.5e-36"
    profiled: ClassVar[bool] = True
    levels: ClassVar[tuple[int, ...]] = tuple(BINS)

    def __init__(self, tables: Tables, stream: Stream) -> None:
        self._model = cachegen_tables.expand(tables, stream)

    @staticmethod
    def calibrate(calibration: Calibration) -> Tables:
        return cachegen_tables.calibrate(calibration)

    def error_bound(self, shape: AtomShape, level: int, largest: float) -> float:
        half_step = 0.5 / min(cachegen_tables.limits(level))
        return largest * _SCALE_ROUNDING * (half_step * 1.0001 + _NUMBER_ROUNDING) + _SMALLEST[shape.stream.dtype]

    def _row_words_max(self, stream: Stream) -> int:
        return stream.heads * stream.head_dim + ROW_EXTRA_WORDS

    def _put_rows(self, numbers_iHPTD: Numbers, layout: Layout, level: int, writer: rans.Writer) -> int:
        kernel = cachegen_kernels.encoder(elements.number_shift(layout.shape.stream.dtype))
        cursor = kernel(numbers_iHPTD, *self._how(layout, level), writer.states, writer.words)
        if cursor == FAILED:
            raise Unencodable("infinite, not a number, or too close to the dtype's largest number")
        return int(cursor)

    def _get_rows_untrusted(
        self, numbers_iHPTD: Numbers, layout: Layout, level: int, states: Numbers, words: Numbers, end: int
    ) -> int:
        kernel = cachegen_kernels.decoder(elements.number_shift(layout.shape.stream.dtype))
        cursor = kernel(numbers_iHPTD, *self._how(layout, level), states, words, end)
        if cursor == FAILED:
            raise FrameError("payload")
        return int(cursor)

    def _how(self, layout: Layout, level: int) -> tuple[Any, ...]:
        """A kernel's arguments between the numbers and the stream."""
        largest = int(np.float32(elements.LARGEST[layout.shape.stream.dtype]).view(np.uint32)) >> SCALE_SHIFT
        return layout.shape.layers[0], layout.first, largest, self._model.scales, self._model.levels[level]
