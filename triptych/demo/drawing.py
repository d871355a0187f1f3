"""From a scene to pixels: plain polygons and strokes on pale paper, drawn large and reduced, so edges are smooth."""

from collections.abc import Callable, Iterable, Mapping
from math import cos, pi, radians, sin
from random import Random
from typing import Final

from PIL import Image, ImageDraw

from triptych.demo.scenes import Mark, Scene

SIDE: Final = 192  # pixels of a picture's side
_FINER: Final = 3  # drawn so many times larger
_INKS: Final[Mapping[str, tuple[int, int, int]]] = {
    "red": (215, 30, 35),
    "orange": (245, 135, 20),
    "yellow": (240, 220, 30),
    "green": (35, 150, 60),
    "blue": (35, 75, 205),
    "purple": (125, 45, 155),
    "pink": (245, 130, 185),
    "black": (25, 25, 25),
}
_SHAKE: Final = 0.07  # how far a hand strays from the strokes below, which span -1 .. 1

Point = tuple[float, float]


def draw(scene: Scene, side: int = SIDE) -> Image.Image:
    """The picture, in RGB."""
    large = side * _FINER
    canvas = Image.new("RGB", (large, large), scene.paper)
    pen = ImageDraw.Draw(canvas)
    for mark in scene.marks:
        if scene.is_digit:
            _write(pen, scene, mark, large)
        else:
            pen.polygon([_placed(point, mark, large) for point in _OUTLINES[scene.figure]()], fill=_ink(scene))
    return canvas.reduce(_FINER)


def _ink(scene: Scene) -> tuple[int, int, int]:
    red, green, blue = (
        min(255, max(0, base + off)) for base, off in zip(_INKS[scene.colour], scene.shade, strict=True)
    )
    return red, green, blue


def _placed(point: Point, mark: Mark, side: int) -> Point:
    angle, (x, y) = radians(mark.turn), point
    turned = x * cos(angle) - y * sin(angle), x * sin(angle) + y * cos(angle)
    return (mark.x + mark.radius * turned[0]) * side, (mark.y + mark.radius * turned[1]) * side


# -- shapes: outlines within a circle of radius 1, y downwards ---------------------------------------------------------
def _ring(points: int, radius: float = 1.0, first: float = -pi / 2) -> list[Point]:
    angles = (first + 2 * pi * point / points for point in range(points))
    return [(radius * cos(angle), radius * sin(angle)) for angle in angles]


def _star() -> list[Point]:
    tips, notches = _ring(5), _ring(5, 0.42, -pi / 2 + pi / 5)
    return [point for pair in zip(tips, notches, strict=True) for point in pair]


def _cross(arm: float = 0.3, reach: float = 0.92) -> list[Point]:
    corner = [(arm, -arm), (reach, -arm), (reach, arm), (arm, arm)]
    turns: Iterable[Callable[[Point], Point]] = (
        lambda p: (p[1], -p[0]),
        lambda p: p,
        lambda p: (-p[1], p[0]),
        lambda p: (-p[0], -p[1]),
    )
    return [turn(point) for turn in turns for point in corner]


def _heart() -> list[Point]:
    """The usual parametric heart."""
    steps = (2 * pi * step / 40 for step in range(40))
    return [
        (16 * sin(t) ** 3 / 17, -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t) + 2) / 17) for t in steps
    ]


_OUTLINES: Final[Mapping[str, Callable[[], list[Point]]]] = {
    "circle": lambda: _ring(48, 0.92),
    "square": lambda: _ring(4, 1.1, -pi / 4),
    "triangle": lambda: _ring(3),
    "star": _star,
    "cross": _cross,
    "heart": _heart,
}


# -- digits: strokes as a hand writes them, in a box of -0.6 .. 0.6 by -1 .. 1 -----------------------------------------
def _arc(x: float, y: float, wide: float, high: float, start: float, end: float, steps: int = 14) -> list[Point]:
    """Part of an ellipse; angles in degrees, 0 to the right, growing clockwise."""
    angles = (radians(start + (end - start) * step / steps) for step in range(steps + 1))
    return [(x + wide * cos(angle), y + high * sin(angle)) for angle in angles]


_STROKES: Final[Mapping[str, tuple[list[Point], ...]]] = {
    "0": (_arc(0, 0, 0.58, 1, 0, 360, 28),),
    "1": ([(-0.35, -0.6), (0.1, -1), (0.1, 1)],),
    "2": ([*_arc(0, -0.45, 0.55, 0.55, 190, 385), (-0.55, 1), (0.6, 1)],),
    "3": ([*_arc(-0.05, -0.5, 0.5, 0.5, 200, 450), *_arc(-0.05, 0.48, 0.58, 0.52, 270, 510)],),
    "4": ([(0.2, -1), (-0.6, 0.35), (0.6, 0.35)], [(0.25, -0.2), (0.25, 1)]),
    "5": ([(0.5, -1), (-0.4, -1), (-0.45, -0.15), *_arc(-0.05, 0.38, 0.6, 0.6, 230, 510)],),
    "6": ([(0.35, -1), (-0.25, -0.35), *_arc(0, 0.42, 0.55, 0.58, 200, 560, 24)],),
    "7": ([(-0.55, -1), (0.55, -1), (-0.1, 1)],),
    "8": ([*_arc(0, -0.5, 0.45, 0.48, 90, 450, 20), *_arc(0, 0.48, 0.55, 0.52, 270, 630, 20)],),
    "9": ([*_arc(0, -0.42, 0.55, 0.58, 0, 360, 24), (0.5, 0.2), (0.3, 1)],),
}


def _write(pen: ImageDraw.ImageDraw, scene: Scene, mark: Mark, side: int) -> None:
    """Each hand stretches and slants the digit as a whole, so that strokes that meet still meet."""
    hand = Random(scene.wobble)
    wide, slant, bend = hand.uniform(0.85, 1.2), hand.uniform(-0.15, 0.15), hand.uniform(-_SHAKE, _SHAKE)
    width = scene.thickness * mark.radius * side
    for stroke in _STROKES[scene.figure]:
        path = [
            _placed((wide * x - slant * y + bend * sin(3 * y), y + bend * cos(4 * x)), mark, side) for x, y in stroke
        ]
        pen.line(path, fill=_ink(scene), width=round(width), joint="curve")
        for x, y in (path[0], path[-1]):
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=_ink(scene))
