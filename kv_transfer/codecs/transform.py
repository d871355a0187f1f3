"""Transform: keys un-rotated, mapped to where an error costs what its length is, cut by one step, entropy coded.

Transform coding as for images, with the distortion measured in nats. The class is KVTC's (Staniszewski and Lancucki,
"KV Cache Transform Coding for Compact Storage in LLM Inference", arXiv 2511.01815): decorrelate, allot bits, entropy
code. Where this differs from the paper:

- *What an error costs is measured* (Fisher information, `transform_tables`), and is part of the basis. A prototype with
  a PCA basis in its place, two kinds of text to calibrate and two to judge by, took about .5 bits more at the same KL.
- *Steps follow tokens*: how much a token matters is predicted from its key and its norms, and sent as its row's
  fineness. Without, the prototype took about .6 bits more.
- *A basis for each layer, K and V, over all heads*; theirs is over layers too, so an atom of theirs needs all layers.
- *rANS with static tables* by how many steps a coefficient usually spans, in place of DEFLATE. Contexts (the tokens
  before, the coefficients before, both) were worth .01 to .02 bits on unseen text, and were left out.
- *The first 4 positions of a sequence are raw*, as theirs are; the last 128 are not.

    payload    raw tokens | rANS stream (`rans`): per panel, layer, part and token: fineness, then coefficients

A level is a step; each is a quarter of an octave coarser than the one before. What a level costs for a model is
measured and in its profile: METHODS.md.

Numbers are rounded to nearest and restored where they were rounded to. A dead zone saves bits but biases every error
towards the mean, and such errors add up over tokens: with one of .58 steps the prototype saved .1 bits and doubled KL.

Legend: i layers of the atom, L of the model, H kv heads, P parts, T tokens, D head dim, C = H * D channels.
"""

from typing import ClassVar, Final

import numpy as np

from engine.base.errors import FrameError
from engine.kv.schema import Stream
from kv_transfer.calibration import Calibration, Floats
from kv_transfer.codecs import AtomShape, Unencodable, codecs, elements, rans, transform_kernels, transform_tables
from kv_transfer.codecs.elements import Numbers
from kv_transfer.codecs.row_coded import Layout, RowCoded
from kv_transfer.codecs.transform_kernels import ERROR_MAX_STEPS, FAILED, FINENESS_MAX, Rotation
from kv_transfer.codecs.transform_tables import LARGEST, LEVELS
from kv_transfer.profile import Tables

PANEL_TOKENS: Final = 128
"""Rows are multiplied so many at a time, padded: what comes out does not depend on how atoms are cut (BLAS sums in
another order for another shape), nor how much memory it takes on how large they are."""

_WORDS_OF_NUMBER: Final = 2  # at most: an escape and the number itself
_LARGEST_BITS: Final = int(np.float32(LARGEST).view(np.uint32))  # a float32's magnitudes are ordered like their bits
_ROUNDING: Final = 2.0**-7  # of stored numbers and of products in float32


@codecs.register("transform")
class Transform(RowCoded):
    """Calibrated transform coding of K and V by what their errors cost."""

    paper: ClassVar[str] = (
        "KV Cache Transform Coding for Compact Storage in LLM Inference (arXiv 2511.01815): its class"
    )
    loses: ClassVar[str] = "half a step, in a basis where equal errors cost the model the same; a level is a step"
    profiled: ClassVar[bool] = True
    levels: ClassVar[tuple[int, ...]] = LEVELS

    def __init__(self, tables: Tables, stream: Stream) -> None:
        self._model = transform_tables.expand(tables, stream)

    @staticmethod
    def calibrate(calibration: Calibration) -> Tables:
        return transform_tables.calibrate(calibration)

    def error_bound(self, shape: AtomShape, level: int, largest: float) -> float:
        """Not relative to what is sent, but to the level's step; of the coarsest row."""
        step = float(self._model.codings[level].step) * 2 ** (FINENESS_MAX / 2)
        return self._model.gain * ERROR_MAX_STEPS * step + _ROUNDING * largest

    def _row_words_max(self, stream: Stream) -> int:
        return 1 + _WORDS_OF_NUMBER * stream.heads * stream.head_dim

    def _put_rows(self, numbers_iHPTD: Numbers, layout: Layout, level: int, writer: rans.Writer) -> int:
        shape, model, coding, cursor = layout.shape, self._model, self._model.codings[level], layout.words_max
        opened, put = transform_kernels.opener(elements.number_shift(shape.stream.dtype)), transform_kernels.encoder()
        rows_PTC, energy_PTH = _panel(shape), np.ones((shape.stream.parts, PANEL_TOKENS, shape.stream.heads), "f4")
        for start, tokens in reversed(_panels(layout)):
            rotations = self._rotations(shape, start, tokens)
            for layer in reversed(range(*shape.layers)):
                rotation, mean_PC = rotations[model.group_L[layer]], model.mean_LPC[layer]
                where = layer - shape.layers[0], start, tokens
                if opened(numbers_iHPTD, *where, rotation, mean_PC, rows_PTC, energy_PTH) > _LARGEST_BITS:
                    raise Unencodable("infinite, not a number, or too large")
                fineness_PT = model.fineness(rows_PTC, energy_PTH, layer)
                coefficients_PTC = rows_PTC @ model.basis_LPCC[layer]
                stream = writer.states, writer.words, np.uint64(cursor)
                cursor = put(coefficients_PTC, fineness_PT, tokens, layer, coding, *stream)
                if cursor == FAILED:
                    raise Unencodable("a coefficient of too many steps")
        return int(cursor)

    def _get_rows_untrusted(
        self, numbers_iHPTD: Numbers, layout: Layout, level: int, states: Numbers, words: Numbers, end: int
    ) -> int:
        shape, model, coding, cursor = layout.shape, self._model, self._model.codings[level], 0
        get, closed = transform_kernels.decoder(), transform_kernels.closer(elements.number_shift(shape.stream.dtype))
        largest = np.float32(min(elements.LARGEST[shape.stream.dtype], LARGEST))
        coefficients_PTC = _panel(shape)
        for start, tokens in _panels(layout):
            rotations = self._rotations(shape, start, tokens)
            for layer in range(*shape.layers):
                cursor = get(coefficients_PTC, tokens, layer, coding, states, words, np.uint64(cursor), end)
                if cursor == FAILED:
                    raise FrameError("payload")
                rows_PTC = coefficients_PTC @ model.inverse_LPCC[layer]
                rotation, mean_PC = rotations[model.group_L[layer]], model.mean_LPC[layer]
                where = layer - shape.layers[0], start, tokens
                closed(rows_PTC, rotation, mean_PC, largest, numbers_iHPTD, *where)
        return int(cursor)

    def _rotations(self, shape: AtomShape, start: int, tokens: int) -> list[Rotation]:
        first = shape.tokens[0] + start
        return self._model.rotations((first, first + tokens))


def _panels(layout: Layout) -> list[tuple[int, int]]:
    """(first token, tokens) of each, counted from the atom's start."""
    end = layout.shape.LHPTX[3]
    return [(start, min(PANEL_TOKENS, end - start)) for start in range(layout.first, end, PANEL_TOKENS)]


def _panel(shape: AtomShape) -> Floats:
    """rows_PTC of zeros: rows behind the last token are multiplied as well."""
    return np.zeros((shape.stream.parts, PANEL_TOKENS, shape.stream.heads * shape.stream.head_dim), np.float32)
