"""CacheGen: whole steps of a token's largest number, coded at the price of its channel's profiled distribution."""

from dataclasses import replace

import numpy as np
import pytest

from engine.base.errors import FrameError, InvalidArgument
from engine.kv.schema import Stream
from kv_transfer.calibration import Calibration
from kv_transfer.codecs import Atom, AtomShape, Unencodable, cachegen_tables, elements, rans
from kv_transfer.codecs.cachegen import CacheGen
from kv_transfer.codecs.cachegen_tables import BINS, limits
from kv_transfer.codecs.row_coded import RAW_TOKENS
from kv_transfer.profile import Tables
from tests.kv_transfer.codecs import synthetic

STREAM = Stream(name="kv", layers=2, heads=3, head_dim=16, dtype="float32")
LEVEL = 32

pytestmark = pytest.mark.timeout(120)  # kernels compile once per version, then come from the cache


@pytest.fixture(scope="module")
def codec() -> CacheGen:
    return CacheGen(synthetic.tables("cachegen", STREAM), STREAM)


def atom_of(values_LHPTD: np.ndarray, start: int = 64) -> Atom:
    layers, heads, _, tokens, _ = values_LHPTD.shape
    shape = AtomShape(STREAM, (0, layers), (start, start + tokens), (0, heads))
    return Atom(shape, elements.from_float32(np.ascontiguousarray(values_LHPTD), STREAM.dtype))


def unseen(tokens: int = 128) -> np.ndarray:
    return elements.to_float32(synthetic.atom(STREAM, 64, tokens).bytes_LHPTX, STREAM.dtype).copy()


def round_trip(codec: CacheGen, values_LHPTD: np.ndarray, level: int = LEVEL, start: int = 64) -> np.ndarray:
    atom = atom_of(values_LHPTD, start)
    payload = memoryview(bytes(codec.encode(atom, level)))
    return elements.to_float32(codec.decode_untrusted(payload, atom.shape, level), STREAM.dtype)


def bits_per_element(codec: CacheGen, values_LHPTD: np.ndarray, level: int = LEVEL) -> float:
    return 8 * len(codec.encode(atom_of(values_LHPTD), level)) / values_LHPTD.size


def scales_of(values_LHPTD: np.ndarray) -> np.ndarray:
    """Of each row, in all its heads and channels: the largest magnitude, rounded up to 5 significant bits."""
    largest = np.abs(values_LHPTD).max((1, 4), keepdims=True)
    unit = np.exp2(np.floor(np.log2(largest)) - 4)
    return np.ceil(largest / unit) * unit


# -- the quantiser -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("level", [255, 64, LEVEL, 16])
def test_numbers_become_the_nearest_whole_step_of_their_rows_scale(codec: CacheGen, level: int) -> None:
    values = unseen()
    step = scales_of(values) / np.array(limits(level)).reshape(1, 1, 2, 1, 1)
    np.testing.assert_allclose(round_trip(codec, values, level), np.rint(values / step) * step, rtol=1e-6)


def test_levels_go_from_nearly_lossless_to_coarse(codec: CacheGen) -> None:
    values = unseen()
    errors = [np.square(round_trip(codec, values, level) - values).mean() for level in codec.levels]
    bits = [bits_per_element(codec, values, level) for level in codec.levels]
    assert errors == sorted(errors) and bits == sorted(bits, reverse=True)
    assert errors[0] < errors[-1] / 200


def test_a_rows_scale_is_of_all_its_heads_and_of_nothing_else(codec: CacheGen) -> None:
    values = unseen()
    before = round_trip(codec, values)
    values[1, 2, 0, 9, 3] = 1000
    changed = (round_trip(codec, values) != before).any(-1)
    assert changed[1, :, 0, 9].all()
    changed[1, :, 0, 9] = False
    assert not changed.any()


@pytest.mark.parametrize("start", [0, 1, 3, 4, 100])
def test_the_first_four_positions_of_a_sequence_are_exact(codec: CacheGen, start: int) -> None:
    values = unseen(20)
    exact = (round_trip(codec, values, 16, start) == values).all((0, 1, 2, 4))
    raw = max(RAW_TOKENS - start, 0)
    assert list(exact) == [True] * raw + [False] * (20 - raw)


