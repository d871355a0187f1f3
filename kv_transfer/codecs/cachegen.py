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

SmolLM2-135M, bfloat16, prefixes of 768 tokens and 256 scored, calibrated with 4 windows of each kind, text of the same
kinds but other places; the whole payload (raw tokens are .083 of the bits); one core, atoms of 30 layers x 256 tokens:

    level   bins K/V   bits pydoc / source / notes   KL                       encode, decode MB/s of raw KV
    255     255/128    5.87    5.89    5.88          .0001 / .0001 / .0001    690    500
    112     112/44     4.47    4.49    4.48          .0005 / .0006 / .0007    700    500
    64      64/24      3.59    3.61    3.60          .0019 / .0020 / .0024    700    530
    40      40/18      3.03    3.04    3.03          .0040 / .0054 / .0057    700    530
    32      32/16      2.77    2.79    2.78          .0062 / .0081 / .0091    700    530
    28      28/14      2.57    2.59    2.58          .0086 / .0111 / .0139    710    530
    24      24/12      2.33    2.35    2.34          .0180 / .0153 / .0191    700    530
    16      16/8       1.72    1.74    1.73          .0480 / .0473 / .0542    700    530

Tables take 331 KB of a profile, 6 s to calibrate, 20 ms to load.

Legend: L layers, H kv heads, P parts, T tokens, R raw tokens, D head dim, X bytes of D numbers.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from engine.base.errors import FrameError
from engine.kv.arena import Bytes
from engine.kv.schema import Stream
from kv_transfer.calibration import Calibration
from kv_transfer.codecs import (
    Atom,
    AtomShape,
    Payload,
    Unencodable,
    cachegen_kernels,
    cachegen_tables,
    codecs,
    elements,
    rans,
)
from kv_transfer.codecs.cachegen_kernels import FAILED, ROW_EXTRA_WORDS, SCALE_SHIFT
from kv_transfer.codecs.cachegen_tables import BINS, RAW_TOKENS
from kv_transfer.profile import Tables

Stored = npt.NDArray[Any]  # uint16 that holds bfloat16, or uint32 that holds float32

_SCALE_ROUNDING: Final = 1 + 2.0**-4  # a scale code has four bits of mantissa
_NUMBER_ROUNDING: Final = 2.0**-8  # of bfloat16, the coarsest dtype
_SMALLEST: Final = {"bfloat16": 2.0**-119, "float16": 2.0**-24, "float32": 2.0**-119}


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
        return self.shape.LHPTX[1] * self.shape.stream.head_dim + ROW_EXTRA_WORDS

    @property
    def words_max(self) -> int:
        layers, _, parts, tokens, _ = self.shape.LHPTX
        return layers * parts * (tokens - self.first) * self.row_words_max


@codecs.register("cachegen")
class CacheGen:
    """Per-token quantisation and static entropy coding. A level is the number of bins for K."""

    paper: ClassVar[str] = "CacheGen: KV Cache Compression and Streaming for Fast LLM Serving (arXiv 2310.07240)"
    loses: ClassVar[str] = "half a step of the largest number of a token's K or V in a layer; magnitudes below 1.5e-36"
    needs: ClassVar[tuple[str, ...]] = ()
    composes_with: ClassVar[str] = "every retention method that keeps all heads of a token"
    lossless: ClassVar[bool] = False
    profiled: ClassVar[bool] = True
    dtypes: ClassVar[frozenset[str]] = elements.DTYPES
    levels: ClassVar[tuple[int, ...]] = tuple(BINS)
    token_multiple: ClassVar[int] = 1
    block_local: ClassVar[bool] = True
    cuts_layers: ClassVar[bool] = True
    cuts_heads: ClassVar[bool] = False

    def __init__(self, tables: Tables, stream: Stream) -> None:
        self._model = cachegen_tables.expand(tables, stream)

    @staticmethod
    def calibrate(calibration: Calibration) -> Tables:
        return cachegen_tables.calibrate(calibration)

    def encode(self, atom: Atom, level: int) -> Payload:
        shape = atom.shape
        if not _has_all_heads(shape):
            raise Unencodable("some heads only: scales are over all of them")
        layout = Layout(shape)
        raw_LHPRX = atom.bytes_LHPTX[:, :, :, : layout.first]
        if not _finite(raw_LHPRX, shape.stream.dtype):
            raise Unencodable("infinite or not a number")
        writer = rans.Writer(layout.words_max, layout.raw_bytes)
        kernel = cachegen_kernels.encoder(_shift(shape.stream.dtype))
        numbers = _stored(atom.bytes_LHPTX, shape.stream.dtype)
        cursor = kernel(numbers, *self._how(layout, level), writer.states, writer.words)
        if cursor == FAILED:
            raise Unencodable("infinite, not a number, or too close to the dtype's largest number")
        payload = writer.seal(int(cursor))
        payload[: layout.raw_bytes].reshape(layout.raw_LHPRX)[...] = raw_LHPRX
        return payload.data

    def decode_untrusted(self, payload: memoryview, shape: AtomShape, level: int) -> Bytes:
        if not _has_all_heads(shape):
            raise FrameError("range")
        layout, dtype = Layout(shape), shape.stream.dtype
        if not layout.raw_bytes <= len(payload) <= self.payload_bytes_max(shape):
            raise FrameError("length")
        raw_LHPRX = np.frombuffer(payload[: layout.raw_bytes], np.uint8).reshape(layout.raw_LHPRX)
        if not _finite(raw_LHPRX, dtype):
            raise FrameError("payload")
        bytes_LHPTX = self._decode_stream_untrusted(payload[layout.raw_bytes :], layout, level)
        bytes_LHPTX[:, :, :, : layout.first] = raw_LHPRX
        return bytes_LHPTX

    def payload_bytes_max(self, shape: AtomShape) -> int:
        layout = Layout(shape)
        return layout.raw_bytes + rans.stream_bytes_max(layout.words_max)

    def error_bound(self, shape: AtomShape, level: int, largest: float) -> float:
        half_step = 0.5 / min(cachegen_tables.limits(level))
        return largest * _SCALE_ROUNDING * (half_step * 1.0001 + _NUMBER_ROUNDING) + _SMALLEST[shape.stream.dtype]

    def _decode_stream_untrusted(self, stream: memoryview, layout: Layout, level: int) -> Bytes:
        """Bytes of all tokens; zeros before `layout.first`."""
        states, words, end = rans.open_untrusted(stream, layout.row_words_max)
        dtype = layout.shape.stream.dtype
        numbers_LHPTD = np.zeros(
            (*layout.shape.LHPTX[:4], layout.shape.stream.head_dim), np.uint16 if _shift(dtype) else np.uint32
        )
        kernel = cachegen_kernels.decoder(_shift(dtype))
        cursor = kernel(numbers_LHPTD, *self._how(layout, level), states, words, end)
        if cursor == FAILED or not rans.finished(states, int(cursor), end):
            raise FrameError("payload")
        return _bytes(numbers_LHPTD, dtype)

    def _how(self, layout: Layout, level: int) -> tuple[Any, ...]:
        """A kernel's arguments between the numbers and the stream."""
        largest = int(np.float32(elements.LARGEST[layout.shape.stream.dtype]).view(np.uint32)) >> SCALE_SHIFT
        return layout.shape.layers[0], layout.first, largest, self._model.scales, self._model.levels[level]


def _has_all_heads(shape: AtomShape) -> bool:
    return shape.heads == (0, shape.stream.heads)


def _finite(bytes_X: Bytes, dtype: str) -> bool:
    return bool(np.isfinite(elements.to_float32(np.ascontiguousarray(bytes_X), dtype)).all())


def _shift(dtype: str) -> int:
    """How many bits of a float32 are not stored. A float16 is widened before and narrowed after."""
    return 16 if dtype == "bfloat16" else 0


# -- views: always of one type, because numba compiles a kernel for each type that it sees -----------------------------
def _stored(bytes_LHPTX: Bytes, dtype: str) -> Stored:
    if dtype == "bfloat16":
        return _read_only(np.require(bytes_LHPTX.view(np.uint16), requirements="A"))
    return _read_only(elements.to_float32(np.require(bytes_LHPTX, requirements="C"), dtype).view(np.uint32))


def _bytes(numbers_LHPTD: Stored, dtype: str) -> Bytes:
    if dtype == "bfloat16":
        return numbers_LHPTD.view(np.uint8)
    return elements.from_float32(numbers_LHPTD.view(np.float32), dtype)


def _read_only(array: Stored) -> Stored:
    view = array.view()
    view.flags.writeable = False
    return view
