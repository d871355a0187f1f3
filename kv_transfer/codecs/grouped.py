"""Grouped quantisation, shared by `int8`, `int4` and `int3`: sizes, layout and limits. `grouped_kernels` has the loops.

Axes as in KIVI (Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv 2402.02750): keys
share a grid per channel over 64 tokens, because a few channels of a key are always large; values, and streams that are
not keys and values, share one per token and head. Groups are counted from the atom's first token.

A grid lies between the smallest and the largest of its numbers (asymmetric). Both are among the numbers, so in the
stream's dtype they are exact, and they are all that travels: 32 bits for 64 bfloat16 numbers. Mean KL of a prototype,
measured once to choose among grids (SmolLM2-135M, 9 prefixes of 512 tokens); what the codecs cost is in METHODS.md:

    bits                  asymmetric   symmetric   95 % of the range   range of least squares
    4, first 4 raw        .0040        .0165       .0058               .0053
    4                     .0068
    3, first 4 raw        .0215        .1159       .0193               .0289
    3                     .0371
    8                     .00002       .00010

    payload    raw tokens | bounds of K | bounds of V | codes of K | codes of V       each C-contiguous
    bounds     [layers * heads, groups, 2, channels or 1], in the stream's dtype
    codes      [layers * heads, rows, channels] bytes: see `grouped_kernels`

Nothing is larger than its group's largest number afterwards, so whatever a payload says decodes to finite numbers if
its bounds and raw tokens are. Numbers from 2^126 on are `Unencodable`, so that no difference overflows.

Legend: L layers, H kv heads, N = L * H planes, P parts, T tokens, D head dim, X bytes of D numbers; G groups, B = 2
bounds, W grids of a group (D or 1), R rows of packed codes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from engine.base.errors import FrameError
from engine.base.jit import Kernel
from engine.kv.arena import Bytes
from kv_transfer.codecs import Atom, AtomShape, Payload, Unencodable, elements, grouped_kernels
from kv_transfer.codecs.grouped_kernels import GROUP_TOKENS, SMALLEST_STEP, Codes

SINK_TOKENS: Final = 4
"""Positions at the start of a sequence that queries attend to whatever they hold: attention sinks."""

_BOUNDS: Final = 2
_LIMIT_BITS: Final = {"bfloat16": 0x7E80, "float16": 0x7C00, "float32": 0x7E80_0000}  # 2^126, or infinity if smaller
_ROUNDING: Final = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}  # half a unit in the last place
_SMALLEST: Final = {"bfloat16": 2.0**-133, "float16": 2.0**-24, "float32": 2.0**-149}


@dataclass(frozen=True, slots=True)
class Panel:
    """One part of an atom, all of whose numbers are grouped alike."""

    part: int
    per_channel: bool
    bounds_NGBW: tuple[int, int, int, int]
    packed_NRD: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Layout:
    """How an atom lies in its payload. A function of its shape alone, so both ends agree."""

    shape: AtomShape
    bits: int
    first: int  # tokens before this one are raw

    @property
    def raw_NPSX(self) -> tuple[int, int, int, int]:
        layers, heads, parts, _, head_bytes = self.shape.LHPTX
        return layers * heads, parts, self.first, head_bytes

    @property
    def numbers_NPTD(self) -> tuple[int, int, int, int]:
        planes, parts, _, _ = self.raw_NPSX
        return planes, parts, self.shape.LHPTX[3], self.shape.stream.head_dim

    @property
    def panels(self) -> list[Panel]:
        stream = self.shape.stream
        keys = stream.role == "kv" and stream.parts == 2
        return [self._panel(part, per_channel=keys and part == 0) for part in range(stream.parts)]

    @property
    def payload_bytes(self) -> int:
        return self.numbers_bytes + sum(math.prod(panel.packed_NRD) for panel in self.panels)

    @property
    def numbers_bytes(self) -> int:
        """Of the payload's first part, all of which are numbers of the stream's dtype."""
        bounds = sum(math.prod(panel.bounds_NGBW) for panel in self.panels)
        return math.prod(self.raw_NPSX) + bounds * self.shape.stream.item_bytes

    def cut(self, payload_X: Bytes) -> tuple[Bytes, list[Bytes], list[Codes]]:
        """Views of the raw tokens, the bounds [..., bytes] of each panel, and the codes of each panel."""
        item_bytes, panels = self.shape.stream.item_bytes, self.panels
        bounds = [(*panel.bounds_NGBW[:-1], panel.bounds_NGBW[-1] * item_bytes) for panel in panels]
        raw, *rest = _cut(payload_X, [self.raw_NPSX, *bounds, *(panel.packed_NRD for panel in panels)])
        return raw, rest[: len(panels)], rest[len(panels) :]

    def _panel(self, part: int, *, per_channel: bool) -> Panel:
        layers, heads, _, tokens, _ = self.shape.LHPTX
        head_dim, coded = self.shape.stream.head_dim, tokens - self.first
        groups, grids = (-(-tokens // GROUP_TOKENS) if coded else 0, head_dim) if per_channel else (coded, 1)
        planes, rows = layers * heads, -(-self.bits * coded // 8)
        return Panel(part, per_channel, (planes, groups, _BOUNDS, grids), (planes, rows, head_dim))


class Grouped:
    """A codec of `bits` bits per number. The first `raw_tokens` positions of a sequence stay as they are."""

    bits: ClassVar[int]
    raw_tokens: ClassVar[int]

    paper: ClassVar[str] = "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (arXiv 2402.02750)"
    needs: ClassVar[tuple[str, ...]] = ()
    composes_with: ClassVar[str] = "every retention method: atoms may have any token range"
    lossless: ClassVar[bool] = False
    profiled: ClassVar[bool] = False
    dtypes: ClassVar[frozenset[str]] = elements.DTYPES
    levels: ClassVar[tuple[int, ...]] = (0,)
    token_multiple: ClassVar[int] = GROUP_TOKENS
    block_local: ClassVar[bool] = True
    cuts_layers: ClassVar[bool] = True
    cuts_heads: ClassVar[bool] = True

    def encode(self, atom: Atom, level: int) -> Payload:
        layout, dtype = self._layout(atom.shape), atom.shape.stream.dtype
        payload_X = np.empty(layout.payload_bytes, np.uint8)
        raw_NPSX, bounds, codes = layout.cut(payload_X)
        raw_NPSX[...] = _planes(atom.bytes_LHPTX)[:, :, : layout.first]
        numbers_NPTD = elements.to_numbers(_planes(atom.bytes_LHPTX), dtype)
        for panel, bounds_X, packed_NRD in zip(layout.panels, bounds, codes, strict=True):
            encode = _encoder(panel, dtype)
            bounds_NGBW = np.empty(panel.bounds_NGBW, np.float32)
            encode(numbers_NPTD, panel.part, layout.first, self.bits, bounds_NGBW, packed_NRD)
            bounds_X[...] = elements.from_float32(bounds_NGBW, dtype)  # exact: they are two of the numbers
        if not _within_limit(payload_X[: layout.numbers_bytes], dtype):
            raise Unencodable("infinite, not a number, or 2^126 and more")
        return payload_X.data

    def decode_untrusted(self, payload: memoryview, shape: AtomShape, level: int) -> Bytes:
        layout, dtype = self._layout(shape), shape.stream.dtype
        if len(payload) != layout.payload_bytes:
            raise FrameError("length")
        payload_X = np.frombuffer(payload.toreadonly(), np.uint8)  # kernels are compiled for what is read-only
        if not _within_limit(payload_X[: layout.numbers_bytes], dtype):
            raise FrameError("payload")
        raw_NPSX, bounds, codes = layout.cut(payload_X)
        numbers_NPTD = elements.zero_numbers(layout.numbers_NPTD, dtype)
        for panel, bounds_X, packed_NRD in zip(layout.panels, bounds, codes, strict=True):
            decode = _decoder(panel, dtype)
            bounds_NGBW = elements.to_float32(np.ascontiguousarray(bounds_X), dtype)
            decode(bounds_NGBW, packed_NRD, panel.part, layout.first, self.bits, numbers_NPTD)
        bytes_NPTX = elements.from_numbers(numbers_NPTD, dtype)
        bytes_NPTX[:, :, : layout.first] = raw_NPSX
        return bytes_NPTX.reshape(shape.LHPTX)

    def payload_bytes_max(self, shape: AtomShape) -> int:
        return self._layout(shape).payload_bytes

    def error_bound(self, shape: AtomShape, level: int, largest: float) -> float:
        """Half a step of a grid from -largest to largest, and the rounding of the result, each a little more than
        exact arithmetic has. A grid whose step would vanish is one number wide."""
        dtype, steps = shape.stream.dtype, (1 << self.bits) - 1
        return 1.001 * largest * (1 / steps + _ROUNDING[dtype]) + steps * float(SMALLEST_STEP) + _SMALLEST[dtype]

    def _layout(self, shape: AtomShape) -> Layout:
        start, end = shape.tokens
        return Layout(shape, self.bits, min(max(self.raw_tokens - start, 0), end - start))


def _encoder(panel: Panel, dtype: str) -> Kernel:
    make = grouped_kernels.channel_encoder if panel.per_channel else grouped_kernels.token_encoder
    return make(elements.number_shift(dtype))


def _decoder(panel: Panel, dtype: str) -> Kernel:
    make = grouped_kernels.channel_decoder if panel.per_channel else grouped_kernels.token_decoder
    return make(elements.number_shift(dtype))


def _planes(bytes_LHPTX: Bytes) -> Bytes:
    layers, heads, *rest = bytes_LHPTX.shape
    return bytes_LHPTX.reshape(layers * heads, *rest)


def _cut(payload_X: Bytes, shapes: Sequence[tuple[int, ...]]) -> list[Bytes]:
    """Consecutive pieces of these shapes."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    return [piece.reshape(shape) for piece, shape in zip(np.split(payload_X, ends[:-1]), shapes, strict=True)]


def _within_limit(bytes_X: Bytes, dtype: str) -> bool:
    return bool(elements.magnitude_bits(bytes_X, dtype).max(initial=0) < _LIMIT_BITS[dtype])
