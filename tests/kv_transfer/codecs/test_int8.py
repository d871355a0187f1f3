"""Int8: half the bytes and a little, nowhere a raw token; keys keep their quiet channels beside loud ones."""

import numpy as np
import pytest

from kv_transfer.codecs import codecs, elements
from tests.kv_transfer.codecs.test_grouped import atom_of, round_trip

QUIET = [channel for channel in range(64) if channel not in (5, 40)]


def outliers(tokens: int = 128) -> np.ndarray:
    """Keys and values [2, 2, 2, T, D] with two channels that are always large."""
    values = np.random.default_rng(0).standard_normal((2, 2, 2, tokens, 64)).astype(np.float32)
    values[..., [5, 40]] *= 30
    return values


@pytest.mark.parametrize(("dtype", "ratio"), [("bfloat16", 8.5 / 16), ("float16", 8.5 / 16), ("float32", 9 / 32)])
@pytest.mark.parametrize("start", [0, 64])
def test_the_size_is_8_bits_and_a_half_wherever_an_atom_stands(dtype: str, ratio: float, start: int) -> None:
    atom = atom_of(outliers(), dtype, start)
    assert len(codecs.get("int8")().encode(atom, 0)) == ratio * atom.shape.raw_bytes


def test_a_keys_quiet_channels_do_not_pay_for_the_loud_ones() -> None:
    """KIVI's reason for its axes. The same numbers with one grid per token, as values have, lose ten times as much."""
    values = outliers()
    values[:, :, 1] = values[:, :, 0]
    error = (round_trip("int8", atom_of(values)) - values)[..., QUIET]
    per_channel, per_token = (np.sqrt((error[:, :, part] ** 2).mean()) for part in (0, 1))
    assert per_channel < 0.007
    assert per_token > 10 * per_channel


def test_errors_are_about_as_large_as_bfloat16s_own() -> None:
    values = outliers()
    own = elements.to_float32(elements.from_float32(values, "bfloat16"), "bfloat16") - values
    error = (round_trip("int8", atom_of(values)) - values)[:, :, 0]
    assert np.abs(error).mean() < 8 * np.abs(own[:, :, 0]).mean()
