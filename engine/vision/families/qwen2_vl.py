"""Qwen2-VL and Qwen2.5-VL: an image keeps its shape, in cells of 28 x 28 pixels, and each cell is a placeholder.

The arithmetic of transformers' `Qwen2VLImageProcessor` (`smart_resize`) and `Qwen2VLProcessor`. Rows and columns of
cells are the image's M-RoPE grid.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine.base.errors import InvalidArgument
from engine.vision.folder import VisionFolder, count
from engine.vision.layout import ImageLayout

ASPECT_MAX: Final = 200
_IMAGE_TOKEN = "<|image_pad|>"
_IMAGE_TOKEN_ID = 151_655
_MIN_PIXELS, _MAX_PIXELS = 56 * 56, 28 * 28 * 1280


@dataclass(frozen=True, slots=True)
class Qwen2VLRule:
    image_token: str
    cell_px: int
    min_pixels: int
    max_pixels: int

    def layout(self, width: int, height: int) -> ImageLayout:
        if max(width, height) / min(width, height) > ASPECT_MAX:
            raise InvalidArgument(
                f"image: the longer side may be at most {ASPECT_MAX} times the shorter one", field="image"
            )
        rows, columns = self._cells(width, height)
        return ImageLayout(self.image_token * (rows * columns), rows * columns, (rows, columns))

    def _cells(self, width: int, height: int) -> tuple[int, int]:
        """`smart_resize` to the letter: where it rounds and in which order it divides decides about a cell."""
        cell = self.cell_px
        rows, columns = round(height / cell), round(width / cell)
        pixels = rows * columns * cell * cell
        if pixels > self.max_pixels:
            shrink = math.sqrt((height * width) / self.max_pixels)
            return max(1, math.floor(height / shrink / cell)), max(1, math.floor(width / shrink / cell))
        if pixels < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            return math.ceil(height * grow / cell), math.ceil(width * grow / cell)
        return rows, columns


def read_rule(folder: VisionFolder) -> Qwen2VLRule:
    folder.require_processor("Qwen2VLImageProcessor")
    if not folder.images.get("do_resize", True):
        raise folder.unsupported("images that are not resized (do_resize)")
    merge = _agreed(folder, "merge_size", "spatial_merge_size", 2)
    patch = _agreed(folder, "patch_size", "patch_size", 14)
    _agreed(folder, "temporal_patch_size", "temporal_patch_size", 2)
    min_pixels, max_pixels = _pixels(folder)
    return Qwen2VLRule(image_token(folder), patch * merge, min_pixels, max_pixels)


def image_token(folder: VisionFolder) -> str:
    return folder.special_token("image_token", _IMAGE_TOKEN)


def image_token_id(config: Mapping[str, Any]) -> int:
    return int(config.get("image_token_id", _IMAGE_TOKEN_ID))


def _agreed(folder: VisionFolder, name: str, model_name: str, default: int) -> int:
    value = count(folder.images, name, default)
    folder.require_equal(name, value, count(folder.vision, model_name, default))
    return value


def _pixels(folder: VisionFolder) -> tuple[int, int]:
    """min_pixels and max_pixels, the old names, count before what `size` says."""
    size = folder.images.get("size") or {"shortest_edge": _MIN_PIXELS, "longest_edge": _MAX_PIXELS}
    if not isinstance(size, Mapping):
        raise folder.unsupported("a size that does not name shortest_edge and longest_edge")
    limits = {
        "shortest_edge": folder.images.get("min_pixels") or size.get("shortest_edge"),
        "longest_edge": folder.images.get("max_pixels") or size.get("longest_edge"),
    }
    low, high = count(limits, "shortest_edge"), count(limits, "longest_edge")
    if low > high:
        raise folder.unsupported("fewer pixels at most than at least (size)")
    return low, high
