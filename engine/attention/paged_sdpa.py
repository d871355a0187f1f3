"""Attention by gathering pages and calling torch's scaled_dot_product_attention: the CPU path, and the fallback.

Chunks of a prompt are attended one by one; sequences with a single new token are gathered and attended together. Only
blocks that a window reaches are gathered. What depends on the window is kept for all layers of a step that share it.

    decode batch, padded            chunk at start > 0              the same in a window
    keys 0 ......... longest        keys 0 ........ start ..... length
    seq a |xxxxxxxxxxxxxxxxx|       row 0 |xxxxxxxxxx|x         |   |      xxxx|x         |
    seq b |xxxxxxxxx00000000|       row 1 |xxxxxxxxxx|xx        |   |       xxx|xx        |
    seq c |xxxxxxxxxxxx00000|       row 2 |xxxxxxxxxx|xxx       |   |        xx|xxx       |

Torch has neither a soft cap nor log-sum-exp on this path, so a model or a caller that asks for one gets the same
formula spelled out. Masks and spelled-out scores never exceed ATTENTION_SCRATCH_BYTES_MAX: chunks run in pieces of
query rows.

Legend: Q query heads, H kv heads, G query heads per kv head, P parts (K, V), N sequences, B blocks, S slots,
T tokens of one chunk, R rows of one piece, K keys, D head dim.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F

from engine.attention import Scores
from engine.attention.paged_kv import PagedKV, Span
from engine.base import limits

_WINDOW_PIECE_ROWS_MIN = 64  # smaller pieces waste less on keys outside the window, but more on calls


class PagedSdpa:
    """The `AttentionBackend` that runs wherever torch does."""

    def prepare(self, kv: PagedKV, spans: Sequence[Span]) -> "SdpaAttend":
        return SdpaAttend(kv, spans)


class SdpaAttend:
    """One step's attention: an `AttendWithLse`."""

    def __init__(self, kv: PagedKV, spans: Sequence[Span]) -> None:
        self._kv = kv
        self._spans = spans
        self._longest = max((span.length for span in spans), default=0)
        self._parts_by_window: dict[int | None, list[_DecodeBatch | _Chunk]] = {}

    def __call__(self, query_QTD: torch.Tensor, layer: int, scores: Scores) -> torch.Tensor:
        if scores.softcap is not None:
            return self.with_lse(query_QTD, layer, scores)[0]
        query_TQD = query_QTD.transpose(0, 1)
        out_TQD = torch.empty_like(query_TQD, memory_format=torch.contiguous_format)
        for part in self._parts(scores.window):
            for rows, tile in part.tiles(query_TQD, layer):
                part.put(out_TQD, rows, tile.fused(scores))
        return out_TQD

    def with_lse(self, query_QTD: torch.Tensor, layer: int, scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
        query_TQD = query_QTD.transpose(0, 1)
        out_TQD = torch.empty_like(query_TQD, memory_format=torch.contiguous_format)
        lse_TQ1 = torch.empty((*query_TQD.shape[:2], 1), dtype=torch.float32, device=query_TQD.device)
        for part in self._parts(scores.window):
            for rows, tile in part.tiles(query_TQD, layer, spelled_out=True):
                out_NJRD, lse_NJR1 = tile.spelled_out(scores)
                part.put(out_TQD, rows, out_NJRD)
                part.put(lse_TQ1, rows, lse_NJR1)
        return out_TQD, lse_TQ1[..., 0]

    def _parts(self, window: int | None) -> "list[_DecodeBatch | _Chunk]":
        if window is not None and window >= self._longest:
            window = None  # nobody is old enough to notice it
        if window not in self._parts_by_window:
            self._parts_by_window[window] = list(_parts(self._kv, self._spans, window))
        return self._parts_by_window[window]


@dataclass(frozen=True, slots=True)
class _Tile:
    """Queries, what they may look at, and the two ways to compute it. J is Q or H, and R then rows or G."""

    query_NJRD: torch.Tensor
    key_NHKD: torch.Tensor
    value_NHKD: torch.Tensor
    mask: torch.Tensor | None  # additive, broadcast to [N, J, R, K]
    is_causal: bool = False  # instead of a mask: row r sees keys 0 .. r

    def fused(self, scores: Scores) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            self.query_NJRD,
            self.key_NHKD,
            self.value_NHKD,
            attn_mask=self.mask,
            is_causal=self.is_causal,
            scale=scores.scaling,
            enable_gqa=True,
        )

    def spelled_out(self, scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
        """(out_NJRD, lse_NJR1). The softmax is computed in float32; keys are not repeated for their query heads."""
        query_NHXD = self.query_NJRD.reshape(*self.key_NHKD.shape[:2], -1, self.key_NHKD.shape[-1])
        weight_NHXK = (query_NHXD @ self.key_NHKD.transpose(-1, -2)).float().mul_(scores.scaling)
        if scores.softcap is not None:
            weight_NHXK.div_(scores.softcap).tanh_().mul_(scores.softcap)
        if self.mask is not None:
            weight_NHXK.view(*self.query_NJRD.shape[:-1], -1).add_(self.mask)
        lse_NHX1 = weight_NHXK.logsumexp(-1, keepdim=True)
        weight_NHXK.sub_(lse_NHX1).exp_()
        out_NHXD = weight_NHXK.to(self.value_NHKD.dtype) @ self.value_NHKD
        return out_NHXD.view(self.query_NJRD.shape), lse_NHX1.view(*self.query_NJRD.shape[:-1], 1)


Tiles = Iterator[tuple[Any, _Tile]]
"""(rows of the packed batch, tile)."""


class _Chunk:
    """Several tokens of one sequence, each seeing everything up to itself, or as far back as its window reaches."""

    def __init__(self, kv: PagedKV, span: Span, window: int | None) -> None:
        self._kv = kv
        self._span = span
        self._window = window
        self._first_key = kv.blocks_seen(span, window).start * kv.block_size  # position of the first gathered token
        self._strips_P1HB = kv.strips_of([span], window)

    def tiles(self, query_TQD: torch.Tensor, layer: int, *, spelled_out: bool = False) -> Tiles:
        span = self._span
        key_1HKD, value_1HKD = self._kv.gather(layer, self._strips_P1HB)[..., : span.length - self._first_key, :]
        # Torch aligns `is_causal` with the first key, so a chunk that has a past needs the mask spelled out.
        is_causal = span.start == 0 and self._window is None and not spelled_out
        if is_causal:
            rows_max = span.tokens
        elif spelled_out:
            rows_max = min(len(self._mask_RK), _rows_within_scratch(4 * query_TQD.shape[1] * key_1HKD.shape[2]))
        else:
            rows_max = len(self._mask_RK)
        for rows, keys in self._pieces(rows_max):
            query_1QRD = query_TQD[rows].transpose(0, 1)[None]
            mask = None if is_causal else self._mask_of(rows, keys)
            yield rows, _Tile(query_1QRD, key_1HKD[:, :, keys], value_1HKD[:, :, keys], mask, is_causal)

    @staticmethod
    def put(into_TQX: torch.Tensor, rows: slice, result_1QRX: torch.Tensor) -> None:
        into_TQX[rows] = result_1QRX[0].transpose(0, 1)

    def _pieces(self, rows_max: int) -> Iterator[tuple[slice, slice]]:
        """(query rows of the packed batch, gathered keys that they see)."""
        span = self._span
        for first in range(0, span.tokens, rows_max):
            end = min(first + rows_max, span.tokens)
            first_seen = Span(0, end - first, span.start + first, ()).first_seen(self._window)
            keys = slice(max(0, first_seen - self._first_key), span.start + end - self._first_key)
            yield slice(span.row + first, span.row + end), keys

    def _mask_of(self, rows: slice, keys: slice) -> torch.Tensor:
        """The lower right corner of the one mask: the last key of a piece is always its last row's own."""
        return self._mask_RK[-(rows.stop - rows.start) :, -(keys.stop - keys.start) :]

    @cached_property
    def _mask_RK(self) -> torch.Tensor:
        """Additive, because torch converts a boolean mask anew in every layer."""
        kv, window = self._kv, self._window
        keys = self._span.length - self._first_key
        rows = min(self._span.tokens, _rows_within_scratch(kv.dtype.itemsize * keys))
        if window is not None:
            rows = min(rows, max(window, _WINDOW_PIECE_ROWS_MIN))
        hidden = torch.full((rows, keys), float("-inf"), dtype=kv.dtype, device=kv.device)
        own_key = keys - rows  # of row 0
        mask_RK = hidden.triu(own_key + 1)
        return mask_RK if window is None else mask_RK.add_(hidden.tril_(own_key - window))


class _DecodeBatch:
    """One new token of each of several sequences.

    The G query heads of a kv head are laid out as if they were G positions of one head: without causality that is the
    same computation, and keys are read once for all of them.
    """

    def __init__(self, kv: PagedKV, spans: Sequence[Span], window: int | None) -> None:
        self._kv = kv
        self._rows_N = torch.tensor([span.row for span in spans], device=kv.device)
        self._strips_PNHB = kv.strips_of(spans, window)
        # Keys are counted from the first gathered block of each sequence, which sees [first, end) of them.
        origins = [kv.blocks_seen(span, window).start * kv.block_size for span in spans]
        pairs = list(zip(spans, origins, strict=True))
        first_N1 = torch.tensor([[span.first_seen(window) - origin] for span, origin in pairs])
        end_N1 = torch.tensor([[span.length - origin] for span, origin in pairs])
        self._keys = int(end_N1.max())
        self._mask_N11K = self._hide(first_N1, end_N1)
        self._unowned_rows = self._rows_beyond(end_N1)

    def _hide(self, first_N1: torch.Tensor, end_N1: torch.Tensor) -> torch.Tensor | None:
        """The additive mask of keys that a sequence does not see; None where all see all."""
        key_K = torch.arange(self._keys)
        hidden_NK = (key_K < first_N1) | (key_K >= end_N1)
        if not hidden_NK.any():
            return None
        mask_NK = torch.zeros(hidden_NK.shape, dtype=self._kv.dtype).masked_fill_(hidden_NK, float("-inf"))
        return mask_NK[:, None, None].to(self._kv.device)

    def _rows_beyond(self, end_N1: torch.Tensor) -> torch.Tensor | None:
        """Rows of a gathered batch that lie beyond their sequence's end, if any sequence is shorter than another."""
        if int(end_N1.min()) == self._keys:
            return None
        parts, sequences, heads, blocks = self._strips_PNHB.shape
        keys = blocks * self._kv.block_size
        beyond_NK = torch.arange(keys) >= end_N1
        beyond_PNHK = beyond_NK[None, :, None].expand(parts, sequences, heads, keys)
        return beyond_PNHK.reshape(-1).nonzero()[:, 0].to(self._kv.device)

    def tiles(self, query_TQD: torch.Tensor, layer: int, *, spelled_out: bool = False) -> Tiles:
        """One tile either way: its scores take fewer bytes than the keys and values that it gathers."""
        gathered_PNHKD = self._kv.gather(layer, self._strips_PNHB)
        if self._unowned_rows is not None:
            # A mask is not enough: what lies there may be NaN of a sequence that failed, and 0 * NaN is NaN.
            gathered_PNHKD.view(-1, gathered_PNHKD.shape[-1]).index_fill_(0, self._unowned_rows, 0.0)
        key_NHKD, value_NHKD = gathered_PNHKD[..., : self._keys, :]
        sequences, heads, _, head_dim = key_NHKD.shape
        query_NHGD = query_TQD[self._rows_N].view(sequences, heads, -1, head_dim)
        yield self._rows_N, _Tile(query_NHGD, key_NHKD, value_NHKD, self._mask_N11K)

    @staticmethod
    def put(into_TQX: torch.Tensor, rows_N: torch.Tensor, result_NHGX: torch.Tensor) -> None:
        into_TQX[rows_N] = result_NHGX.flatten(1, 2)


def _rows_within_scratch(row_bytes: int) -> int:
    return max(1, limits.ATTENTION_SCRATCH_BYTES_MAX // row_bytes)


def _parts(kv: PagedKV, spans: Sequence[Span], window: int | None) -> "Iterator[_DecodeBatch | _Chunk]":
    for group in _by_length(kv, [span for span in spans if span.tokens == 1], window):
        yield _DecodeBatch(kv, group, window)
    for span in spans:
        if span.tokens > 1:
            yield _Chunk(kv, span, window)


def _by_length(kv: PagedKV, spans: Sequence[Span], window: int | None) -> Iterator[list[Span]]:
    """Group sequences whose block counts share their highest bit, so that padding at most doubles the work."""

    def size_class(span: Span) -> int:
        return len(kv.blocks_seen(span, window)).bit_length()

    for _, group in groupby(sorted(spans, key=size_class), key=size_class):
        yield list(group)
