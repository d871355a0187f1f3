"""Transform: keys un-rotated, mapped to where an error costs what its length is, cut by one step, entropy coded.

Transform coding as for images, with the distortion measured in nats. The class is KVTC's (Staniszewski and Lancucki,
"KV Cache Transform Coding for Compact Storage in LLM Inference", arXiv 2511.01815): decorrelate, allot bits, entropy
code. Where this differs from the paper:

- *What an error costs is measured* (Fisher information, `transform_tables`), and is part of the basis: PCA alone, with
  the same step for K and V of all layers, takes .6 bits per element more at the same KL.
- *Steps follow tokens*: how much a token matters is predicted from its key and its norms, and sent as its row's
  fineness. Without: .7 bits more.
- *A basis for each layer, K and V, over all heads*; theirs is over layers too, so an atom of theirs needs all layers.
- *rANS with static tables* by how many steps a coefficient usually spans, in place of DEFLATE. Contexts (the tokens
  before, the coefficients before, both) were worth .01 to .02 bits on unseen text, and were left out.
- *The first 4 positions of a sequence are raw*, as theirs are; the last 128 are not.

    payload    raw tokens | rANS stream (`rans`): per panel, layer, part and token: fineness, then coefficients

A level is a step; each is a quarter of an octave coarser than the one before. What a level costs for a model is
measured and in its profile: METHODS.md.

Numbers are rounded to nearest and restored where they were rounded to. A dead zone saves bits but biases every error
towards the mean, and such errors add up over tokens: with one of .58 steps KL was twice as large for .1 bits.

Legend: i layers of the atom, L of the model, H kv heads, P parts, T tokens, R raw tokens, D head dim, C = H * D
channels, X bytes of D numbers.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from engine.base.errors import FrameError
from engine.kv.arena import Bytes
from engine.kv.schema import Stream
from kv_transfer.calibration import Calibration, Floats
from kv_transfer.codecs import (
    Atom,
    AtomShape,
    Payload,
    Unencodable,
    codecs,
    elements,
    rans,
    transform_kernels,
    transform_tables,
)
from kv_transfer.codecs.transform_kernels import ERROR_MAX_STEPS, FAILED, FINENESS_MAX, Coding, Rotation
from kv_transfer.codecs.transform_tables import LEVELS, RAW_TOKENS
from kv_transfer.profile import Tables

PANEL_TOKENS: Final = 128
"""Rows are multiplied so many at a time, padded: what comes out does not depend on how atoms are cut (BLAS sums in
another order for another shape), nor how much memory it takes on how large they are."""

_WORDS_OF_NUMBER: Final = 2  # at most: an escape and the number itself
_FAR: Final = 2.0**60  # numbers beyond are refused: squares must be finite
_FAR_BITS: Final = int(np.float32(_FAR).view(np.uint32))  # a float32's magnitudes are ordered like their bits
_ROUNDING: Final = 2.0**-7  # of stored numbers and of products in float32


@dataclass(frozen=True, slots=True)
class Layout:
    """How an atom lies in its payload. A function of its shape alone, so both ends agree."""

    shape: AtomShape

    @property
    def first(self) -> int:
        """Of the atom's tokens, the first that is coded."""
        start, end = self.shape.tokens
        return min(max(RAW_TOKENS - start, 0), end - start)

    @property
    def raw_LHPRX(self) -> tuple[int, int, int, int, int]:
        layers, heads, parts, _, head_bytes = self.shape.LHPTX
        return layers, heads, parts, self.first, head_bytes

    @property
    def raw_bytes(self) -> int:
        return int(np.prod(self.raw_LHPRX))

    @property
    def row_words_max(self) -> int:
        return 1 + _WORDS_OF_NUMBER * self.shape.LHPTX[1] * self.shape.stream.head_dim

    @property
    def words_max(self) -> int:
        layers, _, parts, tokens, _ = self.shape.LHPTX
        return layers * parts * (tokens - self.first) * self.row_words_max

    @property
    def panels(self) -> list[slice]:
        """Tokens of the atom, counted from its start."""
        tokens = self.shape.LHPTX[3]
        starts = range(self.first, tokens, PANEL_TOKENS)
        return [slice(start, min(start + PANEL_TOKENS, tokens)) for start in starts]


