"""Matrix products of a few rows, as decode steps have: the weights are read once, at the memory's speed.

    out_MN = x_MK @ weight_NK.T (+ bias_N) (+ other_MN)

oneDNN's product is made for many rows: for one to sixteen it reaches half of the memory's speed and costs 15 us a call
before it starts. Here a thread takes a stretch of rows of the weight, which lie in memory one after the other as the
checkpoint has them, and for each few of them keeps the sums with up to eight rows of x in registers:

    for stretch of weight rows:                      parallel
        for R weight rows, for 8 | 4 | 2 | 1 rows of x:
            for 16 of K:  widen R weights once, multiply with each row of x; ask for weights to come

No layout of our own, so the same memory serves oneDNN when there are many rows. From four rows on arithmetic begins to
show; where there is a matrix unit (`matrix_unit`), it takes over.

Legend: M rows of x, N outputs, K inputs, R weight rows taken together.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
from numba import njit, prange

from engine.kernels import FLAGS, compiled
from engine.kernels.lanes import dot_tile, narrow, widen

ROWS_MAX: Final = 16  # beyond, arithmetic takes longer than reading, and oneDNN's matrix units win
INPUTS_MULTIPLE: Final = 16
_STRETCH: Final = 32  # weight rows


@cache
def few_rows() -> Callable[..., None]:
    """kernel(x_MK, weight_NK, bias_N, other_MN, out_MN); an empty bias or other is none."""

    def kernel(x_MK: Any, weight_NK: Any, bias_N: Any, other_MN: Any, out_MN: Any) -> None:
        rows, outputs = out_MN.shape
        wide_MK = np.empty(x_MK.shape, np.float32)
        for m in range(rows):
            _widen_row(x_MK[m], wide_MK[m])
        for stretch in prange((outputs + _STRETCH - 1) // _STRETCH):
            sums_MR = np.empty((8, 4), np.float32)
            end = min(outputs, (stretch + 1) * _STRETCH)
            n = stretch * _STRETCH
            while n < end:
                together = 4 if n + 4 <= end else 1
                m = 0
                while m < rows:
                    tile = _tile(wide_MK, m, min(rows - m, 8), weight_NK, n, together, sums_MR)
                    _finish(sums_MR, m, tile, n, together, bias_N, other_MN, out_MN)
                    m += tile
                n += together

    return compiled(kernel, parallel=True)


@njit(fastmath=set(FLAGS))
def _widen_row(x_K: Any, wide_K: Any) -> None:
    for k in range(x_K.shape[0]):
        wide_K[k] = widen(x_K[k])


@njit(fastmath=set(FLAGS))
def _tile(x_MK: Any, m: int, rows: int, weight_NK: Any, n: int, together: int, sums_MR: Any) -> int:
    """Sums of as many rows of x, at most `rows`, as there is a tile for; returns how many."""
    if together == 1:
        dot_tile(x_MK, m, weight_NK, n, sums_MR, 0, 1, 1)
        return 1
    if rows >= 8:
        dot_tile(x_MK, m, weight_NK, n, sums_MR, 0, 8, 2)
        dot_tile(x_MK, m, weight_NK, n + 2, sums_MR, 2, 8, 2)
        return 8
    if rows >= 4:
        dot_tile(x_MK, m, weight_NK, n, sums_MR, 0, 4, 4)
        return 4
    if rows >= 2:
        dot_tile(x_MK, m, weight_NK, n, sums_MR, 0, 2, 4)
        return 2
    dot_tile(x_MK, m, weight_NK, n, sums_MR, 0, 1, 4)
    return 1


@njit(fastmath=set(FLAGS))
def _finish(sums_MR: Any, m: int, rows: int, n: int, together: int, bias_N: Any, other_MN: Any, out_MN: Any) -> None:
    for i in range(rows):
        for r in range(together):
            total = sums_MR[i, r]
            if bias_N.shape[0] > 0:
                total += widen(bias_N[n + r])
            if other_MN.shape[0] > 0:
                total += widen(other_MN[m + i, n + r])
            out_MN[m + i, n + r] = narrow(total, out_MN[m + i, n + r])
