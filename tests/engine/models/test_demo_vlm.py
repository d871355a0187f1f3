"""The demo model: a folder made of packaged eyes and the default model. Plain transformers loads it, and it sees."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from engine.models.checkpoint import ensure_default_model
from engine.models.demo_vlm import assemble as assembling
from engine.models.demo_vlm.assemble import IMAGE_TOKEN, WEIGHTS, assemble, assemble_with, ensure_demo_vlm, packaged
from triptych.demo.drawing import draw
from triptych.demo.scenes import KINDS, Kind, Space, scene_of

WEIGHTS_BYTES_MAX = 10_000_000
IMAGE_TOKENS = 36
TEXTS = ("Hello, world!", "def f(x):\n    return x  # 42", "Größe: 7 µm", "<|im_start|>user\nhi<|im_end|>\n", "日本")
RIGHT_OF_EIGHT_MIN = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "demo-vlm"
    assemble(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    loading: Any = LlavaForConditionalGeneration.from_pretrained
    loaded, report = loading(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return loaded


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    loading: Any = AutoProcessor.from_pretrained
    loaded = loading(folder)
    loaded.tokenizer.padding_side = "left"
    return loaded


def prompt(processor: Any, *parts: str) -> str:
    """A user's message; "<>" is a picture, every other part is text."""
    content = [{"type": "image"} if part == "<>" else {"type": "text", "text": part} for part in parts]
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return text


def answers(model: Any, processor: Any, prompts: list[str], pictures: list[list[Image.Image]]) -> list[str]:
    inputs = processor(text=prompts, images=pictures, return_tensors="pt", padding=True)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.inference_mode():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    texts: list[str] = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


# -- what is packaged --------------------------------------------------------------------------------------------------
def test_the_packaged_weights_are_small_and_only_eyes() -> None:
    with packaged() as eyes:
        assert (eyes / WEIGHTS).stat().st_size <= WEIGHTS_BYTES_MAX
        with safe_open(eyes / WEIGHTS, "pt") as file:
            names = set(file.keys())
            assert {file.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    assert {name.partition(".")[0] for name in names} == {"vision_tower", "multi_modal_projector"}


def test_processor_and_configuration_agree_about_the_picture() -> None:
    with packaged() as eyes:
        config, processor = (json.loads((eyes / f"{name}.json").read_text()) for name in ("config", "processor_config"))
    vision = config["vision_config"]
    assert config["image_seq_length"] == (vision["image_size"] // vision["patch_size"]) ** 2 == IMAGE_TOKENS
    assert processor["patch_size"] == vision["patch_size"]
    assert processor["image_processor"]["size"] == {"height": vision["image_size"], "width": vision["image_size"]}
    assert processor["vision_feature_select_strategy"] == config["vision_feature_select_strategy"]


# -- the folder --------------------------------------------------------------------------------------------------------
@pytest.mark.model
def test_text_is_tokenized_as_in_the_default_model(folder: Path) -> None:
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(ensure_default_model())
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    config = json.loads((folder / "config.json").read_text())
    assert ours.encode(IMAGE_TOKEN) == [config["image_token_index"]]
    assert len(ours) == len(theirs)


@pytest.mark.model
def test_text_alone_is_answered_as_by_the_default_model(folder: Path, model: Any) -> None:
    tokens = AutoTokenizer.from_pretrained(folder)("The capital of France is", return_tensors="pt")
    plain: Any = AutoModelForCausalLM.from_pretrained(ensure_default_model(), dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(model(**tokens).logits, plain(**tokens).logits)


@pytest.mark.model
def test_pictures_stand_where_the_message_has_them(processor: Any) -> None:
    picture = Image.new("RGB", (300, 200), "white")
    text = prompt(processor, "before ", "<>", " between ", "<>", " after")
    tokens = processor(text=[text], images=[[picture, picture]], return_tensors="pt")
    assert tokens["pixel_values"].shape == (2, 3, 96, 96)
    shown = processor.decode(tokens["input_ids"][0])
    marks = IMAGE_TOKEN * IMAGE_TOKENS
    assert shown == (f"<|im_start|>user\nbefore {marks} between {marks} after<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.model
def test_a_message_of_plain_text_has_the_default_models_form_without_its_system_prompt(processor: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": [{"type": "text", "text": "Bye"}]},
    ]
    assert processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )


def asked(model: Any, processor: Any, seed: int, count: int, *, text_first: bool = False) -> Counter[Kind]:
    """How many of that many held-out pictures it answers right, by kind."""
    shown = [scene_of(Space.HELD_OUT, seed, number) for number in range(count)]
    parts = [(question.text, "<>") if text_first else ("<>", question.text) for _, question in shown]
    pictures = [[draw(scene)] for scene, _ in shown]
    said = answers(model, processor, [prompt(processor, *both) for both in parts], pictures)
    return Counter(
        question.kind for answer, (_, question) in zip(said, shown, strict=True) if answer == question.answer
    )


@pytest.mark.model
def test_it_names_what_it_sees(model: Any, processor: Any) -> None:
    """One picture of each kind; `slow` has more."""
    assert asked(model, processor, seed=0, count=len(KINDS)) == dict.fromkeys(KINDS, 1)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("text_first", [False, True])
def test_it_sees_held_out_pictures(model: Any, processor: Any, text_first: bool) -> None:
    right = asked(model, processor, seed=1, count=8 * len(KINDS), text_first=text_first)
    assert min(right[kind] for kind in KINDS) >= RIGHT_OF_EIGHT_MIN, right


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_without_the_picture_it_does_not_know(model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers come from pixels: empty paper in the picture's place makes them guesses."""
    monkeypatch.setitem(globals(), "draw", lambda scene: Image.new("RGB", (192, 192), scene.paper))
    right = asked(model, processor, seed=1, count=8 * len(KINDS))
    assert right.total() <= 0.4 * 8 * len(KINDS), right


# -- who writes it when ------------------------------------------------------------------------------------------------
@pytest.mark.model
def test_the_folder_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembling, "ensure_default_model", lambda *_: ensure_default_model())
    told: list[str] = []
    first = ensure_demo_vlm(tmp_path, told.append)
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert ensure_demo_vlm(tmp_path, told.append) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    assert len(told) == 1
    assert first.name == "demo-vlm"


@pytest.mark.model
def test_a_process_that_comes_second_leaves_the_folder_alone(folder: Path) -> None:
    made = (folder / "config.json").stat().st_mtime_ns
    assemble(folder)
    assert (folder / "config.json").stat().st_mtime_ns == made
    assert [path.name for path in folder.parent.iterdir()] == ["demo-vlm"]


def test_a_folder_that_cannot_be_assembled_does_not_appear(tmp_path: Path) -> None:
    with packaged() as eyes, pytest.raises(OSError):
        assemble_with(eyes, tmp_path / "demo-vlm", tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []
