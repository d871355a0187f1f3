"""StepTimeModel: adds up, is found again from its own times, and its file is read with care."""

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.base import limits
from engine.base.errors import InvalidArgument
from engine.commands import SequenceSlice, StepPlan
from engine.step_time import (
    SAMPLES_MIN,
    Kind,
    Sample,
    Setting,
    Spread,
    StepTimeModel,
    features,
    fit,
    load,
    non_negative_fit,
    parse,
    save,
)
from engine.types import SamplingParams

MODEL = StepTimeModel(
    step_us=20_000,
    prefill_step_us=7_000,
    prefill_token_us=1_500,
    prefill_pair_us=0.25,
    decode_context_us=4,
    decode_sequence_us=900,
)
SETTING = Setting(fingerprint="f00d", dtype="bfloat16", device="cpu", threads=2)
GRID = [
    *((((start, tokens),), ()) for tokens in (16, 128, 512) for start in (0, 700)),
    *(((), (context,) * count) for count in (1, 4, 16) for context in (50, 900)),
    *((((start, 200),), (300,) * count) for count in (1, 8) for start in (0, 500)),
]


def piece(seq_id: int, tokens: int, start: int, *, prefill: bool) -> SequenceSlice:
    return SequenceSlice(seq_id, (7,) * tokens, start, (0,), SamplingParams(), None, prefill)


def measured(model: StepTimeModel = MODEL, *, noise: float = 0.0, seed: int = 0) -> list[Sample]:
    draw = random.Random(seed)
    return [
        Sample(prefill=prefill, decodes=decodes, step_us=model.predict(prefill, decodes) * draw.uniform(1, 1 + noise))
        for prefill, decodes in GRID
    ]


# -- model -------------------------------------------------------------------------------------------------------------
def test_a_plan_adds_up() -> None:
    plan = StepPlan(1, (piece(1, 1, 9, prefill=False), piece(2, 1, 19, prefill=False), piece(3, 100, 40, prefill=True)))
    assert MODEL(plan) == 27_000 + 2 * 900 + 4 * (10 + 20) + 100 * 1_500 + 100 * (40 + 50) // 4
    assert MODEL(plan) == MODEL.predict([(40, 100)], [10, 20])


def test_a_prompt_costs_about_the_same_attention_in_chunks_as_whole() -> None:
    """Pairs of a token and one it attends to are counted once, wherever the cuts are."""
    pairs = [features([chunk], [])[3] for chunk in ((0, 300), (0, 100), (100, 150), (250, 50))]
    assert pairs[0] == sum(pairs[1:])


# -- fit ---------------------------------------------------------------------------------------------------------------
def test_finds_the_model_that_made_the_times() -> None:
    model, error = fit(measured())
    assert list(model.coefficients) == pytest.approx(list(MODEL.coefficients), rel=1e-3)
    assert error.all.max < 1e-3


def test_noise_of_a_twentieth_shows_as_such() -> None:
    model, error = fit(measured(noise=0.05))
    assert model.prefill_token_us == pytest.approx(MODEL.prefill_token_us, rel=0.15)
    assert 0.002 < error.all.median < 0.05
    assert {kind: spread.samples for kind, spread in error.by_kind.items()} == {
        Kind.PREFILL: 6,
        Kind.DECODE: 6,
        Kind.MIXED: 4,
    }


def test_errors_are_of_steps_that_the_fit_has_not_seen() -> None:
    """The one step with decodes: all of them together fit perfectly, but the others cannot know what a decode costs."""
    prompts = [sample for sample in measured() if sample.kind is Kind.PREFILL]
    model, error = fit([*prompts, Sample(decodes=(1,) * 100, step_us=110_000)])
    assert model.predict([], [1] * 100) == pytest.approx(110_000)
    assert error.by_kind[Kind.DECODE].max > 0.75
    assert error.by_kind[Kind.PREFILL].max < 1e-3


def test_no_coefficient_is_negative_even_where_that_would_fit_better() -> None:
    """Times fall with the context here, which nothing real does: the least-squares slope is negative."""
    samples = [Sample(decodes=(100 * n,), step_us=50_000 - 10 * 100 * n) for n in range(1, 9)]
    model, _ = fit(samples)
    assert min(model.coefficients) >= 0
    assert model.decode_context_us == 0


