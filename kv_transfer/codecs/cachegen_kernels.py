"""The loops of `cachegen`: a row of numbers <-> its scale and symbols <-> coded words, each row within the L1 cache.

A *row* is one token's K or V of one layer, all heads. Its scale is its largest magnitude, rounded up to four mantissa
bits; the *scale code* is those bits of a float32, exponent and all, and 0 is a row of zeros, of which nothing else is
written. Numbers become round(number / scale * limit) in -limit .. limit, and are coded as how far they are from where
their channel is usually found (modulo the alphabet), by the table of their channel and of how loud the row is.

Coding is scalar and takes nine tenths of the time; the loops around it are SIMD lanes.

Legend: i layers of the atom, L of the model, H kv heads, P parts, T tokens, D head dim, C = H * D channels of a row,
Q loudnesses, E = Q - 1 edges.
"""

from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from engine.base.jit import Kernel, compiled, inlined
from kv_transfer.codecs.grouped_kernels import narrowed, widened
from kv_transfer.codecs.rans import LANES, Expanded, get, put

Array = npt.NDArray[Any]

SCALE_SHIFT: Final = 19  # of a float32's bits: sign, exponent and four bits of the mantissa stay
SCALE_CODE_MIN: Final = 8 << 4  # 2**-119. Below, a limit / scale may not be finite, and the row is taken for zeros
SCALE_SYMBOLS: Final = 256
ESCAPE: Final = SCALE_SYMBOLS - 1  # a scale code far from those of the calibration: it follows as a word
ROW_EXTRA_WORDS: Final = 2  # that a row may take beyond one for each number: its scale's symbol, and that word
FAILED: Final = np.uint64(2**64 - 1)

_ROUNDER: Final = np.float32(3 << 22)  # leaves no bits for a small number's fraction: to nearest, ties to even
_ROUNDER_BITS: Final = int(_ROUNDER.view(np.int32))
_0, _1 = np.uint64(0), np.uint64(1)  # unsigned, so that no index is taken to count from the end


class Scales(NamedTuple):
    """How scale codes are coded, by layer and part, and which of them are loud."""

    tables: Expanded
    base_LP: Array  # the code of symbol 0
    edges_LPE: Array  # a row is as loud as the number of edges below its code


class Level(NamedTuple):
    """How numbers are quantised and coded at one level."""

    tables: Expanded
    table_LPQC: Array
    usual_LPQC: Array  # number + limit that is coded as the alphabet's middle, `limit`
    limit_P: Array


@cache
def encoder(shift: int) -> Kernel:
    """kernel(numbers_iHPTD, layer, first, largest, scales, level, states, words) -> cursor | FAILED.

    Numbers are bits of float32 without the lowest `shift`; the atom begins at the model's layer `layer` and is coded
    from its token `first` on. Fails at a scale code above `largest`, as infinity and NaN have.
    """

    def kernel(
        numbers: Any, layer: Any, first: Any, largest: Any, scales: Any, level: Any, states: Any, words: Any
    ) -> Any:
        layers, heads, parts, tokens, head_dim = numbers.shape
        symbols_C = np.empty(heads * head_dim, np.uint8)
        cursor = np.uint64(words.shape[0])
        for i in range(layers - 1, -1, -1):
            for p in range(parts - 1, -1, -1):
                for t in range(tokens - 1, first - 1, -1):
                    code = _scale_code(numbers, (i, p, t), shift)
                    if code > largest:
                        return FAILED
                    if code > 0:
                        which = (layer + i, p, _loudness(scales.edges_LPE[layer + i, p], code))
                        _quantise(numbers, (i, p, t), shift, code, level, which, symbols_C)
                        cursor = _put_row(symbols_C, level, which, states, words, cursor)
                    cursor = _put_scale(code, scales, (layer + i, p), states, words, cursor)
        return cursor

    return compiled(kernel)


@cache
def decoder(shift: int) -> Kernel:
    """kernel(numbers_iHPTD, layer, first, largest, scales, level, states, words, end) -> cursor | FAILED.

    A row is begun only at or before `end`; `words` must go on for as many more as a row may take.
    """

    def kernel(
        numbers: Any, layer: Any, first: Any, largest: Any, scales: Any, level: Any, states: Any, words: Any, end: Any
    ) -> Any:
        layers, heads, parts, tokens, head_dim = numbers.shape
        symbols_C = np.empty(heads * head_dim, np.uint8)
        cursor = np.uint64(0)
        for i in range(layers):
            for p in range(parts):
                for t in range(first, tokens):
                    code, cursor = _get_scale(scales, (layer + i, p), states, words, cursor)
                    if code > largest or 0 < code < SCALE_CODE_MIN:
                        return FAILED
                    which = (layer + i, p, _loudness(scales.edges_LPE[layer + i, p], code))
                    if code > 0:
                        cursor = _get_row(symbols_C, level, which, states, words, cursor)
                        _restore(numbers, (i, p, t), shift, code, level, which, symbols_C)
                    else:
                        _clear(numbers, (i, p, t))
                    if np.int64(cursor) > end:
                        return FAILED
        return cursor

    return compiled(kernel)


