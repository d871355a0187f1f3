"""Attention on the CPU: sequences with one new token by a kernel that reads their pages in place, chunks by torch.

    packed rows     | decode a | chunk b ............ | decode c |
                        |             |                   |
                        |         PagedSdpa               |          torch's flash attention over gathered pages
                        +------ one kernel call ----------+          engine.kernels.paged_attention

A chunk gathers its pages once and computes for every one of its tokens, so gathering is cheap there; a single token
would spend most of its time on it.

Legend: Q query heads, T packed tokens, D head dim, N decoding sequences, H kv heads, G query heads per kv head,
I pieces (see the kernel), M pairs of sequence and kv head, S slots of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt
import torch

from engine.attention import Scores
from engine.attention.paged_kv import PagedKV, Span
from engine.attention.paged_sdpa import PagedSdpa, SdpaAttend
from engine.kernels import Array, array_of
from engine.kernels.paged_attention import PIECE_TOKENS, PIECE_TOKENS_MAX, PIECES_WANTED, decode_attention

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pages:
    """An arena as kernels address it: one flat array, and how many of its elements lie between neighbours."""

    flat: Array
    slots: int
    heads: int
    head_dim: int
    layer_elements: int
    column_elements: int

    @classmethod
    def of(cls, kv: PagedKV) -> "Pages":
        keys_CSHD, _ = kv.pages(0)
        columns, slots, heads, head_dim = keys_CSHD.shape
        flat = keys_CSHD.as_strided((columns * keys_CSHD.stride(0),), (1,), 0)
        return cls(array_of(flat), slots, heads, head_dim, 2 * heads * slots * head_dim, keys_CSHD.stride(0))

    @property
    def rows_RD(self) -> Array:
        return self.flat.reshape(-1, self.head_dim)


class PagedNumba:
    """The `AttentionBackend` of host memory. Its `Attend` also gives log-sum-exp."""

    def prepare(self, kv: PagedKV, spans: Sequence[Span]) -> "NumbaAttend":
        return NumbaAttend(kv, spans)


class NumbaAttend:
    """One step's attention: an `AttendWithLse`."""

    def __init__(self, kv: PagedKV, spans: Sequence[Span]) -> None:
        self.pages = Pages.of(kv)
        self._decodes = [span for span in spans if span.tokens == 1]
        chunks = [span for span in spans if span.tokens > 1]
        self._chunks: SdpaAttend | None = PagedSdpa().prepare(kv, chunks) if chunks else None
        self._tables = _Tables.of(self._decodes, self.pages) if self._decodes else None
        self._longest = max((span.length for span in self._decodes), default=0)
        self._pieces_by_window: dict[int | None, _Pieces] = {}

    def __call__(self, query_QTD: torch.Tensor, layer: int, scores: Scores) -> torch.Tensor:
        query_TQD = query_QTD.transpose(0, 1)
        if self._chunks is None:
            out_TQD = torch.empty_like(query_TQD, memory_format=torch.contiguous_format)
        else:
            out_TQD = self._chunks(query_QTD, layer, scores)
        if self._tables is not None:
            self._decode(query_TQD, layer, scores, out_TQD, None)
        return out_TQD

    def with_lse(self, query_QTD: torch.Tensor, layer: int, scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
        query_TQD = query_QTD.transpose(0, 1)
        if self._chunks is None:
            out_TQD = torch.empty_like(query_TQD, memory_format=torch.contiguous_format)
            lse_TQ = torch.empty(query_TQD.shape[:2], dtype=torch.float32)
        else:
            out_TQD, lse_TQ = self._chunks.with_lse(query_QTD, layer, scores)
        if self._tables is not None:
            self._decode(query_TQD, layer, scores, out_TQD, lse_TQ)
        return out_TQD, lse_TQ

    def _decode(
        self,
        query_TQD: torch.Tensor,
        layer: int,
        scores: Scores,
        out_TQD: torch.Tensor,
        lse_TQ: torch.Tensor | None,
    ) -> None:
        tables, pages = self._tables, self.pages
        assert tables is not None
        group = query_TQD.shape[1] // pages.heads
        pieces = self._pieces(scores.window, group)
        decode_attention(pages.head_dim, group)(
            array_of(query_TQD.contiguous()),
            pages.flat,
            pieces.piece_I4,
            pieces.first_piece_M,
            tables.columns,
            tables.first_column_N,
            tables.row_N,
            pages.slots,
            layer * pages.layer_elements,
            np.float32(scores.scaling),
            np.float32(scores.softcap or 0),
            pieces.largest_IG,
            pieces.total_IG,
            pieces.sum_IGD,
            array_of(out_TQD),
            pieces.lse_TQ(query_TQD) if lse_TQ is None else array_of(lse_TQ),
        )

    def _pieces(self, window: int | None, group: int) -> "_Pieces":
        if window is not None and window >= self._longest:
            window = None  # nobody is old enough to notice it
        if window not in self._pieces_by_window:
            self._pieces_by_window[window] = _Pieces(self._decodes, window, self.pages, group)
        return self._pieces_by_window[window]


@dataclass(frozen=True, slots=True)
class _Tables:
    """Where the decoding sequences' tokens are, for all layers."""

    columns: Index  # all tables, one after the other, as element offsets
    first_column_N: Index
    row_N: Index

    @classmethod
    def of(cls, spans: Sequence[Span], pages: Pages) -> "_Tables":
        tables = [np.array(span.table[: -(-span.length // pages.slots)], np.int64) for span in spans]
        first = np.array([0, *accumulate(map(len, tables))], np.int64)
        rows = np.array([span.row for span in spans], np.int64)
        return cls(np.concatenate(tables) * pages.column_elements, first, rows)


class _Pieces:
    """How the work is cut for threads, and room for what each piece finds.

    sequence   0 ...... first seen ............................ length
    pieces                   |<- at most so many tokens ->|<- ... ->|      once for every kv head
    """

    def __init__(self, spans: Sequence[Span], window: int | None, pages: Pages, group: int) -> None:
        tokens_max = _piece_tokens(spans, window, pages.heads)
        pieces: list[tuple[int, int, int, int]] = []
        first_piece: list[int] = [0]
        for sequence, span in enumerate(spans):
            ranges = _even_ranges(span.first_seen(window), span.length, tokens_max)
            for head in range(pages.heads):
                pieces += [(sequence, head, start, end) for start, end in ranges]
                first_piece.append(len(pieces))
        self.piece_I4: Index = np.array(pieces, np.int64)
        self.first_piece_M: Index = np.array(first_piece, np.int64)
        self.largest_IG = np.empty((len(pieces), group), np.float32)
        self.total_IG = np.empty((len(pieces), group), np.float32)
        self.sum_IGD = np.empty((len(pieces), group, pages.head_dim), np.float32)
        self._unread_lse_TQ: npt.NDArray[np.float32] | None = None

    def lse_TQ(self, query_TQD: torch.Tensor) -> npt.NDArray[np.float32]:
        """Room for a log-sum-exp that nobody asked for."""
        if self._unread_lse_TQ is None:
            self._unread_lse_TQ = np.empty(query_TQD.shape[:2], np.float32)
        return self._unread_lse_TQ


def _piece_tokens(spans: Sequence[Span], window: int | None, heads: int) -> int:
    """Short pieces keep every thread busy, long ones cost less: as long as leaves enough of them."""
    tokens = heads * sum(span.length - span.first_seen(window) for span in spans)
    return min(PIECE_TOKENS_MAX, max(PIECE_TOKENS, tokens // PIECES_WANTED))


def _even_ranges(start: int, end: int, tokens_max: int) -> list[tuple[int, int]]:
    count = -(-(end - start) // tokens_max)
    cuts = [start + (end - start) * cut // count for cut in range(count + 1)]
    return list(pairwise(cuts))
