"""Idefics3 and SmolVLM: a large image becomes tiles, row by row, and the whole image once more, small.

The arithmetic and the text of transformers' `Idefics3Processor` (SmolVLM's is a copy):

    <fake><row_1_col_1><image>..<image><fake><row_1_col_2><image>..<image>\\n
    <fake><row_2_col_1>...\\n
    \\n<fake><global-img><image>..<image><fake>
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine.base.errors import InvalidArgument
from engine.base.limits import IMAGE_RUNS_MAX
from engine.vision.folder import VisionFolder, count
from engine.vision.layout import ImageLayout

_IMAGE_TOKEN_ID = 128_257
_LONGEST_SIDE: Final = 4096  # nothing is scaled beyond it (transformers, `MAX_IMAGE_SIZE`)
_IMAGE_SEQ_LEN = 169
_TILE_PX, _LONGEST_EDGE_PX = 364, 4 * 364


@dataclass(frozen=True, slots=True)
class Tokens:
    image: str
    fake: str
    whole: str


@dataclass(frozen=True, slots=True)
class Idefics3Rule:
    """`longest_edge_px` is what the longer side is scaled to first; `sides_px`, if given, is what both are, (height,
    width)."""

    tokens: Tokens
    tile_features: int
    tile_px: int
    splits: bool
    longest_edge_px: int | None
    sides_px: tuple[int, int] | None

    def layout(self, width: int, height: int) -> ImageLayout:
        rows, columns = self._tiles(width, height) if self.splits else (0, 0)
        tiles = rows * columns + 1
        if tiles > IMAGE_RUNS_MAX:
            raise InvalidArgument(
                f"image: too large for this model, in more than {IMAGE_RUNS_MAX} tiles", field="image"
            )
        return ImageLayout(self._text(rows, columns), tiles * self.tile_features)

    def _tiles(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns; none if one tile holds the image."""
        height, width = self._scaled(height, width)
        rows, columns = _tiles_of(height, width, self.tile_px)
        return (rows, columns) if max(rows, columns) > 1 else (0, 0)

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        if self.sides_px is not None:
            return self.sides_px
        if self.longest_edge_px is None:
            return height, width
        return _at_most(*_scaled_to(height, width, self.longest_edge_px), _LONGEST_SIDE)

    def _text(self, rows: int, columns: int) -> str:
        tokens, images = self.tokens, self.tokens.image * self.tile_features
        tiles = "".join(
            "".join(f"{tokens.fake}<row_{row}_col_{column}>{images}" for column in range(1, columns + 1)) + "\n"
            for row in range(1, rows + 1)
        )
        gap = "\n" if rows else ""
        return f"{tiles}{gap}{tokens.fake}{tokens.whole}{images}{tokens.fake}"


# -- sizes, as transformers rounds them --------------------------------------------------------------------------------
def _scaled_to(height: int, width: int, longest_px: int) -> tuple[int, int]:
    """`_resize_output_size_rescale_to_max_len`: the shorter side becomes even."""
    aspect = width / height
    if width >= height:
        width, height = longest_px, _even(int(longest_px / aspect))
    else:
        width, height = _even(int(longest_px * aspect)), longest_px
    return max(height, 1), max(width, 1)


def _even(side_px: int) -> int:
    return side_px + side_px % 2


def _at_most(height: int, width: int, longest_px: int) -> tuple[int, int]:
    """`_resize_output_size_scale_below_upper_bound`."""
    aspect = width / height
    if width >= height and width > longest_px:
        width, height = longest_px, int(longest_px / aspect)
    elif height > width and height > longest_px:
        width, height = int(longest_px * aspect), longest_px
    return max(height, 1), max(width, 1)


def _tiles_of(height: int, width: int, tile_px: int) -> tuple[int, int]:
    """`resize_for_vision_encoder`: the longer side grows to whole tiles, and the shorter one with it, before it does
    the same."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile_px) * tile_px
        return math.ceil(int(width / aspect) / tile_px), width // tile_px
    height = math.ceil(height / tile_px) * tile_px
    return height // tile_px, math.ceil(int(height * aspect) / tile_px)


# -- settings ----------------------------------------------------------------------------------------------------------
def read_rule(folder: VisionFolder) -> Idefics3Rule:
    folder.require_processor(*_processors(folder.family))
    settings = {
        "do_resize": True,
        "do_image_splitting": True,
        "size": {"longest_edge": _LONGEST_EDGE_PX},
        "max_image_size": {"longest_edge": _TILE_PX},
        **folder.images,
    }
    if not isinstance(settings["max_image_size"], Mapping):
        raise folder.unsupported("a max_image_size that does not name longest_edge")
    tile_px = count(settings["max_image_size"], "longest_edge")
    longest_edge_px, sides_px = _first_size(folder, settings) if settings["do_resize"] else (None, None)
    return Idefics3Rule(
        tokens=_tokens(folder),
        tile_features=_tile_features(folder, tile_px),
        tile_px=tile_px,
        splits=bool(settings["do_image_splitting"]),
        longest_edge_px=longest_edge_px,
        sides_px=sides_px,
    )


def image_token(folder: VisionFolder) -> str:
    return _tokens(folder).image


def image_token_id(config: Mapping[str, Any]) -> int:
    return int(config.get("image_token_id", _IMAGE_TOKEN_ID))


def _processors(family: str) -> tuple[str, str]:
    """Published SmolVLM folders name either."""
    own, other = "Idefics3ImageProcessor", "SmolVLMImageProcessor"
    return (own, other) if family == "idefics3" else (other, own)


def _tokens(folder: VisionFolder) -> Tokens:
    """Idefics3's processor has fixed names; SmolVLM's asks the tokenizer."""
    image, fake, whole = "<image>", "<fake_token_around_image>", "<global-img>"
    if folder.processor.get("processor_class", "") == "Idefics3Processor" or folder.family == "idefics3":
        return Tokens(image, fake, whole)
    return Tokens(
        folder.special_token("image_token", image),
        folder.special_token("fake_image_token", fake),
        folder.special_token("global_image_token", whole),
    )


def _first_size(folder: VisionFolder, settings: Mapping[str, Any]) -> tuple[int | None, tuple[int, int] | None]:
    size = settings["size"]
    if isinstance(size, Mapping) and size.get("longest_edge"):
        return count(size, "longest_edge"), None
    if isinstance(size, Mapping) and size.get("height") and size.get("width"):
        return None, (count(size, "height"), count(size, "width"))
    raise folder.unsupported("a size that names neither longest_edge nor height and width")


def _tile_features(folder: VisionFolder, tile_px: int) -> int:
    """What the processor makes room for, which has to be what tower and connector say."""
    scale = count(folder.config, "scale_factor", 2)
    patches = tile_px // count(folder.vision, "patch_size", 32)
    room = count(folder.processor, "image_seq_len", _IMAGE_SEQ_LEN)
    folder.require_equal("the number of features of a tile", room, patches**2 // scale**2)
    return room
