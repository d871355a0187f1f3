"""What lies between the matrix products of a decoder layer: norm, rotation with the KV write, gated activation.

Each is one pass over its input, in float32 between the first read and the last rounding. As modules they are dozens of
torch calls per layer, which in a decode step cost more than the numbers they compute.

    x -> [norm] -> qkv product -> [rotate, store] -> attention -> o product -> x
    x -> [norm] -> gate|up product -> [silu(gate) * up] -> down product -> x

Legend: T packed tokens, E hidden size, F width of the gated activation, Q query heads, H kv heads, D head dim.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
from numba import njit, prange

from engine.kernels import FLAGS, compiled
from engine.kernels.lanes import exponential, narrow, widen

_ALONE_MAX: Final = 16_384  # numbers; waking a second thread costs 4 us, in which one thread does this many


# -- norm --------------------------------------------------------------------------------------------------------------
@cache
def rms_norm() -> Callable[..., None]:
    """kernel(x_TE, weight_E, epsilon, out_TE): out = x / sqrt(mean(x**2) + epsilon) * weight; the weight is float32."""

    def kernel(x_TE: Any, weight_E: Any, epsilon: Any, out_TE: Any) -> None:
        tokens, width = x_TE.shape
        if tokens * width <= _ALONE_MAX:
            for t in range(tokens):
                _norm_row(x_TE[t], weight_E, epsilon, out_TE[t])
        else:
            for t in prange(tokens):
                _norm_row(x_TE[t], weight_E, epsilon, out_TE[t])

    return compiled(kernel, parallel=True)


@njit(fastmath=set(FLAGS))
def _norm_row(x_E: Any, weight_E: Any, epsilon: Any, out_E: Any) -> None:
    total = np.float32(0)
    for e in range(x_E.shape[0]):
        x = widen(x_E[e])
        total += x * x
    scale = np.float32(1) / np.sqrt(total / np.float32(x_E.shape[0]) + epsilon)
    for e in range(x_E.shape[0]):
        out_E[e] = narrow(widen(x_E[e]) * scale * weight_E[e], out_E[e])


# -- rotation ----------------------------------------------------------------------------------------------------------
@cache
def rotate_and_store() -> Callable[..., None]:
    """kernel(qkv_TX, cos_TD, sin_TD, rows_TH, shift, slots, pages_RD, query_TQD)

    Rotates queries into `query_TQD`, and keys into the pages, beside their values. `rows_TH` says which row of D
    numbers of the first layer takes each key; `shift` is this layer's distance in rows, `slots` that from K to V.

        qkv_TX   | q of head 0 | ... | q of head Q-1 | k of head 0 | ... | v of head 0 | ... |
    """

    def kernel(
        qkv_TX: Any, cos_TD: Any, sin_TD: Any, rows_TH: Any, shift: int, slots: int, pages_RD: Any, query_TQD: Any
    ) -> None:
        tokens, width = qkv_TX.shape
        if tokens * width <= _ALONE_MAX:
            for t in range(tokens):
                _rotate_token(qkv_TX[t], cos_TD[t], sin_TD[t], rows_TH[t], shift, slots, pages_RD, query_TQD[t])
        else:
            for t in prange(tokens):
                _rotate_token(qkv_TX[t], cos_TD[t], sin_TD[t], rows_TH[t], shift, slots, pages_RD, query_TQD[t])

    return compiled(kernel, parallel=True)


@njit(fastmath=set(FLAGS))
def _rotate_token(
    qkv_X: Any, cos_D: Any, sin_D: Any, rows_H: Any, shift: int, slots: int, pages_RD: Any, query_QD: Any
) -> None:
    queries, dim = query_QD.shape
    kv_heads = rows_H.shape[0]
    for q in range(queries):
        _rotate(qkv_X[q * dim : (q + 1) * dim], cos_D, sin_D, query_QD[q])
    keys, values = queries * dim, (queries + kv_heads) * dim
    for h in range(kv_heads):
        row = rows_H[h] + shift
        _rotate(qkv_X[keys + h * dim : keys + (h + 1) * dim], cos_D, sin_D, pages_RD[row])
        pages_RD[row + slots][:] = qkv_X[values + h * dim : values + (h + 1) * dim]


@njit(fastmath=set(FLAGS), inline="always")
def _rotate(x_D: Any, cos_D: Any, sin_D: Any, out_D: Any) -> None:
    """Halves (a, b) -> (a cos - b sin, b cos + a sin): transformers' `rotate_half`."""
    half = x_D.shape[0] // 2
    for d in range(half):
        a, b = widen(x_D[d]), widen(x_D[half + d])
        out_D[d] = narrow(a * widen(cos_D[d]) - b * widen(sin_D[d]), out_D[d])
        out_D[half + d] = narrow(b * widen(cos_D[half + d]) + a * widen(sin_D[half + d]), out_D[half + d])


# -- activation --------------------------------------------------------------------------------------------------------
@cache
def silu_and_multiply() -> Callable[..., None]:
    """kernel(gate_up_TX, out_TF): out = gate * sigmoid(gate) * up, where X = 2F holds gate, then up."""

    def kernel(gate_up_TX: Any, out_TF: Any) -> None:
        tokens, width = out_TF.shape
        if tokens * width <= _ALONE_MAX // 4:
            for t in range(tokens):
                _silu_row(gate_up_TX[t, :width], gate_up_TX[t, width:], out_TF[t])
        else:
            for t in prange(tokens):
                _silu_row(gate_up_TX[t, :width], gate_up_TX[t, width:], out_TF[t])

    return compiled(kernel, parallel=True)


@njit(fastmath=set(FLAGS))
def _silu_row(gate_F: Any, up_F: Any, out_F: Any) -> None:
    for f in range(out_F.shape[0]):
        gate = widen(gate_F[f])
        out_F[f] = narrow(gate / (np.float32(1) + exponential(-gate)) * widen(up_F[f]), out_F[f])
