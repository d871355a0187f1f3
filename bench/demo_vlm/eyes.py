"""The part that is trained: LLaVA's vision tower and projector, under the names that they have in a checkpoint."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from engine.models.demo_vlm.assemble import read_config


class Eyes(nn.Module):
    """From pixels to what the language model reads."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        vision: Any = config.vision_config
        from_config: Any = AutoModel.from_config
        # eager: on CPUs the backward pass of fused attention takes twice as long for 37 tokens
        self.vision_tower: Any = from_config(vision, attn_implementation="eager")
        self.multi_modal_projector: Any = LlavaMultiModalProjector(config)
        self.side: int = vision.image_size
        self.image_tokens: int = config.image_seq_length
        self._layer: Any = config.vision_feature_layer

    def forward(self, pixels: Tensor) -> Tensor:
        """[pictures, image tokens, hidden], without the class token."""
        with torch.autocast("cpu", torch.bfloat16):
            seen = self.vision_tower(pixels, output_hidden_states=True).hidden_states[self._layer][:, 1:]
            said: Tensor = self.multi_modal_projector(seen)
        return said.float()

    def save(self, file: Path) -> None:
        save_file({name: tensor.to(torch.bfloat16).contiguous() for name, tensor in self.state_dict().items()}, file)

    def load(self, file: Path) -> None:
        self.load_state_dict(load_file(file))


def configuration(eyes: Path, language_model: Path) -> LlavaConfig:
    """Of the whole model, from its two folders."""
    return LlavaConfig(**read_config(eyes, language_model))
