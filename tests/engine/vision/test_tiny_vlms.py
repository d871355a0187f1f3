"""The tiny models are worth testing with: what they say varies, and depends on every picture and where it stands."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.engine.vision.tiny_vlms import FAMILIES, generate, load_model, load_processor, make_tiny_vlm

TOKENS = 12


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = make_tiny_vlm(request.param, tmp_path_factory.mktemp("vlm") / request.param)
    return load_model(folder), load_processor(folder)


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def answer(made: tuple[Any, Any], *parts: str | Image.Image) -> str:
    model, processor = made
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [part for part in parts if not isinstance(part, str)]
    inputs = processor(text=text, images=images or None, return_tensors="pt")
    tokens = generate(model, inputs, TOKENS)
    assert len(tokens) == TOKENS
    said: str = processor.tokenizer.decode(tokens)
    assert said.isascii()
    return said


def test_answers_vary_and_never_end_early(made: tuple[Any, Any]) -> None:
    answers = {answer(made, picture(seed), "What is this?") for seed in range(3)}
    answers |= {answer(made, "What is this?", picture(0)), answer(made, picture(0), "And this?")}
    assert len(answers) == 5
    assert all(len(set(said)) > TOKENS // 3 for said in answers)


def test_every_picture_and_its_place_count(made: tuple[Any, Any]) -> None:
    one, two, wide = picture(1), picture(2), picture(1, 90, 30)
    answers = [answer(made, "A", *pictures, "B") for pictures in ((one, two), (two, one), (one, one), (wide, two))]
    assert len(set(answers)) == len(answers)


def test_a_model_that_sees_also_just_reads(made: tuple[Any, Any]) -> None:
    assert answer(made, "What is this?") != answer(made, "What is that?")


def test_the_same_seed_makes_the_same_folder(tmp_path: Path) -> None:
    one, same, other = (make_tiny_vlm("llava", tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert weights(one) == weights(same) != weights(other)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()
