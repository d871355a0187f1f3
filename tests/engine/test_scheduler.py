"""Scheduler: misuse is refused loudly, and plans are pure. Behaviour is in scenarios/*.txt and test_core.py."""

from dataclasses import replace

import pytest

from engine.base import limits
from engine.batching import Batch, Chunk, Prompt
from engine.commands import (
    Activate,
    AddPrefill,
    Branch,
    DecodeHere,
    Prefilled,
    Reserve,
    Sampled,
    SampledToken,
    StepFailed,
    StepOutput,
    StepPlan,
    TokensSampled,
)
from engine.kv.allocator import ColumnAllocator
from engine.scheduler import Failure, Scheduler
from engine.types import Constraint, ConstraintKind, FinishReason, SamplingParams, TokenLogprobs


class FixedBatching:
    """Gives the chunks that it is told to give."""

    def __init__(self, *chunks: tuple[int, int]) -> None:
        self.answer = [Chunk(*chunk) for chunk in chunks]
        self.batches: list[Batch] = []
        self.observed: list[tuple[int, int]] = []

    def chunks(self, batch: Batch) -> list[Chunk]:
        self.batches.append(batch)
        return self.answer

    def observe(self, plan: StepPlan, step_us: int) -> None:
        self.observed.append((plan.step_id, step_us))


def scheduler(columns: int = 8, batching: FixedBatching | None = None, **config: int) -> Scheduler:
    allocator = ColumnAllocator(columns, layers=1, heads=1)
    return Scheduler(Scheduler.Config(block_size=4, **config), allocator, batching)  # type: ignore[arg-type]


def prefill(seq_id: int, tokens: int = 3, *, here: bool = False, max_tokens: int = 16) -> AddPrefill:
    return AddPrefill(
        seq_id=seq_id,
        token_ids=tuple(range(tokens)),
        prompt_tokens=tokens,
        sampling=SamplingParams(max_tokens=max_tokens),
        decode_here=here,
        tenant="acme",
    )


def reservation(seq_id: int, tokens: int, growth: int = 0, children: tuple[int, ...] = ()) -> Reserve:
    return Reserve(seq_id=seq_id, token_ids=(1,) * tokens, growth_tokens=growth, children=children)


def activation(seq_id: int, tokens: int, *branch_ids: int) -> Activate:
    branches = tuple(Branch(seq_id=i, choice=n, token_id=5) for n, i in enumerate(branch_ids or (seq_id,)))
    return Activate(
        seq_id=seq_id, token_ids=(1,) * tokens, prompt_tokens=1, sampling=SamplingParams(), branches=branches
    )


def output(plan: StepPlan, **seq_tokens: int) -> StepOutput:
    """`s1=7`: sequence 1 sampled token 7."""
    return StepOutput(plan.step_id, {int(name[1:]): (Sampled(token),) for name, token in seq_tokens.items()})


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
        subject.reserve(reservation(1, tokens=1))
    with pytest.raises(ValueError, match="never reused"):
        subject.reserve(reservation(2, tokens=1, children=(3, 1)))
    with pytest.raises(ValueError, match="never reused"):
        subject.reserve(reservation(2, tokens=1, children=(2, 3)))
    subject.check_integrity()
    assert subject.seq_ids == (1,)


@pytest.mark.parametrize("bad", [{"token_ids": ()}, {"choices": ()}])
def test_an_empty_prompt_and_no_choice_are_refused(bad: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="at least one token and one choice"):
        scheduler().add_prefill(replace(prefill(1), **bad))


def test_a_group_names_one_child_per_choice() -> None:
    subject = scheduler()
    group = replace(prefill(1), choices=(0, 1))
    with pytest.raises(ValueError, match="names its children"):
        subject.add_prefill(replace(group, decode_here=True))
    subject.add_prefill(group)
    subject.add_prefill(prefill(9))
    for seq_id, children in ((1, ()), (1, (2,)), (1, (2, 3, 4)), (9, (2,))):
        with pytest.raises(ValueError, match="choices"):
            subject.decode_here(DecodeHere(seq_id=seq_id, children=children))
    subject.decode_here(DecodeHere(seq_id=1, children=(2, 3)))
    subject.decode_here(DecodeHere(seq_id=1, children=(2, 3)))  # again changes nothing
    assert subject.seq_ids == (1, 9, 2, 3)