@codecs.register("transform")
class Transform:
    """Calibrated transform coding of K and V by what their errors cost."""

    paper: ClassVar[str] = (
        "KV Cache Transform Coding for Compact Storage in LLM Inference (arXiv 2511.01815): its class"
    )
    loses: ClassVar[str] = "half a step, in a basis where equal errors cost the model the same; a level is a step"
    needs: ClassVar[tuple[str, ...]] = ()
    composes_with: ClassVar[str] = "every retention method that keeps all heads of a token"
    lossless: ClassVar[bool] = False
    profiled: ClassVar[bool] = True
    dtypes: ClassVar[frozenset[str]] = elements.DTYPES
    levels: ClassVar[tuple[int, ...]] = LEVELS
    token_multiple: ClassVar[int] = 1
    block_local: ClassVar[bool] = True
    cuts_layers: ClassVar[bool] = True
    cuts_heads: ClassVar[bool] = False

    def __init__(self, tables: Tables, stream: Stream) -> None:
        self._model = transform_tables.expand(tables, stream)

    @staticmethod
    def calibrate(calibration: Calibration) -> Tables:
        return transform_tables.calibrate(calibration)

    def encode(self, atom: Atom, level: int) -> Payload:
        shape, layout = atom.shape, Layout(atom.shape)
        if not _has_all_heads(shape):
            raise Unencodable("some heads only: the basis is over all of them")
        raw_LHPRX = atom.bytes_LHPTX[:, :, :, : layout.first]
        if not _tame(raw_LHPRX, shape.stream.dtype):
            raise Unencodable("infinite or not a number")
        writer = rans.Writer(layout.words_max, layout.raw_bytes)
        cursor = self._encode_panels(atom, layout, self._model.codings[level], writer)
        payload = writer.seal(int(cursor))
        payload[: layout.raw_bytes].reshape(layout.raw_LHPRX)[...] = raw_LHPRX
        return payload.data

    def decode_untrusted(self, payload: memoryview, shape: AtomShape, level: int) -> Bytes:
        if not _has_all_heads(shape):
            raise FrameError("range")
        layout = Layout(shape)
        if not layout.raw_bytes <= len(payload) <= self.payload_bytes_max(shape):
            raise FrameError("length")
        raw_LHPRX = np.frombuffer(payload[: layout.raw_bytes], np.uint8).reshape(layout.raw_LHPRX)
        if not _tame(raw_LHPRX, shape.stream.dtype):
            raise FrameError("payload")
        bytes_LHPTX = self._decode_panels_untrusted(payload[layout.raw_bytes :], layout, level)
        bytes_LHPTX[:, :, :, : layout.first] = raw_LHPRX
        return bytes_LHPTX

    def payload_bytes_max(self, shape: AtomShape) -> int:
        layout = Layout(shape)
        return layout.raw_bytes + rans.stream_bytes_max(layout.words_max)

    def error_bound(self, shape: AtomShape, level: int, largest: float) -> float:
        """Not relative to what is sent, but to the level's step; of the coarsest row."""
        step = float(self._model.codings[level].step) * 2 ** (FINENESS_MAX / 2)
        return self._model.gain * ERROR_MAX_STEPS * step + _ROUNDING * largest

    def _encode_panels(self, atom: Atom, layout: Layout, coding: Coding, writer: rans.Writer) -> int:
        """The cursor. Backwards, as rANS has it."""
        shape, model = atom.shape, self._model
        numbers_LHPTD = _stored(atom.bytes_LHPTX, shape.stream.dtype)
        opened, put = transform_kernels.opener(_shift(shape.stream.dtype)), transform_kernels.encoder()
        rows_PTC, energy_PTH = _panel(shape), np.ones((shape.stream.parts, PANEL_TOKENS, shape.stream.heads), "f4")
        cursor = layout.words_max
        for tokens in reversed(layout.panels):
            rotations = self._rotations(shape, tokens)
            for layer in reversed(range(*shape.layers)):
                numbers_HPTD = numbers_LHPTD[layer - shape.layers[0], :, :, tokens]
                rotation, mean_PC = rotations[model.group_L[layer]], model.mean_LPC[layer]
                largest = opened(numbers_HPTD, rotation, mean_PC, rows_PTC, energy_PTH)
                if largest > _FAR_BITS:
                    raise Unencodable("infinite, not a number, or too large")
                fineness_PT = model.fineness(rows_PTC, energy_PTH, layer)[:, : tokens.stop - tokens.start]
                coefficients_PTC = rows_PTC @ model.basis_LPCC[layer]
                stream = writer.states, writer.words, np.uint64(cursor)
                cursor = put(coefficients_PTC, fineness_PT, layer, coding, *stream)
                if cursor == FAILED:
                    raise Unencodable("a coefficient of too many steps")
        return int(cursor)

    def _decode_panels_untrusted(self, stream: memoryview, layout: Layout, level: int) -> Bytes:
        """Bytes of all tokens; those before `layout.first` are anything."""
        shape, model, dtype = layout.shape, self._model, layout.shape.stream.dtype
        states, words, end = rans.open_untrusted(stream, layout.row_words_max)
        numbers_LHPTD = np.empty((*shape.LHPTX[:4], shape.stream.head_dim), np.uint16 if _shift(dtype) else np.uint32)
        get, closed = transform_kernels.decoder(), transform_kernels.closer(_shift(dtype))
        largest = np.float32(min(elements.LARGEST[dtype], _FAR))
        coefficients_PTC, cursor, coding = _panel(shape), 0, model.codings[level]
        for tokens in layout.panels:
            rotations = self._rotations(shape, tokens)
            for layer in range(*shape.layers):
                count = tokens.stop - tokens.start
                cursor = get(coefficients_PTC, count, layer, coding, states, words, np.uint64(cursor), end)
                if cursor == FAILED:
                    raise FrameError("payload")
                rows_PTC = coefficients_PTC @ model.inverse_LPCC[layer]
                numbers_HPTD = numbers_LHPTD[layer - shape.layers[0], :, :, tokens]
                closed(rows_PTC, rotations[model.group_L[layer]], model.mean_LPC[layer], largest, numbers_HPTD)
        if not rans.finished(states, int(cursor), end):
            raise FrameError("payload")
        return _bytes(numbers_LHPTD, dtype)

    def _rotations(self, shape: AtomShape, tokens: slice) -> list[Rotation]:
        return self._model.rotations((shape.tokens[0] + tokens.start, shape.tokens[0] + tokens.stop))


