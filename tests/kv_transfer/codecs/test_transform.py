"""Transform: errors go where they cost least; keys are alike wherever they stand; nothing is further off than said."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.base.errors import FrameError, InvalidArgument
from engine.kv.schema import Stream
from kv_transfer import profile as profiles
from kv_transfer.calibration import Calibration, Rope, Window
from kv_transfer.codecs import Atom, AtomShape, Unencodable, elements, rans, transform_kernels
from kv_transfer.codecs.row_coded import RAW_TOKENS
from kv_transfer.codecs.transform import PANEL_TOKENS, Transform
from kv_transfer.codecs.transform_kernels import FINENESS_MAX, NUMBER_MAX
from kv_transfer.profile import Profile, Tables

STREAM = Stream(name="kv", layers=2, heads=2, head_dim=8, dtype="float32")
CHANNELS = STREAM.heads * STREAM.head_dim
TOKENS = 512
LEVEL = 4
KEYS, VALUES = 0, 1
SLOPE = np.float32(2.0**-5)
"""Of gradients: at level 4 a number of variance 1 is some 4 steps wide."""
FREQUENCIES_F = np.array([1.0, 0.1, 0.01, 0.001], np.float32)

pytestmark = pytest.mark.timeout(120)  # kernels compile once per version, then come from the cache


# -- models whose KV and gradients are known ---------------------------------------------------------------------------
def noise(seed: int, tokens: int = TOKENS) -> np.ndarray:
    """kv_LHPTD."""
    shape = (STREAM.layers, STREAM.heads, STREAM.parts, tokens, STREAM.head_dim)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def turned(kv_LHPTD: np.ndarray, frequencies_F: np.ndarray = FREQUENCIES_F, start: int = 0) -> np.ndarray:
    """As a model would hand it on: RoPE, written down once more, as a product of complex numbers."""
    pairs, tokens = len(frequencies_F), kv_LHPTD.shape[3]
    keys_LHTD = kv_LHPTD[:, :, KEYS].astype(np.float64)
    turn_TF = np.exp(1j * np.arange(start, start + tokens)[:, None] * frequencies_F.astype(np.float64))
    complex_LHTF = (keys_LHTD[..., :pairs] + 1j * keys_LHTD[..., pairs : 2 * pairs]) * turn_TF
    result = kv_LHPTD.copy()
    result[:, :, KEYS, :, :pairs] = complex_LHTF.real
    result[:, :, KEYS, :, pairs : 2 * pairs] = complex_LHTF.imag
    return result


def calibration_of(
    kv: Callable[[int], np.ndarray] = noise,
    gradients: Callable[[int], np.ndarray] = lambda seed: noise(1_000 + seed),
    frequencies_F: np.ndarray = FREQUENCIES_F,
) -> Calibration:
    windows = [
        Window(
            "prose", turned(kv(seed), frequencies_F), turned(SLOPE * gradients(seed), frequencies_F), scored_tokens=64
        )
        for seed in range(4)
    ]
    return Calibration(STREAM, Rope(np.tile(frequencies_F, (STREAM.layers, 1))), windows)


def made(calibration: Calibration) -> Transform:
    return Transform(Transform.calibrate(calibration), calibration.stream)


def atom_of(values_LHPTD: np.ndarray, start: int = 64) -> Atom:
    shape = AtomShape(STREAM, (0, STREAM.layers), (start, start + values_LHPTD.shape[3]), (0, STREAM.heads))
    return Atom(shape, elements.from_float32(np.ascontiguousarray(values_LHPTD), STREAM.dtype))


def bits_per_element(codec: Transform, values_LHPTD: np.ndarray, level: int = LEVEL, start: int = 64) -> float:
    return 8 * len(codec.encode(atom_of(values_LHPTD, start), level)) / values_LHPTD.size


def decoded(codec: Transform, values_LHPTD: np.ndarray, level: int = LEVEL, start: int = 64) -> np.ndarray:
    atom = atom_of(values_LHPTD, start)
    payload = memoryview(bytes(codec.encode(atom, level)))
    return elements.to_float32(codec.decode_untrusted(payload, atom.shape, level), STREAM.dtype)


def error_of(codec: Transform, values_LHPTD: np.ndarray, level: int = LEVEL, start: int = 64) -> np.ndarray:
    """Keys are turned as if they stood there, and back."""
    there = turned(values_LHPTD, start=start)
    return turned(decoded(codec, there, level, start) - there, -FREQUENCIES_F, start)


@pytest.fixture(scope="module")
def plain() -> Transform:
    """All numbers and all gradients are white noise."""
    return made(calibration_of())


# -- keys --------------------------------------------------------------------------------------------------------------
def alike(seed: int) -> np.ndarray:
    """Keys that differ from token to token only by where they stand."""
    values = noise(seed)
    values[:, :, KEYS] = noise(77, 1)[:, :, KEYS] + 0.01 * values[:, :, KEYS]
    values[:, :, VALUES] *= 0.01
    return values


def test_keys_that_differ_by_position_only_cost_next_to_nothing_wherever_they_stand() -> None:
    codec, values = made(calibration_of(alike)), alike(9)
    assert bits_per_element(codec, values, 11) > bits_per_element(codec, turned(values, start=64), 11) + 1
    near, far = (bits_per_element(codec, turned(values, start=start), 11, start) for start in (64, 100_000))
    assert near < 0.8 and far == pytest.approx(near, abs=0.02)


@pytest.mark.parametrize("start", [500, 100_000])
def test_errors_do_not_grow_with_the_position(plain: Transform, start: int) -> None:
    near, there = (np.square(error_of(plain, noise(9), LEVEL, at)[:, :, KEYS]).mean() for at in (64, start))
    assert there == pytest.approx(near, rel=0.05)


@pytest.mark.parametrize("pairs", [0, 2, 4])
def test_any_part_of_a_head_may_be_turned(pairs: int) -> None:
    frequencies_F = FREQUENCIES_F[:pairs]
    codec = made(calibration_of(alike, frequencies_F=frequencies_F))
    values = turned(alike(9), frequencies_F, start=64)
    assert bits_per_element(codec, values, 11) < 0.8
    error = decoded(codec, values) - values
    assert np.square(error).mean() < 2 * np.square(0.01)


def test_layers_may_turn_differently(plain: Transform) -> None:
    """As where some layers attend to a window with another base."""
    calibration = calibration_of(alike)
    windows = [
        replace(
            window,
            kv_LHPTD=np.stack([turned(alike(seed), f)[i] for i, f in enumerate((FREQUENCIES_F, 0 * FREQUENCIES_F))]),
        )
        for seed, window in enumerate(calibration.windows)
    ]
    frequencies_LF = np.stack([FREQUENCIES_F, 0 * FREQUENCIES_F])
    codec = made(replace(calibration, rope=Rope(frequencies_LF), windows=windows))
    values = np.stack([turned(alike(9), start=64)[0], alike(9)[1]])
    assert bits_per_element(codec, values, 11) < 0.8 < bits_per_element(codec, turned(alike(9), start=64), 11)


# -- where errors go ---------------------------------------------------------------------------------------------------
SLOPES_D = np.array([8, 4, 2, 1, 1, 1, 0.5, 0.5], np.float32)


def test_a_direction_errs_in_inverse_proportion_to_its_gradients() -> None:
    """Its root of the Fisher matrix, in which half an octave of `_FLOOR` is left for what has next to none."""
    fine = made(calibration_of(gradients=lambda seed: noise(1_000 + seed) * SLOPES_D))
    error = np.sqrt(np.square(error_of(fine, noise(9), 0)[:, :, VALUES]).mean((0, 1, 2)))
    mean = np.square(SLOPES_D).mean()
    np.testing.assert_allclose(
        error * np.sqrt(np.square(SLOPES_D) + 0.05 * mean), error[3] * (1 + 0.05 * mean) ** 0.5, rtol=0.15
    )


def test_at_equal_bits_weighing_costs_the_model_less() -> None:
    slopes = noise(2_000) * SLOPES_D
    weighted = made(calibration_of(gradients=lambda seed: noise(1_000 + seed) * SLOPES_D))
    unweighted = made(calibration_of())
    values = noise(9)

    def cost_at(bits: float, codec: Transform) -> float:
        points = [
            (
                bits_per_element(codec, turned(values, start=64), level),
                np.log2(np.square((slopes * error_of(codec, values, level)).sum((1, 4))).mean()),
            )
            for level in codec.levels
        ]
        xs, ys = np.array(sorted(points)).T
        return float(np.interp(bits, xs, ys))

    for bits in (2.0, 3.0):
        assert cost_at(bits, weighted) < cost_at(bits, unweighted) - 1


def loud(seed: int) -> np.ndarray:
    """Every eighth token has values four times as large ..."""
    values = noise(seed)
    values[:, :, VALUES, ::8] *= 4
    return values


def steep(seed: int) -> np.ndarray:
    """... and matters ten times as much."""
    slopes = noise(1_000 + seed)
    slopes[:, :, :, ::8] *= 10
    return slopes


def test_tokens_that_are_predicted_to_matter_get_a_finer_step() -> None:
    codec, values = made(calibration_of(loud, steep)), loud(9)
    error_T = np.sqrt(np.square(error_of(codec, values)).mean((0, 1, 2, 4)))
    important, others = error_T[::8].mean(), np.delete(error_T, np.s_[::8]).mean()
    assert 10**0.7 / 2 < others / important < 10**0.7 * 1.4  # trusted by a power of .7, in half octaves
    quiet = made(calibration_of(loud))
    error_T = np.sqrt(np.square(error_of(quiet, values)).mean((0, 1, 2, 4)))
    assert error_T[::8].mean() == pytest.approx(np.delete(error_T, np.s_[::8]).mean(), rel=0.3)


# -- levels ------------------------------------------------------------------------------------------------------------
def test_a_level_is_a_quarter_of_an_octave(plain: Transform) -> None:
    values = noise(9)
    bits = np.array([bits_per_element(plain, turned(values, start=64), level) for level in plain.levels])
    errors = np.array([np.square(error_of(plain, values, level)).mean() ** 0.5 for level in plain.levels])
    assert (np.diff(bits) < 0).all() and (np.diff(errors) > 0).all()
    np.testing.assert_allclose(np.log2(errors[1:8] / errors[:7]), 0.25, atol=0.06)
    np.testing.assert_allclose(np.diff(bits)[:7], -0.25, atol=0.06)


def test_an_error_is_that_of_rounding_to_nearest(plain: Transform) -> None:
    """No dead zone: uniform in half a step, without bias towards the mean."""
    values = noise(9)
    error = error_of(plain, values, 2)
    assert abs((error * values).mean()) < 0.02 * np.abs(error).mean()


# -- numbers that calibration never saw --------------------------------------------------------------------------------
@pytest.mark.parametrize("part", [KEYS, VALUES])
@pytest.mark.parametrize("factor", [3, 30, 300])
def test_numbers_far_from_all_texts_are_kept_within_the_bound(plain: Transform, factor: float, part: int) -> None:
    values = noise(9, 64)
    values[1, 0, part, 20] *= factor
    error = np.abs(error_of(plain, values))
    bound = plain.error_bound(atom_of(values).shape, LEVEL, float(np.abs(values).max()))
    assert error.max() < bound
    others = np.delete(error, 20, axis=3)
    assert error[1, 0, part, 20].max() < 4 * others.max()  # escapes are exact: no saturation


def small(seed: int) -> np.ndarray:
    """Most channels hold next to nothing: they are skipped."""
    values = noise(seed)
    values[..., 1:] *= 0.01
    return values


def test_what_is_usually_skipped_is_not_lost_when_it_is_large() -> None:
    """Its row gets a finer step. Nobody else's does."""
    codec, values = made(calibration_of(small)), turned(small(9), start=64)
    before = decoded(codec, values)
    values[1, 1, VALUES, 20, 5] = step = 8 * np.abs(before - values).max()
    after = decoded(codec, values)
    assert abs(after[1, 1, VALUES, 20, 5] - values[1, 1, VALUES, 20, 5]) < step / 4
    changed = (after != before).any((1, 4))
    assert changed[1, VALUES, 20] and changed.sum() == 1


