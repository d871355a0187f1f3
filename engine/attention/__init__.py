"""Attention over paged KV, as transformers' modules call it.

A decoder layer rotates its queries and keys and then calls `attention_function`, which stores the new keys and values
in the arena and lets a backend attend over the pages. The function keeps no state: what a step knows (pages, tables,
lengths) comes in as the one keyword `paged`, so that several engines may live in one process.

The function refuses every keyword that it does not implement. A model that asks for a soft cap, a window or sinks
would otherwise run and be quietly wrong.
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
_WITHOUT_EFFECT = frozenset({"position_ids", "use_cache"})


class Attend(Protocol):
    """One step's attention, bound to its spans. Legend: Q query heads, T packed tokens, D head dim."""

    def __call__(self, query_QTD: torch.Tensor, layer: int, scaling: float) -> torch.Tensor:
        """Each token attends to its own sequence's KV up to itself; returns [T, Q, D]."""


class AttentionBackend(Protocol):
    """A way to attend over pages: `sdpa` now; kernels that read pages in place later.

    A backend whose `Attend` can also return the log-sum-exp per query lets entries that stand for evicted tokens be
    merged exactly (DESIGN 4). None does yet, and no caller asks.
    """

    def prepare(self, kv: PagedKV, spans: Sequence[Span]) -> Attend:
        """Build what does not depend on the layer (indices, masks) once per step."""


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
    scaling: float,
    dropout: float = 0.0,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface. Keys come rotated; they are stored so, at their original positions."""
    _refuse_unknown({**keywords, "attention_mask": attention_mask, "dropout": dropout or None})
    layer: int = module.layer_idx  # type: ignore[assignment]
    paged.kv.write(layer, paged.rows_TH, key_1HTD[0], value_1HTD[0])
    return paged.attend(query_1QTD[0], layer, scaling)[None], None


def use_paged_attention(model: Any) -> None:
    """Make this model call us. Its configuration is its own copy, so no other model in the process is touched."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_function)
    model.config._attn_implementation = NAME


def _refuse_unknown(keywords: dict[str, Any]) -> None:
    unknown = [name for name, value in keywords.items() if value is not None and name not in _WITHOUT_EFFECT]
    if unknown:
        raise InvalidArgument(
            f"model: its layers ask attention for {', '.join(sorted(unknown))}, which is not implemented", field="model"
        )
