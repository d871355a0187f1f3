"""Measures engine steps over a grid: the samples that `step_time.fit` makes a model of.

Whole grids are run round after round, so that a slow minute of the machine spreads over all steps instead of falling on
a few; the first round warms up and does not count, and each step's time is its median. The KV that steps read is
whatever the arena holds: how long attention takes does not depend on its values.

It neither loads models nor knows torch: it is handed an executor, an arena's block size and a clock.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from engine.base.errors import FailedPrecondition
from engine.commands import SequenceSlice, StepPlan
from engine.executors import Executor
from engine.step_time import Sample
from engine.types import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


class Step(NamedTuple):
    """What a step holds, in the words of `StepTimeModel.predict`."""

    prefill: tuple[tuple[int, int], ...] = ()
    decodes: tuple[int, ...] = ()

    @property
    def sequence_tokens(self) -> tuple[int, ...]:
        """Tokens that each sequence has when the step is over; decodes come first."""
        return (*self.decodes, *(start + tokens for start, tokens in self.prefill))

    def columns(self, block_size: int) -> int:
        return sum(_columns(tokens, block_size) for tokens in self.sequence_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Which steps are measured: every chunk at every start, every batch at every context, and both kinds together."""

    chunks: tuple[int, ...] = (16, 64, 128, 256, 512)
    starts: tuple[int, ...] = (0, 512, 1_024)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    contexts: tuple[int, ...] = (64, 256, 1_024)
    mixed_chunks: tuple[int, ...] = (32, 224)
    mixed_batches: tuple[int, ...] = (2, 8)
    mixed_contexts: tuple[int, ...] = (128, 512)

    def steps(self, *, sequence_tokens_max: int, kv_tokens_max: int) -> list[Step]:
        """Those that the model and the memory at hand allow."""
        return [
            step
            for step in self._all()
            if max(step.sequence_tokens) <= sequence_tokens_max and sum(step.sequence_tokens) <= kv_tokens_max
        ]

    def _all(self) -> Iterable[Step]:
        for tokens, start in product(self.chunks, self.starts):
            yield Step(prefill=((start, tokens),))
        for batch, context in product(self.batches, self.contexts):
            yield Step(decodes=(context,) * batch)
        for tokens, batch, context in product(self.mixed_chunks, self.mixed_batches, self.mixed_contexts):
            yield Step(prefill=((context, tokens),), decodes=(context,) * batch)


QUICK = Grid(
    chunks=(32, 256), starts=(0, 512), batches=(1, 4, 8), contexts=(64, 512), mixed_chunks=(128,), mixed_batches=(4,)
)
STANDARD = Grid()
FULL = Grid(
    chunks=(16, 32, 64, 128, 256, 512, 1_024),
    starts=(0, 256, 1_024, 4_096),
    batches=(1, 2, 4, 8, 16, 32),
    contexts=(64, 256, 1_024, 4_096),
    mixed_chunks=(32, 128, 480),
    mixed_batches=(1, 4, 16),
    mixed_contexts=(128, 1_024),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How often the grid is run: `rounds` times, or fewer, but not fewer than `rounds_min`, where that takes longer."""

    rounds: int = 7
    rounds_min: int = 3
    limit_us: int = 60_000_000


def measure(
    executor: Executor,
    steps: Sequence[Step],
    *,
    block_size: int,
    vocab_size: int,
    clock_us: Callable[[], int],
    effort: Effort,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Sample]:
    """Each step's median time. `progress` is told (steps run, steps in all) after each; it may end before all are."""
    plans = [plan_of(step, step_id, block_size, vocab_size) for step_id, step in enumerate(steps)]
    times_us: list[list[int]] = [[] for _ in steps]
    began_us = clock_us()
    for round_ in range(1 + effort.rounds):
        for index, plan in enumerate(plans):
            took_us = _run(executor, plan, clock_us)
            if round_ > 0:
                times_us[index].append(took_us)
            progress(round_ * len(plans) + index + 1, (1 + effort.rounds) * len(plans))
        if round_ >= effort.rounds_min and clock_us() - began_us >= effort.limit_us:
            break
    return [
        Sample(prefill=step.prefill, decodes=step.decodes, step_us=statistics.median(times))
        for step, times in zip(steps, times_us, strict=True)
    ]


def _run(executor: Executor, plan: StepPlan, clock_us: Callable[[], int]) -> int:
    began_us = clock_us()
    output = executor.execute(plan, lambda start, end: None)
    took_us = clock_us() - began_us
    if output.failed:
        raise FailedPrecondition(
            f"the model cannot be measured: a step failed with {next(iter(output.failed.values()))}"
        )
    return took_us


def plan_of(step: Step, step_id: int, block_size: int, vocab_size: int) -> StepPlan:
    """Decodes, then chunks, on columns 0, 1, 2 ...: no two sequences share any, as their KV must come from memory."""
    slices: list[SequenceSlice] = []
    column = 0
    fed = [*((context - 1, 1) for context in step.decodes), *step.prefill]
    for seq_id, (start, tokens) in enumerate(fed):
        count = _columns(start + tokens, block_size)
        table = tuple(range(column, column + count))
        slices.append(_slice(seq_id, start, tokens, table, vocab_size, is_prefill=seq_id >= len(step.decodes)))
        column += count
    return StepPlan(step_id, tuple(slices))


def _slice(
    seq_id: int, start: int, tokens: int, table: tuple[int, ...], vocab_size: int, *, is_prefill: bool
) -> SequenceSlice:
    """Every slice samples, as a decode and a prompt's last chunk do. Its tokens are many different ones, because
    embeddings and experts are not in cache for one that repeats."""
    context = tuple((seq_id * 7_919 + position * 104_729) % vocab_size for position in range(start + tokens))
    return SequenceSlice(
        seq_id,
        context[start:],
        start,
        table,
        GREEDY,
        sample_position=0 if is_prefill else 1,
        is_prefill=is_prefill,
        context=context,
        prompt_tokens=len(context) if is_prefill else len(context) - 1,
    )


def _columns(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)