def test_steps_beyond_a_word_and_numbers_beyond_a_float_are_not_encoded(plain: Transform) -> None:
    for bad in (1e9, 2.0**60, 3e38, np.inf, -np.inf, np.nan):
        values = noise(9, 16)
        values[1, 1, VALUES, 9, 3] = bad
        with pytest.raises(Unencodable):
            plain.encode(atom_of(values), 0)


@pytest.mark.parametrize("start", [0, 1, 3, 4, 100])
def test_the_first_four_positions_of_a_sequence_are_exact(plain: Transform, start: int) -> None:
    values = noise(9, 20)
    exact = (decoded(plain, values, 11, start) == values).all((0, 1, 2, 4))
    raw = max(RAW_TOKENS - start, 0)
    assert list(exact) == [True] * raw + [False] * (20 - raw)


def test_equal_rows_come_back_equal_wherever_they_stand_in_a_panel() -> None:
    """BLAS must not sum in another order for another row: atoms may be cut anywhere."""
    codec = made(calibration_of(frequencies_F=FREQUENCIES_F[:0]))
    values = np.repeat(noise(9, 1), PANEL_TOKENS + 37, axis=3)
    got = decoded(codec, values)
    np.testing.assert_array_equal(got, np.broadcast_to(got[:, :, :, :1], got.shape))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_kernels_are_compiled_once_per_type_whatever_an_atom_looks_like(dtype: str) -> None:
    stream = replace(STREAM, dtype=dtype)
    codec = Transform(Transform.calibrate(calibration_of()), stream)
    for tokens in (1, 5, PANEL_TOKENS, PANEL_TOKENS + RAW_TOKENS, 300):
        for start, layers in ((0, (0, 2)), (7, (1, 2))):
            shape = AtomShape(stream, layers, (start, start + tokens), (0, STREAM.heads))
            values = noise(9, tokens)[slice(*layers)]
            payload = codec.encode(Atom(shape, elements.from_float32(values, dtype)), LEVEL)
            codec.decode_untrusted(memoryview(payload), shape, LEVEL)
    shift = elements.number_shift(dtype)
    kernels = (transform_kernels.opener(shift), transform_kernels.closer(shift))
    for kernel in (*kernels, transform_kernels.encoder(), transform_kernels.decoder()):
        assert len(kernel.signatures) == 1  # type: ignore[attr-defined]


