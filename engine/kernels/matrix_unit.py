"""Products of up to sixteen rows on AMX, the matrix unit of Intel's server processors, from weights as they lie.

A tile register holds 16 rows of 64 bytes; TDPBF16PS multiplies two and adds to a third in sixteen cycles:

    sums [16 N, 16 M] float32   +=   weights [16 N, 32 K] bfloat16   x   inputs [16 pairs of K, 16 M] of bfloat16 pairs

oneDNN puts the weights on the right-hand side, where the unit wants pairs of rows interleaved, and so must repack them:
in every call, or once into a second copy. Taken the other way round, out.T = weight @ x.T, a checkpoint's plain rows
*are* the left-hand side, and only x, which is small, is interleaved. So there is one copy of the weights, and sixteen
rows cost what one costs: reading them.

    interleave x                                               once a call
    for stretch of 32 weight rows:                             parallel
        for 32 of K:   two tiles of weights, one of x, two products; ask for the same of the next stretch
        sums -> bias, other, rounding -> out

Legend: M rows of x, N outputs, K inputs, P = K / 2 pairs of them, R weight rows of a stretch.
"""

import ctypes
import platform
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils

from engine.kernels import FLAGS, compiled
from engine.kernels.lanes import data_of, declared, intrinsic, matrix_of, narrow, prefetch_one, widen

ROWS_MAX: Final = 16
INPUTS_MULTIPLE: Final = 32  # of K in one tile
OUTPUTS_MULTIPLE: Final = 32  # R: two tiles of weights share a tile of x

