"""What an image of some size becomes, against transformers' own processors."""

import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from engine.base.errors import InvalidArgument
from engine.base.limits import IMAGE_FEATURES_MAX, IMAGE_RUNS_MAX, IMAGE_SIDE_MAX
from engine.vision.families.llava import LlavaRule
from engine.vision.families.qwen2_vl import ASPECT_MAX, Qwen2VLRule
from engine.vision.info import VisionInfo, describe_vision
from engine.vision.layout import PREPARED_PIXELS_MAX
from tests.engine.vision.folders import DROPPED, Settings, TransformersProcessor, scale_no_pixels, with_settings
from tests.engine.vision.tiny_vlms import FAMILIES, make_tiny_vlm

QWEN = ("qwen2_vl", "qwen2_5_vl")
TILED = ("idefics3", "smolvlm")
SIDES = (1, 2, 3, 13, 27, 28, 29, 42, 55, 56, 57, 97, 111, 112, 113, 169, 224, 500, 1023)
SIZES = [*product(SIDES, SIDES), (4000, 3000), (3000, 4000), (16_384, 1000), (1000, 16_384)]
REAL_SIZES = [(1, 1), (200, 100), (100, 200), (640, 480), (1080, 1920), (33, 1500), (4032, 3024)]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vlms")
    return {family: make_tiny_vlm(family, root / family) for family in FAMILIES}


def vision_of(folder: Path) -> VisionInfo:
    vision = describe_vision(folder)
    assert vision is not None
    return vision


def assert_same_layouts(folder: Path, sizes: list[tuple[int, int]]) -> None:
    ours, theirs = vision_of(folder), TransformersProcessor(folder)
    compared = 0
    for width, height in sizes:
        try:
            layout = ours.layout(width, height)
        except InvalidArgument:
            assert max(width, height) > ASPECT_MAX * min(width, height)
            continue
        assert layout == theirs.layout(width, height), (width, height)
        assert layout.text.count(ours.image_token) == layout.features
        compared += 1
    assert compared > len(sizes) * 0.7


# -- sizes and settings ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_hundreds_of_sizes(family: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    if family != "llava":
        scale_no_pixels(monkeypatch)
    sizes = SIZES if family != "llava" else [size for size in SIZES if max(size) < 500]
    assert len(sizes) > 200
    assert_same_layouts(folders[family], sizes)