# -- the wire ----------------------------------------------------------------------------------------------------------
def written(codec: Transform, fineness: int, number: int) -> tuple[memoryview, AtomShape]:
    """A stream of one token whose rows have this fineness, and this number of steps in every coefficient."""
    shape = AtomShape(STREAM, (0, STREAM.layers), (9, 10), (0, STREAM.heads))
    coding = codec._model.codings[LEVEL]
    writer = rans.Writer(STREAM.layers * STREAM.parts * (1 + 2 * CHANNELS))
    cursor, fineness_PT = np.uint64(writer.words.size), np.full((STREAM.parts, 1), fineness, np.int8)
    step = coding.step * np.float32(2 ** (-fineness / 2))
    coefficients_PTC = np.full((STREAM.parts, 1, CHANNELS), number * step, np.float32)
    for layer in reversed(range(STREAM.layers)):
        cursor = transform_kernels.encoder()(
            coefficients_PTC, fineness_PT, 1, layer, coding, writer.states, writer.words, np.uint64(cursor)
        )
    return memoryview(bytes(writer.seal(int(cursor)).data)), shape


WRITTEN = [
    (fineness, sign * number)
    for fineness, most in ((-FINENESS_MAX, NUMBER_MAX + 1), (0, 32_766), (FINENESS_MAX, 32_766))
    for number in (0, NUMBER_MAX, NUMBER_MAX + 1, most)
    for sign in (1, -1)
]


