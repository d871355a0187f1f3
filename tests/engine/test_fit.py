"""engine.fit: what is measured, how often, and that medians of whole rounds come out."""

from collections import Counter
from dataclasses import replace

import pytest

from engine.base.errors import FailedPrecondition
from engine.commands import StepOutput, StepPlan
from engine.executors import LayersComputed
from engine.fit import FULL, QUICK, STANDARD, Effort, Grid, Step, measure, plan_of
from engine.step_time import SAMPLES_MIN, Kind, StepTimeModel, fit

MODEL = StepTimeModel(
    step_us=20_000,
    prefill_step_us=7_000,
    prefill_token_us=1_500,
    prefill_pair_us=0.25,
    decode_context_us=4,
    decode_sequence_us=900,
)
STEPS = [Step(prefill=((0, 8),)), Step(decodes=(5, 5)), Step(prefill=((4, 4),), decodes=(9,))]


class ModelledExecutor:
    """Takes as long as the model says on the clock that it carries, times what `slowness` says of its nth step."""

    def __init__(self, slowness: dict[int, float] | None = None) -> None:
        self.now_us = 0
        self.plans: list[StepPlan] = []
        self._slowness = slowness or {}

    def clock_us(self) -> int:
        return self.now_us

    def execute(self, plan: StepPlan, on_layers: LayersComputed) -> StepOutput:
        self.now_us += round(MODEL(plan) * self._slowness.get(len(self.plans), 1))
        self.plans.append(plan)
        return StepOutput(plan.step_id)


def measured(
    executor: ModelledExecutor, effort: Effort, steps: list[Step] | None = None, **more: object
) -> list[float]:
    samples = measure(
        executor,
        steps or STEPS,
        block_size=4,
        vocab_size=50,
        clock_us=executor.clock_us,
        effort=effort,
        **more,  # type: ignore[arg-type]
    )
    return [sample.step_us for sample in samples]


EXPECTED = [MODEL.predict(step.prefill, step.decodes) for step in STEPS]


# -- rounds ------------------------------------------------------------------------------------------------------------
def test_a_slow_first_round_and_a_slow_minute_do_not_count() -> None:
    executor = ModelledExecutor({0: 30, 1: 30, 2: 30, 3: 5, 4: 5})
    assert measured(executor, Effort(rounds=3)) == EXPECTED
    assert len(executor.plans) == 4 * len(STEPS)


def test_rounds_follow_each_other_whole() -> None:
    executor = ModelledExecutor()
    measured(executor, Effort(rounds=1))
    assert [plan.step_id for plan in executor.plans] == [0, 1, 2] * 2


def test_a_slow_machine_gets_fewer_rounds_but_not_too_few() -> None:
    executor = ModelledExecutor()
    assert measured(executor, Effort(rounds=50, rounds_min=3, limit_us=1)) == EXPECTED
    assert len(executor.plans) == (1 + 3) * len(STEPS)


def test_progress_counts_steps() -> None:
    told: list[tuple[int, int]] = []
    measured(ModelledExecutor(), Effort(rounds=1), progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(1, 7)]


def test_a_step_that_fails_is_an_error_not_a_time() -> None:
    class Failing(ModelledExecutor):
        def execute(self, plan: StepPlan, on_layers: LayersComputed) -> StepOutput:
            return replace(super().execute(plan, on_layers), failed={0: "nan_logits"})

    with pytest.raises(FailedPrecondition, match="nan_logits"):
        measured(Failing(), Effort(rounds=1))


def test_the_model_behind_the_times_is_found() -> None:
    executor = ModelledExecutor()
    steps = STANDARD.steps(sequence_tokens_max=8_192, kv_tokens_max=1 << 20)
    samples = measure(
        executor, steps, block_size=16, vocab_size=50, clock_us=executor.clock_us, effort=Effort(rounds=1)
    )
    model, error = fit(samples)
    assert list(model.coefficients) == pytest.approx(list(MODEL.coefficients), rel=1e-3)
    assert set(error.by_kind) == set(Kind)


# -- steps -------------------------------------------------------------------------------------------------------------
def test_a_plan_feeds_what_the_step_says() -> None:
    plan = plan_of(Step(prefill=((6, 3),), decodes=(9, 4)), 7, block_size=4, vocab_size=50)
    assert [(piece.start, len(piece.token_ids), piece.is_prefill) for piece in plan.slices] == [
        (8, 1, False),
        (3, 1, False),
        (6, 3, True),
    ]
    assert MODEL(plan) == MODEL.predict([(6, 3)], [9, 4])


def test_sequences_share_no_column_and_have_room() -> None:
    step = Step(prefill=((6, 3), (0, 4)), decodes=(9, 4))
    plan = plan_of(step, 7, block_size=4, vocab_size=50)
    uses = Counter(column for piece in plan.slices for column in piece.block_table)
    assert set(uses) == set(range(step.columns(4)))
    assert set(uses.values()) == {1}
    assert all(4 * len(piece.block_table) >= piece.start + len(piece.token_ids) for piece in plan.slices)


def test_tokens_are_many_different_ones_of_the_vocabulary() -> None:
    (piece,) = plan_of(Step(prefill=((10, 40),)), 7, block_size=4, vocab_size=1_000).slices
    assert piece.token_ids == tuple(piece.context[10:])
    assert len(set(piece.context)) == 50
    assert all(0 <= token < 1_000 for token in piece.context)


@pytest.mark.parametrize("grid", [QUICK, STANDARD, FULL])
def test_what_model_and_memory_do_not_allow_is_left_out(grid: Grid) -> None:
    steps = grid.steps(sequence_tokens_max=600, kv_tokens_max=2_000)
    assert SAMPLES_MIN <= len(steps) < len(grid.steps(sequence_tokens_max=1 << 20, kv_tokens_max=1 << 30))
    assert all(max(step.sequence_tokens) <= 600 and sum(step.sequence_tokens) <= 2_000 for step in steps)
