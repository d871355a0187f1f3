"""The arena as torch sees it: where a step's new keys and values go, and how a sequence's pages are gathered.

Nothing here knows about masks, softmax or models. Every copy is one indexed operation over rows or strips of one flat
view, for all sequences at once; the indices are built once per step for layer 0 and shifted per layer. They are built
on the host, since tables are Python's, and cost what a step touches: a decode looks at one entry of its table.

Legend: C columns, L layers, H kv heads, P parts (K then V), S slots of a block, D head dim, T packed tokens,
N sequences, B blocks of the longest of them, U any number of tokens.

    arena   [C, L, H, P, S, D]   contiguous
    row     one (column, layer, head, part, slot): D numbers
    strip   one (column, layer, head, part): S rows, S*D contiguous numbers
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.base.errors import Internal, InvalidArgument
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

    def first_seen(self, window: int | None) -> int:
        """The first position that any of the span's tokens sees: the first token's window reaches back furthest."""
        return 0 if window is None else max(0, self.start + 1 - window)


class PagedKV:
    """Reads and writes the arena in place. Owns nothing: which columns a sequence has is in its spans."""

    def __init__(self, arena: Arena) -> None:
        kv = arena.schema.kv
        if kv.parts != 2:
            raise Internal(f"attention needs a stream of K and V, got {kv.parts} parts")
        self.dtype: torch.dtype = getattr(torch, kv.dtype)
        self.block_size = arena.block_size
        self._layers, self._heads, self._parts, self._head_dim = kv.layers, kv.heads, kv.parts, kv.head_dim
        self._pages_CLHPSD = torch.as_tensor(arena.bytes_CLHPSX).view(self.dtype)  # host or device memory, in place
        self.device = self._pages_CLHPSD.device
        self._rows = self._pages_CLHPSD.view(-1, kv.head_dim)
        self._strips = self._pages_CLHPSD.view(-1, self.block_size, kv.head_dim)

    # -- writing -------------------------------------------------------------------------------------------------------
    def rows_of(self, spans: Sequence[Span]) -> torch.Tensor:
        """The rows of layer 0 that take the keys of the spans' tokens, in packed order: rows_TH."""
        places_T = [place for span in spans for place in self._places(span)]
        columns_T, slots_T = np.array(places_T, np.int64).reshape(-1, 2).T
        return self._to_device(self._strip(columns_T[:, None]) * self.block_size + slots_T[:, None])

    def write(self, layer: int, rows_TH: torch.Tensor, key_HTD: torch.Tensor, value_HTD: torch.Tensor) -> None:
        """Store the new tokens' keys and values of one layer."""
        self._require_shape(layer, key_HTD, value_HTD)
        keys = (rows_TH + layer * self._heads * self._parts * self.block_size).view(-1)
        for rows, new_HTD in ((keys, key_HTD), (keys + self.block_size, value_HTD)):
            self._rows.index_copy_(0, rows, new_HTD.transpose(0, 1).reshape(rows.shape[0], -1))

    # -- reading -------------------------------------------------------------------------------------------------------
    def pages(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's keys and values where they are: strided views [C, S, H, D] for kernels that walk block tables."""
        pages_CHPSD = self._pages_CLHPSD[:, layer]
        return pages_CHPSD[:, :, 0].transpose(1, 2), pages_CHPSD[:, :, 1].transpose(1, 2)

    def strips_of(self, spans: Sequence[Span], window: int | None = None) -> torch.Tensor:
        """The strips of layer 0 that hold what the spans' tokens see: strips_PNHB, from `blocks_seen`'s first on.

        Shorter tables are filled up with a column of their own; whoever gathers must hide those tokens.
        """
        seen = [self.blocks_seen(span, window) for span in spans]
        width = max(map(len, seen))
        columns_NB = np.array(
            [_padded(span.table[blocks.start : blocks.stop], width) for span, blocks in zip(spans, seen, strict=True)],
            np.int64,
        )
        keys_NHB = self._strip(columns_NB[:, None, :], heads_axis=1)
        return self._to_device(np.stack((keys_NHB, keys_NHB + 1)))

    def gather(self, layer: int, strips_PNHB: torch.Tensor) -> torch.Tensor:
        """Copy sequences out of one layer: [P, N, H, B * S, D], contiguous."""
        strips = (strips_PNHB + layer * self._heads * self._parts).view(-1)
        return self._strips.index_select(0, strips).view(*strips_PNHB.shape[:3], -1, self._head_dim)

    def gather_rows(self, layer: int, rows_UH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy the keys and values of single tokens (`rows_of`) out of one layer: two of [U, H, D], contiguous."""
        keys = (rows_UH + layer * self._heads * self._parts * self.block_size).view(-1)
        shape = (*rows_UH.shape, self._head_dim)
        return (
            self._rows.index_select(0, keys).view(shape),
            self._rows.index_select(0, keys + self.block_size).view(shape),
        )

    def blocks(self, span: Span) -> int:
        """How many blocks hold the span's sequence, its new tokens included."""
        return -(-span.length // self.block_size)

    def blocks_seen(self, span: Span, window: int | None = None) -> range:
        """The blocks of the span's table that its tokens look at.

        positions   0 ....... first_seen ......... start ... length
        blocks      |  unseen  |<-------- seen, whole ------->|
        """
        return range(span.first_seen(window) // self.block_size, self.blocks(span))

    # -- addresses -----------------------------------------------------------------------------------------------------
    def _places(self, span: Span) -> list[tuple[int, int]]:
        """(column, slot) of each new token. A table may be longer than the sequence (room to grow), never shorter."""
        if len(span.table) < self.blocks(span):
            raise Internal(f"{span.length} tokens do not fit {len(span.table)} blocks of {self.block_size}")
        table, size = span.table, self.block_size
        return [(table[position // size], position % size) for position in range(span.start, span.length)]

    def _strip(self, columns: Index, heads_axis: int = -1) -> Index:
        """The key strips of layer 0 in these columns; the axis of length 1 becomes the heads."""
        shape = [1] * columns.ndim
        shape[heads_axis] = self._heads
        strips: Index = (columns * (self._layers * self._heads) + np.arange(self._heads).reshape(shape)) * self._parts
        return strips

    def _to_device(self, index: Index) -> torch.Tensor:
        return torch.from_numpy(index).to(self.device, non_blocking=True)

    def _require_shape(self, layer: int, key_HTD: torch.Tensor, value_HTD: torch.Tensor) -> None:
        """Memory holds what config.json promised. A wrong width would otherwise fill the wrong pages."""
        held = (self._heads, self._head_dim)
        for tensor_HTD in (key_HTD, value_HTD):
            heads, _, head_dim = tensor_HTD.shape
            if (heads, head_dim) != held or layer >= self._layers:
                raise InvalidArgument(
                    f"model: layer {layer} makes {heads} KV heads of {head_dim} numbers, but memory holds "
                    f"{self._layers} layers of {held[0]} heads of {held[1]}, as the configuration says; "
                    "layers that differ are not supported",
                    field="model",
                )


def _padded(table: BlockTable, width: int) -> BlockTable:
    return table + table[:1] * (width - len(table))
