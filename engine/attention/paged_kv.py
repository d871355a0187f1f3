"""The arena as torch sees it: where a step's new keys and values go, and how a sequence's pages are gathered.

Nothing here knows about masks, softmax or models. Every copy is one indexed operation over rows or strips of one flat
view, for all sequences at once; the indices are built once per step for layer 0 and shifted per layer.

Legend: C columns, L layers, H kv heads, P parts (K then V), S slots of a block, D head dim, T packed tokens,
N sequences, B blocks of the longest of them.

    arena   [C, L, H, P, S, D]   contiguous
    row     one (column, layer, head, part, slot): D numbers
    strip   one (column, layer, head, part): S rows, S*D contiguous numbers
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.base.errors import Internal
from engine.commands import BlockTable
from engine.kv.arena import Arena

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's share of a packed batch.

    Query rows [row, row + tokens) are its positions [start, start + tokens); KV of [0, start) is in the arena.
    """

    row: int
    tokens: int
    start: int
    table: BlockTable

    @property
    def length(self) -> int:
        return self.start + self.tokens


class PagedKV:
    """Reads and writes the arena in place. Owns nothing: which columns a sequence has is in its spans."""

    def __init__(self, arena: Arena) -> None:
        kv = arena.schema.kv
        if kv.parts != 2:
            raise Internal(f"attention needs a stream of K and V, got {kv.parts} parts")
        self.dtype: torch.dtype = getattr(torch, kv.dtype)
        self.block_size = arena.block_size
        self._layers, self._heads, self._parts = kv.layers, kv.heads, kv.parts
        pages_CLHPSD = torch.from_numpy(arena.bytes_CLHPSX).view(self.dtype)
        self._rows = pages_CLHPSD.view(-1, kv.head_dim)
        self._strips = pages_CLHPSD.view(-1, self.block_size, kv.head_dim)

    # -- writing -------------------------------------------------------------------------------------------------------
    def rows_of(self, spans: Sequence[Span]) -> torch.Tensor:
        """The rows of layer 0 that take the keys of the spans' tokens, in packed order: rows_TH."""
        columns_T, slots_T = (np.concatenate(parts) for parts in zip(*map(self._places, spans), strict=True))
        return torch.from_numpy(self._strip(columns_T[:, None]) * self.block_size + slots_T[:, None])

    def write(self, layer: int, rows_TH: torch.Tensor, key_HTD: torch.Tensor, value_HTD: torch.Tensor) -> None:
        """Store the new tokens' keys and values of one layer."""
        keys = (rows_TH + layer * self._heads * self._parts * self.block_size).view(-1)
        for rows, new_HTD in ((keys, key_HTD), (keys + self.block_size, value_HTD)):
            self._rows.index_copy_(0, rows, new_HTD.transpose(0, 1).reshape(rows.shape[0], -1))

    # -- reading -------------------------------------------------------------------------------------------------------
    def strips_of(self, spans: Sequence[Span]) -> torch.Tensor:
        """The strips of layer 0 that hold the spans' sequences: strips_PNHB.

        Shorter tables are filled up with their own first column; whoever gathers must hide those tokens.
        """
        blocks = max(self.blocks(span) for span in spans)
        columns_NB = np.array([self._padded_table(span, blocks) for span in spans], np.int64)
        keys_NHB = self._strip(columns_NB[:, None, :], heads_axis=1)
        return torch.from_numpy(np.stack((keys_NHB, keys_NHB + 1)))

    def gather(self, layer: int, strips_PNHB: torch.Tensor) -> torch.Tensor:
        """Copy sequences out of one layer: [P, N, H, B * S, D], contiguous."""
        strips = (strips_PNHB + layer * self._heads * self._parts).view(-1)
        return self._strips.index_select(0, strips).view(*strips_PNHB.shape[:3], -1, self._strips.shape[-1])

    def blocks(self, span: Span) -> int:
        """How many blocks hold the span's sequence, its new tokens included."""
        return -(-span.length // self.block_size)

    # -- addresses -----------------------------------------------------------------------------------------------------
    def _places(self, span: Span) -> tuple[Index, Index]:
        """(column, slot) of each new token. A table may be longer than the sequence (room to grow), never shorter."""
        if len(span.table) < self.blocks(span):
            raise Internal(f"{span.length} tokens do not fit {len(span.table)} blocks of {self.block_size}")
        positions_T = np.arange(span.start, span.length)
        return np.array(span.table, np.int64)[positions_T // self.block_size], positions_T % self.block_size

    def _strip(self, columns: Index, heads_axis: int = -1) -> Index:
        """The key strips of layer 0 in these columns; the axis of length 1 becomes the heads."""
        shape = [1] * columns.ndim
        shape[heads_axis] = self._heads
        strips: Index = (columns * (self._layers * self._heads) + np.arange(self._heads).reshape(shape)) * self._parts
        return strips

    def _padded_table(self, span: Span, blocks: int) -> list[int]:
        table = span.table[: self.blocks(span)]
        return [*table, *table[:1] * (blocks - len(table))]