@pytest.mark.parametrize(("fineness", "number"), WRITTEN)
def test_every_fineness_and_number_that_can_be_written_is_read(plain: Transform, fineness: int, number: int) -> None:
    payload, shape = written(plain, fineness, number)
    got = elements.to_float32(plain.decode_untrusted(payload, shape, LEVEL), STREAM.dtype)
    step = plain._model.codings[LEVEL].step * 2 ** (-fineness / 2)
    rows_LPTC = (
        turned(got, -FREQUENCIES_F, start=9).transpose(0, 2, 3, 1, 4).reshape(STREAM.layers, STREAM.parts, 1, -1)
    )
    coefficients = (rows_LPTC - plain._model.mean_LPC[:, :, None]) @ plain._model.basis_LPCC
    fits = np.abs(coefficients / step - number) < 0.01 + 1e-4 * abs(number)
    assert fits.all() or number == 0 or fineness < 0  # where a step is coarse, some are skipped
    assert np.isfinite(got).all()


def test_words_and_layers_too_few_or_too_many_are_refused(plain: Transform) -> None:
    payload, shape = written(plain, 0, 100)
    for wrong in (payload[:-2], bytes(payload) + b"\0\0", bytes(payload)[:-40], b"", bytes(len(payload))):
        with pytest.raises(FrameError):
            plain.decode_untrusted(memoryview(wrong), shape, LEVEL)
    for other in (replace(shape, tokens=(9, 11)), replace(shape, layers=(0, 1)), replace(shape, heads=(0, 1))):
        with pytest.raises(FrameError):
            plain.decode_untrusted(payload, other, LEVEL)