def test_activate_needs_a_reservation_of_the_same_tokens_and_branches() -> None:
    subject = scheduler()
    subject.add_prefill(prefill(1))
    with pytest.raises(ValueError, match="not RESERVED"):
        subject.activate(activation(1, tokens=3))
    subject.reserve(reservation(2, tokens=4))
    with pytest.raises(ValueError, match="other tokens"):
        subject.activate(activation(2, tokens=6))
    subject.reserve(reservation(3, tokens=4, children=(4, 5)))
    for branch_id in (3, 2):
        with pytest.raises(ValueError, match="not reserved"):
            subject.activate(activation(3, 4, 4, branch_id))


def test_a_slice_carries_what_the_executor_needs() -> None:
    subject = scheduler()
    subject.add_prefill(prefill(1, tokens=5))
    (piece,) = planned(subject).slices
    assert (piece.seq_id, piece.token_ids, piece.start, piece.tenant) == (1, (0, 1, 2, 3, 4), 0, "acme")
    assert piece.sampling == SamplingParams(max_tokens=16)
    assert (piece.sample_position, piece.is_prefill, len(piece.block_table)) == (0, True, 2)
    assert (piece.choices, piece.prompt_tokens, piece.context) == ((0,), 5, [0, 1, 2, 3, 4])


def test_a_slice_refers_to_the_tokens_so_far_and_does_not_copy_them() -> None:
    subject = scheduler()
    subject.add_prefill(prefill(1, tokens=3, here=True))
    (first,) = planned(subject).slices
    subject.apply(StepOutput(1, {1: (Sampled(77),)}), 0)
    (second,) = planned(subject).slices
    assert second.context is first.context and list(second.context) == [0, 1, 2, 77]


def test_the_sampled_token_is_fed_next() -> None:
    subject = scheduler()
    subject.add_prefill(prefill(1, here=True))
    subject.apply(output(planned(subject), s1=77), 0)
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
    subject.apply(output(planned(subject), s1=7, s2=7), 0)
    events = subject.apply(output(planned(subject), s2=8), 0)
    assert [type(event) for event in events] == [TokensSampled, StepFailed]
    assert events[1] == StepFailed(seq_ids=(1,), reason=Failure.NO_TOKEN)


def test_a_group_needs_a_token_for_each_choice() -> None:
    subject = scheduler()
    subject.add_prefill(replace(prefill(1), choices=(0, 1)))
    events = subject.apply(output(planned(subject), s1=7), 0)
    assert events[-1] == StepFailed(seq_ids=(1,), reason=Failure.NO_TOKEN)


def test_tokens_carry_choice_position_and_logprobs() -> None:
    subject = scheduler()
    subject.add_prefill(replace(prefill(1), choices=(2, 5), prompt_tokens=1))
    logprobs = TokenLogprobs(-0.5, 1)
    _, event = subject.apply(StepOutput(planned(subject).step_id, {1: (Sampled(7, logprobs), Sampled(8))}), 0)
    tokens = (SampledToken(1, 2, 7, None, 2, logprobs), SampledToken(1, 2, 8, None, 5, None))
    assert event == Prefilled(seq_id=1, tokens=tokens)


def test_nothing_stops_before_min_tokens() -> None:
    subject = scheduler(eos_token_ids=frozenset({7}))  # type: ignore[arg-type]
    sampling = SamplingParams(max_tokens=16, min_tokens=2, stop_token_ids=(8,))
    subject.add_prefill(replace(prefill(1, here=True), sampling=sampling))
    ends: list[FinishReason | None] = []
    for token in (7, 8, 8):
        event = subject.apply(output(planned(subject), s1=token), 0)[-1]
        ends.append(event.tokens[0].finish)
    assert ends == [None, None, FinishReason.STOP]


