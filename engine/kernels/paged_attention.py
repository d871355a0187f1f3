"""Decode attention over pages, where they lie: one new query per sequence, bfloat16 or float32, no gathering.

A page holds K and V of one kv head for S tokens; a sequence's pages are scattered, its table says where:

    arena   | column 0 ..................................... | column 1 ...
            | layer 0                      | layer 1 ....... |
            | head 0        | head 1 ..... |
            | K strip  V strip |                                strip = S rows of D numbers, contiguous
            | D D .. D D D .. D |

Loops, outermost first. A *piece* is at most PIECE_TOKENS consecutive tokens of one sequence for one kv head, so threads
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
from numba import prange

from engine.kernels import compiled
from engine.kernels.lanes import add_weighted_rows, dot_rows, exponential, largest, narrow, prefetch, widen

PIECE_TOKENS: Final = 128  # its K strips stay in the first-level cache's neighbour until the V strips are done
_REGISTERS: Final = 16  # of accumulators; the rest are for a row, a weight and queries


@cache
def decode_attention(head_dim: int, group: int) -> Callable[..., None]:
    """The kernel for G = `group` query heads per kv head, compiled for these sizes."""
    dim = head_dim
    together = _heads_together(head_dim, group)

    def kernel(
        query_TQD: Any,
        pages: Any,  # the whole arena, flat
        pieces_I4: Any,  # (sequence, kv head, first token, end token), a sequence's and head's pieces in a row
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
            query_GD = np.empty((group, dim), np.float32)
            for g in range(group):
                row = query_TQD[row_N[n], head * group + g]
                for d in range(dim):
                    query_GD[g, d] = widen(row[d]) * scaling
            scores_GR = np.empty((group, end - start), np.float32)
            table = columns[first_column_N[n] :]
            page = layer_offset + head * 2 * strip
            token = start
            while token < end:
                slot = token % slots
                rows = min(slots - slot, end - token)
                if token + rows < end:
                    prefetch(pages, table[token // slots + 1] + page, 2 * strip)
                keys = table[token // slots] + page + slot * dim
                for g in range(0, group, together):
                    dot_rows(query_GD[g:], pages, keys, rows, scores_GR[g:], token - start, together, dim)
                token += rows
            for g in range(group):
                score_R = scores_GR[g]
                if softcap > 0:
                    for r in range(end - start):
                        score_R[r] = softcap - 2 * softcap / (exponential(2 * score_R[r] / softcap) + 1)
                highest = largest(score_R)
                total = np.float32(0)
                for r in range(end - start):
                    score_R[r] = exponential(score_R[r] - highest)
                    total += score_R[r]
                largest_IG[i, g] = highest
                total_IG[i, g] = total
            sums_GD = sums_IGD[i]
            sums_GD[:] = 0
            token = start
            while token < end:
                slot = token % slots
                rows = min(slots - slot, end - token)
                values = table[token // slots] + page + strip + slot * dim
                for g in range(0, group, together):
                    add_weighted_rows(sums_GD[g:], pages, values, rows, scores_GR[g:], token - start, together, dim)
                token += rows
        for m in prange(first_piece_M.shape[0] - 1):
            first, end = first_piece_M[m], first_piece_M[m + 1]
            n, head = pieces_I4[first, 0], pieces_I4[first, 1]
            for g in range(group):
                highest = largest(largest_IG[first:end, g])
                sum_D = sums_IGD[first, g]
                total = np.float32(0)
                for i in range(first, end):
                    weight = exponential(largest_IG[i, g] - highest)
                    total += weight * total_IG[i, g]
                    piece_D = sums_IGD[i, g]
                    for d in range(dim):
                        sum_D[d] = weight * piece_D[d] if i == first else sum_D[d] + weight * piece_D[d]
                out_D = out_TQD[row_N[n], head * group + g]
                for d in range(dim):
                    out_D[d] = narrow(sum_D[d] / total, out_D[d])
                lse_TQ[row_N[n], head * group + g] = highest + np.log(total)

    return compiled(kernel, parallel=True)


def _heads_together(head_dim: int, group: int) -> int:
    """How many query heads share one pass over a strip: the largest divisor of G whose sums fit the registers."""
    vectors = -(-head_dim // 16)
    fitting = [heads for heads in range(1, group + 1) if group % heads == 0 and heads * vectors <= _REGISTERS]
    return max(fitting, default=1)