# -- tables ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tables() -> Tables:
    return Transform.calibrate(calibration_of())


ARRAYS = [
    "mean_LPC",
    "basis_LPCC",
    "scale_LPC",
    "importance_LPX",
    "deviation_LPC",
    "classes_KS",
    "fineness_KS",
    "frequencies_LF",
]


@pytest.mark.parametrize("name", ARRAYS)
def test_tables_that_lack_something_or_have_another_shape_or_type_are_refused(tables: Tables, name: str) -> None:
    arrays = dict(tables.arrays)
    others = {other: array for other, array in arrays.items() if other != name}
    wrong = (
        arrays[name][:-1],
        arrays[name].astype(np.float64),
        arrays[name].reshape(-1),
        np.zeros((), arrays[name].dtype),
    )
    for broken in ({}, *({name: array} for array in wrong)):
        with pytest.raises(InvalidArgument, match=name):
            Transform(replace(tables, arrays={**others, **broken}), STREAM)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, bad) for name in ("mean_LPC", "scale_LPC", "importance_LPX", "frequencies_LF") for bad in (np.nan, np.inf)]
    + [("basis_LPCC", 0), ("basis_LPCC", 1), ("scale_LPC", 0), ("scale_LPC", 1e-38), ("scale_LPC", 1e38)]
    + [("classes_KS", 0), ("classes_KS", 67), ("fineness_KS", 164)],
)
def test_tables_that_make_no_sense_are_refused(tables: Tables, name: str, value: float) -> None:
    """Not finite; no inverse, or one beyond float32; frequencies that do not sum."""
    array = np.full_like(tables.arrays[name], value)
    with pytest.raises(InvalidArgument, match="tables of transform"):
        Transform(replace(tables, arrays={**tables.arrays, name: array}), STREAM)


@pytest.mark.parametrize("unit", [0, -1.0, float("nan"), float("inf"), 1e-30, 1e30, "wide", None])
def test_a_unit_that_is_no_step_is_refused(tables: Tables, unit: float) -> None:
    with pytest.raises(InvalidArgument, match="tables of transform"):
        Transform(replace(tables, settings={"unit": unit}), STREAM)
    with pytest.raises(InvalidArgument, match="unit"):
        Transform(replace(tables, settings={}), STREAM)


