"""A model that sees, in two halves. A process loads the one that it runs; the other never takes memory there.

    llava   | vision_tower, multi_modal_projector |   | language_model, lm_head |
              `load_tower`: encodes images              `load_language_model`: prefills and decodes

A half is the family's own class of transformers, in which the other half's modules are None before weights are read.
So the family's renaming of weights, its tied weights and its `get_image_features` are transformers' own, and what we
know about a family is one line of a table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from engine.base.errors import InvalidArgument
from engine.models.loading import load_config, load_weights

if TYPE_CHECKING:
    from engine.models.language_model import LanguageModel


@dataclass(frozen=True, slots=True)
class Parts:
    """Where a family keeps its halves inside `model`, and along which axis it takes the pixels of several images."""

    language_model: str
    tower: tuple[str, ...]
    images_axis: int = 0


FAMILIES: Final[Mapping[str, Parts]] = {
    "llava": Parts("language_model", ("vision_tower", "multi_modal_projector")),
    "qwen2_vl": Parts("language_model", ("visual",)),
    "qwen2_5_vl": Parts("language_model", ("visual",)),
    "idefics3": Parts("text_model", ("vision_model", "connector"), images_axis=1),
    "smolvlm": Parts("text_model", ("vision_model", "connector"), images_axis=1),
}


def parts_of(config: Any) -> Parts:
    parts = FAMILIES.get(config.model_type)
    if parts is None:
        raise InvalidArgument(f"model: {config.model_type}: images of this family are not served", field="model")
    return parts


def load_language_model(path: Path, dtype: str) -> tuple["LanguageModel", Any]:
    """The half that reads and writes tokens, and the text configuration."""
    from engine.models.language_model import LanguageModel

    config = load_config(path)
    parts = parts_of(config)
    whole = load_weights(_without(config, [f"model.{name}" for name in parts.tower]), path, dtype)
    model = LanguageModel(getattr(whole.model, parts.language_model), whole.lm_head).eval()
    return model, model.config


def load_tower(path: Path, dtype: str) -> tuple[Any, Any]:
    """The half that has `get_image_features`, and the whole model's configuration."""
    config = load_config(path)
    parts = parts_of(config)
    tower = load_weights(_without(config, [f"model.{parts.language_model}", "lm_head"]), path, dtype, "sdpa")
    return tower, config


def _without(config: Any, dropped: Sequence[str]) -> Any:
    """The family's class without some of its modules.

    It is made inside `from_pretrained` on torch's meta device, so nothing of them is ever allocated. Name and module
    are the original's: by them transformers finds which weights have other names in older checkpoints.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    model_class: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]

    def __init__(self: Any, *args: Any, **keywords: Any) -> None:
        model_class.__init__(self, *args, **keywords)
        for name in dropped:
            owner, _, attribute = name.rpartition(".")
            setattr(self.get_submodule(owner), attribute, None)
        if self.lm_head is None:
            self.all_tied_weights_keys = {}  # both ends of the tie are in the other half

    return type(model_class.__name__, (model_class,), {"__init__": __init__, "__module__": model_class.__module__})
