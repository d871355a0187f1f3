"""Training the demo model: that questions which share a picture are asked as if each were alone, and what is taught."""

import math
from pathlib import Path
from random import Random

import pytest
import torch

from bench.demo_vlm.caption import WORDS, Caption, labels
from bench.demo_vlm.evaluate import Shown as Answered
from bench.demo_vlm.evaluate import figures_of, wilson
from bench.demo_vlm.pictures import drawn
from bench.demo_vlm.reader import Order, Reader, Talk
from bench.demo_vlm.recipe import CaptionStage, Recipe, SightStage, TogetherStage
from bench.demo_vlm.train import CAPTION, SIGHT, STAGES, train
from engine.models.checkpoint import ensure_default_model
from engine.models.demo_vlm.assemble import WEIGHTS
from triptych.demo.scenes import Space, questions_about, scene_of

IMAGE_TOKENS = 36
TINY = Recipe(
    caption=CaptionStage(steps=1, scenes=1),
    sight=SightStage(steps=1, batch=2, pictures=5, more_digits=1),
    together=TogetherStage(steps=1, pictures=1),
)


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(ensure_default_model(), IMAGE_TOKENS)


@pytest.fixture(scope="module")
def caption(reader: Reader) -> Caption:
    return Caption(reader.embeddings, reader.tokenize, IMAGE_TOKENS)


@pytest.mark.model
def test_questions_beside_each_other_do_not_hear_each_other(reader: Reader, caption: Caption) -> None:
    scene, _ = scene_of(Space.TRAIN, 0, 0)
    questions = list(questions_about(scene, Random(0)))
    assert len(questions) > 1
    with torch.inference_mode():
        said = caption.of([scene])
        alone = [float(reader.loss(said, [Talk(Order.BESIDE, [question])])) for question in questions]
        lengths = [len(reader.tokenize(question.answer)) + 1 for question in questions]
        together = float(reader.loss(said, [Talk(Order.BESIDE, questions)]))
        in_turn = float(reader.loss(said, [Talk(Order.IN_TURN, questions)]))
    mean = sum(loss * length for loss, length in zip(alone, lengths, strict=True)) / sum(lengths)
    assert together == pytest.approx(mean, rel=0.03)  # bfloat16, in other shapes
    assert in_turn != pytest.approx(mean, rel=0.03)


@pytest.mark.model
def test_a_caption_begins_as_words_that_say_what_is_in_the_picture(reader: Reader, caption: Caption) -> None:
    scenes = [scene_of(Space.TRAIN, 0, number)[0] for number in range(20)]
    said = caption.of(scenes)
    (line_end,) = reader.tokenize("\n")
    assert said.shape == (20, IMAGE_TOKENS, reader.embeddings.shape[1])
    assert torch.equal(said[:, 0], reader.embeddings[line_end].float().expand(20, -1))
    for slot, right in labels(scenes).items():
        assert torch.equal(caption.choices(said, slot).argmax(-1), right), slot
    assert set(caption.slots) == set(WORDS)


@pytest.mark.model
@pytest.mark.timeout(60)
def test_every_stage_leaves_its_file_for_the_next(tmp_path: Path) -> None:
    train(STAGES, tmp_path, TINY)
    assert {file.name for file in tmp_path.iterdir()} == {CAPTION, SIGHT, WEIGHTS}


def test_training_pictures_are_what_the_processor_makes_of_them() -> None:
    pictures = drawn(Space.TRAIN, 0, range(3), 96)
    inputs = pictures.inputs([2, 0])
    assert inputs.shape == (2, 3, 96, 96)
    assert -1 <= inputs.min() < inputs.max() <= 1
    assert len(pictures) == 3


def test_a_share_of_answers_has_an_interval_that_is_sensible_at_its_ends() -> None:
    low, high = wilson(100, 100)
    assert 0.95 < low < 0.97 and math.isclose(high, 1.0)
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(50, 100)
    assert low < 0.5 < high and math.isclose(0.5 - low, high - 0.5)


def test_figures_hold_the_bars_and_show_chance() -> None:
    shown = [scene_of(Space.HELD_OUT, 0, number) for number in range(50)]
    right = figures_of([Answered(scene, question, question.answer) for scene, question in shown])
    wrong = figures_of([Answered(scene, question, "mauve") for scene, question in shown])
    assert all(figure.passed for figure in right)
    assert not any(figure.passed for figure in wrong)
    assert [figure.notes.get("chance") for figure in right[:-1]] == [0.125, 0.167, 0.167, 0.111, 0.1]
