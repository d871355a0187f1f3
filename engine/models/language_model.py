"""The language half of a model that sees, called as transformers calls a model of text alone.

Everything that runs text models (runner, self-check, packing, capture) takes it as one of them: `config` is the text
configuration, and logits are the head's, as in the whole model's own forward.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast


class LanguageModel(nn.Module):
    """A decoder and the head over it. Dtype and device are those of the embedding, which nobody ever replaces."""

    def __init__(self, decoder: Any, lm_head: nn.Module) -> None:
        super().__init__()
        self.config = decoder.config
        self.decoder = decoder
        self.lm_head = lm_head
        self._supports_attention_backend: bool = decoder._supports_attention_backend

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding_VE.dtype

    @property
    def device(self) -> torch.device:
        return self._embedding_VE.device

    @property
    def _embedding_VE(self) -> torch.Tensor:
        weight_VE: torch.Tensor = self.get_input_embeddings().weight
        return weight_VE

    def get_input_embeddings(self) -> Any:
        return self.decoder.get_input_embeddings()

    def set_attn_implementation(self, name: str) -> None:
        self.decoder.set_attn_implementation(name)

    def forward(
        self, input_ids: torch.Tensor | None = None, *, logits_to_keep: int | torch.Tensor = 0, **keywords: Any
    ) -> CausalLMOutputWithPast:
        """`logits_to_keep`: so many last rows, 0 for all; or the indices of those to keep."""
        output = self.decoder(input_ids=input_ids, **keywords)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)
