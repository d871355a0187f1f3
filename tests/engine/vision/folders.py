"""Tiny checkpoints with other settings, and what transformers' own processor makes of an image of some size."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.image_processing_backends import PilBackend

from engine.vision.layout import ImageLayout
from tests.engine.vision.tiny_vlms import load_processor

Changes = Mapping[str, Any]
DROPPED = object()  # as a value: the key is left out
_TILED = frozenset({"idefics3", "smolvlm"})
_NESTED = frozenset({"vision_config", "text_config"})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to change in which file of a folder. `nested`: the image processor's settings move into
    processor_config.json, where transformers 5 saves them."""

    images: Changes = field(default_factory=dict)
    processor: Changes = field(default_factory=dict)
    config: Changes = field(default_factory=dict)
    nested: bool = False


def with_settings(folder: Path, changed: Settings, to: Path) -> Path:
    """A copy of `folder` with other settings."""
    shutil.copytree(folder, to)
    edit(to / "config.json", changed.config)
    edit(to / "preprocessor_config.json", changed.images)
    edit(to / "processor_config.json", changed.processor)
    if changed.nested:
        old = to / "preprocessor_config.json"
        edit(to / "processor_config.json", {"image_processor": json.loads(old.read_text())})
        old.unlink()
    return to


def edit(file: Path, changes: Changes) -> None:
    """Changes of "vision_config" and "text_config" go one level down."""
    file.write_text(json.dumps(_merged(json.loads(file.read_text()), changes)))


def _merged(old: Changes, changes: Changes) -> dict[str, Any]:
    new = dict(old)
    for key, value in changes.items():
        new[key] = _merged(old.get(key) or {}, value) if key in _NESTED and isinstance(value, Mapping) else value
    return {key: value for key, value in new.items() if value is not DROPPED}


class TransformersProcessor:
    """The family's own processor, and what it makes of an image of some size."""

    def __init__(self, folder: Path) -> None:
        self.processor = load_processor(folder)
        family = json.loads((folder / "config.json").read_text())["model_type"]
        self._tiles = {"return_row_col_info": True, "do_pad": False} if family in _TILED else {}

    def layout(self, width: int, height: int) -> ImageLayout:
        blank = np.broadcast_to(np.uint8(7), (height, width, 3))
        made = self.processor.image_processor(
            images=[blank],
            input_data_format="channels_last",
            do_rescale=False,
            do_normalize=False,
            **self._tiles,
        )
        text = self.processor.replace_image_token(made, 0)
        return ImageLayout(text, text.count(self.processor.image_token), self._grid(made))

    def _grid(self, made: Any) -> tuple[int, int]:
        if "image_grid_thw" not in made:
            return (0, 0)
        merge = self.processor.image_processor.merge_size
        time, rows, columns = (int(side) for side in made["image_grid_thw"][0])
        assert time == 1
        return (rows // merge, columns // merge)


def scale_no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are worked out as always, but pixels are blank: a hundred large images take no time."""

    def resize(self: Any, image: Any, size: Any, **_: Any) -> Any:
        return np.broadcast_to(np.uint8(7), (3, size.height, size.width))

    monkeypatch.setattr(PilBackend, "resize", resize)
