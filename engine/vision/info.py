"""What a checkpoint's images are to everybody who holds none of its weights: layouts, names and the cache's schema."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from engine.base.errors import InvalidArgument
from engine.base.limits import IMAGE_FEATURES_MAX
from engine.images import KEY_BYTES
from engine.kv.schema import CacheSchema, Stream
from engine.models.files import fingerprint, read_json
from engine.models.text_config import text_config
from engine.vision.families import idefics3, llava, qwen2_vl
from engine.vision.folder import VisionFolder, count, read_folder
from engine.vision.layout import ImageLayout, LayoutRule


class _Family(NamedTuple):
    read_rule: Callable[[VisionFolder], LayoutRule]
    image_token: Callable[[VisionFolder], str]
    image_token_id: Callable[[Mapping[str, Any]], int]


_QWEN = _Family(qwen2_vl.read_rule, qwen2_vl.image_token, qwen2_vl.image_token_id)
_IDEFICS = _Family(idefics3.read_rule, idefics3.image_token, idefics3.image_token_id)
_FAMILIES: Mapping[str, _Family] = {
    "idefics3": _IDEFICS,
    "llava": _Family(llava.read_rule, llava.image_token, llava.image_token_id),
    "qwen2_5_vl": _QWEN,
    "qwen2_vl": _QWEN,
    "smolvlm": _IDEFICS,
}
FAMILIES: Final = frozenset(_FAMILIES)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionInfo:
    """`settings_digest` differs whenever the same pixels may become another embedding: by the processor's settings,
    the configuration or the weights."""

    family: str
    image_token: str
    image_token_id: int
    hidden_size: int
    settings_digest: bytes
    rule: LayoutRule

    def layout(self, width: int, height: int) -> ImageLayout:
        """What an image of this size becomes. InvalidArgument if there can be none of it."""
        layout = self.rule.layout(width, height)
        if not 1 <= layout.features <= IMAGE_FEATURES_MAX:
            raise InvalidArgument(
                f"image: of this size it would be more than {IMAGE_FEATURES_MAX} tokens of the prompt, or none",
                field="image",
            )
        return layout

    def key(self, scope: str, pixel_digest: bytes) -> bytes:
        """Name the embedding of these pixels, for those who share a cache (`scope`) and for nobody else."""
        digest = hashlib.blake2b(digest_size=KEY_BYTES)
        for field in (self.settings_digest, scope.encode(), pixel_digest):
            digest.update(len(field).to_bytes(8, "little"))
            digest.update(field)
        return digest.digest()


def embedding_schema(vision: VisionInfo, dtype: str) -> CacheSchema:
    """What one row of an embedding holds: a vector as wide as the language model, in place of a token's."""
    image = Stream(
        name="image",
        layers=1,
        heads=1,
        head_dim=vision.hidden_size,
        dtype=dtype,
        parts=1,
        position_encoding="none",
        role="embedding",
    )
    return CacheSchema(vision.settings_digest.hex(), (image,))


# -- reading a folder --------------------------------------------------------------------------------------------------
def describe_vision(path: Path) -> VisionInfo | None:
    """None if the model in this folder does not see, or if it is not of a family that is served."""
    config = read_json(path / "config.json")
    if config.get("model_type") not in FAMILIES:
        return None
    return vision_of(path, config, fingerprint(path, config))


def vision_of(path: Path, config: Mapping[str, Any], model: str) -> VisionInfo:
    """Likewise, of a model that is known to see; `model` is its fingerprint."""
    folder = read_folder(path, config)
    family = _FAMILIES[folder.family]
    return VisionInfo(
        family=folder.family,
        image_token=family.image_token(folder),
        image_token_id=family.image_token_id(config),
        hidden_size=count(text_config(config), "hidden_size"),
        settings_digest=_settings_digest(folder, model),
        rule=family.read_rule(folder),
    )


def _settings_digest(folder: VisionFolder, model: str) -> bytes:
    """`model` is a digest of the whole config.json and of the weights."""
    settings = json.dumps([folder.images, folder.processor, model], sort_keys=True)
    return hashlib.blake2b(settings.encode(), digest_size=16).digest()
