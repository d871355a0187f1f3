"""The loops of `transform`: stored numbers <-> centred rows without rotation, and coefficients <-> coded words.

What lies between them, a product of each row with its layer's basis, is numpy's. A *row* is one token's K or V of one
layer, all heads; kernels are given one layer and some tokens at a time. Key channels i and i + F of a head are a pair
that RoPE has turned by position * frequency; turned back, keys at different positions are alike.

A coefficient becomes a whole number of its row's steps. Its table follows from how many steps it usually spans:

    spread class = deviation - step        all in eighths of an octave, integers, so that both ends find the same table

Coefficients that usually span less than `SKIPPED` are not coded at all. Where one is not as small as usual, its row
gets smaller steps, until it is coded or small: no error of a coefficient is more than `ERROR_MAX_STEPS`.

Legend: i layers of the atom, L of the model, H kv heads, P parts, T tokens, D head dim, F rotated pairs of a head,
C = H * D channels of a row, and as many coefficients.
"""

from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from engine.base.jit import Kernel, compiled, inlined
from kv_transfer.codecs.grouped_kernels import narrowed
from kv_transfer.codecs.rans import LANES, Expanded, get, put

Array = npt.NDArray[Any]

OCTAVE: Final = 8  # of deviations and steps: their unit is an eighth of an octave
CLASSES: Final = 56  # tables for coefficients: two eighths of an octave each
SKIPPED: Final = -3 * OCTAVE  # what usually spans less than 1/8 of a step
ERROR_MAX_STEPS: Final = 1.5  # more than 12 deviations
NUMBER_MAX: Final = 30  # in the alphabet; beyond, a number follows as a word
ESCAPE: Final = 2 * NUMBER_MAX + 1
SYMBOLS: Final = ESCAPE + 1
WORD_MAX: Final = 32_767  # no coefficient is more steps than this
FINENESS_MAX: Final = 12  # a row's step is 2 ** (-fineness / 2) of the level's; fineness in -12 .. 12
FINENESS_SYMBOLS: Final = 2 * FINENESS_MAX + 1
FAILED: Final = np.uint64(2**64 - 1)

_0, _1 = np.uint64(0), np.uint64(1)
_EIGHTHS_OF_FINENESS: Final = OCTAVE // 2
_MAGNITUDE: Final = 0x7FFF_FFFF  # of a float32's bits, all but the sign


class Rotation(NamedTuple):
    """Of a layer's keys, by token."""

    cosines_TF: Array
    sines_TF: Array


class Coding(NamedTuple):
    """How coefficients of a level are quantised and coded."""

    tables: Expanded  # of spread classes
    fineness_tables: Expanded  # by layer and part
    deviation_LPC: Array  # int16, eighths of an octave
    step_eighths: int
    step: Any  # float32: the level's


# -- numbers <-> rows --------------------------------------------------------------------------------------------------
@cache
def opener(shift: int) -> Kernel:
    """kernel(numbers_iHPTD, i, start, tokens, rotation, mean_PC, rows_PTC, energy_PTH) -> largest magnitude's bits.

    Numbers are bits of float32 without the lowest `shift`. There may be more rows than tokens.
    """

    def kernel(numbers: Any, i: Any, start: Any, tokens: Any, rotation: Any, mean: Any, rows: Any, energy: Any) -> Any:
        _, heads, parts, _, head_dim = numbers.shape
        worst = np.uint32(0)
        for p in range(parts):
            for t in range(tokens):
                row_C = rows[p, t]
                for h in range(heads):
                    row_D = row_C[h * head_dim : (h + 1) * head_dim]
                    worst = max(worst, _widen(numbers[i, h, p, start + t], shift, row_D))
                    energy[p, t, h] = _energy(row_D)
                    if p == 0:
                        _turn(row_D, rotation.cosines_TF[t], rotation.sines_TF[t], np.float32(-1))
                for c in range(row_C.shape[0]):
                    row_C[c] -= mean[p, c]
        return worst

    return compiled(kernel, fastmath={"reassoc"})  # else a sum of squares is one long chain of additions