def test_a_number_is_the_same_in_each_dtype() -> None:
    values = elements.to_float32(elements.from_float32(unseen(8) / 8, "bfloat16"), "bfloat16")
    decoded = []
    for dtype in ("bfloat16", "float16", "float32"):
        stream = replace(STREAM, dtype=dtype)
        shape = AtomShape(stream, (0, 2), (9, 17), (0, 3))
        codec = CacheGen(synthetic.tables("cachegen", STREAM), stream)
        payload = codec.encode(Atom(shape, elements.from_float32(values, dtype)), LEVEL)
        decoded.append(elements.to_float32(codec.decode_untrusted(memoryview(payload), shape, LEVEL), dtype))
    for coarse, rounding in zip(decoded, (2**-8, 2**-10, 0), strict=False):
        np.testing.assert_allclose(coarse, decoded[2], rtol=rounding, atol=1e-7)


# -- rows that are unlike the others -----------------------------------------------------------------------------------
def test_rows_of_zeros_cost_nothing_and_come_back_without_a_sign(codec: CacheGen) -> None:
    values = np.full((2, 3, 2, 256, 16), -0.0, np.float32)
    assert 8 * len(codec.encode(atom_of(values), LEVEL)) < 40 * 2 * 2 * 256
    assert not round_trip(codec, values).view(np.uint32).any()


@pytest.mark.parametrize("factor", [1e-30, 1e-9, 1e9, 1e30])
def test_a_scale_that_calibration_never_saw_takes_one_more_word(codec: CacheGen, factor: float) -> None:
    values = unseen(16)
    usual = codec.encode(atom_of(values), LEVEL)
    values[1, :, 1, 5] *= np.float32(factor)
    strange = codec.encode(atom_of(values), LEVEL)
    assert len(strange) <= len(usual) + 2 * STREAM.heads * STREAM.head_dim
    step = scales_of(values) / np.array(limits(LEVEL)).reshape(1, 1, 2, 1, 1)
    assert (np.abs(round_trip(codec, values) - values) <= 0.5001 * step).all()


@pytest.mark.parametrize("token", [0, 1, 9])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3.4e38])
def test_what_has_no_scale_is_not_encoded(codec: CacheGen, bad: float, token: int) -> None:
    """Nor are raw tokens that the far end would refuse; only there may a number be so large."""
    values = unseen(10)
    values[1, 2, 1, token, 7] = bad
    with pytest.raises(Unencodable):
        codec.encode(atom_of(values, start=64 if np.isfinite(bad) else 0), LEVEL)


# -- the price ---------------------------------------------------------------------------------------------------------
def test_a_channel_is_coded_with_its_own_distribution(codec: CacheGen) -> None:
    """The paper's insight 3. The same numbers, each in another channel, cost more."""
    values = unseen(256)
    elsewhere = np.ascontiguousarray(np.roll(values, 5, axis=-1))
    assert bits_per_element(codec, values) < bits_per_element(codec, elsewhere) - 0.2


def test_tables_of_the_calibrated_distribution_cost_little_above_the_texts_own(codec: CacheGen) -> None:
    """Classes, phases and unseen text together: entropy by channel against what was sent."""
    values = unseen(256)
    steps = scales_of(values) / np.array(limits(LEVEL)).reshape(1, 1, 2, 1, 1)
    numbers_CT = np.rint(values / steps).astype(int).transpose(0, 1, 2, 4, 3).reshape(-1, 256)
    shares = [np.unique(numbers_T, return_counts=True)[1] / 256 for numbers_T in numbers_CT]
    entropy = np.mean([-(share * np.log2(share)).sum() for share in shares])
    sent = bits_per_element(codec, values)
    assert entropy < sent < entropy + 0.45  # of which states and scales are 0.15, with 48 channels


