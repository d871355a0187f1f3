"""LLaVA: every image becomes a square of one size, whatever it was, and so always the same number of placeholders.

The arithmetic of transformers' `LlavaProcessor`, with towers and image processors of CLIP and SigLIP.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.vision.folder import VisionFolder, count
from engine.vision.layout import ImageLayout, require_prepared

IMAGE_TOKEN = "<image>"
_IMAGE_TOKEN_ID = 32_000
_UNNAMED_TOWER = {"image_size": 336, "patch_size": 14}  # of a configuration that says nothing about vision


@dataclass(frozen=True, slots=True)
class _Tower:
    """Defaults of a kind of tower; `extra` is what it says beside one feature for each patch (CLIP's class token)."""

    image_size: int
    patch_size: int
    extra: int


_TOWERS: Mapping[str, _Tower] = {
    "clip_vision_model": _Tower(image_size=224, patch_size=32, extra=1),
    "siglip_vision_model": _Tower(image_size=224, patch_size=16, extra=0),
}
_CLIP_SIZES: Mapping[str, Any] = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
}
# What an image processor does where its file is silent. The first one is meant where no file names any.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "LlavaImageProcessor": _CLIP_SIZES,
    "CLIPImageProcessor": _CLIP_SIZES,
    "SiglipImageProcessor": {"size": {"height": 224, "width": 224}},
}


@dataclass(frozen=True, slots=True)
class LlavaRule:
    """`shortest_edge_px` is what the shorter side is scaled to before the crop (None: both sides are given)."""

    image_token: str
    features: int
    shortest_edge_px: int | None
    pads_to_square: bool

    def layout(self, width: int, height: int) -> ImageLayout:
        require_prepared(self._prepared_pixels(width, height))
        return ImageLayout(self.image_token * self.features, self.features)

    def _prepared_pixels(self, width: int, height: int) -> int:
        shorter, longer = sorted((width, height))
        if self.pads_to_square:
            return longer * longer
        if self.shortest_edge_px is None:
            return 0
        return self.shortest_edge_px * (self.shortest_edge_px * longer // shorter)


def read_rule(folder: VisionFolder) -> LlavaRule:
    kind = folder.require_processor(*_DEFAULTS)
    settings = {"do_resize": True, "do_pad": False, **_DEFAULTS[kind], **folder.images}
    if settings["do_pad"] and kind != "LlavaImageProcessor":
        raise folder.unsupported(f"{kind} with do_pad")
    size = settings["size"] if isinstance(settings["size"], Mapping) else {"shortest_edge": settings["size"]}
    side_px = _prepared_side(folder, settings, size)
    folder.require_equal("the number of features of an image", _room(folder, side_px), _said(folder, side_px))
    return LlavaRule(
        image_token=image_token(folder),
        features=_room(folder, side_px),
        shortest_edge_px=count(size, "shortest_edge") if settings["do_resize"] and "shortest_edge" in size else None,
        pads_to_square=bool(settings["do_pad"]),
    )


def image_token(folder: VisionFolder) -> str:
    return folder.special_token("image_token", str(folder.processor.get("image_token") or IMAGE_TOKEN))


def image_token_id(config: Mapping[str, Any]) -> int:
    return int(config.get("image_token_index", config.get("image_token_id", _IMAGE_TOKEN_ID)))


# -- settings ----------------------------------------------------------------------------------------------------------
def _prepared_side(folder: VisionFolder, settings: Mapping[str, Any], size: Mapping[str, Any]) -> int:
    """What each image becomes, on both sides."""
    if settings.get("do_center_crop"):
        crop = settings.get("crop_size")
        size = crop if isinstance(crop, Mapping) else {"height": crop, "width": crop}
    elif not settings["do_resize"]:
        size = {}
    if "height" not in size or size["height"] != size.get("width"):
        raise folder.unsupported("images that do not all become one square (no crop, or one that is no square)")
    return count(size, "height")


def _room(folder: VisionFolder, side_px: int) -> int:
    """The features that the processor makes room for."""
    if not folder.processor.get("patch_size"):
        raise folder.unsupported("a processor_config.json without patch_size")
    patches = (side_px // count(folder.processor, "patch_size")) ** 2
    extra = int(folder.processor.get("num_additional_image_tokens") or 0)
    return patches + extra - _dropped(folder.processor.get("vision_feature_select_strategy"))


def _said(folder: VisionFolder, side_px: int) -> int:
    """The features that come out of the tower."""
    vision = folder.vision or _UNNAMED_TOWER
    kind = str(vision.get("model_type", "clip_vision_model"))
    if kind not in _TOWERS:
        raise folder.unsupported(f"a vision tower of type {kind}")
    tower = _TOWERS[kind]
    folder.require_equal("the side of an image", side_px, count(vision, "image_size", tower.image_size))
    patches = (side_px // count(vision, "patch_size", tower.patch_size)) ** 2
    return patches + tower.extra - _dropped(folder.config.get("vision_feature_select_strategy", "default"))


def _dropped(strategy: Any) -> int:
    """ "default" leaves out the first feature, which is the class token's; "full" takes all."""
    return 1 if strategy == "default" else 0