@pytest.mark.parametrize("change", [{"heads": 3}, {"layers": 3}, {"head_dim": 16}, {"parts": 1}, {"role": "latent"}])
def test_tables_for_another_stream_are_refused(tables: Tables, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="tables of transform"):
        Transform(tables, replace(STREAM, **change))


def test_other_tables_do_not_decode(plain: Transform) -> None:
    atom = atom_of(noise(9))
    other = made(calibration_of(loud))
    with pytest.raises(FrameError, match="payload"):
        other.decode_untrusted(memoryview(plain.encode(atom, LEVEL)), atom.shape, LEVEL)


def test_tables_come_back_from_a_profile_and_give_the_same_bytes(tables: Tables, tmp_path: Path) -> None:
    profiles.save(Profile(model="synthetic", tables={"transform": tables}), tmp_path / "profile")
    loaded = profiles.load(tmp_path / "profile").tables["transform"]
    assert loaded.digest == tables.digest == Transform.calibrate(calibration_of()).digest
    atom = atom_of(noise(9))
    first, second = (bytes(Transform(some, STREAM).encode(atom, LEVEL)) for some in (tables, loaded))
    assert first == second


# -- calibrating -------------------------------------------------------------------------------------------------------
def test_kinds_of_text_weigh_the_same_however_much_there_is_of_each() -> None:
    prose = list(calibration_of().windows)
    code = [replace(w, kind="code", kv_LHPTD=w.kv_LHPTD + np.float32(w.gradients_LHPTD > 0)) for w in prose[:1]]
    code = [replace(window, kv_LHPTD=1 + 0.1 * window.kv_LHPTD) for window in code]

    def means_of(windows: list[Window]) -> np.ndarray:
        rope = Rope(np.zeros((STREAM.layers, 0), np.float32))
        return Transform.calibrate(Calibration(STREAM, rope, windows)).arrays["mean_LPC"].astype(np.float64)

    assert means_of([*prose, *code]) == pytest.approx((means_of(prose) + means_of(code)) / 2, abs=2e-3)


@pytest.mark.parametrize("part", [KEYS, VALUES])
def test_constant_channels_and_gradients_of_zero_still_give_a_codec(part: int) -> None:
    """A channel that no text moves, a layer whose K or V nobody looks at."""

    def still(seed: int) -> np.ndarray:
        values = noise(seed)
        values[0, 0, part, :, 3], values[1, :, part] = 5, 0
        return values

    def flat(seed: int) -> np.ndarray:
        slopes = noise(1_000 + seed)
        slopes[0, :, part], slopes[:, 0, :, :, 3] = 0, 0
        return slopes

    codec, values = made(calibration_of(still, flat)), still(9)
    error = np.abs(error_of(codec, values))
    assert (error < codec.error_bound(atom_of(values).shape, LEVEL, 5)).all()
    assert np.square(error[:, :, 1 - part]).mean() < 0.1


@pytest.mark.parametrize("tokens", [0, RAW_TOKENS])
def test_calibrating_needs_texts_keys_and_gradients(tokens: int) -> None:
    calibration = calibration_of()
    short = [replace(window, kv_LHPTD=window.kv_LHPTD[:, :, :, :tokens]) for window in calibration.windows]
    with pytest.raises(InvalidArgument, match="longer than 4 tokens"):
        Transform.calibrate(replace(calibration, windows=short))
    with pytest.raises(InvalidArgument, match="keys and values"):
        Transform.calibrate(replace(calibration, stream=replace(STREAM, role="latent")))
    broken = [replace(window, gradients_LHPTD=np.full_like(window.kv_LHPTD, np.nan)) for window in calibration.windows]
    with pytest.raises(InvalidArgument, match="gradient"):
        Transform.calibrate(replace(calibration, windows=broken))
