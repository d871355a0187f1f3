"""Elements: bfloat16 in numpy is bfloat16 in torch, bit for bit."""

import numpy as np
import pytest
import torch

from kv_transfer.codecs import elements

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def as_torch(bytes_X: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(bytes_X.copy()).view(TORCH[dtype])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_narrow_number_widens_exactly_and_comes_back(dtype: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    wide = elements.to_float32(every, dtype)
    np.testing.assert_array_equal(wide, as_torch(every, dtype).float().numpy())
    number = ~np.isnan(wide)
    back = elements.from_float32(wide, dtype).view(np.uint16)
    np.testing.assert_array_equal(back[number], every.view(np.uint16)[number])
    assert np.isnan(elements.to_float32(back.view(np.uint8), dtype)[~number]).all()


@pytest.mark.parametrize("dtype", sorted(elements.DTYPES))
def test_narrowing_rounds_as_torch_does(dtype: str) -> None:
    """Random bits reach every exponent; halfway cases, carries and overflow are put in by hand."""
    random = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    bits = np.concatenate([random, upper | 0x8000, upper | 0x7FFF, upper | 0x8001])
    wide = bits.view(np.float32)
    wide = wide[~np.isnan(wide)]
    np.testing.assert_array_equal(
        as_torch(elements.from_float32(wide, dtype), dtype).float().numpy(),
        torch.from_numpy(wide.copy()).to(TORCH[dtype]).float().numpy(),
    )


@pytest.mark.parametrize("dtype", sorted(elements.DTYPES))
@pytest.mark.parametrize("nan_bits", [0x7F80_0001, 0x7FFF_FFFF, 0xFFFF_FFFF, 0x7FC0_0000])
def test_not_a_number_stays_none(dtype: str, nan_bits: int) -> None:
    nan = np.array([1, nan_bits], np.uint32).view(np.float32)
    assert np.isnan(elements.to_float32(elements.from_float32(nan, dtype), dtype)).tolist() == [False, True]


@pytest.mark.parametrize("dtype", sorted(elements.DTYPES))
def test_magnitudes_are_ordered_like_absolute_values(dtype: str) -> None:
    bytes_X = elements.from_float32(np.random.default_rng(0).standard_normal(40).astype(np.float32), dtype)
    absolute = np.abs(elements.to_float32(bytes_X, dtype))
    assert (np.diff(absolute[np.argsort(elements.magnitude_bits(bytes_X, dtype))]) >= 0).all()


@pytest.mark.parametrize("dtype", sorted(elements.DTYPES))
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_one_number_that_is_not_finite_is_seen(dtype: str, bad: float) -> None:
    good, worse = (elements.from_float32(np.array([1, each, 2], np.float32), dtype) for each in (0, bad))
    assert elements.all_finite(good, dtype) and not elements.all_finite(worse, dtype)


@pytest.mark.parametrize("dtype", sorted(elements.DTYPES))
def test_the_largest_number_is_finite_and_the_next_is_not(dtype: str) -> None:
    largest = np.array([elements.LARGEST[dtype]], np.float32)
    bits = elements.from_float32(largest, dtype).view(elements._BITS[dtype])
    assert elements.to_float32(bits.view(np.uint8), dtype) == largest
    assert np.isinf(elements.to_float32((bits + 1).view(np.uint8), dtype))