# -- scales ------------------------------------------------------------------------------------------------------------
@inlined
def _scale_code(numbers_iHPTD: Any, row: Any, shift: Any) -> Any:
    i, p, t = row
    largest = np.uint32(0)
    for h in range(numbers_iHPTD.shape[1]):
        numbers_D = numbers_iHPTD[i, h, p, t]
        for d in range(numbers_D.shape[0]):
            largest = max(largest, np.uint32(np.uint32(numbers_D[d]) << shift) & np.uint32(0x7FFF_FFFF))
    code = (np.int64(largest) + ((1 << SCALE_SHIFT) - 1)) >> SCALE_SHIFT
    return code if code >= SCALE_CODE_MIN else np.int64(0)


@inlined
def _scale(code: Any) -> Any:
    return np.uint32(np.uint32(code) << np.uint32(SCALE_SHIFT)).view(np.float32)


@inlined
def _loudness(edges_E: Any, code: Any) -> Any:
    loudness = 0
    for e in range(edges_E.shape[0]):
        loudness += code > np.int64(edges_E[e])
    return loudness


@inlined
def _put_scale(code: Any, scales: Any, which: Any, states: Any, words: Any, cursor: Any) -> Any:
    layer, part = which
    symbol = code - np.int64(scales.base_LP[layer, part])
    if symbol < 0 or symbol >= ESCAPE:
        cursor -= _1
        words[cursor] = code
        symbol = np.int64(ESCAPE)
    return put(states, 0, words, cursor, scales.tables, layer * scales.base_LP.shape[1] + part, symbol)


@inlined
def _get_scale(scales: Any, which: Any, states: Any, words: Any, cursor: Any) -> Any:
    layer, part = which
    symbol, cursor = get(states, 0, words, cursor, scales.tables, layer * scales.base_LP.shape[1] + part)
    code = np.int64(scales.base_LP[layer, part]) + np.int64(symbol)
    if symbol == ESCAPE:
        code = np.int64(words[cursor])
        cursor += _1
    return code, cursor


# -- numbers -----------------------------------------------------------------------------------------------------------
@inlined
def _quantise(numbers_iHPTD: Any, row: Any, shift: Any, code: Any, level: Any, which: Any, symbols_C: Any) -> None:
    """symbol = number + 2 * limit - usual, modulo the alphabet; all intermediate numbers fit in 32 bits."""
    (i, p, t), limit, usual_C = row, np.int32(level.limit_P[row[1]]), level.usual_LPQC[which]
    inverse, span = np.float32(limit) / _scale(code), np.int32(2 * limit + 1)
    bias = np.int32(_ROUNDER_BITS - 2 * limit)
    for h in range(numbers_iHPTD.shape[1]):
        numbers_D = numbers_iHPTD[i, h, p, t]
        first = h * numbers_D.shape[0]
        for d in range(numbers_D.shape[0]):
            rounded = np.float32(widened(numbers_D[d], shift) * inverse + _ROUNDER).view(np.int32)
            symbol = np.int32(np.int32(rounded - bias) - np.int32(usual_C[first + d]))
            symbols_C[first + d] = symbol + (span if symbol < 0 else 0) - (span if symbol >= span else 0)


@inlined
def _restore(numbers_iHPTD: Any, row: Any, shift: Any, code: Any, level: Any, which: Any, symbols_C: Any) -> None:
    (i, p, t), limit, usual_C = row, np.int32(level.limit_P[row[1]]), level.usual_LPQC[which]
    step, span = _scale(code) / np.float32(limit), np.int32(2 * limit + 1)
    for h in range(numbers_iHPTD.shape[1]):
        numbers_D = numbers_iHPTD[i, h, p, t]
        first = h * numbers_D.shape[0]
        for d in range(numbers_D.shape[0]):
            number = np.int32(np.int32(symbols_C[first + d]) + np.int32(usual_C[first + d]) - np.int32(2 * limit))
            wrapped = np.int32(number + (span if number < -limit else 0) - (span if number > limit else 0))
            numbers_D[d] = narrowed(np.float32(wrapped) * step, shift)


@inlined
def _clear(numbers_iHPTD: Any, row: Any) -> None:
    i, p, t = row
    for h in range(numbers_iHPTD.shape[1]):
        numbers_iHPTD[i, h, p, t, :] = 0


@inlined
def _put_row(symbols_C: Any, level: Any, which: Any, states: Any, words: Any, cursor: Any) -> Any:
    table_C = level.table_LPQC[which]
    c = np.uint64(symbols_C.shape[0])
    while c > _0:
        c -= _1
        cursor = put(states, c & np.uint64(LANES - 1), words, cursor, level.tables, table_C[c], symbols_C[c])
    return cursor


@inlined
def _get_row(symbols_C: Any, level: Any, which: Any, states: Any, words: Any, cursor: Any) -> Any:
    table_C = level.table_LPQC[which]
    c, channels = _0, np.uint64(symbols_C.shape[0])
    while c < channels:
        symbols_C[c], cursor = get(states, c & np.uint64(LANES - 1), words, cursor, level.tables, table_C[c])
        c += _1
    return cursor
