"""Runs a transformers model layer by layer over a packed batch, with KV in the arena.

    slices -> packed tokens -> embed -> layers [0, g) -> on_layers(0, g) -> layers [g, 2g) -> ... -> logits

The runner decides nothing: which tokens, which columns and when is in the plan; attention is `engine.attention`; what
families do differently is their adapter; tokens are picked in `engine.sampling`. `verify` is how a model earns its
place: it must give the logits of its own eager forward.

Legend: T packed tokens, E hidden size, N rows that sample, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from engine.attention import AttentionBackend, StepAttention, use_paged_attention
from engine.attention.paged_kv import PagedKV, Span
from engine.attention.paged_sdpa import PagedSdpa
from engine.base import limits
from engine.base.errors import InvalidArgument
from engine.commands import SequenceSlice, StepPlan
from engine.executors import LayersComputed
from engine.kv.arena import Arena
from engine.models.family import FamilyAdapter
from engine.types import SamplingParams

# Largest logit difference that counts as rounding, relative to the largest logit. Wrong attention is off by far more.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
_VERIFY_TOKENS = 41
_VERIFY_FIRST_CHUNK = 18  # not a multiple of any block size: the second chunk starts inside a block


@dataclass(frozen=True, slots=True)
class PackedStep:
    """A plan's slices, one after the other without padding."""

    tokens_1T: torch.Tensor
    positions_1T: torch.Tensor
    spans: tuple[Span, ...]
    sampled_rows_N: torch.Tensor

    @classmethod
    def pack(cls, slices: Sequence[SequenceSlice]) -> "PackedStep":
        spans = tuple(_spans(slices))
        return cls(
            tokens_1T=torch.tensor([[token for piece in slices for token in piece.token_ids]]),
            positions_1T=torch.cat([torch.arange(span.start, span.length) for span in spans])[None],
            spans=spans,
            sampled_rows_N=torch.tensor(
                [
                    span.row + span.tokens - 1
                    for span, piece in zip(spans, slices, strict=True)
                    if piece.sample_position is not None
                ],
                dtype=torch.long,
            ),
        )


class ModelRunner:
    """One transformers model over one arena. The only thing that outlives a step is the arena's content."""

    def __init__(
        self,
        model: Any,
        adapter: FamilyAdapter,
        arena: Arena,
        layers_per_group: int = limits.LAYERS_PER_GROUP,
        backend: AttentionBackend | None = None,
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.arena = arena
        self._kv = PagedKV(arena)
        self._backend = backend or PagedSdpa()
        layers = len(adapter.layers)
        starts = range(0, layers, layers_per_group)
        self._groups = [(start, min(start + layers_per_group, layers)) for start in starts]
        use_paged_attention(model)

    def with_arena(self, arena: Arena) -> "ModelRunner":
        """The same model over other memory."""
        return ModelRunner(self.model, self.adapter, arena, self._groups[0][1], self._backend)

    @torch.inference_mode()
    def run(self, plan: StepPlan, on_layers: LayersComputed) -> torch.Tensor:
        """Compute the plan; logits_NV of the slices that sample, in plan order.

        `on_layers` is told of each group of layers if the step holds a prefill slice. A pure decode step has no hooks
        between layers (DESIGN 6), so that it can become one captured graph.
        """
        step = PackedStep.pack(plan.slices)
        paged = StepAttention.prepare(self._kv, self._backend, step.spans)
        announces = any(piece.is_prefill for piece in plan.slices)
        hidden_1TE = self.adapter.embed(step.tokens_1T)
        arguments = self.adapter.layer_arguments(hidden_1TE, step.positions_1T)
        for start, end in self._groups:
            for layer in self.adapter.layers[start:end]:
                hidden_1TE = layer(hidden_1TE, paged=paged, **arguments)
            if announces:
                on_layers(start, end)
        return self.adapter.logits(hidden_1TE[0, step.sampled_rows_N])


def _spans(slices: Sequence[SequenceSlice]) -> Iterator[Span]:
    row = 0
    for piece in slices:
        yield Span(row, len(piece.token_ids), piece.start, piece.block_table)
        row += len(piece.token_ids)


# -- self-check --------------------------------------------------------------------------------------------------------
def verify(runner: ModelRunner) -> None:
    """Refuse a model whose logits under our runner are not those of its own eager forward.

    The prompt runs as two chunks and a decode step, in memory of its own, and is longer than the model's window if it
    has one: Gemma-2 and gpt-oss are silently wrong when their attention is misread.
    """
    tokens = _verify_prompt(runner.model.config)
    cuts = (0, _VERIFY_FIRST_CHUNK, len(tokens) - 1, len(tokens))
    expected_NV = _eager_logits(runner.model, tokens)[[cut - 1 for cut in cuts[1:]]]
    actual_NV = _paged_logits(runner, tokens, cuts)
    scale = float(expected_NV.abs().max())
    difference = float((actual_NV - expected_NV).abs().max()) / scale
    tolerance = _TOLERANCE[runner.model.dtype]
    if not difference <= tolerance:  # NaN fails too
        raise InvalidArgument(
            f"model: {runner.model.config.model_type} differs from its own eager forward: largest logit difference is "
            f"{difference:.1e} of the largest logit, {tolerance:.0e} is allowed",
            field="model",
        )


def _verify_prompt(config: Any) -> list[int]:
    window = getattr(config, "sliding_window", None) or 0
    length = max(_VERIFY_TOKENS, window + _VERIFY_TOKENS)
    return [(7919 * position + 13) % config.vocab_size for position in range(length)]


@torch.inference_mode()
def _eager_logits(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    with _eager_attention(model):
        logits_TV: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits_TV.float()


@contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    ours = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = ours


def _paged_logits(runner: ModelRunner, tokens: Sequence[int], cuts: Sequence[int]) -> torch.Tensor:
    block_size = runner.arena.block_size
    columns = -(-len(tokens) // block_size)
    scratch = runner.with_arena(Arena(runner.arena.schema, columns=columns, block_size=block_size))
    table = tuple(reversed(range(columns)))  # not the identity: a runner that ignores tables must fail
    rows = []
    for start, end in pairwise(cuts):
        piece = SequenceSlice(0, tuple(tokens[start:end]), start, table, SamplingParams(), 0, is_prefill=False)
        rows.append(scratch.run(StepPlan(0, (piece,)), lambda start, end: None)[0])
    return torch.stack(rows).float()