@given(
    rows=st.lists(st.lists(st.floats(0.01, 10), min_size=3, max_size=3), min_size=4, max_size=8),
    step=st.lists(st.floats(-0.01, 0.01), min_size=3, max_size=3),
)
def test_no_non_negative_neighbour_is_better(rows: list[list[float]], step: list[float]) -> None:
    """The problem is convex: what no neighbour betters is the optimum."""
    rows_NF = np.array(rows)
    best = non_negative_fit(rows_NF)
    near = np.maximum(best + np.array(step), 0)
    assert np.square(rows_NF @ best - 1).sum() <= np.square(rows_NF @ near - 1).sum() + 1e-9


def test_too_little_to_fit_is_said() -> None:
    with pytest.raises(InvalidArgument, match=f"at least {SAMPLES_MIN}"):
        fit(measured()[: SAMPLES_MIN - 1])
    with pytest.raises(InvalidArgument, match="taken some time"):
        fit([*measured(), Sample(decodes=(1,), step_us=0)])


def test_a_kind_that_was_not_measured_has_no_error() -> None:
    _, error = fit([sample for sample in measured() if sample.kind is Kind.DECODE] * 2)
    assert list(error.by_kind) == [Kind.DECODE]
    assert isinstance(error.all, Spread)


# -- files -------------------------------------------------------------------------------------------------------------
def saved(folder: Path, **changes: object) -> bytes:
    """A good file's bytes, with some of its fields changed."""
    model, error = fit(measured())
    file = SETTING.file(folder)
    save(file, SETTING, model, error)
    return json.dumps(json.loads(file.read_bytes()) | changes).encode()


def test_what_was_saved_is_loaded_for_the_same_setting_only(tmp_path: Path) -> None:
    saved(tmp_path)
    assert load(SETTING, tmp_path) == fit(measured())[0]
    for other in (replace(SETTING, threads=1), replace(SETTING, dtype="float32"), replace(SETTING, fingerprint="beef")):
        assert load(other, tmp_path) is None


def test_the_file_is_named_after_the_setting(tmp_path: Path) -> None:
    assert SETTING.file(tmp_path) == tmp_path / "step_time" / "f00d-bfloat16-cpu-t2.json"
    assert replace(SETTING, fingerprint="../../etc").file(tmp_path).parent == tmp_path / "step_time"


def test_saving_leaves_nothing_else_behind(tmp_path: Path) -> None:
    saved(tmp_path)
    saved(tmp_path)
    assert [file.name for file in (tmp_path / "step_time").iterdir()] == ["f00d-bfloat16-cpu-t2.json"]


def test_a_bad_file_is_named_with_the_way_out(tmp_path: Path) -> None:
    SETTING.file(tmp_path).parent.mkdir()
    SETTING.file(tmp_path).write_text("{")
    with pytest.raises(InvalidArgument, match=r"f00d-bfloat16-cpu-t2.json: not JSON; `triptych fit` writes it anew"):
        load(SETTING, tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    SETTING.file(tmp_path).mkdir(parents=True)
    with pytest.raises(InvalidArgument, match="cannot be read"):
        load(SETTING, tmp_path)


def us(**changes: object) -> dict[str, object]:
    return asdict(MODEL) | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version 1"),
        ({"version": None}, "version 1"),
        ({"setting": asdict(replace(SETTING, threads=7))}, "threads"),
        ({"setting": "mine"}, "another model"),
        ({"model_us": None}, "fields"),
        ({"model_us": {}}, "fields"),
        ({"model_us": us(extra=1)}, "fields"),
        ({"model_us": us(step_us=-1)}, "model_us.step_us"),
        ({"model_us": us(step_us=True)}, "model_us.step_us"),
        ({"model_us": us(step_us="fast")}, "model_us.step_us"),
        ({"model_us": us(step_us=float("nan"))}, "model_us.step_us"),
        ({"model_us": us(prefill_pair_us=float("inf"))}, "model_us.prefill_pair_us"),
        ({"model_us": us(prefill_pair_us=10**400)}, "model_us.prefill_pair_us"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        parse(saved(tmp_path, **changes), SETTING)


@given(data=st.binary(max_size=200))
def test_any_bytes_raise_one_error(data: bytes) -> None:
    with pytest.raises(InvalidArgument):
        parse(data, SETTING)


@pytest.mark.parametrize(
    "data", [b"[" * 60_000, b"[]", b"null", b" " * (limits.STEP_TIME_FILE_BYTES_MAX + 1), b"\xff\xfe", b"9" * 5_000]
)
def test_hostile_documents_raise_one_error(data: bytes) -> None:
    with pytest.raises(InvalidArgument):
        parse(data, SETTING)
