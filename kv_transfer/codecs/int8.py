"""Int8: every number as one signed byte times a shared scale: 8.25 bits per number for a head dim of 64.

Axes as in KIVI (Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv 2402.02750), but
symmetric and with eight bits: keys share a scale per channel over 64 tokens, because a few channels of a key are
always large; values, and streams that are not keys and values, share one per token and head. Measured on Gaussian keys
(head dim 64, 1,024 tokens), error of a Gaussian query's logits, one scale per token against one per channel: 0.0060 /
0.0060; with two channels 10 times larger 0.028 / 0.010; 30 times larger 0.081 / 0.026. No token stays raw as in codecs
of fewer bits: a sink's scale is its own in V, and a sink key four times larger than its 64 neighbours costs those two
bits of eight.

Loses up to half a step per number. A scale is a bfloat16, rounded up: the range of float32, so that it neither
overflows nor vanishes where float16 would, and no number is ever clipped. Rows of zeros stay zeros; what is below
1.5e-36 becomes zero. Infinities, NaN and numbers within about 1 % of the dtype's largest are `Unencodable`.

    payload    panel | panel | ...      panel: scales (bfloat16), then codes (int8), each C-contiguous
    panels     keys and values:  K, whole groups of 64 tokens | K, the remaining tokens | V
               other streams:    everything

Legend: L layers, H kv heads, P parts, T tokens, D head dim, X bytes of D numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from engine.base.errors import FrameError
from engine.kv.arena import Bytes, Range
from kv_transfer.codecs import Atom, AtomShape, Payload, Unencodable, codecs, elements

GROUP_TOKENS = 64  # part of the wire format, hence no setting: another size is another codec id
CODE_MAX = 127
SCALE_BYTES = 2
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # below, a scale's inverse may not be finite

Codes = npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Panel:
    """Numbers that are quantised alike: some parts, some tokens, seen as `numbers`, sharing scales along `axis`."""

    parts: slice
    tokens: Range
    numbers: tuple[int, ...]  # dimensions; the last is D
    axis: int

    @property
    def scales(self) -> tuple[int, ...]:
        dimensions = list(self.numbers)
        dimensions[self.axis] = 1
        return tuple(dimensions)

    @property
    def scale_bytes(self) -> int:
        return SCALE_BYTES * int(np.prod(self.scales))

    @property
    def payload_bytes(self) -> int:
        return self.scale_bytes + int(np.prod(self.numbers))

    def cut(self, bytes_LHPTX: Bytes) -> Bytes:
        """This panel's bytes, a view of the atom's."""
        bytes_LHPTX = bytes_LHPTX[:, :, self.parts, slice(*self.tokens)]
        return bytes_LHPTX.reshape(*self.numbers[:-1], bytes_LHPTX.shape[-1], copy=False)


@codecs.register("int8")
class Int8:
    """Symmetric eight-bit quantisation: K per channel over 64 tokens, V per token and head."""

    paper: ClassVar[str] = "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (arXiv 2402.02750): its axes"
    loses: ClassVar[str] = "half a step of 1/127 of the largest number that shares a scale; magnitudes below 1.5e-36"
    needs: ClassVar[tuple[str, ...]] = ()
    composes_with: ClassVar[str] = "every retention method: atoms may have any token range"
    lossless: ClassVar[bool] = False
    error_of_max: ClassVar[float] = 0.006  # half a step 0.5/127, scale rounded up 2^-7, result rounded to bf16 2^-9
    dtypes: ClassVar[frozenset[str]] = elements.DTYPES
    levels: ClassVar[tuple[int, ...]] = (0,)
    token_multiple: ClassVar[int] = GROUP_TOKENS
    block_local: ClassVar[bool] = True

    def encode(self, atom: Atom, level: int) -> Payload:
        payload = np.empty(self.payload_bytes_max(atom.shape), np.uint8)
        start = 0
        for panel in panels(atom.shape):
            written = payload[start : start + panel.payload_bytes]
            _encode_panel(panel, panel.cut(atom.bytes_LHPTX), atom.shape.stream.dtype, written)
            start += panel.payload_bytes
        return payload.data

    def decode_untrusted(self, payload: memoryview, shape: AtomShape, level: int) -> Bytes:
        if len(payload) != self.payload_bytes_max(shape):
            raise FrameError("length")
        bytes_LHPTX = np.empty(shape.LHPTX, np.uint8)
        start = 0
        for panel in panels(shape):
            received = payload[start : start + panel.payload_bytes]
            panel.cut(bytes_LHPTX)[...] = _decode_panel_untrusted(panel, received, shape.stream.dtype)
            start += panel.payload_bytes
        return bytes_LHPTX

    def payload_bytes_max(self, shape: AtomShape) -> int:
        return sum(panel.payload_bytes for panel in panels(shape))


def panels(shape: AtomShape) -> Iterator[Panel]:
    """How an atom is laid out in its payload. A function of its shape alone, so both ends agree."""
    layers, heads, parts, tokens, _ = shape.LHPTX
    head_dim = shape.stream.head_dim
    if shape.stream.role != "kv" or parts != 2:
        yield Panel(slice(parts), (0, tokens), (layers, heads, parts, tokens, head_dim), axis=-1)
        return
    key, value = slice(0, 1), slice(1, 2)
    groups, rest = divmod(tokens, GROUP_TOKENS)
    if groups:
        yield Panel(key, (0, tokens - rest), (layers, heads, groups, GROUP_TOKENS, head_dim), axis=-2)
    if rest:
        yield Panel(key, (tokens - rest, tokens), (layers, heads, 1, rest, head_dim), axis=-2)
    yield Panel(value, (0, tokens), (layers, heads, 1, tokens, head_dim), axis=-1)


def _encode_panel(panel: Panel, bytes_X: Bytes, dtype: str, out: Bytes) -> None:
    largest = elements.magnitude_bits(bytes_X, dtype).max(panel.axis, keepdims=True, initial=0)
    try:
        scale_bits = elements.bfloat16_at_least(elements.magnitudes(largest, dtype) / np.float32(CODE_MAX))
    except ValueError as error:
        raise Unencodable(str(error)) from error
    if scale_bits.size and scale_bits.max() > _largest_scale_bits(dtype):
        raise Unencodable("too close to the dtype's largest number")
    scales = elements.bfloat16_to_float32(scale_bits)
    scales_inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales >= SMALLEST_SCALE)
    codes_D = elements.to_float32(bytes_X, dtype) * scales_inverse
    np.rint(codes_D, out=codes_D)
    out[: panel.scale_bytes] = scale_bits.reshape(-1).view(np.uint8)
    np.copyto(out[panel.scale_bytes :].view(np.int8).reshape(panel.numbers), codes_D, casting="unsafe")


def _decode_panel_untrusted(panel: Panel, payload: memoryview, dtype: str) -> Bytes:
    """Bytes of the panel's numbers. Whatever the payload says, they are finite."""
    scale_bits = np.frombuffer(payload[: panel.scale_bytes], "<u2").reshape(panel.scales)
    if scale_bits.size and scale_bits.max() > _largest_scale_bits(dtype):  # also true of NaN, infinity, a minus sign
        raise FrameError("payload")
    codes_D: Codes = np.frombuffer(payload[panel.scale_bytes :], np.int8).reshape(panel.numbers)
    values_D = np.multiply(codes_D, elements.bfloat16_to_float32(scale_bits), dtype=np.float32)
    return elements.from_float32(values_D, dtype)


def _largest_scale_bits(dtype: str) -> int:
    """128 (any code's magnitude) times this bfloat16 is still finite in the stream's dtype."""
    return int(np.float32(elements.LARGEST[dtype] / 128).view(np.uint32)) >> 16
