"""PacedExecutor: the inner executor's tokens, at the model's pace."""

import pytest

from engine.commands import Sampled, SequenceSlice, StepPlan
from engine.executors.oracle import OracleExecutor, oracle_schema, reference_tokens
from engine.executors.paced import SMOLLM2_ONE_CORE, PacedExecutor, smollm2_schema
from engine.kv.arena import Arena
from engine.step_time import StepTimeModel
from engine.types import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
MODEL = StepTimeModel(step_us=10_000, prefill_token_us=100)


def piece(seq_id: int, token_ids: tuple[int, ...], start: int, *, prefill: bool, table=(0,)) -> SequenceSlice:
    return SequenceSlice(seq_id, token_ids, start, table, GREEDY, 0, prefill)


def test_the_model_without_a_measurement_is_smollm2s() -> None:
    """A lone decode takes as long as reading 270 MB on a core; a prompt's token a fiftieth of that."""
    decode_us = SMOLLM2_ONE_CORE(StepPlan(1, (piece(1, (7,), 99, prefill=False),)))
    prompt_us = SMOLLM2_ONE_CORE(StepPlan(1, (piece(1, (7,) * 256, 0, prefill=True),)))
    assert 15_000 < decode_us < 80_000
    assert 20 < 256 * decode_us / prompt_us < 100
    assert smollm2_schema().token_bytes == 30 * 2 * 3 * 64 * 2


def test_sleeps_between_layers_for_the_whole_step() -> None:
    schema = oracle_schema(layers=4)
    config = OracleExecutor.Config(schema=schema, layers_per_group=2)
    inner = OracleExecutor(Arena(schema, columns=1, block_size=4), config)
    happened: list[object] = []
    executor = PacedExecutor(inner, MODEL, happened.append)
    plan = StepPlan(1, (piece(1, (1, 2, 3), 0, prefill=True),))
    output = executor.execute(plan, lambda start, end: happened.append((start, end)))
    half_s = pytest.approx((10_000 + 300) / 2 / 1e6)
    assert happened == [half_s, (0, 2), half_s, (2, 4)]
    assert output.tokens == {1: (Sampled(reference_tokens((1, 2, 3), "", GREEDY, 1, config)[0]),)}
