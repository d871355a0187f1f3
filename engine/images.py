"""Images as the language model meets them: which tokens of a prompt stand for which rows of which embedding.

An image in a prompt is *placeholders*: tokens of one id, whose embeddings are not looked up but come from an encoder.
What they say is in the image, not in the ids, so that wherever token ids decide something (names of cached blocks,
positions, the oracle's digests) the image takes part.

    token_ids    the cat <fake> <image> <image> <row> <image> <image> looks
    runs                        |-- run 0 ----|       |-- run 1 ----|
    rows                         0       1             2       3             of the embedding `key`, `features` in all

Pure values: no tensors, no torch. Which layout an image of some size gets is a family's business (`engine.vision`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from engine.commands import BlockTable

KEY_BYTES: Final = 16
PIXEL_BYTES: Final = 3  # RGB

_NAME_BITS: Final = 62
_STEP: Final = 0x2545F4914F6CDD1D  # odd: rows of one image have different names


@dataclass(frozen=True, slots=True)
class Picture:
    """Decoded pixels, RGB, row by row: `width * height * 3` bytes."""

    width: int
    height: int
    pixels: bytes = field(repr=False)  # a client's: never in a log

    def __post_init__(self) -> None:
        if min(self.width, self.height) < 1 or len(self.pixels) != self.width * self.height * PIXEL_BYTES:
            raise ValueError(f"{len(self.pixels)} bytes are not {self.width} x {self.height} RGB pixels")


class Run(NamedTuple):
    """Placeholders in a row: prompt tokens [token_start, token_start + tokens)."""

    token_start: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptImage:
    """One image of a prompt. `key` names the embedding and everything that decides what is in it, the tenant included.

    `grid` is the embedding's rows and columns where positions have three dimensions (M-RoPE); (0, 0): they are those of
    text.
    """

    key: bytes
    runs: tuple[Run, ...]
    grid: tuple[int, int] = (0, 0)

    @property
    def features(self) -> int:
        """Rows of the embedding: one for each placeholder."""
        return sum(run.tokens for run in self.runs)

    def rows(self) -> tuple[tuple[Run, int], ...]:
        """Each run with the row of its first placeholder."""
        starts = accumulate((run.tokens for run in self.runs[:-1]), initial=0)
        return tuple(zip(self.runs, starts, strict=True))

    @property
    def token_end(self) -> int:
        """Behind the last placeholder."""
        return self.runs[-1].token_start + self.runs[-1].tokens


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """An image whose embedding is in memory: row r in column `table[r // S]`, slot `r % S`."""

    image: PromptImage
    table: BlockTable


# -- names -------------------------------------------------------------------------------------------------------------
def naming_ids(token_ids: Sequence[int], images: Sequence[PromptImage], start: int = 0) -> list[int]:
    """`token_ids`, those of a sequence from position `start` on, with each placeholder replaced by a negative number
    that only this row of this embedding has. What blocks are named after (`engine.kv.block_hash`)."""
    ids = list(token_ids)
    for image in images:
        if image.token_end <= start:
            continue  # a long answer names its blocks one by one, and each time only what is new
        halves = _halves(image.key)
        for run, first_row in image.rows():
            low, high = max(run.token_start, start), min(run.token_start + run.tokens, start + len(ids))
            if low < high:
                row = first_row + low - run.token_start
                ids[low - start : high - start] = _names(halves, row, row + high - low)
    return ids


def _halves(key: bytes) -> npt.NDArray[np.uint64]:
    """Neighbours take different halves of a digest: any two of them hold all of it."""
    return np.frombuffer(blake2b(key, digest_size=16).digest(), "<u8")


def _names(halves: npt.NDArray[np.uint64], row_start: int, row_end: int) -> list[int]:
    """In one go: a router does it on its event loop, and an image may have thousands of rows."""
    rows = np.arange(row_start, row_end, dtype=np.uint64)
    mixed = (halves[rows % 2] + rows * np.uint64(_STEP)) & np.uint64((1 << _NAME_BITS) - 1)
    names: list[int] = (-1 - mixed.astype(np.int64)).tolist()
    return names


# -- positions ---------------------------------------------------------------------------------------------------------
def positions_3T(images: Sequence[PromptImage], start: int, end: int) -> npt.NDArray[np.int64]:
    """Time, row and column of tokens [start, end) of a sequence whose images are these (Qwen2-VL, section 2.1: M-RoPE).

    text    one number for all three, one more for each token
    image   time stands still, row and column count; what follows continues after the larger of both sides
    """
    positions = np.tile(np.arange(start, end, dtype=np.int64), (3, 1))
    shift = 0
    for image in images:
        rows, columns = image.grid
        if not rows:
            continue
        (run,) = image.runs
        begin, stop = run.token_start, run.token_start + run.tokens
        first = begin + shift
        shift += max(rows, columns) - run.tokens
        positions[:, max(stop - start, 0) :] += max(rows, columns) - run.tokens
        low, high = max(begin, start), min(stop, end)
        if low < high:
            cell_T = np.arange(low - begin, high - begin)
            positions[:, low - start : high - start] = first + np.stack(
                (np.zeros_like(cell_T), cell_T // columns, cell_T % columns)
            )
    return positions


def rope_delta(images: Sequence[PromptImage]) -> int:
    """What to add to a token's index for its position, once all images are behind it."""
    return sum(max(image.grid) - image.features for image in images if image.grid[0])
