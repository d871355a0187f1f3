"""rANS: every symbol comes back, at the price of its tables, and what an encoder cannot have written is refused."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.base.errors import FrameError
from kv_transfer.codecs import rans
from kv_transfer.codecs.rans import TOTAL, FrequencyTables

pytestmark = pytest.mark.timeout(120)  # kernels compile once per version, then come from the cache
STATES_BITS = 8 * rans.LANES * rans.STATE_BYTES


def tables(symbols: int, count: int = 3, seed: int = 0) -> FrequencyTables:
    """Of very unequal symbols: most are rare."""
    counts_KS = np.random.default_rng(seed).pareto(0.5, (count, symbols)) * 1000
    return FrequencyTables.from_counts(np.minimum(counts_KS, 1e9).astype(np.int64))


def drawn(frequencies: FrequencyTables, rows: int, table_of_N: np.ndarray, seed: int = 1) -> np.ndarray:
    """Symbols as often as their tables expect them."""
    slots_K = frequencies.expanded.slots.reshape(-1, TOTAL)
    slots_TN = np.random.default_rng(seed).integers(0, TOTAL, (rows, len(table_of_N)))
    return np.ascontiguousarray(slots_K[table_of_N[None], slots_TN])


def stream_of(symbols_TN: np.ndarray, table_of_N: np.ndarray, frequencies: FrequencyTables) -> bytes:
    return bytes(rans.encode(symbols_TN, table_of_N, frequencies))


def decoded(stream: bytes, rows: int, table_of_N: np.ndarray, frequencies: FrequencyTables) -> np.ndarray:
    return rans.decode_untrusted(memoryview(stream), rows, table_of_N, frequencies)


# -- tables ------------------------------------------------------------------------------------------------------------
@settings(max_examples=50, deadline=None)
@given(st.integers(2, 256), st.integers(0, 2**32))
def test_tables_sum_to_4096_and_leave_no_symbol_out(symbols: int, seed: int) -> None:
    frequencies_KS = tables(symbols, seed=seed).frequencies_KS
    assert (frequencies_KS.sum(1) == TOTAL).all() and (frequencies_KS >= 1).all()


def test_tables_follow_the_counts() -> None:
    counts_KS = np.array([[0, 1, 2, 5], [0, 0, 0, 0], [10**12, 0, 0, 0]])
    frequencies_KS = FrequencyTables.from_counts(counts_KS).frequencies_KS.astype(int)
    np.testing.assert_allclose(frequencies_KS[0], [1, TOTAL / 8, TOTAL / 4, TOTAL * 5 / 8], atol=4)
    assert frequencies_KS[1].sum() == TOTAL
    assert list(frequencies_KS[2]) == [TOTAL - 3, 1, 1, 1]


@pytest.mark.parametrize(
    "frequencies",
    [[[4096, 0]], [[4095, 2]], [[2048, 2047]], [[4096]], [[16] * 257], [4096]],
    ids=["impossible symbol", "too many", "too few", "one symbol", "257 symbols", "no table"],
)
def test_tables_that_are_none_are_refused(frequencies: list) -> None:
    with pytest.raises(ValueError, match="frequenc"):
        FrequencyTables(np.array(frequencies, np.uint16))


def test_expanded_tables_agree_with_the_frequencies() -> None:
    first, second = tables(5), tables(200)
    both = rans.expand([first, second])
    for number, frequencies_S in enumerate([*first.frequencies_KS, *second.frequencies_KS]):
        slots = both.slots[number * TOTAL :][:TOTAL]
        np.testing.assert_array_equal(np.bincount(slots, minlength=len(frequencies_S)), frequencies_S)
        ranges = both.ranges[number * 256 :][: len(frequencies_S)]
        np.testing.assert_array_equal(ranges >> 16, frequencies_S)
        np.testing.assert_array_equal(slots[ranges & 0xFFFF], np.arange(len(frequencies_S)))


def test_a_quotient_by_reciprocal_is_exact() -> None:
    """For every frequency, at the states where rounding would show: around multiples, and at the largest."""
    frequencies = np.arange(1, TOTAL, dtype=np.uint64)
    halves_K2 = np.stack([frequencies, TOTAL - frequencies], 1).astype(np.uint16)
    reciprocals = FrequencyTables(halves_K2).expanded.reciprocals[:: rans.SYMBOLS_MAX]
    largest = (frequencies << np.uint64(20)) - np.uint64(1)
    for states in (largest, largest - largest % frequencies, largest - largest % frequencies - np.uint64(1)):
        products = states * reciprocals
        assert (products // reciprocals == states).all()  # none overflows
        np.testing.assert_array_equal(products >> np.uint64(44), states // frequencies)


# -- streams -----------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 30), st.integers(2, 256), st.integers(0, 2**32))
def test_any_symbols_come_back(rows: int, columns: int, symbols: int, seed: int) -> None:
    """Not as often as expected: rare ones too."""
    frequencies, dice = tables(symbols, seed=seed), np.random.default_rng(seed)
    table_of_N = dice.integers(0, 3, columns).astype(np.uint8)
    symbols_TN = dice.integers(0, symbols, (rows, columns)).astype(np.uint8)
    stream = stream_of(symbols_TN, table_of_N, frequencies)
    assert len(stream) <= rans.stream_bytes_max(rows * columns)
    np.testing.assert_array_equal(decoded(stream, rows, table_of_N, frequencies), symbols_TN)


@pytest.mark.parametrize("symbols", [2, 31, 256])
def test_a_stream_costs_what_its_tables_say_and_its_states(symbols: int) -> None:
    frequencies, table_of_N = tables(symbols), np.arange(192, dtype=np.uint8) % 3
    symbols_TN = drawn(frequencies, 300, table_of_N)
    expected_bits = frequencies.bits_KS[table_of_N[None], symbols_TN].sum()
    bits = 8 * len(stream_of(symbols_TN, table_of_N, frequencies))
    assert expected_bits < bits < 1.0005 * expected_bits + STATES_BITS


def test_one_certain_symbol_costs_next_to_nothing_and_the_rarest_a_word() -> None:
    frequencies = FrequencyTables(np.array([[TOTAL - 1, 1]], np.uint16))
    table_of_N = np.zeros(64, np.uint8)
    for symbol, bits_each in ((0, 0.001), (1, 12.01)):
        symbols_TN = np.full((200, 64), symbol, np.uint8)
        stream = stream_of(symbols_TN, table_of_N, frequencies)
        assert 8 * len(stream) < bits_each * symbols_TN.size + STATES_BITS
        np.testing.assert_array_equal(decoded(stream, 200, table_of_N, frequencies), symbols_TN)


def test_the_writer_keeps_room_for_what_comes_before() -> None:
    writer = rans.Writer(10, room_bytes=6)
    writer.words[7:] = (1, 2, 3)
    sealed = writer.seal(7)
    assert len(sealed) == 6 + rans.stream_bytes_max(3)
    states, words, count = rans.open_untrusted(memoryview(bytes(sealed[6:])), 2)
    assert list(words) == [1, 2, 3, 0, 0] and count == 3
    assert rans.finished(states, 3, count) and not rans.finished(states, 2, count)


# -- what comes over the wire ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def honest() -> tuple[bytes, np.ndarray, FrequencyTables]:
    frequencies, table_of_N = tables(31), np.arange(24, dtype=np.uint8) % 3
    return stream_of(drawn(frequencies, 20, table_of_N), table_of_N, frequencies), table_of_N, frequencies


def test_every_truncation_and_extension_is_refused(honest: tuple) -> None:
    stream, table_of_N, frequencies = honest
    for other in (
        *(stream[:end] for end in range(len(stream))),
        stream + b"\0",
        stream + b"\0\0",
        stream + b"\0" * 900,
    ):
        with pytest.raises(FrameError, match=r"length|payload"):
            decoded(other, 20, table_of_N, frequencies)


def test_every_flipped_bit_is_refused(honest: tuple) -> None:
    stream, table_of_N, frequencies = honest
    for bit in range(8 * len(stream)):
        mutated = bytearray(stream)
        mutated[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError, match="payload"):
            decoded(bytes(mutated), 20, table_of_N, frequencies)


def test_noise_and_another_number_of_rows_are_refused(honest: tuple) -> None:
    stream, table_of_N, frequencies = honest
    dice = random.Random(3)
    for _ in range(500):
        with pytest.raises(FrameError):
            decoded(dice.randbytes(dice.randrange(400)), 20, table_of_N, frequencies)
    for rows in (0, 1, 19, 21, 10_000):
        with pytest.raises(FrameError):
            decoded(stream, rows, table_of_N, frequencies)


def test_states_of_zero_end(honest: tuple) -> None:
    """No encoder leaves them; every symbol then takes a word and the cursor may not run away."""
    _, table_of_N, frequencies = honest
    with pytest.raises(FrameError, match="payload"):
        decoded(bytes(rans.stream_bytes_max(3)), 20, table_of_N, frequencies)
