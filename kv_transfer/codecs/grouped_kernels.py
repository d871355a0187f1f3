"""The loops of `grouped`: numbers <-> grids, codes and packed bits, one read and one write of memory each way.

A group's numbers become codes on a *grid*: number = base + code * step. Its *bounds*, the smallest and the largest of
the numbers, are what is stored; both ends compute base = smallest and step = (largest - smallest) / (2^bits - 1) from
them with the same float32 operations.

Packed bits: each channel has a bit stream of its own, code after code, lowest bit first, and byte r of all channels is
row r. Every inner loop then runs over channels, which are independent: these are the SIMD lanes. Rates of one core, per
loop (raw bf16): 10 to 30 GB/s.

    3 bits   row 0   222 111 000 -> 2 of code 2, code 1, code 0
             row 1   the third bit of code 2, codes 3 and 4, the first bit of code 5 ...

Nothing is checked here: callers compare sizes before, and bounds before or after.

Legend: N planes (a layer's head), P parts, T tokens, D channels of a head; G groups, B the two bounds of a grid, W
grids of a group (D, or 1 for all channels); R rows of packed codes.
"""

from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from engine.base.jit import Kernel, compiled, inlined

Stored = npt.NDArray[Any]  # uint16 that holds bfloat16, or uint32 that holds float32
Words = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

GROUP_TOKENS: Final = 64
"""Tokens that share a channel's grid: part of the wire format, hence no setting. As many codes wait unpacked, which is
a multiple of 8, so that every run of them is whole bytes, and 4 KiB, in L1."""
_MAGNITUDE: Final = 0x7FFF_FFFF
SMALLEST_STEP: Final = np.float32(np.finfo(np.float32).tiny)  # below, its inverse may not be finite
_HALF: Final = np.float32(0.5)


# -- numbers -----------------------------------------------------------------------------------------------------------
@inlined
def ordered(bits: Any, shift: int) -> Any:
    """A float's bits as an int32 that compares as the float does. Infinities are the last, NaN is beyond them."""
    word = np.uint32(np.uint32(bits) << shift).view(np.int32)
    return np.int32(word ^ ((word >> 31) & _MAGNITUDE))


@inlined
def disordered(order: Any) -> Any:
    """The float32 of `ordered`."""
    return np.int32(order ^ ((order >> 31) & _MAGNITUDE)).view(np.float32)


@inlined
def widened(bits: Any, shift: int) -> Any:
    return np.uint32(np.uint32(bits) << shift).view(np.float32)


@inlined
def narrowed(number: Any, shift: int) -> Any:
    """Bits of a finite float32, rounded to nearest, ties to even (`elements.from_float32`)."""
    bits = np.float32(number).view(np.uint32)
    if shift == 0:
        return bits
    odd = (bits >> shift) & 1
    return (bits + ((1 << (shift - 1)) - 1) + odd) >> shift


# -- grids -------------------------------------------------------------------------------------------------------------
@inlined
def step_of(low: Any, high: Any, bits: int) -> Any:
    return (high - low) / np.float32((1 << bits) - 1)


@inlined
def inverse_of(step: Any) -> Any:
    """0 where numbers are all but equal: they become code 0, their base."""
    return np.float32(1) / step if step >= SMALLEST_STEP else np.float32(0)


@inlined
def code_of(number: Any, base: Any, inverse: Any) -> Any:
    return np.uint8(np.int32((number - base) * inverse + _HALF))


@inlined
def token_bounds(row_D: Stored, shift: int) -> Any:
    """Smallest and largest of a token's channels."""
    low = high = ordered(row_D[0], shift)
    for d in range(1, row_D.size):
        order = ordered(row_D[d], shift)
        low, high = min(low, order), max(high, order)
    return disordered(low), disordered(high)


