"""Attention over paged KV, as transformers' modules call it.

A decoder layer rotates its queries and keys and then calls `attention_function`, which stores the new keys and values
in the arena and lets a backend attend over the pages. The function keeps no state: what a step knows (pages, tables,
lengths) comes in as the one keyword `paged`, so that several engines may live in one process.

The function refuses every keyword that it does not implement. A model that asks for sinks or for a position bias would
otherwise run and be quietly wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from engine.attention.paged_kv import PagedKV, Span
from engine.base.errors import InvalidArgument

NAME = "triptych"
# What decoder layers pass along and attention has no use for: positions are in the rotated keys and in the spans.
_WITHOUT_EFFECT = frozenset({"position_ids", "use_cache", "output_attentions", "output_router_logits"})
# What asks for nothing beyond what we do. Of any other keyword only None does.
_NEUTRAL: dict[str, Any] = {"dropout": 0.0, "is_causal": True}


@dataclass(frozen=True, slots=True)
class Scores:
    """How one layer turns queries and keys into weights: softmax(softcap * tanh(scaling * q.k / softcap)).

    `window`: a token sees itself and the `window - 1` tokens before it; None: everything before it.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None


class Attend(Protocol):
    """One step's attention, bound to its spans. Legend: Q query heads, T packed tokens, D head dim.

    Layers of one model may differ in `scores`: whatever depends on the window (which blocks are read, masks) is made
    when a step first meets that window, and kept for the step's other layers.
    """

    def __call__(self, query_QTD: torch.Tensor, layer: int, scores: Scores) -> torch.Tensor:
        """Each token attends to its own sequence's KV up to itself; returns [T, Q, D]."""


class AttendWithLse(Attend, Protocol):
    """An `Attend` that can also say how much weight it dealt out. Two attentions of one query over disjoint keys then
    merge exactly, which is how entries that stand for evicted tokens take part (DESIGN 4):

        lse = logaddexp(lse_a, lse_b);  out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b
    """

    def with_lse(self, query_QTD: torch.Tensor, layer: int, scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
        """(out_TQD, lse_TQ): lse is float32, the natural logarithm of the sum of exp(score) over the keys seen."""


class AttentionBackend(Protocol):
    """A way to attend over pages. One whose `Attend` is an `AttendWithLse` says so by `prepare`'s return type."""

    def prepare(self, kv: PagedKV, spans: Sequence[Span]) -> Attend:
        """Build what does not depend on the layer (indices, masks) once per step, or on its first use."""


@dataclass(frozen=True, slots=True)
class StepAttention:
    """What attention needs to know about one step. Passed to each layer as the keyword `paged`."""

    kv: PagedKV
    rows_TH: torch.Tensor  # where the step's new keys go
    attend: Attend

    @classmethod
    def prepare(cls, kv: PagedKV, backend: AttentionBackend, spans: Sequence[Span]) -> "StepAttention":
        return cls(kv, kv.rows_of(spans), backend.prepare(kv, spans))


def attention_function(
    module: nn.Module,
    query_1QTD: torch.Tensor,
    key_1HTD: torch.Tensor,
    value_1HTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: StepAttention,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface. Keys come rotated; they are stored so, at their original positions."""
    _refuse_unknown(attention_mask=attention_mask, **keywords)
    layer: int = module.layer_idx  # type: ignore[assignment]
    scaling = query_1QTD.shape[-1] ** -0.5 if scaling is None else scaling  # transformers' default
    paged.kv.write(layer, paged.rows_TH, key_1HTD[0], value_1HTD[0])
    return paged.attend(query_1QTD[0], layer, Scores(scaling, sliding_window, softcap))[None], None


def use_paged_attention(model: Any) -> None:
    """Make this model call us. Its configuration is its own copy, so no other model in the process is touched.

    No mask function is registered under our name: transformers then builds no mask at all.
    """
    from transformers import AttentionInterface

    if not model._supports_attention_backend:
        raise InvalidArgument(
            f"model: {model.config.model_type} does not support transformers' AttentionInterface", field="model"
        )
    AttentionInterface.register(NAME, attention_function)
    model.config._attn_implementation = NAME


def _refuse_unknown(**keywords: Any) -> None:
    unknown = [name for name, value in keywords.items() if value is not None and not _is_neutral(name, value)]
    if unknown:
        raise InvalidArgument(
            f"model: its layers ask attention for {', '.join(sorted(unknown))}, which is not implemented", field="model"
        )


def _is_neutral(name: str, value: Any) -> bool:
    return name in _WITHOUT_EFFECT or (name in _NEUTRAL and bool(value == _NEUTRAL[name]))
