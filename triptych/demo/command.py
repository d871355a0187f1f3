"""`triptych encode-demo`: held-out pictures as PNG files, and `items.json` with what to ask and what is right.

Whatever the seed, the demo model was trained on none of them (`scenes`).
"""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from control_plane.options import OptionError, require_at_least
from engine.base.files import replace_file
from triptych.demo.drawing import draw
from triptych.demo.scenes import Kind, Question, Scene, Space, scene_of

ITEMS: Final = "items.json"
COUNT_MAX: Final = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """How many pictures, which, and where to."""

    count: int = 20
    seed: int = 0
    out: Path

    def __post_init__(self) -> None:
        require_at_least("count", self.count, 1)
        if self.count > COUNT_MAX:
            raise OptionError("count", f"must be at most {COUNT_MAX}, not {self.count}")
        require_at_least("seed", self.seed, 0)


@dataclass(frozen=True, slots=True)
class Item:
    """One line of items.json: scripts rely on these names."""

    file: str
    question: str
    answer: str
    kind: Kind


def run(options: DemoOptions) -> int:
    """The exit status. A folder that has such files gets them replaced; others stay."""
    try:
        items = write(options)
    except OSError as error:
        raise OptionError("out", f"cannot write to {options.out}: {error.strerror}") from error
    print(f"{len(items)} pictures and {ITEMS} in {options.out}")
    return 0


def write(options: DemoOptions) -> Sequence[Item]:
    """The list comes last: where it is, all its pictures are."""
    items = []
    for number in range(options.count):
        scene, question = scene_of(Space.HELD_OUT, options.seed, number)
        items.append(item := _item(number, question))
        replace_file(options.out / item.file, png(scene))
    replace_file(options.out / ITEMS, as_json(items))
    return items


def png(scene: Scene) -> bytes:
    stream = io.BytesIO()
    draw(scene).save(stream, format="PNG")
    return stream.getvalue()


def as_json(items: Sequence[Item]) -> bytes:
    rows: list[dict[str, Any]] = [asdict(item) for item in items]
    return json.dumps(rows, indent=2).encode() + b"\n"


def _item(number: int, question: Question) -> Item:
    return Item(f"{number:05d}.png", question.text, question.answer, question.kind)
