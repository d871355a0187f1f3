"""How well the demo model sees, on pictures that it was not trained on, through plain transformers' `generate`.

python -m bench.demo_vlm.evaluate [--count N] [--seed S] [--folder CHECKPOINT] [--json FILE]

An answer is right if it is the right one, to the letter. Chance is that of guessing among the answers of the kind.
"""

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoProcessor, LlavaForConditionalGeneration

from bench.figures import Bar, Figure, machine
from engine.models.demo_vlm.assemble import ensure_demo_vlm
from triptych.demo.drawing import draw
from triptych.demo.scenes import CHOICES, UNSEEN, Kind, Question, Scene, Space, scene_of

BATCH: Final = 20
ANSWER_TOKENS_MAX: Final = 8
COUNT: Final = 500
SEED: Final = 2026
LIMITS: Final = {Kind.COLOUR: 0.9, Kind.SHAPE: 0.9, Kind.COUNT: 0.7, Kind.POSITION: 0.9, Kind.DIGIT: 0.9}
UNSEEN_LIMIT: Final = 0.8
_WILSON_Z: Final = 1.96  # 95 %


@dataclass(frozen=True, slots=True)
class Shown:
    """One picture, and what the model said."""

    scene: Scene
    question: Question
    said: str

    @property
    def right(self) -> bool:
        return self.said == self.question.answer

    @property
    def unseen(self) -> bool:
        return (self.scene.colour, self.scene.figure) in UNSEEN


class Model:
    """A checkpoint, as anybody would load it."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        load_processor: Any = AutoProcessor.from_pretrained
        self._processor = load_processor(folder)
        self._processor.tokenizer.padding_side = "left"
        self._model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)

    @torch.inference_mode()
    def answers(self, asked: Sequence[tuple[Scene, Question]]) -> list[str]:
        """Greedy, one conversation each."""
        inputs = self._processor(
            text=[self._prompt(question) for _, question in asked],
            images=[[draw(scene)] for scene, _ in asked],
            return_tensors="pt",
            padding=True,
        )
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        tokens = self._model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS_MAX)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        texts: list[str] = self._processor.batch_decode(new, skip_special_tokens=True)
        return texts

    def _prompt(self, question: Question) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        text: str = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return text


def shown(model: Model, seed: int, count: int) -> Iterator[Shown]:
    """The kinds take turns, so each gets a fifth of the pictures."""
    for first in range(0, count, BATCH):
        asked = [scene_of(Space.HELD_OUT, seed, number) for number in range(first, min(first + BATCH, count))]
        for (scene, question), said in zip(asked, model.answers(asked), strict=True):
            yield Shown(scene, question, said)


# -- figures -----------------------------------------------------------------------------------------------------------
async def measured() -> list[Figure]:
    """For `make bench`: the packaged model on the usual pictures."""
    return figures_of(list(shown(Model(ensure_demo_vlm()), SEED, COUNT)))


def figures_of(results: Sequence[Shown]) -> list[Figure]:
    """One per kind, and one for pairs of colour and shape that training never showed."""
    kinds = [_figure(kind, [one for one in results if one.question.kind is kind]) for kind in Kind]
    unseen = _bar("demo model, unseen pairs", "colours and shapes never trained together", UNSEEN_LIMIT)
    return [*kinds, _of([one for one in results if one.unseen], unseen)]


def _figure(kind: Kind, results: Sequence[Shown]) -> Figure:
    chance = 1 / CHOICES[kind]
    bar = _bar(f"demo model, {kind}", f"answers about held-out pictures; chance {chance:.2f}", LIMITS[kind])
    return _of(results, bar, chance=round(chance, 3))


def _bar(name: str, claim: str, limit: float) -> Bar:
    return Bar(name=name, claim=claim, unit="right", limit=limit, at_least=True)


def _of(results: Sequence[Shown], bar: Bar, **notes: Any) -> Figure:
    right, total = sum(one.right for one in results), len(results)
    value = right / total if total else 0.0
    return Figure(bar=bar, value=value, interval=wilson(right, total), samples=total, notes=notes)


def wilson(right: int, total: int) -> tuple[float, float]:
    """Where the true share lies, 95 times of 100 (Wilson 1927): sensible also where every answer was right."""
    if total == 0:
        return 0.0, 1.0
    share, z2 = right / total, _WILSON_Z**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    reach = _WILSON_Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, middle - reach), min(1.0, middle + reach)


# -- command -----------------------------------------------------------------------------------------------------------
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.demo_vlm.evaluate")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--folder", type=Path, help="a checkpoint; default: the packaged model")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args(arguments)
    model = Model(options.folder or ensure_demo_vlm(progress=print))
    results = list(shown(model, options.seed, options.count))
    figures = figures_of(results)
    Console().print(table(figures))
    Console().print(*_mistakes(results), sep="\n")
    if options.json:
        rows = [asdict(figure) | {"passed": figure.passed} for figure in figures]
        options.json.write_text(json.dumps({"machine": machine(), "figures": rows}, indent=2) + "\n")
    return 0 if all(figure.passed for figure in figures) else 1


def table(figures: Iterable[Figure]) -> Table:
    rows = Table("kind", "right", "95 %", "of", "chance", "bar", "")
    for figure in figures:
        low, high = figure.interval
        chance = figure.notes.get("chance")
        rows.add_row(
            figure.bar.name,
            f"{figure.value:.1%}",
            f"{low:.1%} .. {high:.1%}",
            str(figure.samples),
            "" if chance is None else f"{chance:.1%}",
            f">= {figure.bar.limit:.0%}",
            "ok" if figure.passed else "MISSED",
        )
    return rows


def _mistakes(results: Sequence[Shown], most: int = 12) -> list[str]:
    wrong = [one for one in results if not one.right]
    return [f"{one.question.text} {one.question.answer}, not {one.said!r}" for one in wrong[:most]]


if __name__ == "__main__":
    raise SystemExit(main())
