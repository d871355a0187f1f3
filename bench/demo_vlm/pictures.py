"""Training pictures: drawn once, kept as bytes, taken at random."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from triptych.demo.drawing import draw
from triptych.demo.scenes import Scene, Space, scene_of


@dataclass(frozen=True, slots=True)
class Pictures:
    """Scenes and their pixels: [pictures, side, side, 3] bytes, as the processor resizes them."""

    scenes: Sequence[Scene]
    pixels: Tensor

    def __len__(self) -> int:
        return len(self.scenes)

    def inputs(self, numbers: Sequence[int]) -> Tensor:
        """What the processor makes of them: -1 .. 1, channels first."""
        return self.pixels[list(numbers)].permute(0, 3, 1, 2).float() / 127.5 - 1


def drawn(space: Space, seed: int, numbers: Iterable[int], side: int) -> Pictures:
    scenes = [scene_of(space, seed, number)[0] for number in numbers]
    pixels = np.empty((len(scenes), side, side, 3), np.uint8)
    for number, scene in enumerate(scenes):
        pixels[number] = np.asarray(draw(scene).resize((side, side), Image.Resampling.BICUBIC))
    return Pictures(scenes, torch.from_numpy(pixels))
