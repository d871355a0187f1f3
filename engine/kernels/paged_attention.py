"""Decode attention over pages, where they lie: one new query per sequence, bfloat16 or float32, no gathering.

A page holds K and V of one kv head for S tokens; a sequence's pages are scattered, its table says where:

    arena   | column 0 ..................................... | column 1 ...
            | layer 0                      | layer 1 ....... |
            | head 0        | head 1 ..... |
            | K strip  V strip |                                strip = S rows of D numbers, contiguous
            | D D .. D D D .. D |

Loops, outermost first. A *piece* is some hundred consecutive tokens of one sequence for one kv head, so threads
get equal shares whether there are many sequences or one long one (split-K, as in Flash-Decoding):

    for piece:                                   parallel
        for block of the piece:                  scores = query . K strip; the next page is asked for meanwhile
        weights = exp(score - largest)           over the whole piece, in lanes
        for block of the piece:                  sums += weights . V strip
    for sequence, kv head:                       parallel
        merge its pieces by their log-sum-exp

Per token and kv head the kernel reads 2 * D numbers once, for all G query heads that share them, so its cost is that of
reading the KV. Gathering the pages first writes and reads all of it once more; that cost 100 ms of a step with 8 x
1,500 tokens of SmolLM2. Slots beyond a sequence's end are never read: they may hold NaN.

Legend: T packed tokens, Q query heads, H kv heads, G = Q / H, D head dim, S slots, N sequences, I pieces, R tokens of a
piece.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
from numba import njit, prange

from engine.kernels import FLAGS, compiled
from engine.kernels.lanes import add_weighted_rows, dot_rows, exponential, largest, narrow, prefetch, widen

PIECE_TOKENS: Final = 128  # where there is little to share out; a large batch has longer pieces (8 x 1,500: -3 %)
PIECE_TOKENS_MAX: Final = 512
PIECES_WANTED: Final = 64  # so that the last ones to end leave few threads idle
_REGISTERS: Final = 16  # of accumulators; the rest are for a row, a weight and queries


@cache
def decode_attention(head_dim: int, group: int) -> Callable[..., None]:
    """The kernel for G = `group` query heads per kv head, compiled for these sizes."""
    dim = head_dim
    together = _heads_together(head_dim, group)

    def kernel(
        query_TQD: Any,
        pages: Any,  # the whole arena, flat
        pieces_I4: Any,  # (sequence, kv head, first token, end token); those of a sequence and head are neighbours
        first_piece_M: Any,  # of each (sequence, kv head), and the end
        columns: Any,  # all sequences' tables, one after the other, as element offsets of their columns
        first_column_N: Any,
        row_N: Any,  # which packed token each sequence is
        slots: int,
        layer_offset: int,
        scaling: Any,
        softcap: Any,  # 0: none
        largest_IG: Any,
        total_IG: Any,
        sums_IGD: Any,
        out_TQD: Any,
        lse_TQ: Any,
    ) -> None:
        strip = slots * dim
        for i in prange(pieces_I4.shape[0]):
            n, head, start, end = pieces_I4[i, 0], pieces_I4[i, 1], pieces_I4[i, 2], pieces_I4[i, 3]
            table = columns[first_column_N[n] :]
            keys = layer_offset + head * 2 * strip
            query_GD = np.empty((group, dim), np.float32)
            for g in range(group):
                _scale(query_TQD[row_N[n], head * group + g], scaling, query_GD[g])
            scores_GR = np.empty((group, end - start), np.float32)
            _score(query_GD, pages, table, keys, start, end, slots, scores_GR, group, together, dim)
            for g in range(group):
                largest_IG[i, g], total_IG[i, g] = _weigh(scores_GR[g], softcap)
            sums_IGD[i] = 0
            _sum(scores_GR, pages, table, keys + strip, start, end, slots, sums_IGD[i], group, together, dim)
        for m in prange(first_piece_M.shape[0] - 1):
            first, end = first_piece_M[m], first_piece_M[m + 1]
            row, head = row_N[pieces_I4[first, 0]], pieces_I4[first, 1]
            for g in range(group):
                q = head * group + g
                lse_TQ[row, q] = _merge(
                    largest_IG[first:end, g], total_IG[first:end, g], sums_IGD[first:end, g], out_TQD[row, q]
                )

    return compiled(kernel, parallel=True)


@njit(fastmath=set(FLAGS))
def _scale(query_D: Any, scaling: Any, out_D: Any) -> None:
    for d in range(out_D.shape[0]):
        out_D[d] = widen(query_D[d]) * scaling


@njit(inline="always")
def _score(
    query_GD: Any,
    pages: Any,
    table: Any,
    keys: int,
    start: int,
    end: int,
    slots: int,
    scores_GR: Any,
    group: int,
    together: int,
    dim: int,
) -> None:
    """scores = query . key, block by block. The next block's page, K and V, is asked for before this one is read."""
    token = start
    while token < end:
        slot = token % slots
        rows = min(slots - slot, end - token)
        if token + rows < end:
            prefetch(pages, table[token // slots + 1] + keys, 2 * slots * dim)
        first = table[token // slots] + keys + slot * dim
        for g in range(0, group, together):
            dot_rows(query_GD[g:], pages, first, rows, scores_GR[g:], token - start, together, dim)
        token += rows


@njit(fastmath=set(FLAGS))
def _weigh(score_R: Any, softcap: Any) -> Any:
    """Scores become weights, relative to the largest; returns (the largest, the weights' sum)."""
    if softcap > 0:
        for r in range(score_R.shape[0]):  # softcap * tanh(score / softcap)
            score_R[r] = softcap - 2 * softcap / (exponential(2 * score_R[r] / softcap) + 1)
    highest, total = largest(score_R), np.float32(0)
    for r in range(score_R.shape[0]):
        score_R[r] = exponential(score_R[r] - highest)
        total += score_R[r]
    return highest, total


@njit(inline="always")
def _sum(
    weights_GR: Any,
    pages: Any,
    table: Any,
    values: int,
    start: int,
    end: int,
    slots: int,
    sums_GD: Any,
    group: int,
    together: int,
    dim: int,
) -> None:
    """sums += weights . value, block by block."""
    token = start
    while token < end:
        slot = token % slots
        rows = min(slots - slot, end - token)
        first = table[token // slots] + values + slot * dim
        for g in range(0, group, together):
            add_weighted_rows(sums_GD[g:], pages, first, rows, weights_GR[g:], token - start, together, dim)
        token += rows


@njit(fastmath=set(FLAGS))
def _merge(largest_I: Any, total_I: Any, sums_ID: Any, out_D: Any) -> Any:
    """One answer from the pieces' own; returns its log-sum-exp. Overwrites the first piece's sums."""
    highest = largest(largest_I)
    sum_D, total = sums_ID[0], np.float32(0)
    for i in range(largest_I.shape[0]):
        weight = exponential(largest_I[i] - highest)
        total += weight * total_I[i]
        piece_D = sums_ID[i]
        for d in range(sum_D.shape[0]):
            sum_D[d] = weight * piece_D[d] if i == 0 else sum_D[d] + weight * piece_D[d]
    for d in range(sum_D.shape[0]):
        out_D[d] = narrow(sum_D[d] / total, out_D[d])
    return highest + np.log(total)


def _heads_together(head_dim: int, group: int) -> int:
    """How many query heads share one pass over a strip: the largest divisor of G whose sums fit the registers."""
    vectors = -(-head_dim // 16)
    fitting = [heads for heads in range(1, group + 1) if group % heads == 0 and heads * vectors <= _REGISTERS]
    return max(fitting, default=1)