def _panel(shape: AtomShape) -> Floats:
    """rows_PTC of zeros: rows behind the last token are multiplied as well."""
    return np.zeros((shape.stream.parts, PANEL_TOKENS, shape.stream.heads * shape.stream.head_dim), np.float32)


def _bytes(numbers_LHPTD: npt.NDArray[Any], dtype: str) -> Bytes:
    if dtype == "bfloat16":
        return numbers_LHPTD.view(np.uint8)
    return elements.from_float32(numbers_LHPTD.view(np.float32), dtype)


def _has_all_heads(shape: AtomShape) -> bool:
    return shape.heads == (0, shape.stream.heads)


def _tame(bytes_X: Bytes, dtype: str) -> bool:
    return bool(np.isfinite(elements.to_float32(np.ascontiguousarray(bytes_X), dtype)).all())


def _shift(dtype: str) -> int:
    """How many bits of a float32 are not stored. A float16 is widened before and narrowed after."""
    return 16 if dtype == "bfloat16" else 0


def _stored(bytes_LHPTX: Bytes, dtype: str) -> npt.NDArray[Any]:
    """Always of one type, because numba compiles a kernel for each type that it sees."""
    if dtype == "bfloat16":
        numbers = np.require(bytes_LHPTX.view(np.uint16), requirements="A").view()
    else:
        numbers = elements.to_float32(np.require(bytes_LHPTX, requirements="C"), dtype).view(np.uint32)
    numbers.flags.writeable = False
    return numbers
