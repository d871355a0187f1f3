"""Attention by gathering pages and calling torch's scaled_dot_product_attention: the CPU path, and the fallback.

Chunks of a prompt are attended one by one; sequences with a single new token are gathered and attended together.

    decode batch, padded            chunk at start > 0
    keys 0 ......... longest        keys 0 ........ start ..... length
    seq a |xxxxxxxxxxxxxxxxx|       row 0 |xxxxxxxxxx|x         |
    seq b |xxxxxxxxx00000000|       row 1 |xxxxxxxxxx|xx        |
    seq c |xxxxxxxxxxxx00000|       row 2 |xxxxxxxxxx|xxx       |

Legend: Q query heads, H kv heads, G query heads per kv head, P parts (K, V), N sequences, B blocks, S slots,
T tokens of one chunk, K keys, D head dim.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F

from engine.attention.paged_kv import PagedKV, Span


class PagedSdpa:
    """The `AttentionBackend` that runs wherever torch does."""

    def prepare(self, kv: PagedKV, spans: Sequence[Span]) -> "_Attend":
        chunks = [_Chunk(kv, span) for span in spans if span.tokens > 1]
        decodes = [_DecodeBatch(kv, group) for group in _by_length(kv, [span for span in spans if span.tokens == 1])]
        return _Attend([*decodes, *chunks])


class _Attend:
    def __init__(self, parts: "list[_DecodeBatch | _Chunk]") -> None:
        self._parts = parts

    def __call__(self, query_QTD: torch.Tensor, layer: int, scaling: float) -> torch.Tensor:
        query_TQD = query_QTD.transpose(0, 1)
        out_TQD = torch.empty_like(query_TQD, memory_format=torch.contiguous_format)
        for part in self._parts:
            part.attend(query_TQD, layer, scaling, out_TQD)
        return out_TQD


class _Chunk:
    """Several tokens of one sequence, each seeing everything up to itself."""

    def __init__(self, kv: PagedKV, span: Span) -> None:
        self._kv = kv
        self._rows = slice(span.row, span.row + span.tokens)
        self._length = span.length
        self._strips_P1HB = kv.strips_of([span])
        # Torch aligns `is_causal` with the first key, so a chunk that has a past needs the mask spelled out.
        self._mask_TK = _lower_right_mask(span, kv.dtype) if span.start else None

    def attend(self, query_TQD: torch.Tensor, layer: int, scaling: float, out_TQD: torch.Tensor) -> None:
        key_1HKD, value_1HKD = self._kv.gather(layer, self._strips_P1HB)[..., : self._length, :]
        out_1QTD = F.scaled_dot_product_attention(
            query_TQD[self._rows].transpose(0, 1)[None],
            key_1HKD,
            value_1HKD,
            attn_mask=self._mask_TK,
            is_causal=self._mask_TK is None,
            scale=scaling,
            enable_gqa=True,
        )
        out_TQD[self._rows] = out_1QTD[0].transpose(0, 1)


class _DecodeBatch:
    """One new token of each of several sequences.

    The G query heads of a kv head are laid out as if they were G positions of one head: without causality that is the
    same computation, and keys need not be repeated.
    """

    def __init__(self, kv: PagedKV, spans: Sequence[Span]) -> None:
        self._kv = kv
        self._rows_N = torch.tensor([span.row for span in spans])
        self._strips_PNHB = kv.strips_of(spans)
        lengths_N1 = torch.tensor([span.length for span in spans])[:, None]
        self._longest = int(lengths_N1.max())
        self._mask_N11K, self._unowned_rows = self._hide(lengths_N1)

    def _hide(self, lengths_N1: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The mask of keys beyond each sequence's length, and their rows in a gathered batch."""
        if int(lengths_N1.min()) == self._longest:
            return None, None
        parts, sequences, heads, blocks = self._strips_PNHB.shape
        keys = blocks * self._kv.block_size
        beyond_NK = torch.arange(keys) >= lengths_N1
        mask_NK = torch.zeros(sequences, keys, dtype=self._kv.dtype).masked_fill_(beyond_NK, float("-inf"))
        beyond_PNHK = beyond_NK[None, :, None].expand(parts, sequences, heads, keys)
        return mask_NK[:, None, None, : self._longest], beyond_PNHK.reshape(-1).nonzero()[:, 0]

    def attend(self, query_TQD: torch.Tensor, layer: int, scaling: float, out_TQD: torch.Tensor) -> None:
        gathered_PNHKD = self._kv.gather(layer, self._strips_PNHB)
        if self._unowned_rows is not None:
            # A mask is not enough: what lies there may be NaN of a sequence that failed, and 0 * NaN is NaN.
            gathered_PNHKD.view(-1, gathered_PNHKD.shape[-1]).index_fill_(0, self._unowned_rows, 0.0)
        key_NHKD, value_NHKD = gathered_PNHKD[..., : self._longest, :]
        sequences, heads, _, head_dim = key_NHKD.shape
        query_NHGD = query_TQD[self._rows_N].view(sequences, heads, -1, head_dim)
        out_NHGD = F.scaled_dot_product_attention(
            query_NHGD, key_NHKD, value_NHKD, attn_mask=self._mask_N11K, scale=scaling
        )
        out_TQD[self._rows_N] = out_NHGD.reshape(sequences, -1, head_dim)


def _lower_right_mask(span: Span, dtype: torch.dtype) -> torch.Tensor:
    """Row t sees keys 0 .. start + t. Additive, because torch converts a boolean mask anew in every layer."""
    mask_TK = torch.full((span.tokens, span.length), float("-inf"), dtype=dtype)
    return mask_TK.triu_(span.start + 1)


def _by_length(kv: PagedKV, spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Group sequences whose block counts share their highest bit, so that padding at most doubles the work."""

    def size_class(span: Span) -> int:
        return kv.blocks(span).bit_length()

    for _, group in groupby(sorted(spans, key=size_class), key=size_class):
        yield list(group)
