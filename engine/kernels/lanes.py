"""SIMD for numba: lanes of float32, widened from bfloat16 on the way in and narrowed on the way out.

LLVM's own vectoriser sums a dot product of 64 numbers with sixteen scalar adds at the end and keeps a running sum of
vectors in memory; decode attention is nothing but those two. So the two inner loops are spelled out in LLVM's IR, with
as many accumulators in registers as a strip needs. `<16 x float>` is one AVX-512 register, two of AVX2 or four of NEON:
LLVM splits it where it must.

    bfloat16 is the upper half of float32:   widen = bits << 16     narrow = round to nearest even, bits >> 16

Legend: R rows, G query heads that share a kv head, D head dim.
"""

import math
from collections.abc import Callable
from typing import Any

import numba.extending
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from engine.kernels import FLAGS

_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_LANES_MAX = 16
_FLAGS = tuple(sorted(FLAGS))
_CACHE_LINE_BYTES = 64
_TILES_AHEAD = 2  # of weight rows are asked for early: without it half the time is waiting (38 against 23 ms a step)


def intrinsic(generator: Callable[..., Any]) -> Callable[..., Any]:
    """A function that compiled code may call, as the IR it becomes. The generator sees sizes as literals."""
    function: Callable[..., Any] = numba.extending.intrinsic(prefer_literal=True)(generator)
    return function


# -- numbers -----------------------------------------------------------------------------------------------------------
@intrinsic
def widen(typingctx: Any, element: Any) -> Any:
    """A stored number as float32: `uint16` holds a bfloat16, `float32` itself."""

    def bits_to_float(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.shl(builder.zext(arguments[0], _I32), _I32(16))
        return builder.bitcast(bits, _F32)

    if element == types.float32:
        return types.float32(element), lambda context, builder, signature, arguments: arguments[0]
    return types.float32(types.uint16), bits_to_float


@intrinsic
def narrow(typingctx: Any, number: Any, like: Any) -> Any:
    """A float32 as `like` is stored. Rounds to nearest, ties to even; a NaN that arithmetic makes stays one."""

    def float_to_bits(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], _I32)
        odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.add(bits, builder.add(odd, _I32(0x7FFF)))
        return builder.trunc(builder.lshr(rounded, _I32(16)), _I16)

    if like == types.float32:
        return types.float32(number, like), lambda context, builder, signature, arguments: arguments[0]
    return types.uint16(types.float32, like), float_to_bits


@intrinsic
def _float_of_bits(typingctx: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _F32)

    return types.float32(types.int32), generate


@numba.njit(inline="always", fastmath=set(FLAGS))
def exponential(x: Any) -> Any:
    """e**x to 2 ulp in operations that have lanes: 2**n * 2**f with |f| <= 1/2, and 2**f as a Taylor polynomial.

    Below e**-87 the answer is 2**-126, which is nothing beside the 1 that every softmax holds. NaN stays NaN.
    """
    y = x * np.float32(1.4426950408889634)
    y = np.float32(-126.0) if y < np.float32(-126.0) else y
    y = np.float32(127.0) if y > np.float32(127.0) else y
    n = np.floor(y + np.float32(0.5))
    f = y - n
    power = np.float32(1.5403530393381609e-4)
    power = power * f + np.float32(1.3333558146428443e-3)
    power = power * f + np.float32(9.618129107628477e-3)
    power = power * f + np.float32(5.550410866482158e-2)
    power = power * f + np.float32(2.402265069591007e-1)
    power = power * f + np.float32(6.931471805599453e-1)
    power = power * f + np.float32(1.0)
    return power * _float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@numba.njit(inline="always", fastmath={*FLAGS, "nnan"})
def largest(numbers: Any) -> Any:
    """The maximum. It may miss a NaN, without which condition LLVM finds no lanes; the sum that follows does not."""
    best = np.float32(-np.inf)
    for i in range(numbers.shape[0]):
        best = max(best, numbers[i])
    return best