_I8, _I64 = ir.IntType(8), ir.IntType(64)
_TILE_ROWS, _TILE_ROW_BYTES, _TILES = 16, 64, 8
_SUMS, _X, _WEIGHTS = (0, 1), 2, (3, 4)  # register numbers
# Linux gives a process the tile registers when it asks: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
_SYS_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@cache
def _available() -> bool:
    """Whether this processor has the unit and the system lets us use it."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    features = llvm.get_host_cpu_features()
    if not (features.get("amx-tile") and features.get("amx-bf16")):
        return False
    return bool(ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


def takes(outputs: int, inputs: int) -> bool:
    return _available() and outputs % OUTPUTS_MULTIPLE == 0 and inputs % INPUTS_MULTIPLE == 0


@cache
def tiled_product() -> Callable[..., None]:
    """kernel(x_MK, weight_NK, bias_N, other_MN, out_MN), all bfloat16; an empty bias or other is none."""

    def kernel(x_MK: Any, weight_NK: Any, bias_N: Any, other_MN: Any, out_MN: Any) -> None:
        settings = _tile_settings()
        x_P16 = np.zeros((x_MK.shape[1] // 2, 16), np.uint32)
        _interleave(x_MK.view(np.uint32), x_P16)
        for stretch in prange(weight_NK.shape[0] // 32):
            sums_RM = np.empty((32, 16), np.float32)
            _multiply(x_P16, weight_NK, stretch * 32, settings, sums_RM)
            _finish(sums_RM, stretch * 32, bias_N, other_MN, out_MN)

    return compiled(kernel, parallel=True)


@njit
def _tile_settings() -> Any:
    """What LDTILECFG reads: palette 1, and for every tile 64 bytes a row, 16 rows."""
    settings = np.zeros(64, np.uint8)
    settings[0] = 1
    settings[16 : 16 + 2 * _TILES : 2] = _TILE_ROW_BYTES
    settings[48 : 48 + _TILES] = _TILE_ROWS
    return settings


@njit(fastmath=set(FLAGS))
def _interleave(pairs_MP: Any, x_P16: Any) -> None:
    """Pair p of all sixteen rows, then pair p + 1: a transposition of pairs. Rows that are missing stay 0."""
    for m in range(pairs_MP.shape[0]):
        pairs_P = pairs_MP[m]
        for p in range(pairs_P.shape[0]):
            x_P16[p, m] = pairs_P[p]


@njit(fastmath=set(FLAGS))
def _finish(sums_RM: Any, n: int, bias_N: Any, other_MN: Any, out_MN: Any) -> None:
    """Loops of one operation each, which LLVM gives lanes; one loop with conditions would have none."""
    total_R = np.empty(sums_RM.shape[0], np.float32)
    for m in range(out_MN.shape[0]):
        for r in range(total_R.shape[0]):
            total_R[r] = sums_RM[r, m]
        if bias_N.shape[0] > 0:
            _add(total_R, bias_N[n : n + total_R.shape[0]])
        if other_MN.shape[0] > 0:
            _add(total_R, other_MN[m, n : n + total_R.shape[0]])
        out_R = out_MN[m, n : n + total_R.shape[0]]
        for r in range(total_R.shape[0]):
            out_R[r] = narrow(total_R[r], out_R[r])


@njit(fastmath=set(FLAGS))
def _add(total_R: Any, more_R: Any) -> None:
    for r in range(total_R.shape[0]):
        total_R[r] += widen(more_R[r])


@intrinsic
def _multiply(typingctx: Any, x_P16: Any, weight_NK: Any, n: Any, settings: Any, sums_RM: Any) -> Any:
    """sums_RM[r, m] = weight_NK[n + r] . x[m] for 32 weight rows.

    The registers are set up and released here: oneDNN, which uses the same ones, expects to find them released.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        unit = _Unit(builder)
        x = data_of(context, builder, x_P16, arguments[0])
        weights, width = matrix_of(context, builder, weight_NK, arguments[1])
        sums = data_of(context, builder, sums_RM, arguments[4])
        row_bytes = builder.mul(width, _I64(2))
        first = builder.mul(arguments[2], width)
        next_stretch = builder.add(first, builder.mul(width, _I64(OUTPUTS_MULTIPLE)))
        unit.call("ldtilecfg", unit.place(data_of(context, builder, settings, arguments[3]), _I64(0)))
        for tile in _SUMS:
            unit.call("tilezero", _I8(tile))
        with cgutils.for_range_slice(builder, _I64(0), width, _I64(INPUTS_MULTIPLE), _I64) as (k, _):
            here = builder.add(first, k)
            unit.load(_X, x, builder.mul(k, _I64(_TILE_ROWS // 2)), _I64(_TILE_ROW_BYTES))  # 16 of P a tile
            for index, (sum_tile, tile) in enumerate(zip(_SUMS, _WEIGHTS, strict=True)):
                rows_before = builder.mul(width, _I64(index * _TILE_ROWS))
                unit.load(tile, weights, builder.add(here, rows_before), row_bytes)
                unit.call("tdpbf16ps", _I8(sum_tile), _I8(tile), _I8(_X))
            # The next stretch in the order of memory, as many lines as this round has used, into the second-level
            # cache: beside this stretch the first-level one has no room for it.
            ahead = builder.add(next_stretch, builder.mul(k, _I64(OUTPUTS_MULTIPLE)))
            for line in range(OUTPUTS_MULTIPLE):
                prefetch_one(builder, weights, builder.add(ahead, _I64(line * INPUTS_MULTIPLE)), 2)
        for index, tile in enumerate(_SUMS):
            place = unit.place(sums, _I64(index * _TILE_ROWS * ROWS_MAX))
            unit.call("tilestored64", _I8(tile), place, _I64(_TILE_ROW_BYTES))
        unit.call("tilerelease")
        return context.get_dummy_value()

    return types.void(x_P16, weight_NK, types.int64, settings, sums_RM), generate


class _Unit:
    """The unit's instructions, by LLVM's names for them."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def place(self, data: Any, index: Any) -> Any:
        return self._builder.bitcast(self._builder.gep(data, [index]), _I8.as_pointer())

    def load(self, tile: int, data: Any, index: Any, row_bytes: Any) -> None:
        self.call("tileloadd64", _I8(tile), self.place(data, index), row_bytes)

    def call(self, name: str, *arguments: Any) -> None:
        signature = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        self._builder.call(declared(self._builder.module, signature, f"llvm.x86.{name}"), arguments)
