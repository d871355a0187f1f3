"""PacedExecutor: the inner executor's tokens, at the model's pace."""

import pytest

from engine.commands import SequenceSlice, StepPlan
from engine.executors.oracle import OracleExecutor, oracle_schema, reference_tokens
from engine.executors.paced import PacedExecutor, StepTimeModel, smollm2_schema
from engine.kv.arena import Arena
from engine.types import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
MODEL = StepTimeModel(step_us=10_000, prefill_token_us=100, decode_sequence_us=1_000, kv_token_us=1)


def piece(seq_id: int, token_ids: tuple[int, ...], start: int, *, prefill: bool, table=(0,)) -> SequenceSlice:
    return SequenceSlice(seq_id, token_ids, start, table, GREEDY, 0, prefill)


def test_step_time_adds_up() -> None:
    plan = StepPlan(1, (piece(1, (7,), 9, prefill=False), piece(2, (1, 2, 3), 4, prefill=True)))
    assert MODEL(plan) == 10_000 + (1_000 + 10) + (300 + 7)


def test_defaults_are_the_measured_model() -> None:
    assert StepTimeModel()(StepPlan(1, (piece(1, (7,), 9, prefill=False),))) == 36_000
    assert smollm2_schema().token_bytes == 30 * 2 * 3 * 64 * 2


def test_sleeps_between_layers_for_the_whole_step() -> None:
    schema = oracle_schema(layers=4)
    config = OracleExecutor.Config(schema=schema, layers_per_group=2)
    inner = OracleExecutor(Arena(schema, columns=1, block_size=4), config)
    happened: list[object] = []
    executor = PacedExecutor(inner, MODEL, happened.append)
    plan = StepPlan(1, (piece(1, (1, 2, 3), 0, prefill=True),))
    output = executor.execute(plan, lambda start, end: happened.append((start, end)))
    half_s = pytest.approx((10_000 + 300 + 3) / 2 / 1e6)
    assert happened == [half_s, (0, 2), half_s, (2, 4)]
    assert output.tokens == {1: reference_tokens((1, 2, 3), "", GREEDY, 1, config)[0]}
