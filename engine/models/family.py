"""What model families do differently, as a protocol of three methods, and which family a checkpoint belongs to.

An adapter names the parts of a transformers module; it computes nothing itself. The runner drives the parts, the
attention function serves them all. There is no forked model code behind this.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from engine.base.errors import InvalidArgument
from engine.models.llama import LlamaAdapter


class FamilyAdapter(Protocol):
    """A causal language model, cut between its layers. Legend: T packed tokens, E hidden size, N rows, V vocabulary."""

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder layers in order; each maps hidden_1TE to hidden_1TE."""

    def embed(self, tokens_1T: torch.Tensor) -> torch.Tensor:
        """Token ids to hidden_1TE."""

    def layer_arguments(self, hidden_1TE: torch.Tensor, positions_1T: torch.Tensor) -> Mapping[str, Any]:
        """Keyword arguments that every layer of this step gets (rotary tables and the like)."""

    def logits(self, hidden_NE: torch.Tensor) -> torch.Tensor:
        """Final norm and vocabulary projection of the rows that sample: logits_NV."""


# A family is listed once a test has run it against transformers' own generate (tests/engine/test_model_runner.py).
_FAMILIES: Mapping[str, Callable[[Any], FamilyAdapter]] = {
    "llama": LlamaAdapter,
    "mistral": LlamaAdapter,
    "qwen2": LlamaAdapter,
    "qwen3": LlamaAdapter,
}


def adapter_for(model: Any) -> FamilyAdapter:
    """The adapter of a loaded transformers model, by its configuration's `model_type`."""
    family = _FAMILIES.get(model.config.model_type)
    if family is None:
        known = ", ".join(sorted(_FAMILIES))
        raise InvalidArgument(
            f"model: family {model.config.model_type!r} is not supported; these are: {known}", field="model"
        )
    return family(model)
