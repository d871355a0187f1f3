"""Int3: 3.5 bits per number, 15/7 of int4's error, sinks raw as there; any number of tokens, in whole bytes."""

import numpy as np
import pytest

from kv_transfer.codecs import codecs
from tests.kv_transfer.codecs.test_grouped import SINK_TOKENS, atom_of, round_trip
from tests.kv_transfer.codecs.test_int4 import rms, sequence


def test_the_size_is_3_bits_and_a_half() -> None:
    values = sequence()
    assert 8 * len(codecs.get("int3")().encode(atom_of(values, "bfloat16", start=64), 0)) == 3.5 * values.size


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 9, 63])
def test_codes_take_whole_bytes_per_channel_and_no_more(tokens: int) -> None:
    values = sequence()[:, :, :, :tokens]
    planes, bounds = 4, 64 + tokens  # of a plane: one grid per channel of K, one per token of V
    codes = 2 * 64 * -(-3 * tokens // 8)
    payload = codecs.get("int3")().encode(atom_of(values, "bfloat16", start=64), 0)
    assert len(payload) == planes * (4 * bounds + codes)


def test_half_the_steps_are_twice_the_error() -> None:
    values = sequence()
    errors = {name: rms(round_trip(name, atom_of(values, start=64)) - values) for name in ("int3", "int4")}
    assert errors["int3"] / errors["int4"] == pytest.approx(15 / 7, rel=0.05)


def test_large_sinks_cost_their_neighbours_nothing() -> None:
    values = sequence(sink=50.0)
    error = round_trip("int3", atom_of(values)) - values
    assert not error[:, :, :, :SINK_TOKENS].any()
    assert np.abs(error).max() < 1
