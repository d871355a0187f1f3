"""Prepacking: whole prompts of different lengths in one step, without a padding token.

Zhao et al., "Prepacking: A Simple Method for Fast Prefilling and Increased Throughput in Large Language Models",
arXiv 2404.09529. The paper concatenates prompts into rows of one length, under a block-diagonal mask and with positions
that restart, instead of padding each to the longest. Here a step *is* one row of variable length: no mask, the last
token of a prompt included, KV written straight to each prompt's columns. What is left of the method is the choice of
prompts: those that fill the step's budget best, first-fit-decreasing, each computed whole.

    budget    | oldest prompt | longest that fits | next that fits | ... |       (decodes come before them)

- The oldest prompt is in every step, so nobody starves; younger ones may pass while it is computed.
- A prompt longer than the budget is chunked once it is the oldest: it then has the step for itself.
- Prompts with a cached or computed beginning count with what is left of them.

That packed logits are each prompt's own is the runner's promise, tested where the runner is
(`tests/engine/test_model_runner.py`). `pack_rows` is for backends whose rows have a fixed size, such as CUDA graphs.

The published packing leaves out each prompt's last token and loses prompts of one token (their empty segments share a
key); it fills bins of the longest prompt's length, here the capacity is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from engine.base.errors import InvalidArgument
from engine.batching import Batch, BatchingConfig, Chunk, Prompt, batchings, oldest_chunk, prefill_budget
from engine.commands import StepPlan


@batchings.register("prepacking")
class Prepacking:
    """Whole prompts, packed."""

    paper: ClassVar[str] = "Prepacking: A Simple Method for Fast Prefilling and Increased Throughput (arXiv 2404.09529)"
    loses: ClassVar[str] = "order of arrival: shorter prompts may pass longer ones, never the oldest"
    needs: ClassVar[tuple[str, ...]] = ()
    composes_with: ClassVar[str] = "everything"

    @dataclass(frozen=True, kw_only=True)
    class Config(BatchingConfig):
        """Nothing beyond what every method is told. The bound and the model are ignored."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def chunks(self, batch: Batch) -> list[Chunk]:
        budget = prefill_budget(self._config.step_tokens, len(batch.decode_contexts))
        first = oldest_chunk(batch, budget, self._config.align_tokens)
        left = budget - sum(chunk.tokens for chunk in first)
        return first + _largest_that_fit(batch.prompts[1:], left, batch.sequences_left - len(first))

    def observe(self, plan: StepPlan, step_us: int) -> None:
        """Nothing to learn: the budget is fixed."""


def _largest_that_fit(prompts: Sequence[Prompt], budget_tokens: int, sequences_left: int) -> list[Chunk]:
    """First-fit-decreasing into one bin; of equally long prompts the older comes first."""
    chunks: list[Chunk] = []
    for prompt in sorted(prompts, key=_decreasing):
        if len(chunks) < sequences_left and prompt.uncomputed_tokens <= budget_tokens:
            chunks.append(Chunk(prompt.seq_id, prompt.uncomputed_tokens))
            budget_tokens -= prompt.uncomputed_tokens
    return chunks


def _decreasing(prompt: Prompt) -> int:
    return -prompt.uncomputed_tokens


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` by row, so that no row holds more than `capacity`: first-fit-decreasing.

    At most 11/9 of the fewest rows possible, and one more. How many rows, and how full, depends on the lengths alone
    and not on their order. Each row lists its longest first.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise InvalidArgument(f"lengths[{index}]: must be in [1, {capacity}], got {length}", field="lengths")
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        row = next((row for row, left in enumerate(room) if lengths[index] <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows
