"""Arena: the bytes of a worker's KV memory, and the way between blocks and wire order.

It does not know who owns a column (`allocator`), what a codec or a frame is, or what a device is: this one is host
memory (`device_arena` is the other kind). It holds `schema.kv`, the only stream of today's models; a further stream is
a further buffer with the same columns, addressed by the same tables.

Legend: C columns, L layers, H kv heads, P parts (K, V), S slots of a block, T tokens, X bytes of one token's head
(head_dim * item_bytes); B blocks and R rows of a token range. LG and HG: the layers and heads of a range.

    memory      bytes_CLHPSX    token t of a sequence: column table[t // S], slot t % S
    wire order  bytes_LHPTX     tokens in a row, no trace of S: workers with other block sizes read the same bytes

Columns, units and pages are views of one buffer, and their ids are its row numbers (DESIGN section 4):

    |<------------------------------- column c ------------------------------->|<- column c + 1 ...
    |<---- unit c*L + 0 ---->|<---- unit c*L + 1 ---->| ... |<- unit c*L + L-1 ->|
    |<- page ->|<- page ->|...     page = unit*H + head = [P, S, X], contiguous

Reads and writes run on codec threads beside the engine. They take no lock: a range that is read is final, a range that
is written has one writer, and neither is free (DESIGN 2.2). Each is one gather or one scatter, made without the GIL.
A loop of one copy per block moves as many bytes per second alone, but asks for the GIL back at every block: beside a
busy Python thread that made it ten times slower.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.base import limits
from engine.kv.schema import CacheSchema

Bytes = npt.NDArray[np.uint8]
Range = tuple[int, int]
"""Half open: (start, end)."""

POISON = 0xFF  # NaN in float32, float16 and bfloat16 alike: a stale read spoils everything that it touches


class Arena:
    """KV memory of one worker: `columns` blocks of `block_size` tokens, zero until written."""

    def __init__(self, schema: CacheSchema, *, columns: int, block_size: int = limits.BLOCK_SIZE_TOKENS) -> None:
        if min(columns, block_size) < 1:
            raise ValueError(f"columns and block_size must be >= 1, got {columns}, {block_size}")
        kv = schema.kv
        self.schema = schema
        self.columns = columns
        self.block_size = block_size
        self._head_bytes = kv.head_dim * kv.item_bytes
        self.bytes_CLHPSX = self._new_memory((columns, kv.layers, kv.heads, kv.parts, block_size, self._head_bytes))
        # Which block-long stretch of a column holds a (layer, head, part): the L, H, P steps of every address.
        self._stretch_LHP = np.arange(kv.layers * kv.heads * kv.parts).reshape(kv.layers, kv.heads, kv.parts)

    def _new_memory(self, shape: tuple[int, ...]) -> Any:
        return np.zeros(shape, np.uint8)  # calloc: the system gives pages on first touch

    def of(self, schema_digest: bytes) -> "Arena":
        """Itself, if it holds what is asked for, else KeyError: one arena is all the memory that some workers have."""
        if schema_digest != self.schema.digest:
            raise KeyError(schema_digest)
        return self

    # -- views ---------------------------------------------------------------------------------------------------------
    @property
    def array(self) -> Bytes:
        """The whole buffer, [C, L, H, P, S, X], in place."""
        array: Bytes = self.bytes_CLHPSX
        return array

    def unit_view(self, unit: int) -> Bytes:
        """One layer of one column, [H, P, S, X], in place."""
        column, layer = divmod(unit, self.schema.kv.layers)
        _require_range("unit's column", (column, column + 1), self.columns)
        unit_HPSX: Bytes = self.bytes_CLHPSX[column, layer]
        return unit_HPSX

    def page_view(self, page: int) -> Bytes:
        """One head of one unit, [P, S, X], in place and contiguous."""
        unit, head = divmod(page, self.schema.kv.heads)
        page_PSX: Bytes = self.unit_view(unit)[head]
        return page_PSX

    # -- tokens --------------------------------------------------------------------------------------------------------
    def read(
        self,
        table: Sequence[int],
        layers: Range,
        tokens: Range,
        heads: Range | None = None,
        into: memoryview | None = None,
    ) -> Bytes:
        """Copy tokens out in wire order: bytes [LG, HG, P, T, X], C-contiguous. Ranges may start and end anywhere.

        With `into`, a buffer of just that many bytes, they are copied there and the result is a view of it.
        """
        row_tokens, index_LHPR = self._address(table, layers, tokens, heads)
        rows = self._rows(row_tokens)
        shape = (*index_LHPR.shape, rows.shape[1])
        rows_LHPRX = np.empty(shape, np.uint8) if into is None else np.frombuffer(into, np.uint8).reshape(shape)
        # `clip` only because `raise` would gather into a second buffer first; the addresses are already checked.
        np.take(rows, index_LHPR, axis=0, out=rows_LHPRX, mode="clip")
        return rows_LHPRX.reshape(*index_LHPR.shape[:3], tokens[1] - tokens[0], self._head_bytes)

    def write(self, table: Sequence[int], layers: Range, tokens: Range, heads: Range | None, data_LHPTX: Bytes) -> None:
        """Put bytes in wire order where `read` with the same ranges finds them. Touches nothing else."""
        row_tokens, index_LHPR = self._address(table, layers, tokens, heads)
        self._require_data(data_LHPTX, (*index_LHPR.shape[:3], tokens[1] - tokens[0], self._head_bytes))
        rows = self._rows(row_tokens)
        rows[index_LHPR] = data_LHPTX.reshape(*index_LHPR.shape, rows.shape[1])

    # -- whole columns -------------------------------------------------------------------------------------------------
    def copy_column(self, source: int, target: int) -> None:
        """Second half of `ColumnAllocator.copy_on_write`."""
        self._require_columns((source, target))
        self.bytes_CLHPSX[target] = self.bytes_CLHPSX[source]

    def zero(self, columns: Sequence[int]) -> None:
        self._fill(columns, 0)

    def poison(self, columns: Sequence[int]) -> None:
        """Make columns that nobody owns unreadable by mistake: every number in them becomes NaN (tests)."""
        self._fill(columns, POISON)

    # -- addresses -----------------------------------------------------------------------------------------------------
    def _address(
        self, table: Sequence[int], layers: Range, tokens: Range, heads: Range | None
    ) -> tuple[int, npt.NDArray[np.intp]]:
        """See memory as equal rows and name those of a range: (tokens in a row, index [LG, HG, P, R]).

        A row is the longest run of tokens that never crosses a block's border or the range's: a whole block when the
        range is block aligned, one token when it is not aligned at all.

            tokens [32, 96), S=16   rows of 16: |----------------|----------------| ...
            tokens [40, 96), S=16   rows of 8:          |--------|--------|--------| ...
        """
        kv = self.schema.kv
        heads = (0, kv.heads) if heads is None else heads
        _require_range("layers", layers, kv.layers)
        _require_range("heads", heads, kv.heads)
        _require_range("tokens", tokens, len(table) * self.block_size)
        row_tokens = math.gcd(self.block_size, *tokens)
        rows_per_block = self.block_size // row_tokens
        first_block, end_block = tokens[0] // self.block_size, -(-tokens[1] // self.block_size)
        columns = table[first_block:end_block]
        self._require_columns(columns)
        columns_B = np.array(columns, np.intp)
        row_R = np.arange(tokens[0] // row_tokens, tokens[1] // row_tokens) - first_block * rows_per_block
        start_R = columns_B[row_R // rows_per_block] * self._stretch_LHP.size * rows_per_block + row_R % rows_per_block
        start_LHP = self._stretch_LHP[slice(*layers), slice(*heads)] * rows_per_block
        index_LHPR = start_LHP[..., None] + start_R  # the one large sum: numpy gives up the GIL for each of them
        return row_tokens, index_LHPR

    def _rows(self, row_tokens: int) -> Bytes:
        """The whole buffer as rows of so many tokens of one (column, layer, head, part): [N, row bytes]."""
        rows: Bytes = self.bytes_CLHPSX.reshape(-1, row_tokens * self._head_bytes)
        return rows

    @staticmethod
    def _require_data(data_LHPTX: Bytes, shape: tuple[int, ...]) -> None:
        if data_LHPTX.shape != shape or data_LHPTX.dtype != np.uint8:
            raise ValueError(f"data must be uint8 {shape}, got {data_LHPTX.dtype} {data_LHPTX.shape}")

    def _fill(self, columns: Sequence[int], value: int) -> None:
        self._require_columns(columns)
        self.bytes_CLHPSX[np.array(columns, np.intp)] = value

    def _require_columns(self, columns: Sequence[int]) -> None:
        """Refuse foreign ids before numpy wraps the negative ones around."""
        if columns and (min(columns) < 0 or max(columns) >= self.columns):
            raise ValueError(f"column ids must be in [0, {self.columns}), got {min(columns)}..{max(columns)}")


class Arenas:
    """The arenas of one worker, each by the schema of what it holds: KV, and embeddings of images."""

    def __init__(self, *arenas: Arena) -> None:
        self._arenas = {arena.schema.digest: arena for arena in arenas}

    def of(self, schema_digest: bytes) -> Arena:
        """KeyError if this worker has no memory for it."""
        return self._arenas[schema_digest]


def _require_range(name: str, wanted: Range, size: int) -> None:
    if not 0 <= wanted[0] <= wanted[1] <= size:
        raise ValueError(f"{name} must be within [0, {size}), got [{wanted[0]}, {wanted[1]})")
