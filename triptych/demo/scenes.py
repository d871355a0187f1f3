"""What is in a demo picture, and what can be asked about it: pure from (space, seed, number).

A scene is either one to six copies of a shape, each in its own field of a 3x3 grid, or one handwritten digit. The space
is part of every random draw, so no picture of `HELD_OUT` is ever drawn for training, whatever the seeds. Training also
never shows the pairs of `UNSEEN`: a model that names them has learned colours and shapes, not pictures.

Drawing a scene is `drawing`'s; writing files is `command`'s.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Final

COLOURS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SHAPES: Final = ("circle", "square", "triangle", "star", "cross", "heart")
PLURALS: Final = {shape: f"{shape}s" for shape in SHAPES} | {"cross": "crosses"}
DIGITS: Final = tuple("0123456789")
COUNT_MAX: Final = 6
POSITIONS: Final = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
UNSEEN: Final = frozenset({("purple", "star"), ("green", "heart"), ("red", "cross"), ("black", "triangle")})

FIELD: Final = 1 / 3  # of the picture's side
RADII: Final = (0.1, 0.155)  # a shape fits into its field, also turned
DIGIT_RADII: Final = (0.22, 0.34)
TURN_MAX: Final = 12.0  # degrees: a square stays a square
PAPER_MIN: Final = 225  # of 255: pale, of any tint
SHADE: Final = 18  # how far a colour may be off, in each channel


class Space(StrEnum):
    """Which pictures are drawn: one picture belongs to one space."""

    TRAIN = "train"
    HELD_OUT = "held-out"


class Kind(StrEnum):
    """What is asked."""

    COLOUR = "colour"
    SHAPE = "shape"
    COUNT = "count"
    POSITION = "position"
    DIGIT = "digit"


KINDS: Final = tuple(Kind)
CHOICES: Final = {
    Kind.COLOUR: len(COLOURS),
    Kind.SHAPE: len(SHAPES),
    Kind.COUNT: COUNT_MAX,
    Kind.POSITION: len(POSITIONS) ** 2,
    Kind.DIGIT: len(DIGITS),
}
WORDINGS: Final = {
    Kind.COLOUR: ("What is the colour of the {}?", "Which colour do you see?", "Name the colour."),
    Kind.SHAPE: ("What shape is this?", "Which shape do you see?", "Name the shape."),
    Kind.COUNT: ("How many {} are there?", "How many {} do you see?", "Count the {}."),
    Kind.POSITION: ("Where is the {}?", "In which part of the picture is the {}?", "Name the place of the {}."),
    Kind.DIGIT: ("Which digit is this?", "What digit do you see?", "Read the digit."),
}


@dataclass(frozen=True, slots=True)
class Question:
    """One question with the only right answer."""

    kind: Kind
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Mark:
    """Where one copy is drawn. All lengths are parts of the picture's side."""

    x: float
    y: float
    radius: float
    turn: float  # degrees


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Everything that a picture shows."""

    figure: str  # a shape, or a digit
    colour: str
    shade: tuple[int, int, int]  # added to the colour
    paper: tuple[int, int, int]
    marks: tuple[Mark, ...]
    thickness: float  # of a digit's strokes
    wobble: int  # seeds the hand that writes a digit

    @property
    def is_digit(self) -> bool:
        return self.figure in DIGITS

    @property
    def position(self) -> str:
        """Of the first mark."""
        mark = self.marks[0]
        return POSITIONS[int(mark.y / FIELD)][int(mark.x / FIELD)]


def scene_of(space: Space, seed: int, number: int) -> tuple[Scene, Question]:
    """The picture of that number and its question. The kinds of questions take turns."""
    kind = KINDS[number % len(KINDS)]
    random = Random(f"{space}/{seed}/{number}")
    scene = _drawn(random, kind, space)
    return scene, _question(random, kind, scene)


def questions_about(scene: Scene, random: Random) -> Iterator[Question]:
    """One question of each kind that this picture can answer."""
    kinds = [Kind.COLOUR, *([Kind.DIGIT] if scene.is_digit else [Kind.SHAPE, Kind.COUNT])]
    if not scene.is_digit and len(scene.marks) == 1:
        kinds.append(Kind.POSITION)
    return (_question(random, kind, scene) for kind in kinds)


# -- draws -------------------------------------------------------------------------------------------------------------
def _drawn(random: Random, kind: Kind, space: Space) -> Scene:
    figure, colour = _figure_and_colour(random, kind, space)
    return Scene(
        figure=figure,
        colour=colour,
        shade=_three(random, -SHADE, SHADE),
        paper=_three(random, PAPER_MIN, 255),
        marks=(_digit_mark(random),) if kind is Kind.DIGIT else tuple(_marks(random, _count(random, kind))),
        thickness=random.uniform(0.16, 0.3),
        wobble=random.randrange(1 << 30),
    )


def _figure_and_colour(random: Random, kind: Kind, space: Space) -> tuple[str, str]:
    while True:
        pair = random.choice(COLOURS), random.choice(DIGITS if kind is Kind.DIGIT else SHAPES)
        if space is not Space.TRAIN or pair not in UNSEEN:
            return pair[1], pair[0]


def _count(random: Random, kind: Kind) -> int:
    """Any number where it is asked for; otherwise mostly one, and exactly one where its place is asked for."""
    if kind is Kind.POSITION or (kind is not Kind.COUNT and random.random() < 0.5):
        return 1
    return random.randint(1, COUNT_MAX)


def _marks(random: Random, count: int) -> Iterator[Mark]:
    for field in random.sample(range(len(POSITIONS) ** 2), count):
        row, column = divmod(field, len(POSITIONS))
        radius = random.uniform(*RADII)
        play = FIELD / 2 - radius
        yield Mark(
            x=(column + 0.5) * FIELD + random.uniform(-play, play),
            y=(row + 0.5) * FIELD + random.uniform(-play, play),
            radius=radius,
            turn=random.uniform(-TURN_MAX, TURN_MAX),
        )


def _digit_mark(random: Random) -> Mark:
    radius = random.uniform(*DIGIT_RADII)
    play = 0.45 - radius
    return Mark(
        x=0.5 + random.uniform(-play, play),
        y=0.5 + random.uniform(-play, play),
        radius=radius,
        turn=random.uniform(-TURN_MAX, TURN_MAX),
    )


def _three(random: Random, low: int, high: int) -> tuple[int, int, int]:
    return random.randint(low, high), random.randint(low, high), random.randint(low, high)


# -- words -------------------------------------------------------------------------------------------------------------
def _question(random: Random, kind: Kind, scene: Scene) -> Question:
    wording = random.choice(WORDINGS[kind])
    return Question(kind, wording.format(_named(kind, scene)), _answer(kind, scene))


def _named(kind: Kind, scene: Scene) -> str:
    """What the question calls the thing, without saying what is asked."""
    if scene.is_digit:
        return "digit"
    if kind is Kind.COUNT:
        return PLURALS[scene.figure]
    return scene.figure if len(scene.marks) == 1 else PLURALS[scene.figure]


def _answer(kind: Kind, scene: Scene) -> str:
    answers = {
        Kind.COLOUR: scene.colour,
        Kind.SHAPE: scene.figure,
        Kind.COUNT: str(len(scene.marks)),
        Kind.POSITION: scene.position,
        Kind.DIGIT: scene.figure,
    }
    return answers[kind]
