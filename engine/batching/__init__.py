"""Batching: how many tokens of which prompts the next step computes beside the decodes. One file per published method.

The scheduler owns sequences, memory and order of arrival. In each step it says what runs and what waits (`Batch`) and
gets back a list of chunks; a method sees no token ids, columns or clocks, and decides nothing else.

    step      d d d d | chunk of prompt 7 | chunk of prompt 8
              decodes   `chunks(batch)`, in this order

Three promises that every method keeps, so that none can stall or starve anybody (`tests/contracts/test_batchings.py`):

- every decode runs in every step: methods choose prompts' tokens and have no way to hold a decode back;
- the oldest prompt advances in every step that has room for a sequence, however many decodes there are;
- the same batch gives the same chunks as long as nothing was observed in between.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from engine.base import limits
from engine.base.errors import InvalidArgument
from engine.base.registry import Registry
from engine.commands import StepPlan
from engine.step_time import StepTimeModel


@dataclass(frozen=True, slots=True)
class Prompt:
    """A sequence that has its memory and is not all computed yet. Also a preempted one that is computed again.

    tokens   0 ......... computed_tokens ......... computed_tokens + uncomputed_tokens
    KV       | in columns (or cached) | to be computed |
    """

    seq_id: int
    computed_tokens: int
    uncomputed_tokens: int  # at least 1


@dataclass(frozen=True, slots=True)
class Batch:
    """What a step may consist of."""

    decode_contexts: tuple[int, ...]  # tokens that each decode of this step attends to; they all run
    prompts: Sequence[Prompt]  # the one whose turn is next comes first
    sequences_left: int  # how many prompts may be in this step


class Chunk(NamedTuple):
    """The next `tokens` uncomputed tokens of a prompt."""

    seq_id: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """What every method is told. A method's own `Config` adds fields that have defaults."""

    step_tokens: int = limits.STEP_TOKENS_MAX  # no step has more, but see `prefill_budget`
    tbt_slo_ms: float | None = None  # time between two tokens of a running sequence that is still good
    model: StepTimeModel | None = None  # measured; without it no step's duration is predicted
    align_tokens: int = 1  # a chunk that is not its prompt's last ends at a multiple of this: the block size
    tile_tokens: int = limits.STEP_TILE_TOKENS

    def __post_init__(self) -> None:
        for name in ("step_tokens", "align_tokens", "tile_tokens"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name}: must be >= 1, got {getattr(self, name)}", field=name)
        if self.tbt_slo_ms is not None and not 0 < self.tbt_slo_ms < float("inf"):
            raise InvalidArgument(f"tbt_slo_ms: must be above 0, got {self.tbt_slo_ms}", field="tbt_slo_ms")


class Batching(Protocol):
    """A method. One per engine, called between two steps on the engine's thread."""

    Config: ClassVar[type[BatchingConfig]]
    paper: ClassVar[str]
    loses: ClassVar[str]  # what becomes worse for whom, in words for METHODS.md; tokens are never changed
    needs: ClassVar[tuple[str, ...]]  # beside the batch: "step-time model", "tbt_slo_ms"
    composes_with: ClassVar[str]

    def __init__(self, config: Any) -> None:
        """`config` is a `Config` of this class."""

    def chunks(self, batch: Batch) -> list[Chunk]:
        """This step's chunks: one at most per prompt, `batch.sequences_left` at most, none of zero tokens."""

    def observe(self, plan: StepPlan, step_us: int) -> None:
        """A step is over and took this long."""


batchings: Registry[type[Batching]] = Registry("engine.batching", kind="batching", group="triptych.batching")


def build(
    name: str,
    *,
    step_tokens: int = limits.STEP_TOKENS_MAX,
    tbt_slo_ms: float | None = None,
    model: StepTimeModel | None = None,
    align_tokens: int = 1,
    tile_tokens: int = limits.STEP_TILE_TOKENS,
) -> Batching:
    """The method of this name. Raises `InvalidArgument` for names and numbers that cannot be."""
    kind = batchings.get(name)
    config = kind.Config(
        step_tokens=step_tokens,
        tbt_slo_ms=tbt_slo_ms,
        model=model,
        align_tokens=align_tokens,
        tile_tokens=tile_tokens,
    )
    return kind(config)


# -- what several methods share ----------------------------------------------------------------------------------------
def prefill_budget(step_tokens: int, decodes: int) -> int:
    """What `decodes` leave of a step's tokens for prompts, and an eighth of the step's where they leave less.

    A plain difference turns negative when there are more decodes than tokens, and then no prompt advances until some
    of them end. The eighth keeps prompts moving at a bounded price: a step never has more tokens than `step_tokens`,
    or its decodes and that eighth, whichever is more.
    """
    return max(step_tokens - decodes, step_tokens // 8, 1)


def first_come_first_served(
    prompts: Sequence[Prompt], budget_tokens: int, sequences_left: int, align_tokens: int = 1
) -> list[Chunk]:
    """Whole prompts in order while they fit, then the part that fits of the next one."""
    chunks: list[Chunk] = []
    for prompt in prompts[: max(sequences_left, 0)]:
        tokens = fitting_tokens(prompt, budget_tokens, align_tokens)
        if tokens < 1 and not chunks:
            tokens = budget_tokens
        if tokens < 1:
            break
        chunks.append(Chunk(prompt.seq_id, tokens))
        budget_tokens -= tokens
        if tokens < prompt.uncomputed_tokens:
            break  # what alignment left over is less than a block
    return chunks


def oldest_chunk(batch: Batch, budget_tokens: int, align_tokens: int = 1) -> list[Chunk]:
    """What the oldest prompt gets when it comes first; nothing where there is none, or no room for it."""
    return first_come_first_served(batch.prompts[:1], budget_tokens, batch.sequences_left, align_tokens)


def fitting_tokens(prompt: Prompt, budget_tokens: int, align_tokens: int) -> int:
    """All of the prompt if the budget allows, else up to the last block's border *of the prompt* within it; perhaps 0.

    Borders are counted from position 0 and not from the chunk's start. After a prefix-cache hit, or a chunk beside
    many decodes, the start may be anywhere; prefix cache, frames and lossy codecs want blocks that one step completed.
    """
    if prompt.uncomputed_tokens <= budget_tokens:
        return prompt.uncomputed_tokens
    end = prompt.computed_tokens + budget_tokens
    return max(end - end % align_tokens - prompt.computed_tokens, 0)
