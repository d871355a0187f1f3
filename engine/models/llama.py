"""Llama and the families whose module has the same parts: Mistral, Qwen2, Qwen3. SmolLM2 is a Llama.

What differs inside their layers (biases, query and key norms) is transformers' business. A layer that wants attention
we do not have (a sliding window) says so by a keyword, which the attention function refuses.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from engine.base.errors import InvalidArgument

# "dynamic" and "longrope" change their frequencies with the longest position that a *call* sees. Keys are stored
# rotated, so what a token's key is must not depend on which tokens were packed beside it.
_CONSTANT_ROPE = frozenset({"default", "linear", "llama3", "yarn"})


class LlamaAdapter:
    """embed_tokens -> rotary_emb -> layers -> norm -> lm_head."""

    def __init__(self, model: Any) -> None:
        self._model = model
        rope_type = model.config.rope_parameters["rope_type"]
        if rope_type not in _CONSTANT_ROPE:
            raise InvalidArgument(f"model: rope type {rope_type!r} depends on the length of a call", field="model")

    @property
    def layers(self) -> Sequence[nn.Module]:
        layers: Sequence[nn.Module] = self._model.model.layers
        return layers

    def embed(self, tokens_1T: torch.Tensor) -> torch.Tensor:
        hidden_1TE: torch.Tensor = self._model.model.embed_tokens(tokens_1T)
        return hidden_1TE

    def layer_arguments(self, hidden_1TE: torch.Tensor, positions_1T: torch.Tensor) -> Mapping[str, Any]:
        return {"position_embeddings": self._model.model.rotary_emb(hidden_1TE, positions_1T)}

    def logits(self, hidden_NE: torch.Tensor) -> torch.Tensor:
        logits_NV: torch.Tensor = self._model.lm_head(self._model.model.norm(hidden_NE))
        return logits_NV
