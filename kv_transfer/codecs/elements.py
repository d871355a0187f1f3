"""Elements: the bytes of cached numbers <-> float32, in numpy alone and without the GIL. Shared by codecs; none itself.

numpy has no bfloat16. It is the upper half of a float32, so widening is a shift, and narrowing is rounding to nearest,
ties to even, as torch and the hardware do.

Compiled kernels see *numbers*: a bfloat16 as its 16 bits, which they widen themselves, others as the bits of a float32.

Legend: X bytes of one token's head, D numbers in it (X = D * item bytes). Leading dimensions are kept as they are.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from engine.kv.arena import Bytes

Floats = npt.NDArray[np.float32]
Bits = npt.NDArray[Any]  # unsigned integers as wide as the dtype
Numbers = npt.NDArray[Any]  # uint16 that holds bfloat16, or uint32 that holds float32

_BITS: Final = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}
_INFINITY: Final = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F80_0000}

DTYPES: Final = frozenset(_BITS)
LARGEST: Final = {
    "bfloat16": float.fromhex("0x1.fep127"),
    "float16": float(np.finfo(np.float16).max),
    "float32": float(np.finfo(np.float32).max),
}
"""The largest finite number of each dtype."""


def to_float32(bytes_X: Bytes, dtype: str) -> Floats:
    """Every number exactly. A copy, except from float32."""
    if dtype == "bfloat16":
        return bfloat16_to_float32(bytes_X.view(np.uint16))
    numbers = np.float16 if dtype == "float16" else np.float32
    return bytes_X.view(numbers).astype(np.float32, copy=False)


def from_float32(values_D: Floats, dtype: str) -> Bytes:
    """Rounded to nearest, ties to even; beyond the dtype's range is infinity, NaN stays NaN."""
    if dtype == "bfloat16":
        return _round_to_bfloat16(values_D).view(np.uint8)
    if dtype == "float32":
        return np.ascontiguousarray(values_D).view(np.uint8)
    with np.errstate(over="ignore"):
        return values_D.astype(np.float16).view(np.uint8)


def bfloat16_to_float32(bits_D: Bits) -> Floats:
    wide_D = np.empty(bits_D.shape, np.uint32)
    np.left_shift(bits_D, 16, out=wide_D, dtype=np.uint32)  # widens on the way: no second pass over memory
    return wide_D.view(np.float32)


def magnitude_bits(bytes_X: Bytes, dtype: str) -> Bits:
    """Bits without the sign. They order like the magnitudes, and from infinity's on a number is not finite."""
    bits_D = bytes_X.view(_BITS[dtype])
    magnitudes_D: Bits = bits_D & bits_D.dtype.type(np.iinfo(bits_D.dtype).max >> 1)
    return magnitudes_D


def all_finite(bytes_X: Bytes, dtype: str) -> bool:
    return bool((magnitude_bits(bytes_X, dtype) < _INFINITY[dtype]).all())


# -- numbers: of one type each whatever the caller has, because numba compiles a kernel for each type that it sees -----
def number_shift(dtype: str) -> int:
    """How many of a float32's lowest bits a number lacks as kernels see it: a float16 is widened for them."""
    return 16 if dtype == "bfloat16" else 0


def to_numbers(bytes_X: Bytes, dtype: str) -> Numbers:
    """Read-only, and a view if it can be one."""
    bits = bytes_X.view(np.uint16) if dtype == "bfloat16" else to_float32(bytes_X, dtype).view(np.uint32)
    numbers_D = np.require(bits, requirements=["C", "A"]).view()
    numbers_D.flags.writeable = False
    return numbers_D


def zero_numbers(shape: tuple[int, ...], dtype: str) -> Numbers:
    return np.zeros(shape, np.uint16 if dtype == "bfloat16" else np.uint32)


def from_numbers(numbers_D: Numbers, dtype: str) -> Bytes:
    """A view if it can be one."""
    return numbers_D.view(np.uint8) if dtype == "bfloat16" else from_float32(numbers_D.view(np.float32), dtype)


# -- rounding ----------------------------------------------------------------------------------------------------------
def _round_to_bfloat16(values_D: Floats) -> Bits:
    bits_D = np.ascontiguousarray(values_D).view(np.uint32)
    rounded_D = bits_D >> 16
    rounded_D &= 1
    rounded_D += 0x7FFF
    rounded_D += bits_D  # a carry into the upper half rounds up; a tie carries only if that half was odd
    rounded_D >>= 16
    narrow_D = rounded_D.astype(np.uint16)
    nan_D = np.isnan(values_D)
    if nan_D.any():
        narrow_D[nan_D] = 0x7FC0  # the sum may have carried a NaN over to infinity, or to zero
    return narrow_D
