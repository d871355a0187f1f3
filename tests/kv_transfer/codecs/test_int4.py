"""Int4: 4.5 bits per number; a sixteenth of int8's resolution; sinks are raw, so their neighbours do not pay."""

import numpy as np
import pytest

from kv_transfer.codecs import codecs
from tests.kv_transfer.codecs.test_grouped import SINK_TOKENS, atom_of, round_trip


def sequence(sink: float = 1.0) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((2, 2, 2, 64, 64)).astype(np.float32)
    values[:, :, :, :SINK_TOKENS] *= sink
    return values


def rms(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean()))


@pytest.mark.parametrize(("start", "bits"), [(64, 4.5), (0, 4.5 * 60 / 64 + 16 * 4 / 64 + 32 / 64 * 4 / 64 / 2)])
def test_the_size_is_4_bits_and_a_half_and_that_of_the_sinks(start: int, bits: float) -> None:
    values = sequence()
    payload = codecs.get("int4")().encode(atom_of(values, "bfloat16", start), 0)
    assert 8 * len(payload) / values.size == bits


def test_a_sixteenth_of_the_steps_is_17_times_the_error() -> None:
    values = sequence()
    errors = {name: rms(round_trip(name, atom_of(values, start=64)) - values) for name in ("int4", "int8")}
    assert errors["int4"] / errors["int8"] == pytest.approx(255 / 15, rel=0.05)


def test_large_sinks_cost_their_neighbours_nothing() -> None:
    calm, wild = (round_trip("int4", atom_of(values)) - values for values in (sequence(), sequence(sink=50.0)))
    np.testing.assert_array_equal(calm[:, :, :, SINK_TOKENS:], wild[:, :, :, SINK_TOKENS:])
    assert not wild[:, :, :, :SINK_TOKENS].any()