@inlined
def channel_bounds(numbers_TD: Stored, shift: int, orders_BD: Words, bounds_BD: Floats) -> None:
    """Smallest and largest of each channel over these tokens."""
    for d in range(bounds_BD.shape[1]):
        orders_BD[0, d] = orders_BD[1, d] = ordered(numbers_TD[0, d], shift)
    for t in range(1, numbers_TD.shape[0]):
        for d in range(bounds_BD.shape[1]):
            order = ordered(numbers_TD[t, d], shift)
            orders_BD[0, d] = min(orders_BD[0, d], order)
            orders_BD[1, d] = max(orders_BD[1, d], order)
    for d in range(bounds_BD.shape[1]):
        bounds_BD[0, d], bounds_BD[1, d] = disordered(orders_BD[0, d]), disordered(orders_BD[1, d])


# -- bits --------------------------------------------------------------------------------------------------------------
@inlined
def run(packed_RD: Codes, bits: int, first: int, count: int) -> Any:
    """The rows of `count` codes from the `first` on, which is a multiple of 8."""
    row = bits * first // 8
    return packed_RD[row : row + (bits * count + 7) // 8]


@inlined
def pack(codes_TD: Codes, bits: int, packed_RD: Codes) -> None:
    """Shifts are products: LLVM narrows those to lanes of 16 bits, and a shift by a variable it does not."""
    tokens, channels = codes_TD.shape
    for r in range(packed_RD.shape[0]):
        first = 8 * r // bits  # the code of which the row has the lowest bit, and perhaps not the code's lowest
        place = np.uint16(1 << (8 + bits * first - 8 * r))
        for d in range(channels):
            packed_RD[r, d] = np.uint8((np.uint16(codes_TD[first, d]) * place) >> 8)
        for t in range(first + 1, min(tokens, (8 * r + 7) // bits + 1)):
            place = np.uint16(1 << (bits * t - 8 * r))
            for d in range(channels):
                packed_RD[r, d] |= np.uint8((np.uint16(codes_TD[t, d]) * place) & 0xFF)


@inlined
def unpack(packed_RD: Codes, bits: int, codes_TD: Codes) -> None:
    tokens, channels = codes_TD.shape
    mask = (1 << bits) - 1
    for t in range(tokens):
        row, skipped = bits * t >> 3, bits * t & 7
        place = np.uint32(1 << (8 - skipped))
        if skipped + bits <= 8:
            for d in range(channels):
                codes_TD[t, d] = np.uint8((np.uint32(packed_RD[row, d]) * place >> 8) & mask)
        else:
            for d in range(channels):
                two_rows = np.uint32(packed_RD[row, d]) | np.uint32(packed_RD[row + 1, d]) << 8
                codes_TD[t, d] = np.uint8((two_rows * place >> 8) & mask)


# -- kernels -----------------------------------------------------------------------------------------------------------
# Of numbers that are stored without their lowest `shift` bits: 16 is bfloat16, 0 is float32. Tokens before `first` are
# neither read nor written; groups are counted from token 0, rows of codes from `first`.


@cache
def channel_encoder(shift: int) -> Kernel:
    """One grid per channel and `GROUP_TOKENS`, for keys."""

    def encode_channels(
        numbers_NPTD: Stored, part: int, first: int, bits: int, bounds_NGBD: Floats, packed_NRD: Codes
    ) -> None:
        planes, _, tokens, channels = numbers_NPTD.shape
        orders_BD, inverse_D = np.empty((2, channels), np.int32), np.empty(channels, np.float32)
        codes_TD = np.empty((GROUP_TOKENS, channels), np.uint8)
        for n in range(planes):
            for t in range(first, tokens):
                group, at = t // GROUP_TOKENS, (t - first) % GROUP_TOKENS
                bounds_BD = bounds_NGBD[n, group]
                if t == first or t % GROUP_TOKENS == 0:
                    group_TD = numbers_NPTD[n, part, t : min(tokens, (group + 1) * GROUP_TOKENS)]
                    channel_bounds(group_TD, shift, orders_BD, bounds_BD)
                    for d in range(channels):
                        inverse_D[d] = inverse_of(step_of(bounds_BD[0, d], bounds_BD[1, d], bits))
                for d in range(channels):
                    codes_TD[at, d] = code_of(
                        widened(numbers_NPTD[n, part, t, d], shift), bounds_BD[0, d], inverse_D[d]
                    )
                if at == GROUP_TOKENS - 1 or t == tokens - 1:
                    pack(codes_TD[: at + 1], bits, run(packed_NRD[n], bits, t - first - at, at + 1))

    return compiled(encode_channels)


@cache
def token_encoder(shift: int) -> Kernel:
    """One grid per token."""

    def encode_tokens(
        numbers_NPTD: Stored, part: int, first: int, bits: int, bounds_NTB1: Floats, packed_NRD: Codes
    ) -> None:
        planes, _, tokens, channels = numbers_NPTD.shape
        codes_TD = np.empty((GROUP_TOKENS, channels), np.uint8)
        for n in range(planes):
            for t in range(first, tokens):
                at = (t - first) % GROUP_TOKENS
                low, high = token_bounds(numbers_NPTD[n, part, t], shift)
                inverse = inverse_of(step_of(low, high, bits))
                bounds_NTB1[n, t - first, 0, 0], bounds_NTB1[n, t - first, 1, 0] = low, high
                for d in range(channels):
                    codes_TD[at, d] = code_of(widened(numbers_NPTD[n, part, t, d], shift), low, inverse)
                if at == GROUP_TOKENS - 1 or t == tokens - 1:
                    pack(codes_TD[: at + 1], bits, run(packed_NRD[n], bits, t - first - at, at + 1))

    return compiled(encode_tokens)


@cache
def channel_decoder(shift: int) -> Kernel:
    def decode_channels(
        bounds_NGBD: Floats, packed_NRD: Codes, part: int, first: int, bits: int, numbers_NPTD: Stored
    ) -> None:
        planes, _, tokens, channels = numbers_NPTD.shape
        step_D, codes_TD = np.empty(channels, np.float32), np.empty((GROUP_TOKENS, channels), np.uint8)
        for n in range(planes):
            for t in range(first, tokens):
                at, bounds_BD = (t - first) % GROUP_TOKENS, bounds_NGBD[n, t // GROUP_TOKENS]
                if at == 0:
                    count = min(GROUP_TOKENS, tokens - t)
                    unpack(run(packed_NRD[n], bits, t - first, count), bits, codes_TD[:count])
                if t == first or t % GROUP_TOKENS == 0:
                    for d in range(channels):
                        step_D[d] = step_of(bounds_BD[0, d], bounds_BD[1, d], bits)
                for d in range(channels):
                    number = bounds_BD[0, d] + np.float32(codes_TD[at, d]) * step_D[d]
                    numbers_NPTD[n, part, t, d] = narrowed(number, shift)

    return compiled(decode_channels)


@cache
def token_decoder(shift: int) -> Kernel:
    def decode_tokens(
        bounds_NTB1: Floats, packed_NRD: Codes, part: int, first: int, bits: int, numbers_NPTD: Stored
    ) -> None:
        planes, _, tokens, channels = numbers_NPTD.shape
        codes_TD = np.empty((GROUP_TOKENS, channels), np.uint8)
        for n in range(planes):
            for t in range(first, tokens):
                at, low = (t - first) % GROUP_TOKENS, bounds_NTB1[n, t - first, 0, 0]
                if at == 0:
                    count = min(GROUP_TOKENS, tokens - t)
                    unpack(run(packed_NRD[n], bits, t - first, count), bits, codes_TD[:count])
                step = step_of(low, bounds_NTB1[n, t - first, 1, 0], bits)
                for d in range(channels):
                    numbers_NPTD[n, part, t, d] = narrowed(low + np.float32(codes_TD[at, d]) * step, shift)

    return compiled(decode_tokens)