@cache
def closer(shift: int) -> Kernel:
    """kernel(rows_PTC, rotation, mean_PC, largest, numbers_iHPTD, i, start, tokens): the way back. Rows are written
    over.

    Numbers beyond `largest` become that: what comes out is finite.
    """

    def kernel(
        rows: Any, rotation: Any, mean: Any, largest: Any, numbers: Any, i: Any, start: Any, tokens: Any
    ) -> None:
        _, heads, parts, _, head_dim = numbers.shape
        for p in range(parts):
            for t in range(tokens):
                row_C = rows[p, t]
                for c in range(row_C.shape[0]):
                    row_C[c] += mean[p, c]
                for h in range(heads):
                    row_D = row_C[h * head_dim : (h + 1) * head_dim]
                    if p == 0:
                        _turn(row_D, rotation.cosines_TF[t], rotation.sines_TF[t], np.float32(1))
                    numbers_D = numbers[i, h, p, start + t]
                    for d in range(head_dim):
                        numbers_D[d] = narrowed(min(max(row_D[d], -largest), largest), shift)

    return compiled(kernel)


@inlined
def _widen(numbers_D: Any, shift: Any, row_D: Any) -> Any:
    worst = np.uint32(0)
    for d in range(row_D.shape[0]):
        bits = np.uint32(np.uint32(numbers_D[d]) << shift)
        worst = max(worst, bits & np.uint32(_MAGNITUDE))
        row_D[d] = bits.view(np.float32)
    return worst


@inlined
def _turn(row_D: Any, cosines_F: Any, sines_F: Any, direction: Any) -> None:
    """Forwards by the position's angles, or back."""
    pairs = cosines_F.shape[0]
    left_F, right_F = row_D[:pairs], row_D[pairs : 2 * pairs]
    for f in range(pairs):
        cosine, sine = cosines_F[f], direction * sines_F[f]
        left, right = left_F[f], right_F[f]
        left_F[f] = left * cosine - right * sine
        right_F[f] = right * cosine + left * sine


@inlined
def _energy(row_D: Any) -> Any:
    total = np.float32(0)
    for d in range(row_D.shape[0]):
        total += row_D[d] * row_D[d]
    return total


# -- coefficients <-> words --------------------------------------------------------------------------------------------
@cache
def encoder() -> Kernel:
    """kernel(coefficients_PTC, fineness_PT, tokens, layer, coding, states, words, cursor) -> cursor | FAILED."""

    def kernel(
        coefficients: Any, fineness: Any, tokens: Any, layer: Any, coding: Any, states: Any, words: Any, cursor: Any
    ) -> Any:
        parts, _, channels = coefficients.shape
        numbers_C, class_C = np.empty(channels, np.int32), np.empty(channels, np.int8)
        for p in range(parts - 1, -1, -1):
            deviation_C = coding.deviation_LPC[layer, p]
            for t in range(tokens - 1, -1, -1):
                row_C = coefficients[p, t]
                fine = _fine_enough(row_C, deviation_C, coding, np.int64(fineness[p, t]))
                if fine > FINENESS_MAX or not _quantise(row_C, _step(coding, fine), numbers_C):
                    return FAILED
                _classify(deviation_C, _eighths(coding, fine), class_C)
                cursor = _put_row(numbers_C, class_C, coding.tables, states, words, cursor)
                symbol = fine + FINENESS_MAX
                cursor = put(states, 0, words, cursor, coding.fineness_tables, layer * parts + p, symbol)
        return cursor

    return compiled(kernel)


@cache
def decoder() -> Kernel:
    """kernel(coefficients_PTC, tokens, layer, coding, states, words, cursor, end) -> cursor | FAILED.

    A row is begun only at or before `end`; `words` must go on for as many more as a row may take.
    """

    def kernel(
        coefficients: Any, tokens: Any, layer: Any, coding: Any, states: Any, words: Any, cursor: Any, end: Any
    ) -> Any:
        parts, _, channels = coefficients.shape
        numbers_C, class_C = np.empty(channels, np.int32), np.empty(channels, np.int8)
        for p in range(parts):
            for t in range(tokens):
                symbol, cursor = get(states, 0, words, cursor, coding.fineness_tables, layer * parts + p)
                fine = np.int64(symbol) - FINENESS_MAX
                _classify(coding.deviation_LPC[layer, p], _eighths(coding, fine), class_C)
                cursor = _get_row(numbers_C, class_C, coding.tables, states, words, cursor)
                if np.int64(cursor) > end:
                    return FAILED
                _restore(numbers_C, _step(coding, fine), coefficients[p, t])
        return cursor

    return compiled(kernel)


