"""What images change about a packed step: some rows are not looked up, and positions may have three dimensions.

    tokens      the   cat  <image>  <image>  <image> | looks || <image>  <image>  dog   ||
    embedded     E     E    row 4    row 5    row 6  |   E   ||  row 0    row 1    E    ||     E: the model's own lookup

A chunk may begin and end inside an image: it takes the rows that are its own. The result is what transformers makes of
the whole prompt (`masked_scatter` of the image features over the embedded placeholders).

Legend: T packed tokens, U of them placeholders, E hidden size, R rows of the embedding arena.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engine.attention.paged_kv import Span
from engine.commands import BlockTable, SequenceSlice
from engine.images import positions_3T
from engine.kv.arena import Arena


class Placeholders(NamedTuple):
    """Packed rows [row, row + tokens), which stand for rows [first, first + tokens) of the embedding in `table`."""

    row: int
    tokens: int
    first: int
    table: BlockTable


def placeholders_of(piece: SequenceSlice, span: Span) -> Iterator[Placeholders]:
    """Of one slice; none where its images lie outside of its tokens."""
    for placed in piece.images:
        for run, first in placed.image.rows():
            start, end = max(run.token_start, span.start), min(run.token_start + run.tokens, span.length)
            if start < end:
                at = first + start - run.token_start
                yield Placeholders(span.row + start - span.start, end - start, at, placed.table)


class EmbeddingRows:
    """An embedding arena as torch sees it, in place. Only reads."""

    def __init__(self, arena: Arena) -> None:
        stream = arena.schema.kv
        self._block_size = arena.block_size
        memory = torch.as_tensor(arena.bytes_CLHPSX).view(getattr(torch, stream.dtype))
        self._rows_RE = memory.view(-1, stream.head_dim)

    def put(self, embedded_1TE: torch.Tensor, placeholders: Sequence[Placeholders]) -> None:
        """Replace the placeholders' rows."""
        targets_U = np.concatenate([np.arange(each.row, each.row + each.tokens) for each in placeholders])
        sources_U = np.concatenate([self._sources(each) for each in placeholders])
        rows_UE = self._rows_RE.index_select(0, torch.from_numpy(sources_U).to(self._rows_RE.device))
        embedded_1TE[0, torch.from_numpy(targets_U).to(embedded_1TE.device)] = rows_UE.to(embedded_1TE)

    def _sources(self, placeholders: Placeholders) -> npt.NDArray[np.int64]:
        rows_U = np.arange(placeholders.first, placeholders.first + placeholders.tokens)
        columns_U = np.array(placeholders.table, np.int64)[rows_U // self._block_size]
        return columns_U * self._block_size + rows_U % self._block_size


# -- positions ---------------------------------------------------------------------------------------------------------
def positions_of(slices: Sequence[SequenceSlice], spans: Sequence[Span]) -> npt.NDArray[np.int64]:
    """[1, T]; or [3, 1, T] for time, row and column where any slice has an image whose rows and columns count."""
    pairs = list(zip(slices, spans, strict=True))
    if any(placed.image.grid[0] for piece in slices for placed in piece.images):
        return np.concatenate([_three(piece, span) for piece, span in pairs], axis=1)[:, None]
    return np.concatenate([_one(piece, span) for piece, span in pairs])[None]


def _one(piece: SequenceSlice, span: Span) -> npt.NDArray[np.int64]:
    return np.arange(span.start, span.length, dtype=np.int64) + piece.rope_delta


def _three(piece: SequenceSlice, span: Span) -> npt.NDArray[np.int64]:
    """A slice has its images or, when they are all behind it, what they add up to."""
    if piece.images:
        return positions_3T([placed.image for placed in piece.images], span.start, span.length)
    return np.tile(_one(piece, span), (3, 1))
