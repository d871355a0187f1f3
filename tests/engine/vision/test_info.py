"""What names an embedding, and what it is made of."""

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from control_plane.router.media import pictures
from engine.base.errors import InvalidArgument
from engine.images import KEY_BYTES, Picture
from engine.models.text_config import SEEING
from engine.vision import info
from engine.vision.info import VisionInfo, describe_vision, embedding_schema
from tests.engine.vision.folders import Settings, edit, with_settings
from tests.engine.vision.tiny_vlms import FAMILIES, HIDDEN, make_tiny_vlm

PICTURE = Picture(2, 3, bytes(range(18)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vlm("qwen2_vl", tmp_path_factory.mktemp("vlm") / "model")


@pytest.fixture(scope="module")
def vision(folder: Path) -> VisionInfo:
    return described(folder)


def described(folder: Path) -> VisionInfo:
    vision = describe_vision(folder)
    assert vision is not None
    return vision


def test_the_families_are_those_whose_language_models_are_served() -> None:
    assert set(FAMILIES) == set(SEEING) == info.FAMILIES


def test_a_model_that_only_reads_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert describe_vision(tmp_path) is None


def pixel_digest(picture: Picture) -> bytes:
    """As the router's edge has it."""
    return pictures.digest_of((picture.width, picture.height), picture.pixels)


# -- keys --------------------------------------------------------------------------------------------------------------
def test_a_key_is_the_same_wherever_it_is_worked_out(folder: Path, vision: VisionInfo) -> None:
    assert described(folder) == vision == pickle.loads(pickle.dumps(vision))
    key = vision.key("tenant", pixel_digest(PICTURE))
    assert len(key) == KEY_BYTES
    assert key == described(folder).key("tenant", pixel_digest(Picture(2, 3, bytes(range(18)))))


@pytest.mark.parametrize(
    "other",
    [
        Picture(2, 3, bytes(range(1, 19))),  # other pixels
        Picture(3, 2, PICTURE.pixels),  # the same bytes in another shape
        Picture(6, 1, PICTURE.pixels),
    ],
)
def test_another_picture_has_another_key(other: Picture, vision: VisionInfo) -> None:
    assert vision.key("tenant", pixel_digest(other)) != vision.key("tenant", pixel_digest(PICTURE))


def test_another_mode_has_another_key(vision: VisionInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    before = vision.key("tenant", pixel_digest(PICTURE))
    monkeypatch.setattr(pictures, "MODE", "BGR")
    assert vision.key("tenant", pixel_digest(PICTURE)) != before


def test_another_scope_has_another_key(vision: VisionInfo) -> None:
    digest = pixel_digest(PICTURE)
    assert len({vision.key(scope, digest) for scope in ("", "a", "b", "ab", "a\0")}) == 5


def test_fields_of_a_key_do_not_run_together(vision: VisionInfo) -> None:
    assert vision.key("ab", b"c") != vision.key("a", b"bc")
    shorter, longer = replace(vision, settings_digest=b"s"), replace(vision, settings_digest=b"st")
    assert shorter.key("t", b"d") != longer.key("", b"d")


@pytest.mark.parametrize(
    "changed",
    [
        Settings(images={"max_pixels": 9000}),  # another layout
        Settings(images={"image_mean": [0.5, 0.5, 0.5]}),  # the same layout, other numbers
        Settings(images={"resample": 2}),
        Settings(images={"do_convert_rgb": False}),
        Settings(processor={"some_switch": True}),
        Settings(config={"vision_config": {"depth": 3}}),
        Settings(config={"text_config": {"rms_norm_eps": 0.1}}),
    ],
)
def test_other_settings_have_other_keys(changed: Settings, folder: Path, vision: VisionInfo, tmp_path: Path) -> None:
    other = described(with_settings(folder, changed, tmp_path / "other"))
    assert other.settings_digest != vision.settings_digest
    assert other.key("tenant", b"pixels") != vision.key("tenant", b"pixels")


def test_other_weights_have_other_keys(vision: VisionInfo, tmp_path: Path) -> None:
    assert described(make_tiny_vlm("qwen2_vl", tmp_path / "fine-tuned", seed=1)).key("", b"") != vision.key("", b"")


def test_who_saved_the_folder_does_not_matter(folder: Path, vision: VisionInfo, tmp_path: Path) -> None:
    other = with_settings(folder, Settings(config={"transformers_version": "9", "_name_or_path": "x"}), tmp_path / "o")
    assert described(other) == vision


# -- the embedding -----------------------------------------------------------------------------------------------------
def test_an_embedding_is_rows_as_wide_as_the_language_model(vision: VisionInfo) -> None:
    schema = embedding_schema(vision, "bfloat16")
    (stream,) = schema.streams
    assert (stream.name, stream.role, stream.position_encoding) == ("image", "embedding", "none")
    assert (stream.layers, stream.heads, stream.parts, stream.head_dim) == (1, 1, 1, HIDDEN)
    assert schema.token_bytes == 2 * HIDDEN


def test_embeddings_that_are_not_the_same_have_other_schemas(vision: VisionInfo) -> None:
    digest = embedding_schema(vision, "bfloat16").digest
    assert digest != embedding_schema(vision, "float32").digest
    assert digest != embedding_schema(replace(vision, settings_digest=b"other"), "bfloat16").digest


# -- tokens ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tokenizer", "token"),
    [
        ({}, "<|image_pad|>"),
        ({"image_token": "<picture>"}, "<picture>"),
        ({"image_token": {"content": "<picture>", "special": True}}, "<picture>"),
        ({"extra_special_tokens": {"image_token": "<picture>"}, "image_token": "<no>"}, "<picture>"),
        ({"extra_special_tokens": ["<picture>"]}, "<|image_pad|>"),
    ],
)
def test_the_tokenizer_may_have_a_name_of_its_own_for_the_image_token(
    tokenizer: dict[str, Any], token: str, folder: Path, tmp_path: Path
) -> None:
    other = with_settings(folder, Settings(), tmp_path / "other")
    edit(other / "tokenizer_config.json", tokenizer)
    vision = described(other)
    layout = vision.layout(40, 40)
    assert vision.image_token == token
    assert layout.text == token * layout.features


def test_an_image_of_no_placeholders_is_refused(vision: VisionInfo) -> None:
    class Nothing:
        def layout(self, width: int, height: int) -> info.ImageLayout:
            return info.ImageLayout("", 0)

    with pytest.raises(InvalidArgument, match="or none"):
        replace(vision, rule=Nothing()).layout(1, 1)


@pytest.mark.parametrize("module", ["engine.vision.info", "engine.models.info"])
def test_routers_may_import_it(module: str) -> None:
    code = f"import {module}, sys; print(*({{'torch', 'transformers', 'PIL'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.split() == []