@inlined
def _step(coding: Any, fine: Any) -> Any:
    return np.float32(coding.step * np.float32(2.0 ** (-0.5 * fine)))


@inlined
def _eighths(coding: Any, fine: Any) -> Any:
    return np.int32(coding.step_eighths - fine * _EIGHTHS_OF_FINENESS)


@inlined
def _magnitude(number: Any) -> Any:
    """Its bits: ordered as the magnitudes are, NaN last. A maximum of integers is SIMD lanes, one of floats is not."""
    return np.float32(number).view(np.int32) & np.int32(_MAGNITUDE)


@inlined
def _fine_enough(row_C: Any, deviation_C: Any, coding: Any, fine: Any) -> Any:
    """The coarsest fineness, from this one on, that skips nothing large."""
    skips_large = True
    while skips_large and fine <= FINENESS_MAX:
        largest, skipped = np.int32(0), np.int32(_eighths(coding, fine) + SKIPPED)
        for c in range(row_C.shape[0]):
            largest = max(largest, _magnitude(row_C[c]) if deviation_C[c] < skipped else np.int32(0))
        skips_large = largest > _magnitude(np.float32(ERROR_MAX_STEPS) * _step(coding, fine))
        fine += skips_large
    return fine


@inlined
def _quantise(row_C: Any, step: Any, numbers_C: Any) -> Any:
    """Whether every number fits a word."""
    inverse, worst = np.float32(1) / step, np.int32(0)
    for c in range(row_C.shape[0]):
        steps = abs(row_C[c]) * inverse + np.float32(0.5)
        worst = max(worst, _magnitude(steps))
        number = np.int32(min(steps, np.float32(WORD_MAX)))
        numbers_C[c] = -number if row_C[c] < 0 else number
    return worst < _magnitude(WORD_MAX)


@inlined
def _restore(numbers_C: Any, step: Any, row_C: Any) -> None:
    for c in range(row_C.shape[0]):
        row_C[c] = np.float32(numbers_C[c]) * step


@inlined
def _classify(deviation_C: Any, eighths: Any, class_C: Any) -> None:
    """Spread classes, from 0; where below, the coefficient is skipped."""
    skipped = np.int32(eighths + SKIPPED)
    for c in range(class_C.shape[0]):
        spread = np.int32(np.int32(deviation_C[c]) - skipped)
        class_C[c] = min(max(spread >> 1, -1), CLASSES - 1)


@inlined
def _put_row(numbers_C: Any, class_C: Any, tables: Any, states: Any, words: Any, cursor: Any) -> Any:
    c = np.uint64(numbers_C.shape[0])
    while c > _0:
        c -= _1
        if class_C[c] >= 0:
            symbol = np.int64(numbers_C[c]) + NUMBER_MAX
            if symbol < 0 or symbol >= ESCAPE:
                cursor -= _1
                words[cursor] = np.uint16(numbers_C[c] + (WORD_MAX + 1))
                symbol = np.int64(ESCAPE)
            cursor = put(states, c & np.uint64(LANES - 1), words, cursor, tables, class_C[c], symbol)
    return cursor


@inlined
def _get_row(numbers_C: Any, class_C: Any, tables: Any, states: Any, words: Any, cursor: Any) -> Any:
    c, channels = _0, np.uint64(numbers_C.shape[0])
    while c < channels:
        number = np.int32(0)
        if class_C[c] >= 0:
            symbol, cursor = get(states, c & np.uint64(LANES - 1), words, cursor, tables, class_C[c])
            number = np.int32(symbol) - NUMBER_MAX
            if symbol == ESCAPE:
                number = np.int32(words[cursor]) - (WORD_MAX + 1)
                cursor += _1
        numbers_C[c] = number
        c += _1
    return cursor
