"""The files of a checkpoint that decide how its images are prepared, read in the places where transformers reads them.

Old folders keep the image processor's settings in preprocessor_config.json, new ones nested in processor_config.json,
which wins (transformers 5, `ImageProcessingMixin.get_image_processor_dict`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.base.errors import InvalidArgument
from engine.models.files import read_json, read_json_if_there

_BACKENDS = ("Fast", "Pil")  # of one and the same processor


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionFolder:
    """`config` is the model's, `images` the image processor's, `processor` what is around it; `tokenizer` its
    tokenizer_config.json."""

    family: str
    config: Mapping[str, Any]
    images: Mapping[str, Any]
    processor: Mapping[str, Any]
    tokenizer: Mapping[str, Any]

    @property
    def vision(self) -> Mapping[str, Any]:
        return self.config.get("vision_config") or {}

    def special_token(self, name: str, default: str) -> str:
        """What the tokenizer calls by `name`, which is where processors look first."""
        named = self.tokenizer.get("extra_special_tokens")
        value = (named.get(name) if isinstance(named, Mapping) else None) or self.tokenizer.get(name) or default
        return str(value["content"] if isinstance(value, Mapping) else value)

    def require_processor(self, *names: str) -> str:
        """Which of `names` prepares the images; the first if the folder does not say. Others are refused."""
        name = str(self.images.get("image_processor_type") or names[0])
        for backend in _BACKENDS:
            name = name.removesuffix(backend)
        if name not in names:
            raise self.unsupported(f"images prepared by {name}")
        return name

    def require_equal(self, what: str, processor: Any, model: Any) -> None:
        if processor != model:
            raise self.unsupported(f"{what} is {processor} to the processor and {model} to the model")

    def unsupported(self, what: str) -> InvalidArgument:
        return InvalidArgument(f"model: {self.family}: {what}: not supported", field="model")


def read_folder(path: Path, config: Mapping[str, Any]) -> VisionFolder:
    processor = read_json_if_there(path / "processor_config.json")
    nested = processor.get("image_processor")
    return VisionFolder(
        family=config["model_type"],
        config=config,
        images=nested if isinstance(nested, Mapping) else read_json(path / "preprocessor_config.json"),
        processor={key: value for key, value in processor.items() if not isinstance(value, Mapping)},
        tokenizer=read_json_if_there(path / "tokenizer_config.json"),
    )


def count(settings: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A number of at least 1 under `name`; a missing one is `default`."""
    value = settings.get(name, default)
    if isinstance(value, list) and value and value.count(value[0]) == len(value):
        value = value[0]  # [14, 14]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidArgument(f"model: {name}: a number of at least 1 is needed", field="model")
    return value