# -- rows of pages -----------------------------------------------------------------------------------------------------
@intrinsic
def prefetch(typingctx: Any, pages: Any, first: Any, elements: Any) -> Any:
    """Ask for `pages[first : first + elements]`, a cache line at a time."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line = _CACHE_LINE_BYTES * 8 // pages.dtype.bitwidth
        data = data_of(context, builder, pages, arguments[0])
        with cgutils.for_range_slice(builder, _I64(0), arguments[2], _I64(line), _I64) as (offset, _):
            prefetch_one(builder, data, builder.add(arguments[1], offset))
        return context.get_dummy_value()

    return types.void(pages, types.int64, types.int64), generate


@intrinsic
def dot_rows(
    typingctx: Any, query_GD: Any, pages: Any, first: Any, rows: Any, scores_GR: Any, at: Any, heads: Any, dim: Any
) -> Any:
    """scores_GR[g, at + r] = query_GD[g] . row r, for `rows` rows of `dim` numbers from `pages[first]` on.

    A row is widened once for all `heads` queries, which stay in registers.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tiles = _Tiles(builder, heads.literal_value, dim.literal_value)
        query = data_of(context, builder, query_GD, arguments[0])
        keys = data_of(context, builder, pages, arguments[1])
        scores, stride = matrix_of(context, builder, scores_GR, arguments[4])
        queries = [[tiles.load(query_GD, query, tiles.offset(g, v)) for v in tiles.vectors] for g in tiles.heads]
        with cgutils.for_range(builder, arguments[3], intp=_I64) as row:
            place = builder.add(arguments[2], builder.mul(row.index, _I64(tiles.dim)))
            key = [tiles.load(pages, keys, builder.add(place, tiles.offset(0, v))) for v in tiles.vectors]
            for g in tiles.heads:
                total = tiles.dot(queries[g], key)
                column = builder.add(arguments[5], row.index)
                builder.store(total, builder.gep(scores, [builder.add(column, builder.mul(_I64(g), stride))]))
        return context.get_dummy_value()

    sizes = (types.int64, types.int64)
    return types.void(query_GD, pages, *sizes, scores_GR, types.int64, heads, dim), generate


@intrinsic
def add_weighted_rows(
    typingctx: Any, sums_GD: Any, pages: Any, first: Any, rows: Any, weights_GR: Any, at: Any, heads: Any, dim: Any
) -> Any:
    """sums_GD[g] += weights_GR[g, at + r] * row r, for `rows` rows of `dim` numbers from `pages[first]` on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tiles = _Tiles(builder, heads.literal_value, dim.literal_value)
        sums = data_of(context, builder, sums_GD, arguments[0])
        values = data_of(context, builder, pages, arguments[1])
        weights, stride = matrix_of(context, builder, weights_GR, arguments[4])
        slots = [
            [_register(builder, tiles.load(sums_GD, sums, tiles.offset(g, v))) for v in tiles.vectors]
            for g in tiles.heads
        ]
        with cgutils.for_range(builder, arguments[3], intp=_I64) as row:
            place = builder.add(arguments[2], builder.mul(row.index, _I64(tiles.dim)))
            value = [tiles.load(pages, values, builder.add(place, tiles.offset(0, v))) for v in tiles.vectors]
            for g in tiles.heads:
                column = builder.add(arguments[5], row.index)
                weight = builder.load(builder.gep(weights, [builder.add(column, builder.mul(_I64(g), stride))]))
                tiles.add_scaled(slots[g], weight, value)
        for g in tiles.heads:
            for v in tiles.vectors:
                tiles.store(builder.load(slots[g][v]), sums, tiles.offset(g, v))
        return context.get_dummy_value()

    sizes = (types.int64, types.int64)
    return types.void(sums_GD, pages, *sizes, weights_GR, types.int64, heads, dim), generate


@intrinsic
def dot_tile(
    typingctx: Any, x_MK: Any, m: Any, weights_NK: Any, n: Any, sums_MR: Any, at: Any, m_tile: Any, n_tile: Any
) -> Any:
    """sums_MR[i, at + r] = x_MK[m + i] . weights_NK[n + r] for an `m_tile` x `n_tile` corner, all sums in registers.

    K must be a multiple of sixteen. A weight is read and widened once for all `m_tile` rows of x, which is float32.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tiles = _Tiles(builder, 1, _LANES_MAX)
        x, width = matrix_of(context, builder, x_MK, arguments[0])
        weights, _ = matrix_of(context, builder, weights_NK, arguments[2])
        sums, stride = matrix_of(context, builder, sums_MR, arguments[4])
        x_rows = [builder.mul(builder.add(arguments[1], _I64(i)), width) for i in range(m_tile.literal_value)]
        w_rows = [builder.mul(builder.add(arguments[3], _I64(r)), width) for r in range(n_tile.literal_value)]
        ahead = builder.mul(_I64(_TILES_AHEAD * len(w_rows)), width)
        slots = [[_register(builder, tiles.zero) for _ in w_rows] for _ in x_rows]
        with cgutils.for_range_slice(builder, _I64(0), width, _I64(_LANES_MAX), _I64) as (k, _):
            for row in w_rows:
                prefetch_one(builder, weights, builder.add(builder.add(row, ahead), k))
            weight = [tiles.load(weights_NK, weights, builder.add(row, k)) for row in w_rows]
            for i, x_row in enumerate(x_rows):
                tiles.add_products(slots[i], tiles.load(x_MK, x, builder.add(x_row, k)), weight)
        for i, row in enumerate(slots):
            for r, slot in enumerate(row):
                place = builder.add(builder.mul(_I64(i), stride), builder.add(arguments[5], _I64(r)))
                builder.store(tiles.sum(builder.load(slot)), builder.gep(sums, [place]))
        return context.get_dummy_value()

    return types.void(x_MK, types.int64, weights_NK, types.int64, sums_MR, types.int64, m_tile, n_tile), generate


