"""Scheduler: misuse is refused loudly, and plans are pure. Behaviour is in scenarios/*.txt and test_core.py."""

import pytest

from engine.commands import Activate, AddPrefill, Reserve, StepFailed, StepOutput, StepPlan, TokensSampled
from engine.kv.allocator import ColumnAllocator
from engine.scheduler import Failure, Scheduler
from engine.types import SamplingParams


def scheduler(columns: int = 8, **config: int) -> Scheduler:
    return Scheduler(Scheduler.Config(block_size=4, **config), ColumnAllocator(columns, layers=1, heads=1))


def prefill(seq_id: int, tokens: int = 3, *, here: bool = False, max_tokens: int = 16) -> AddPrefill:
    return AddPrefill(
        seq_id=seq_id,
        token_ids=tuple(range(tokens)),
        prompt_tokens=tokens,
        sampling=SamplingParams(max_tokens=max_tokens),
        decode_here=here,
        tenant="acme",
    )


def activation(seq_id: int, tokens: int) -> Activate:
    return Activate(seq_id=seq_id, token_ids=(1,) * tokens, prompt_tokens=1, sampling=SamplingParams())


def planned(subject: Scheduler) -> StepPlan:
    plan = subject.plan(0)
    assert plan is not None
    return plan


@pytest.mark.parametrize(
    "config",
    [
        {"step_tokens": 0},
        {"step_sequences": 0},
        {"near_turn_tokens": 0},
        {"growth_reserve_tokens": -1},
        {"passes_max": -1},
        {"unbound_prefills_max": 0},
    ],
)
def test_config_refuses_budgets_that_stop_everything(config: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Scheduler.Config(**config)


def test_sequence_ids_are_never_reused() -> None:
    subject = scheduler()
    subject.add_prefill(prefill(1))
    with pytest.raises(ValueError, match="never reused"):
        subject.add_prefill(prefill(1))
    with pytest.raises(ValueError, match="never reused"):
        subject.reserve(Reserve(seq_id=1, context_tokens=1, growth_tokens=0))
    subject.check_integrity()


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        scheduler().add_prefill(prefill(1, tokens=0))


def test_activate_needs_a_reservation_that_is_large_enough() -> None:
    subject = scheduler()
    subject.add_prefill(prefill(1))
    with pytest.raises(ValueError, match="not RESERVED"):
        subject.activate(activation(1, tokens=3))
    subject.reserve(Reserve(seq_id=2, context_tokens=4, growth_tokens=0))
    with pytest.raises(ValueError, match="more KV than columns"):
        subject.activate(activation(2, tokens=6))


def test_a_slice_carries_what_the_executor_needs() -> None:
    subject = scheduler()
    subject.add_prefill(prefill(1, tokens=5))
    (piece,) = planned(subject).slices
    assert (piece.seq_id, piece.token_ids, piece.start, piece.tenant) == (1, (0, 1, 2, 3, 4), 0, "acme")
    assert piece.sampling == SamplingParams(max_tokens=16)
    assert (piece.sample_position, piece.is_prefill, len(piece.block_table)) == (0, True, 2)


def test_the_sampled_token_is_fed_next() -> None:
    subject = scheduler()
    subject.add_prefill(prefill(1, here=True))
    subject.apply(StepOutput(planned(subject).step_id, {1: 77}), 0)
    (piece,) = planned(subject).slices
    assert (piece.token_ids, piece.start, piece.sample_position) == ((77,), 3, 1)


def test_steps_are_numbered_from_one_and_idle_plans_do_not_count() -> None:
    subject = scheduler()
    assert subject.plan(0) is None
    subject.add_prefill(prefill(1))
    assert planned(subject).step_id == 1
    assert subject.load().steps == 1


def test_a_token_that_was_asked_for_and_not_given_is_a_failure() -> None:
    subject = scheduler(columns=16)
    subject.add_prefill(prefill(1, here=True))
    subject.add_prefill(prefill(2, here=True))
    subject.apply(StepOutput(planned(subject).step_id, {1: 7, 2: 7}), 0)
    events = subject.apply(StepOutput(planned(subject).step_id, {2: 8}), 0)
    assert [type(event) for event in events] == [StepFailed, TokensSampled]
    assert events[0] == StepFailed(seq_ids=(1,), reason=Failure.NO_TOKEN)


def test_a_step_ends_once() -> None:
    subject = scheduler()
    with pytest.raises(RuntimeError, match="no step"):
        subject.apply(StepOutput(1), 0)
    with pytest.raises(RuntimeError, match="no step"):
        subject.step_raised(0)


def test_integrity_check_sees_columns_of_nobody() -> None:
    allocator = ColumnAllocator(4, layers=1, heads=1)
    subject = Scheduler(Scheduler.Config(block_size=4), allocator)
    allocator.allocate(99, 1)
    with pytest.raises(RuntimeError, match="unknown sequences"):
        subject.check_integrity()


def test_integrity_check_sees_memory_that_went_away() -> None:
    allocator = ColumnAllocator(4, layers=1, heads=1)
    subject = Scheduler(Scheduler.Config(block_size=4), allocator)
    subject.add_prefill(prefill(1))
    subject.apply(StepOutput(planned(subject).step_id, {1: 7}), 0)
    subject.check_integrity()
    allocator.release(1)
    with pytest.raises(RuntimeError, match="tokens of KV in 0 columns"):
        subject.check_integrity()


def test_the_same_commands_give_the_same_plans() -> None:
    def run() -> list[StepPlan | None]:
        subject, plans = scheduler(columns=6, step_sequences=2), []
        for seq_id in range(1, 6):
            subject.add_prefill(prefill(seq_id, tokens=seq_id + 2, here=seq_id % 2 == 0, max_tokens=seq_id))
        for _ in range(12):
            plans.append(plan := subject.plan(0))
            if plan is not None:
                tokens = {piece.seq_id: 5 for piece in plan.slices if piece.sample_position is not None}
                subject.apply(StepOutput(plan.step_id, tokens), 0)
        return plans

    assert run() == run()