# -- the batching seam -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("constraint", "finish"), [(None, None), (Constraint(ConstraintKind.JSON_OBJECT), "stop")])
def test_an_ignored_end_still_ends_what_is_complete(constraint: Constraint | None, finish: str | None) -> None:
    """A constraint allows an end only where the output is complete, and then nothing else may follow."""
    config = Scheduler.Config(block_size=4, eos_token_ids=frozenset({9}))
    subject = Scheduler(config, ColumnAllocator(8, layers=1, heads=1))
    sampling = SamplingParams(max_tokens=16, ignore_eos=True, constraint=constraint)
    subject.add_prefill(replace(prefill(1), sampling=sampling))
    events = subject.apply(StepOutput(planned(subject).step_id, {1: (Sampled(9),)}), 0)
    assert [token.finish for event in events if isinstance(event, Prefilled) for token in event.tokens] == [finish]


def test_batching_is_told_what_runs_and_what_waits() -> None:
    batching = FixedBatching((1, 3))
    subject = scheduler(columns=16, batching=batching, step_sequences=4)
    subject.add_prefill(prefill(1, here=True))
    subject.apply(output(planned(subject), s1=7), 2_500)
    subject.add_prefill(prefill(2, tokens=6))
    batching.answer = [Chunk(2, 4)]
    plan = planned(subject)
    assert [(piece.seq_id, piece.start, len(piece.token_ids)) for piece in plan.slices] == [(1, 3, 1), (2, 0, 4)]
    batch = batching.batches[-1]
    assert (batch.decode_contexts, batch.sequences_left) == ((4,), 3)
    assert batch.prompts == (Prompt(2, computed_tokens=0, uncomputed_tokens=6),)
    assert batching.observed == [(1, 2_500)]


def test_a_step_that_raised_is_not_observed() -> None:
    batching = FixedBatching((1, 3))
    subject = scheduler(batching=batching)
    subject.add_prefill(prefill(1))
    planned(subject)
    subject.step_raised(0)
    assert batching.observed == []


@pytest.mark.parametrize(
    "chunks", [((1, 0),), ((1, 4),), ((9, 1),), ((1, 1), (1, 1)), ((1, 1), (2, 1), (3, 1)), ()], ids=str
)
def test_chunks_that_cannot_be_are_refused(chunks: tuple[tuple[int, int], ...]) -> None:
    subject = scheduler(batching=FixedBatching(*chunks), step_sequences=2, unbound_prefills_max=9)
    for seq_id in (1, 2, 3):
        subject.add_prefill(prefill(seq_id))
    with pytest.raises(ValueError, match="batching"):
        subject.plan(0)


# -- costs -------------------------------------------------------------------------------------------------------------
def test_planning_does_not_look_at_all_prompts_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = scheduler(columns=2, passes_max=999, unbound_prefills_max=999)
    subject.add_prefill(prefill(1, tokens=8))
    planned(subject)
    subject.apply(StepOutput(1, {1: (Sampled(7),)}), 0)
    for seq_id in range(2, 102):
        subject.add_prefill(replace(prefill(seq_id, tokens=8), token_ids=(seq_id,) * 8))
    tries: list[int] = []
    match = ColumnAllocator.match
    monkeypatch.setattr(ColumnAllocator, "match", lambda *args: tries.append(1) or match(*args))
    assert subject.plan(0) is None
    assert len(tries) == limits.ADMISSION_TRIES_MAX


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


def test_integrity_check_sees_memory_of_a_sequence_that_waits() -> None:
    allocator = ColumnAllocator(4, layers=1, heads=1)
    subject = Scheduler(Scheduler.Config(block_size=4), allocator)
    subject.add_prefill(prefill(1))
    allocator.allocate(1, 1)
    with pytest.raises(RuntimeError, match="without KV"):
        subject.check_integrity()


def test_integrity_check_sees_memory_that_went_away() -> None:
    allocator = ColumnAllocator(4, layers=1, heads=1)
    subject = Scheduler(Scheduler.Config(block_size=4), allocator)
    subject.add_prefill(prefill(1))
    subject.apply(output(planned(subject), s1=7), 0)
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
                tokens = {piece.seq_id: (Sampled(5),) for piece in plan.slices if piece.sample_position is not None}
                subject.apply(StepOutput(plan.step_id, tokens), 0)
        return plans

    assert run() == run()
