"""Prompts with images as a family's own processor makes them, told in our words, and their embeddings in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from encode_worker.encoders.tower import TowerEncoder
from engine.commands import EncodeItem, EncodePlan
from engine.images import Picture, PlacedImage, PromptImage, Run
from engine.kv.arena import Arena
from engine.kv.schema import CacheSchema, Stream
from engine.vision.info import describe_vision, embedding_schema
from tests.engine.vision.tiny_vlms import load_processor

SIZES = ((56, 56), (120, 40), (30, 90), (112, 111))  # square, wide, tall, and larger than what a tile holds
ARRANGEMENTS = {  # numbers are images
    "before": (0, "What is this?"),
    "after": ("Look at this: ", 1),
    "between": ("First ", 2, " then ", 3, ", which is larger?"),
    "everywhere": (3, "\n", 0, " and ", 1, "?", 2),
}
BLOCK_SIZE = 4  # of embedding memory: every image lies in several blocks


def picture_of(index: int) -> Picture:
    width, height = SIZES[index]
    pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), np.uint8)
    return Picture(width, height, pixels.tobytes())


@dataclass(frozen=True)
class ImagePrompt:
    """`inputs` is what transformers' own `generate` takes."""

    inputs: Any
    token_ids: tuple[int, ...]
    images: tuple[PromptImage, ...]
    pictures: tuple[Picture, ...]


@lru_cache
def image_prompt(folder: Path, arrangement: str) -> ImagePrompt:
    parts = ARRANGEMENTS[arrangement]
    content = [{"type": "image"} if isinstance(part, int) else {"type": "text", "text": part} for part in parts]
    pictures = tuple(picture_of(part) for part in parts if isinstance(part, int))
    return prompt_with(folder, [{"role": "user", "content": content}], pictures)


def prompt_with(folder: Path, messages: Any, pictures: Sequence[Picture], processor: Any = None) -> ImagePrompt:
    processor = processor or load_processor(folder)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[_opened(pictures)], return_tensors="pt")
    tokens = inputs["input_ids"][0].tolist()
    images = tuple(_images(processor, inputs, tokens, pictures))
    return ImagePrompt(inputs, tuple(tokens), images, tuple(pictures))


def _images(processor: Any, inputs: Any, tokens: list[int], pictures: Sequence[Picture]) -> Iterator[PromptImage]:
    """Placeholders in order, dealt to the images by their numbers of features."""
    at = iter([position for position, token in enumerate(tokens) if token == processor.image_token_id])
    grids = _grids(processor, inputs, len(pictures))
    for index, features in enumerate(_features(processor, inputs, tokens, pictures)):
        positions = [next(at) for _ in range(features)]
        stretches = [list(group) for _, group in groupby(enumerate(positions), key=lambda pair: pair[1] - pair[0])]
        runs = tuple(Run(stretch[0][1], len(stretch)) for stretch in stretches)
        yield PromptImage(key=bytes([index]) * 16, runs=runs, grid=grids[index])
    assert next(at, None) is None


def _grids(processor: Any, inputs: Any, count: int) -> list[tuple[int, int]]:
    if "image_grid_thw" not in inputs:
        return [(0, 0)] * count
    merged = inputs["image_grid_thw"][:, 1:] // processor.image_processor.merge_size
    return [(rows, columns) for rows, columns in merged.tolist()]


def _features(processor: Any, inputs: Any, tokens: list[int], pictures: Sequence[Picture]) -> list[int]:
    if "image_grid_thw" in inputs:
        return [rows * columns for rows, columns in _grids(processor, inputs, len(pictures))]
    total = tokens.count(processor.image_token_id)
    tiles = [1] * len(pictures)
    if "pixel_attention_mask" in inputs:
        tiles = [processor.image_processor([[image]])["pixel_values"][0].shape[0] for image in _opened(pictures)]
    return [total * count // sum(tiles) for count in tiles]


def _opened(pictures: Sequence[Picture]) -> list[Any]:
    return [Image.frombytes("RGB", (each.width, each.height), each.pixels) for each in pictures]


# -- embeddings --------------------------------------------------------------------------------------------------------
def embedding_arena(folder: Path, dtype: str = "float32", columns: int = 64) -> Arena:
    """Every number in it is NaN, so a row that nobody wrote and somebody reads spoils the logits."""
    vision = describe_vision(folder)
    assert vision is not None
    return _poisoned(embedding_schema(vision, dtype), columns)


def bare_embedding_arena(hidden: int, columns: int = 64) -> Arena:
    """For no model in particular."""
    stream = Stream(name="image", layers=1, heads=1, head_dim=hidden, dtype="float32", parts=1)
    return _poisoned(CacheSchema("tiny", (stream,)), columns)


def _poisoned(schema: CacheSchema, columns: int) -> Arena:
    arena = Arena(schema, columns=columns, block_size=BLOCK_SIZE)
    arena.poison(range(columns))
    return arena


def embeddings_of(arena: Arena, placed: Sequence[PlacedImage]) -> list[torch.Tensor]:
    """What memory holds of each image, [R, E]."""
    dtype = getattr(torch, arena.schema.kv.dtype)
    rows = [arena.read(each.table, (0, 1), (0, each.image.features))[0, 0, 0] for each in placed]
    return [torch.from_numpy(each).view(dtype) for each in rows]


class Encoding:
    """A tower over an arena, whose columns are given away in a scattered order and never come back."""

    def __init__(self, folder: Path, arena: Arena, dtype: str = "float32") -> None:
        self.encoder = TowerEncoder(TowerEncoder.Config(model=folder, dtype=dtype), arena)
        self._columns = iter([(column * 29 + 7) % arena.columns for column in range(arena.columns)])

    def place(self, images: Sequence[PromptImage], pictures: Sequence[Picture]) -> tuple[PlacedImage, ...]:
        """All in one plan."""
        placed = tuple(PlacedImage(image, self._table(image.features)) for image in images)
        items = [
            EncodeItem(index, picture, each.image.features, each.table, each.image.key)
            for index, (each, picture) in enumerate(zip(placed, pictures, strict=True))
        ]
        assert self.encoder.encode(EncodePlan(0, tuple(items))).failed == {}
        return placed

    def _table(self, features: int) -> tuple[int, ...]:
        return tuple(next(self._columns) for _ in range(-(-features // BLOCK_SIZE)))