def test_kinds_of_text_weigh_the_same_however_much_there_is_of_each() -> None:
    calibration = synthetic.calibration(STREAM)
    windows = [
        replace(window, kv_LHPTD=np.where(np.arange(256)[:, None] % 2, window.kv_LHPTD, 0.1 * window.kv_LHPTD))
        if window.kind == "code"
        else window
        for window in calibration.windows
    ]
    code = [window for window in windows if window.kind == "code"]

    def numbers_of(windows: list) -> np.ndarray:
        tables = cachegen_tables.calibrate(replace(calibration, windows=windows))
        return tables.arrays["scales"].astype(int)

    once, thrice = numbers_of(windows), numbers_of([*windows, *code, *code])
    only = numbers_of(code)
    assert np.abs(once - thrice).max() < 0.1 * np.abs(once - only).max()


# -- tables ------------------------------------------------------------------------------------------------------------
def test_other_tables_do_not_decode(codec: CacheGen) -> None:
    other = CacheGen(synthetic.tables("cachegen", STREAM, 1_000), STREAM)
    atom = atom_of(unseen())
    with pytest.raises(FrameError, match="payload"):
        other.decode_untrusted(memoryview(codec.encode(atom, LEVEL)), atom.shape, LEVEL)


@pytest.mark.parametrize("change", [{"heads": 2}, {"layers": 3}, {"head_dim": 8}, {"parts": 1}, {"role": "latent"}])
def test_tables_for_another_stream_are_refused(change: dict) -> None:
    with pytest.raises(InvalidArgument, match="cachegen"):
        CacheGen(synthetic.tables("cachegen", STREAM), replace(STREAM, **change))


@pytest.mark.parametrize("name", ["class_LPQC", "mean_LPQC", "edges_LPE", "base_LP", "scales", "keys_32", "values_255"])
def test_tables_that_lack_something_or_make_no_sense_are_refused(name: str) -> None:
    arrays = dict(synthetic.tables("cachegen", STREAM).arrays)
    for broken in ({}, {name: arrays[name][:-1]}, {name: arrays[name].astype(np.float32)}):
        others = {other: array for other, array in arrays.items() if other != name}
        with pytest.raises(InvalidArgument, match=name):
            CacheGen(Tables({**others, **broken}), STREAM)
    if name in ("class_LPQC", "scales", "keys_32", "values_255"):
        with pytest.raises(InvalidArgument, match="tables of cachegen"):
            CacheGen(Tables({**arrays, name: np.full_like(arrays[name], 77)}), STREAM)


def test_any_mean_leaves_the_alphabet_whole() -> None:
    means = np.arange(-(2**15), 2**15).astype(np.int16)
    for level in BINS:
        for limit in limits(level):
            usual, phase = cachegen_tables.places(means, limit)
            assert usual.min() == 0 and usual.max() == 2 * limit
            assert set(phase) == set(range(4))


def test_a_profile_is_small() -> None:
    """SmolLM2-135M has 5,760 channels of each part: with a table for each, one level alone would take 1 MB."""
    stream = Stream(name="kv", layers=30, heads=3, head_dim=64, dtype="bfloat16")
    per_channel = 3 * stream.layers * 2 * 4 * stream.heads * stream.head_dim
    tables = synthetic.tables("cachegen", STREAM)
    shared = [array for name, array in tables.arrays.items() if name.startswith(("keys", "values"))]
    scales = 2 * stream.layers * 2 * rans.SYMBOLS_MAX
    assert per_channel + scales + sum(array.nbytes for array in shared) < 350_000


@pytest.mark.parametrize("tokens", [0, RAW_TOKENS])
def test_calibrating_needs_texts_and_keys(tokens: int) -> None:
    calibration = synthetic.calibration(STREAM)
    short = [replace(window, kv_LHPTD=window.kv_LHPTD[:, :, :, :tokens]) for window in calibration.windows]
    with pytest.raises(InvalidArgument, match="longer than 4 tokens"):
        CacheGen.calibrate(replace(calibration, windows=short))
    with pytest.raises(InvalidArgument, match="keys and values"):
        CacheGen.calibrate(Calibration(replace(STREAM, role="latent"), calibration.rope, calibration.windows))