@pytest.mark.parametrize(
    "changed",
    [
        Settings(images={"min_pixels": 3136, "max_pixels": 12_845_056, "size": DROPPED}),  # Qwen2-VL as published
        Settings(images={"min_pixels": 3136, "max_pixels": 1_003_520}),
        Settings(images={"size": {"shortest_edge": 784, "longest_edge": 78_400}, "min_pixels": 7840}),
        Settings(images={"size": {"shortest_edge": 784, "longest_edge": 78_400}, "max_pixels": 7840}),
        Settings(images={"size": None, "image_processor_type": "Qwen2VLImageProcessorFast"}),
        Settings(images=dict.fromkeys(("size", "patch_size", "temporal_patch_size", "merge_size"), DROPPED)),
        Settings(images={"patch_size": 16}, config={"vision_config": {"patch_size": 16}}, nested=True),
        Settings(images={"merge_size": 3}, config={"vision_config": {"spatial_merge_size": 3}}),
    ],
)
@pytest.mark.parametrize("family", QWEN)
def test_settings_of_qwen(
    family: str, changed: Settings, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale_no_pixels(monkeypatch)
    folder = with_settings(folders[family], changed, tmp_path / "other")
    assert_same_layouts(folder, [size for size in SIZES[::11] + REAL_SIZES if math.prod(size) < 3_000_000])


SMOLVLM_VISION = {"image_size": 512, "patch_size": 16}


@pytest.mark.parametrize(
    "changed",
    [
        Settings(images={"do_image_splitting": False}),
        Settings(images={"size": {"height": 100, "width": 60}}),
        # 200 x 100 has 55 rows then, which are made even: one too many for a tile.
        Settings(images={"size": {"longest_edge": 110}}, nested=True),
        Settings(images={"size": {"longest_edge": 56}}),
        Settings(  # scaled to no more than 4096, whatever it asks for
            images={"size": {"longest_edge": 5000}, "max_image_size": {"longest_edge": 448}},
            processor={"image_seq_len": 16},
            config={"scale_factor": 8},
        ),
        Settings(  # SmolVLM-256M as published
            images={"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
            processor={"image_seq_len": 64},
            config={"scale_factor": 4, "vision_config": SMOLVLM_VISION},
        ),
        Settings(  # Idefics3-8B as published: nothing but defaults
            images=dict.fromkeys(("size", "max_image_size", "do_image_splitting", "image_processor_type"), DROPPED),
            processor={"image_seq_len": DROPPED},
            config={"vision_config": {"image_size": 364}},
        ),
    ],
)
@pytest.mark.parametrize("family", TILED)
def test_settings_of_idefics3(
    family: str, changed: Settings, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale_no_pixels(monkeypatch)
    assert_same_layouts(with_settings(folders[family], changed, tmp_path / "other"), SIZES[::5] + REAL_SIZES)


@pytest.mark.parametrize("family", TILED)
def test_without_a_first_size_a_large_image_is_refused(
    family: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale_no_pixels(monkeypatch)
    folder = with_settings(folders[family], Settings(images={"do_resize": False}), tmp_path / "other")
    assert_same_layouts(folder, [size for size in SIZES[::5] if max(size) < 500])
    with pytest.raises(InvalidArgument, match=f"in more than {IMAGE_RUNS_MAX} tiles"):
        vision_of(folder).layout(4000, 4000)


@pytest.mark.parametrize(
    ("changed", "features"),
    [
        (Settings(nested=True), 9),
        (Settings(images={"crop_size": 48, "size": 48}), 9),
        (Settings(images={"image_processor_type": "LlavaImageProcessorFast", "do_pad": True}), 9),
        (Settings(images={"do_center_crop": False, "size": {"height": 48, "width": 48}}), 9),
        (Settings(images={"do_resize": False}), 9),
        (
            Settings(
                processor={"vision_feature_select_strategy": "full"},
                config={"vision_feature_select_strategy": "full"},
            ),
            10,
        ),
        (  # llava-interleave-qwen as published: SigLIP, all of its features
            Settings(
                images={"image_processor_type": "SiglipImageProcessor", "size": {"height": 48, "width": 48}}
                | dict.fromkeys(("crop_size", "do_center_crop"), DROPPED),
                processor={"vision_feature_select_strategy": "full", "num_additional_image_tokens": DROPPED},
                config={
                    "vision_feature_select_strategy": "full",
                    "vision_config": {"model_type": "siglip_vision_model"},
                },
            ),
            9,
        ),
        (  # LLaVA-1.5's defaults
            Settings(
                images={"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
                processor={"patch_size": 14},
                config={"vision_config": {"image_size": 336, "patch_size": 14}},
            ),
            576,
        ),
        (
            Settings(
                images=dict.fromkeys(("size", "crop_size", "image_processor_type"), DROPPED),
                processor={"patch_size": 32},
                config={"vision_config": {"image_size": DROPPED, "patch_size": DROPPED}},
            ),
            49,
        ),
    ],
)
def test_settings_of_llava(changed: Settings, features: int, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = with_settings(folders["llava"], changed, tmp_path / "other")
    assert vision_of(folder).layout(10, 20).features == features
    assert_same_layouts(folder, [(1, 1), (1, 50), (50, 1), (48, 48), (90, 31), (300, 400)])


@given(
    st.integers(1, IMAGE_SIDE_MAX),
    st.integers(1, IMAGE_SIDE_MAX),
    st.integers(8, 40),
    st.integers(1, 4000),
    st.integers(1, 4000),
)
@example(width=200, height=1, cell=28, low=4, high=16)
@example(width=1, height=201, cell=28, low=4, high=16)
@example(width=42, height=70, cell=28, low=1, high=100)  # 1.5 and 2.5 cells: Python rounds to even
def test_any_size_and_any_limits_are_as_smart_resize_has_them(
    width: int, height: int, cell: int, low: int, high: int
) -> None:
    low_pixels, high_pixels = (cells * cell * cell for cells in sorted((low, high)))
    rule = Qwen2VLRule("x", cell, low_pixels, high_pixels)
    try:
        resized = smart_resize(height, width, cell, low_pixels, high_pixels)
    except ValueError:
        with pytest.raises(InvalidArgument, match="at most 200 times the shorter one"):
            rule.layout(width, height)
        return
    rows, columns = (side // cell for side in resized)
    layout = rule.layout(width, height)
    assert (layout.grid, layout.features, layout.text) == ((rows, columns), rows * columns, "x" * (rows * columns))


# -- whole prompts -----------------------------------------------------------------------------------------------------
CONVERSATION = [
    {
        "role": "user",
        "content": [
            {"type": "image"},
            {"type": "text", "text": "before"},
            {"type": "image"},
            {"type": "image"},
            {"type": "text", "text": "\nafter\n\n"},
        ],
    }
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_with_its_layouts_has_the_ids_of_transformers(family: str, folders: dict[str, Path]) -> None:
    vision, processor = vision_of(folders[family]), TransformersProcessor(folders[family]).processor
    sizes = [(60, 40), (1, 1), (33, 190)]
    text = processor.apply_chat_template(CONVERSATION, add_generation_prompt=True)
    inputs = processor(text=text, images=[Image.new("RGB", size, "red") for size in sizes], return_tensors="np")
    pieces = text.split(vision.image_token)
    layouts = [vision.layout(*size) for size in sizes]
    assert len(pieces) == len(layouts) + 1
    ours = pieces[0] + "".join(layout.text + piece for layout, piece in zip(layouts, pieces[1:], strict=True))
    ids = processor.tokenizer(ours)["input_ids"]
    assert ids == inputs["input_ids"][0].tolist()
    assert ids.count(vision.image_token_id) == sum(layout.features for layout in layouts)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_guesses_about_narrow_images_changes_nothing(family: str, folders: dict[str, Path]) -> None:
    """One or three rows look like channels to it, unless it is given a PIL image."""
    vision, processor = vision_of(folders[family]), TransformersProcessor(folders[family]).processor
    for size in ((1, 1), (3, 3), (40, 1), (40, 3), (1, 40), (3, 40)):
        inputs = processor(text=vision.image_token, images=[Image.new("RGB", size)], return_tensors="np")
        assert np.count_nonzero(inputs["input_ids"] == vision.image_token_id) == vision.layout(*size).features


# -- what cannot be --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "changed", "reason"),
    [
        ("llava", Settings(images={"do_center_crop": False}), "do not all become one square"),
        ("llava", Settings(images={"crop_size": {"height": 48, "width": 32}}), "do not all become one square"),
        (
            "llava",
            Settings(images={"crop_size": {"height": 32, "width": 32}}),
            "side of an image is 32 to the processor",
        ),
        ("llava", Settings(images={"image_processor_type": "PixtralImageProcessor"}), "by PixtralImageProcessor"),
        ("llava", Settings(config={"vision_config": {"model_type": "pixtral"}}), "a vision tower of type pixtral"),
        ("llava", Settings(images={"do_pad": True}), "CLIPImageProcessor with do_pad"),
        ("llava", Settings(images={"crop_size": None}), "height: a number of at least 1"),
        ("llava", Settings(processor={"patch_size": DROPPED}), "without patch_size"),
        ("llava", Settings(processor={"num_additional_image_tokens": 0}), "is 8 to the processor and 9 to the model"),
        ("llava", Settings(processor={"patch_size": 8}), "is 36 to the processor and 9 to the model"),
        ("llava", Settings(images={"crop_size": {"height": "48", "width": "48"}}), "height: a number of at least 1"),
        ("qwen2_vl", Settings(images={"do_resize": False}), "images that are not resized"),
        ("qwen2_vl", Settings(images={"patch_size": 16}), "patch_size is 16 to the processor and 14 to the model"),
        ("qwen2_vl", Settings(images={"merge_size": 4}), "merge_size is 4 to the processor and 2 to the model"),
        ("qwen2_5_vl", Settings(images={"temporal_patch_size": 1}), "temporal_patch_size is 1 to the processor"),
        ("qwen2_vl", Settings(images={"size": {"min_pixels": 1, "max_pixels": 9}}), "shortest_edge: a number of at"),
        ("qwen2_vl", Settings(images={"size": 3136}), "does not name shortest_edge and longest_edge"),
        ("qwen2_vl", Settings(images={"min_pixels": 90_000}), "fewer pixels at most than at least"),
        ("qwen2_vl", Settings(images={"image_processor_type": "GlmgaImageProcessor"}), "by GlmgaImageProcessor"),
        ("idefics3", Settings(images={"size": {"shortest_edge": 4}}), "neither longest_edge nor height and width"),
        ("idefics3", Settings(images={"max_image_size": 56}), "a max_image_size that does not name longest_edge"),
        ("smolvlm", Settings(processor={"image_seq_len": 5}), "of a tile is 5 to the processor and 4 to the model"),
        ("smolvlm", Settings(config={"scale_factor": 4}), "of a tile is 4 to the processor and 1 to the model"),
    ],
)
def test_what_a_folder_asks_for_that_we_do_not_do_is_refused(
    family: str, changed: Settings, reason: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument, match=reason) as refused:
        describe_vision(with_settings(folders[family], changed, tmp_path / "other"))
    assert refused.value.field == "model"


def test_a_folder_without_a_processor_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = with_settings(folders["qwen2_vl"], Settings(), tmp_path / "other")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InvalidArgument, match=r"cannot read .*preprocessor_config\.json"):
        describe_vision(folder)


def test_an_image_that_would_be_scaled_beyond_reason_is_refused() -> None:
    widest = math.floor(PREPARED_PIXELS_MAX / 336 / 336)
    scaled = LlavaRule("x", 576, shortest_edge_px=336, pads_to_square=False)
    assert scaled.layout(widest, 1) == scaled.layout(1, widest) == scaled.layout(4000, 3000)
    for size in ((widest + 1, 1), (1, IMAGE_SIDE_MAX)):
        with pytest.raises(InvalidArgument, match="too far from a square for this model"):
            scaled.layout(*size)
    padded = LlavaRule("x", 576, shortest_edge_px=336, pads_to_square=True)
    assert padded.layout(5000, 1).features == 576
    with pytest.raises(InvalidArgument, match="too far from a square for this model"):
        padded.layout(1, 6000)


@pytest.mark.parametrize("family", QWEN)
def test_an_image_of_too_many_placeholders_is_refused(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    changed = Settings(images={"max_pixels": 2 * IMAGE_FEATURES_MAX * 28 * 28})
    vision = vision_of(with_settings(folders[family], changed, tmp_path / "other"))
    side = math.isqrt(IMAGE_FEATURES_MAX)
    assert vision.layout(28 * side, 28 * side).features == IMAGE_FEATURES_MAX
    with pytest.raises(InvalidArgument, match=f"more than {IMAGE_FEATURES_MAX} tokens of the prompt"):
        vision.layout(28 * side, 28 * (side + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_client_is_told_repeats_nothing_of_the_image(family: str, folders: dict[str, Path]) -> None:
    vision = vision_of(folders[family])
    told: set[Any] = set()
    for size in ((IMAGE_SIDE_MAX, 1), (1, IMAGE_SIDE_MAX), (16_001, 2)):
        try:
            vision.layout(*size)
        except InvalidArgument as error:
            told.add((error.message, error.field))
    assert len(told) == (0 if family in TILED else 1)
