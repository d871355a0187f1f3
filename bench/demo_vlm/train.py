"""Trains the demo model's tower and projector, in three stages, each of which leaves a file in --out.

    caption     caption.safetensors    the vectors that make the frozen language model answer right
    sight       sight.safetensors      tower and projector that say them of pictures
    together    weights.safetensors    the same after some steps through the language model: what is packaged

python -m bench.demo_vlm.train --out FOLDER [caption | sight | together ...]     default: all, in this order

Uses as many threads as OMP_NUM_THREADS says. Stages save as they go; a stage starts from the file of the one before.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.demo_vlm.caption import WORDS, Caption, labels
from bench.demo_vlm.eyes import Eyes, configuration
from bench.demo_vlm.pictures import Pictures, drawn
from bench.demo_vlm.reader import Order, Reader, Talk
from bench.demo_vlm.recipe import Recipe, SightStage
from engine.models.checkpoint import ensure_default_model
from engine.models.demo_vlm.assemble import WEIGHTS, packaged
from triptych.demo.scenes import KINDS, Kind, Scene, Space, questions_about, scene_of

CAPTION: Final = "caption.safetensors"
SIGHT: Final = "sight.safetensors"
BETAS: Final = (0.9, 0.98)
GRADIENT_MAX: Final = 1.0
SAVED_EVERY_STEPS: Final = 25
_SEEDS: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Workshop:
    """What every stage needs."""

    recipe: Recipe
    folder: Path  # where the stages' files are
    eyes: Eyes
    language_model: Path

    def reader(self) -> Reader:
        return Reader(self.language_model, self.eyes.image_tokens)

    def caption(self, reader: Reader) -> Caption:
        return Caption(reader.embeddings, reader.tokenize, self.eyes.image_tokens)

    def random(self, stage: str) -> Random:
        return Random(f"{stage}/{self.recipe.seed}")

    def pictures(self, seed: int, numbers: Iterable[int]) -> Pictures:
        return drawn(Space.TRAIN, seed, numbers, self.eyes.side)


# -- stages ------------------------------------------------------------------------------------------------------------
def learn_caption(shop: Workshop) -> None:
    """Prompt tuning of a template: 30 vectors between slots and 41 in them."""
    stage, random, reader = shop.recipe.caption, shop.random("caption"), shop.reader()
    caption = shop.caption(reader)
    optimizer = torch.optim.Adam(caption.parameters(), lr=stage.rate, betas=BETAS)
    for step in _steps("caption", stage.steps):
        _set_rates(optimizer, step, stage.steps, warm_up_steps=10)
        scenes = [scene_of(Space.TRAIN, shop.recipe.seed, random.randrange(_SEEDS))[0] for _ in range(stage.scenes)]
        said = caption.of(scenes)
        said = said + stage.noise * torch.randn_like(said)
        loss = reader.loss(said, [_talk(scene, random, stage.questions) for scene in scenes])
        step.end(loss, optimizer, caption, lambda: save_file(caption.state_dict(), shop.folder / CAPTION))


def learn_to_see(shop: Workshop) -> None:
    """Each slot: choose the right word, and come near to its vector. Between them: come near."""
    stage, random = shop.recipe.sight, shop.random("sight")
    caption, pictures = shop.caption(shop.reader()), shop.pictures(shop.recipe.seed, _numbers(stage))
    caption.load_state_dict(load_file(shop.folder / CAPTION))
    caption.requires_grad_(False)
    optimizer = torch.optim.AdamW(shop.eyes.parameters(), lr=stage.rate, betas=BETAS, weight_decay=stage.weight_decay)
    for step in _steps("sight", stage.steps):
        _set_rates(optimizer, step, stage.steps, stage.warm_up_steps)
        numbers = [random.randrange(len(pictures)) for _ in range(stage.batch)]
        loss = sight_loss(shop, caption, shop.eyes(pictures.inputs(numbers)), [pictures.scenes[n] for n in numbers])
        step.end(loss, optimizer, shop.eyes, lambda: shop.eyes.save(shop.folder / SIGHT))


def _numbers(stage: SightStage) -> Iterable[int]:
    """Of the pictures: all kinds in turn, then digits only."""
    digits = range(
        stage.pictures + KINDS.index(Kind.DIGIT), stage.pictures + len(KINDS) * stage.more_digits, len(KINDS)
    )
    return (*range(stage.pictures), *digits)


def sight_loss(shop: Workshop, caption: Caption, said: Tensor, scenes: Sequence[Scene]) -> Tensor:
    stage, right = shop.recipe.sight, labels(scenes)
    off = (said - caption.of(scenes)).square().sum(-1) / caption.mean_square()
    loss = stage.between_weight * off[:, caption.fixed].mean()
    for slot in WORDS:
        weight = stage.figure_weight if slot == "figure" else 1.0
        chosen = F.cross_entropy(caption.choices(said, slot), right[slot])
        loss = loss + weight * chosen + off[:, caption.slots[slot]].mean()
    return loss


def learn_together(shop: Workshop) -> None:
    """Through the frozen language model, on the tokens of right answers."""
    stage, random, reader, eyes = shop.recipe.together, shop.random("together"), shop.reader(), shop.eyes
    eyes.load(shop.folder / SIGHT)
    pictures = shop.pictures(shop.recipe.seed + 1, range(stage.steps * stage.pictures))  # each is shown once
    optimizer = torch.optim.AdamW(
        [
            {"params": eyes.multi_modal_projector.parameters(), "lr": stage.projector_rate},
            {"params": eyes.vision_tower.parameters(), "lr": stage.tower_rate},
        ],
        betas=BETAS,
        weight_decay=0.0,
    )
    for step in _steps("together", stage.steps):
        _set_rates(optimizer, step, stage.steps, warm_up_steps=5)
        numbers = range(step.number * stage.pictures, (step.number + 1) * stage.pictures)
        talks = [_talk(pictures.scenes[number], random, stage.questions) for number in numbers]
        loss = reader.loss(eyes(pictures.inputs(numbers)), talks)
        step.end(loss, optimizer, eyes, lambda: eyes.save(shop.folder / WEIGHTS))


STAGES: Final[dict[str, Callable[[Workshop], None]]] = {
    "caption": learn_caption,
    "sight": learn_to_see,
    "together": learn_together,
}


def _talk(scene: Scene, random: Random, most: int) -> Talk:
    """Different questions about one picture, those that take more than one look first, in any order of asking."""
    once, again = (list(questions_about(scene, random)) for _ in range(2))
    hard = [one for one in once if one.kind in (Kind.COUNT, Kind.POSITION, Kind.DIGIT)]
    distinct = {one.text: one for one in (*hard, *random.sample(once, len(once)), *again)}
    questions = list(distinct.values())[:most]
    order = random.choice((Order.BESIDE, Order.BESIDE, Order.IN_TURN, Order.TEXT_FIRST))
    return Talk(order, questions if order is Order.BESIDE else random.sample(questions, len(questions)))


# -- steps -------------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Step:
    """One of a stage. Remembers the stage's running loss."""

    stage: str
    number: int
    last: bool
    began_s: float
    running: float | None = None

    def end(self, loss: Tensor, optimizer: torch.optim.Optimizer, trained: nn.Module, save: Callable[[], None]) -> None:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained.parameters(), GRADIENT_MAX)
        optimizer.step()
        self.running = loss.item() if self.running is None else 0.95 * self.running + 0.05 * loss.item()
        if self.last or self.number % SAVED_EVERY_STEPS == SAVED_EVERY_STEPS - 1:
            save()
            print(
                f"{self.stage} {self.number + 1}: {self.running:.4f} after {time.process_time() - self.began_s:.0f} s",
                flush=True,
            )


def _steps(stage: str, count: int) -> Iterator[Step]:
    step = Step(stage, 0, False, time.process_time())
    for step.number in range(count):
        step.last = step.number == count - 1
        yield step


def _set_rates(optimizer: torch.optim.Optimizer, step: Step, steps: int, warm_up_steps: int) -> None:
    """Up for a while, then down along a cosine, almost to nothing."""
    factor = min(1.0, (step.number + 1) / warm_up_steps) * (0.51 + 0.5 * math.cos(math.pi * step.number / steps))
    for group in optimizer.param_groups:
        group["lr"] = factor * group.setdefault("highest", group["lr"])


# -- command -----------------------------------------------------------------------------------------------------------
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.demo_vlm.train")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"unknown stages: {', '.join(sorted(unknown))}")
    options.out.mkdir(parents=True, exist_ok=True)
    train(options.stages or STAGES, options.out, Recipe())
    return 0


def train(stages: Iterable[str], out: Path, recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    language_model = ensure_default_model(progress=print)
    with packaged() as folder:
        eyes = Eyes(configuration(folder, language_model))
    shop = Workshop(recipe, out, eyes, language_model)
    for stage in stages:
        STAGES[stage](shop)


if __name__ == "__main__":
    raise SystemExit(main())