def prefetch_one(builder: Any, data: Any, index: Any, nearness: int = 3) -> None:
    """Ask for one cache line: 3 into the first-level cache, 2 into the second."""
    byte = _I8.as_pointer()
    signature = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    function = declared(builder.module, signature, "llvm.prefetch.p0i8")
    place = builder.bitcast(builder.gep(data, [index]), byte)
    builder.call(function, [place, _I32(0), _I32(nearness), _I32(1)])  # to read; data


class _Tiles:
    """A [G, D] matrix as G x D / lanes vectors, and arithmetic on them, at compile time."""

    def __init__(self, builder: Any, heads: int, dim: int) -> None:
        self._builder = builder
        self._lanes = math.gcd(dim, _LANES_MAX)
        self._vector = ir.VectorType(_F32, self._lanes)
        self.dim = dim
        self.heads = range(heads)
        self.vectors = range(dim // self._lanes)
        self.zero = ir.Constant(self._vector, [0.0] * self._lanes)

    def offset(self, head: int, vector: int) -> Any:
        return _I64(head * self.dim + vector * self._lanes)

    def load(self, array: Any, data: Any, index: Any) -> Any:
        place = self._builder.gep(data, [index])
        if array.dtype == types.float32:
            return self._load(place, self._vector, 4)
        wide = ir.VectorType(_I32, self._lanes)
        bits = self._builder.zext(self._load(place, ir.VectorType(_I16, self._lanes), 2), wide)
        return self._builder.bitcast(self._builder.shl(bits, ir.Constant(wide, [16] * self._lanes)), self._vector)

    def store(self, vector: Any, data: Any, index: Any) -> None:
        place = self._builder.bitcast(self._builder.gep(data, [index]), self._vector.as_pointer())
        self._builder.store(vector, place).align = 4

    def dot(self, left: list[Any], right: list[Any]) -> Any:
        products = [self._builder.fmul(a, b, flags=_FLAGS) for a, b in zip(left, right, strict=True)]
        total = products[0]
        for product in products[1:]:
            total = self._builder.fadd(total, product, flags=_FLAGS)
        return self.sum(total)

    def sum(self, vector: Any) -> Any:
        signature = ir.FunctionType(_F32, [_F32, self._vector])
        name = f"llvm.vector.reduce.fadd.v{self._lanes}f32"
        reduce = declared(self._builder.module, signature, name)
        return self._builder.call(reduce, [_F32(-0.0), vector], fastmath=_FLAGS)

    def add_scaled(self, slots: list[Any], factor: Any, vectors: list[Any]) -> None:
        nothing = ir.Constant(self._vector, ir.Undefined)
        first = self._builder.insert_element(nothing, factor, _I32(0))
        to_all = ir.Constant(ir.VectorType(_I32, self._lanes), [0] * self._lanes)
        self.add_products(slots, self._builder.shuffle_vector(first, nothing, to_all), vectors)

    def add_products(self, slots: list[Any], factors: Any, vectors: list[Any]) -> None:
        for slot, vector in zip(slots, vectors, strict=True):
            product = self._builder.fmul(factors, vector, flags=_FLAGS)
            self._builder.store(self._builder.fadd(self._builder.load(slot), product, flags=_FLAGS), slot)

    def _load(self, place: Any, vector: Any, align: int) -> Any:
        loaded = self._builder.load(self._builder.bitcast(place, vector.as_pointer()))
        loaded.align = align
        return loaded


def _register(builder: Any, value: Any) -> Any:
    """A slot on the stack that LLVM turns into a register for as long as a loop runs."""
    return cgutils.alloca_once_value(builder, value)  # type: ignore[no-untyped-call]


def declared(module: Any, signature: Any, name: str) -> Any:
    return cgutils.get_or_insert_function(module, signature, name)  # type: ignore[no-untyped-call]


def data_of(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    return context.make_array(array_type)(context, builder, array).data


def matrix_of(context: Any, builder: Any, array_type: Any, array: Any) -> tuple[Any, Any]:
    """(data, elements from one row to the next) of a contiguous 2-D array."""
    struct = context.make_array(array_type)(context, builder, array)
    _, width = cgutils.unpack_tuple(builder, struct.shape, 2)  # type: ignore[no-untyped-call]
    return struct.data, width
