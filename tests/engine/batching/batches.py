"""Batches without a scheduler, and the plans that one would make of them."""

from collections.abc import Sequence

from engine.batching import Batch, Chunk, Prompt
from engine.commands import SequenceSlice, StepPlan
from engine.types import SamplingParams


def batch_of(prompts: Sequence[tuple[int, int]], decodes: tuple[int, ...] = (), sequences_left: int = 100) -> Batch:
    waiting = [Prompt(seq_id, computed, left) for seq_id, (computed, left) in enumerate(prompts)]
    return Batch(decodes, waiting, sequences_left)


def step_of(batch: Batch, chunks: Sequence[Chunk]) -> StepPlan:
    """The plan that a scheduler would make of it."""
    starts = {prompt.seq_id: prompt.computed_tokens for prompt in batch.prompts}
    decodes = [piece(-1 - index, context - 1, 1, prefill=False) for index, context in enumerate(batch.decode_contexts)]
    return StepPlan(1, (*decodes, *(piece(seq_id, starts[seq_id], tokens) for seq_id, tokens in chunks)))


def piece(seq_id: int, start: int, tokens: int, *, prefill: bool = True) -> SequenceSlice:
    return SequenceSlice(seq_id, (7,) * tokens, start, (), SamplingParams(), None, prefill)
