"""Demo pictures: the same for the same seed anywhere, with answers that are right because the picture was made so."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from control_plane.options import OptionError
from triptych.demo.command import ITEMS, DemoOptions, run
from triptych.demo.drawing import SIDE, draw
from triptych.demo.scenes import (
    CHOICES,
    COLOURS,
    COUNT_MAX,
    DIGITS,
    KINDS,
    POSITIONS,
    SHAPES,
    UNSEEN,
    Kind,
    Mark,
    Scene,
    Space,
    questions_about,
    scene_of,
)

MANY = 600
ANSWERS = {
    Kind.COLOUR: set(COLOURS),
    Kind.SHAPE: set(SHAPES),
    Kind.COUNT: {str(count) for count in range(1, COUNT_MAX + 1)},
    Kind.POSITION: {position for row in POSITIONS for position in row},
    Kind.DIGIT: set(DIGITS),
}


def scene(figure: str, *places: tuple[float, float], colour: str = "red") -> Scene:
    return Scene(
        figure=figure,
        colour=colour,
        shade=(0, 0, 0),
        paper=(255, 255, 255),
        marks=tuple(Mark(x, y, 0.12, 0.0) for x, y in places),
        thickness=0.2,
        wobble=1,
    )


def islands(picture: Image.Image) -> int:
    """How many separate things are on the paper, counted in the pixels."""
    ink = picture.convert("L").point(lambda grey: 255 * (grey < 200)).convert("1")
    left = {(x, y) for x in range(ink.width) for y in range(ink.height) if ink.getpixel((x, y))}
    found = 0
    while left:
        found, edge = found + 1, [left.pop()]
        while edge:
            x, y = edge.pop()
            near = {(x + dx, y + dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)} & left
            left -= near
            edge += near
    return found


# -- scenes ------------------------------------------------------------------------------------------------------------
def test_a_number_always_gives_the_same_scene() -> None:
    assert scene_of(Space.HELD_OUT, 3, 7) == scene_of(Space.HELD_OUT, 3, 7)
    assert scene_of(Space.HELD_OUT, 3, 7) != scene_of(Space.HELD_OUT, 4, 7)


def test_known_scenes_do_not_change_from_version_to_version() -> None:
    _, questions = zip(*(scene_of(Space.HELD_OUT, 1, number) for number in range(5)), strict=True)
    assert [question.answer for question in questions] == ["yellow", "circle", "4", "middle", "4"]


def test_no_seed_of_training_draws_a_held_out_scene() -> None:
    held_out = {scene_of(Space.HELD_OUT, seed, number)[0] for seed in range(3) for number in range(100)}
    train = {scene_of(Space.TRAIN, seed, number)[0] for seed in range(3) for number in range(100)}
    assert not held_out & train


def test_training_never_shows_the_unseen_pairs_and_held_out_pictures_do() -> None:
    shown = {
        space: {(scene.colour, scene.figure) for scene, _ in (scene_of(space, 0, number) for number in range(MANY))}
        for space in Space
    }
    assert not shown[Space.TRAIN] & UNSEEN
    assert shown[Space.HELD_OUT] >= UNSEEN


def test_kinds_take_turns_and_every_answer_occurs() -> None:
    questions = [scene_of(Space.HELD_OUT, 0, number)[1] for number in range(MANY)]
    assert Counter(question.kind for question in questions) == dict.fromkeys(KINDS, MANY // len(KINDS))
    for kind, answers in ANSWERS.items():
        assert {question.answer for question in questions if question.kind is kind} == answers
        assert CHOICES[kind] == len(answers)


@pytest.mark.parametrize(
    ("place", "answer"),
    [
        ((0.2, 0.1), "top left"),
        ((0.5, 0.2), "top"),
        ((0.6, 0.4), "middle"),
        ((0.8, 0.5), "right"),
        ((0.4, 0.9), "bottom"),
    ],
)
def test_the_place_is_the_field_that_the_middle_lies_in(place: tuple[float, float], answer: str) -> None:
    assert scene("circle", place).position == answer


def test_a_picture_is_asked_only_what_it_can_answer() -> None:
    def kinds(about: Scene) -> set[Kind]:
        return {question.kind for question in questions_about(about, Random(0))}

    assert kinds(scene("star", (0.5, 0.5))) == {Kind.COLOUR, Kind.SHAPE, Kind.COUNT, Kind.POSITION}
    assert kinds(scene("star", (0.2, 0.2), (0.8, 0.8))) == {Kind.COLOUR, Kind.SHAPE, Kind.COUNT}
    assert kinds(scene("7", (0.5, 0.5))) == {Kind.COLOUR, Kind.DIGIT}


# -- pixels ------------------------------------------------------------------------------------------------------------
def test_what_is_drawn_is_as_many_as_the_answer_says() -> None:
    for number in range(KINDS.index(Kind.COUNT), 60, len(KINDS)):
        counted, question = scene_of(Space.HELD_OUT, 5, number)
        assert islands(draw(replace(counted, colour="black"), 96)) == int(question.answer)


@pytest.mark.parametrize("figure", [*SHAPES, *DIGITS])
def test_ink_has_the_colour_and_is_where_the_scene_says(figure: str) -> None:
    picture = draw(scene(figure, (0.2, 0.8)))
    box = picture.convert("L").point(lambda grey: 255 * (grey < 200)).getbbox()
    assert box is not None
    assert box[2] < SIDE * 0.4 and box[1] > SIDE * 0.6
    colours = {colour for _, colour in picture.getcolors(1 << 16) or ()}
    assert (215, 30, 35) in colours and (255, 255, 255) in colours


def test_figures_do_not_look_alike() -> None:
    pictures = {draw(scene(figure, (0.5, 0.5)), 48).tobytes() for figure in (*SHAPES, *DIGITS)}
    assert len(pictures) == len(SHAPES) + len(DIGITS)


# -- triptych encode-demo ----------------------------------------------------------------------------------------------
def test_the_command_writes_pictures_and_their_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(DemoOptions(count=6, seed=4, out=tmp_path / "new")) == 0
    items = json.loads((tmp_path / "new" / ITEMS).read_text())
    assert [set(item) for item in items] == [{"file", "question", "answer", "kind"}] * 6
    assert [item["kind"] for item in items] == ["colour", "shape", "count", "position", "digit", "colour"]
    for number, item in enumerate(items):
        drawn_scene, question = scene_of(Space.HELD_OUT, 4, number)
        assert (item["question"], item["answer"]) == (question.text, question.answer)
        with Image.open(tmp_path / "new" / item["file"]) as picture:
            assert picture.format == "PNG"
            assert picture.tobytes() == draw(drawn_scene).tobytes()
    assert "6 pictures" in capsys.readouterr().out


def test_the_command_writes_the_same_bytes_twice(tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(DemoOptions(count=5, seed=1, out=tmp_path / name))
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("bad", [{"count": 0}, {"count": 100_001}, {"seed": -1}])
def test_options_that_cannot_work_are_refused(bad: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(OptionError):
        DemoOptions(out=tmp_path, **bad)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot write"):
        run(DemoOptions(count=1, out=tmp_path / "file"))
