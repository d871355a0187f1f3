"""Attention over pages on an accelerator, by kernels that take packed queries and a block table.

    torch        torch.nn.attention.varlen (core torch, no further package)
    flash_attn   flash-attn, where it is installed: soft caps too

Pages stay where they are: a layer's keys are a strided view of the arena, [C, S, H, D], and the kernel walks it by the
block table. Kernels differ in the page sizes they take (flash-attention 2 asks for multiples of 256 in most builds),
so `PagedVarlen.choose` tries one tiny call on the arena's own strides. If that is refused, keys and values are gathered
first, packed without padding, and the same kernel reads the copy.

What neither kernel does (float32, a soft cap under torch's) is left to `PagedSdpa`, layer by layer.

Legend: C columns, L layers, H kv heads, Q query heads, P parts, S slots, D head dim, T packed query tokens, N
sequences, B blocks of the longest sequence, U packed keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from engine.attention import AttendWithLse, Scores
from engine.attention.paged_kv import PagedKV, Span
from engine.attention.paged_sdpa import PagedSdpa

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Batch:
    """What a kernel must know about one step, on the device. Static tensors in a captured graph."""

    query_starts_N: torch.Tensor  # int32 [N + 1]: rows of sequence n are [starts[n], starts[n + 1])
    lengths_N: torch.Tensor  # int32: keys of each sequence, its new tokens included
    table_NB: torch.Tensor  # int32: columns, filled up with any valid one
    longest_query: int
    longest_key: int

    @classmethod
    def of(cls, kv: PagedKV, spans: Sequence[Span]) -> "Batch":
        blocks = max(kv.blocks(span) for span in spans)
        starts = [span.row for span in spans] + [spans[-1].row + spans[-1].tokens]
        rows = [[*span.table[:blocks], *[span.table[0]] * (blocks - len(span.table))] for span in spans]
        return cls(
            query_starts_N=_int32(starts, kv.device),
            lengths_N=_int32([span.length for span in spans], kv.device),
            table_NB=_int32(rows, kv.device),
            longest_query=max(span.tokens for span in spans),
            longest_key=max(span.length for span in spans),
        )


class Kernel(Protocol):
    """One library's variable-length attention, causal towards the end of each sequence."""

    softcaps: bool

    def __call__(
        self, query_TQD: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: Batch, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out_TQD, lse_TQ). Keys and values are pages [C, S, H, D], walked by the batch's tables, or lie packed in a
        row [U, H, D], `batch.lengths_N` of each sequence. Raises RuntimeError for page sizes that it does not take."""


class TorchVarlen:
    """`torch.nn.attention.varlen.varlen_attn`; one split, so that a token does not depend on its batch (DESIGN 8)."""

    softcaps = False

    def __init__(self, varlen_attn: Callable[..., Any]) -> None:
        self._varlen_attn = varlen_attn

    @classmethod
    def installed(cls) -> "TorchVarlen":
        from torch.nn.attention.varlen import varlen_attn

        return cls(varlen_attn)

    def __call__(
        self, query_TQD: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: Batch, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from torch.nn.attention.varlen import AuxRequest

        paged = _is_paged(key)
        out_TQD, lse_TQ = self._varlen_attn(
            query_TQD,
            key,
            value,
            batch.query_starts_N,
            None if paged else _starts(batch.lengths_N),
            batch.longest_query,
            batch.longest_key,
            return_aux=AuxRequest(lse=True),
            scale=scores.scaling,
            window_size=(_reach(scores), 0),
            enable_gqa=query_TQD.shape[1] != key.shape[-2],
            seqused_k=batch.lengths_N if paged else None,
            block_table=batch.table_NB if paged else None,
            num_splits=1,
        )
        return out_TQD, lse_TQ


class FlashAttn:
    """flash-attn 2's `flash_attn_varlen_func`, where the package is installed."""

    softcaps = True

    def __init__(self, flash_attn_varlen_func: Callable[..., Any]) -> None:
        self._function = flash_attn_varlen_func

    @classmethod
    def installed(cls) -> "FlashAttn":
        """Raises ImportError where the package is not."""
        from flash_attn import flash_attn_varlen_func

        return cls(flash_attn_varlen_func)

    def __call__(
        self, query_TQD: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: Batch, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out_TQD, lse_QT, _ = self._function(
            query_TQD,
            key,
            value,
            cu_seqlens_q=batch.query_starts_N,
            cu_seqlens_k=_starts(batch.lengths_N),
            max_seqlen_q=batch.longest_query,
            max_seqlen_k=batch.longest_key,
            softmax_scale=scores.scaling,
            causal=True,
            window_size=(-1, -1) if scores.window is None else (_reach(scores), 0),
            softcap=scores.softcap or 0.0,
            block_table=batch.table_NB if _is_paged(key) else None,
            return_attn_probs=True,
        )
        return out_TQD, lse_QT.transpose(0, 1)


def installed_kernel() -> Kernel:
    """flash-attn if it is there, else torch's own."""
    try:
        return FlashAttn.installed()
    except ImportError:
        return TorchVarlen.installed()


class PagedVarlen:
    """The `AttentionBackend` of accelerators."""

    def __init__(self, kernel: Kernel, *, in_place: bool) -> None:
        self._kernel = kernel
        self._in_place = in_place

    @classmethod
    def choose(cls, kv: PagedKV, kernel: Kernel | None = None) -> "PagedVarlen":
        """Try the kernel on this arena's strides once, at load."""
        kernel = kernel or installed_kernel()
        return cls(kernel, in_place=kv.dtype in HALF and _reads_pages(kernel, kv))

    @property
    def in_place(self) -> bool:
        """Pages are read where they are. Without it a step copies the KV that it reads, and cannot be captured."""
        return self._in_place

    def prepare(self, kv: PagedKV, spans: Sequence[Span]) -> "VarlenAttend":
        gather_UH = None if self._in_place else _packed_rows(kv, spans)
        return VarlenAttend(kv, self._kernel, Batch.of(kv, spans), gather_UH, lambda: PagedSdpa().prepare(kv, spans))

    def over(self, kv: PagedKV, batch: Batch) -> "VarlenAttend":
        """Attention over pages in place and tensors that exist already: those of a captured graph. A layer that the
        kernel does not serve raises RuntimeError: what would serve it instead reads Python's tables."""
        return VarlenAttend(kv, self._kernel, batch, None, _not_capturable)


class VarlenAttend:
    """One step's attention: an `AttendWithLse`."""

    def __init__(
        self,
        kv: PagedKV,
        kernel: Kernel,
        batch: Batch,
        gather_UH: torch.Tensor | None,
        prepare_fallback: Callable[[], AttendWithLse],
    ) -> None:
        self._kv = kv
        self._kernel = kernel
        self._batch = batch
        self._gather_UH = gather_UH
        self._prepare_fallback = prepare_fallback
        self._fallback: AttendWithLse | None = None

    def __call__(self, query_QTD: torch.Tensor, layer: int, scores: Scores) -> torch.Tensor:
        if self._serves(query_QTD, scores):
            return self._run(query_QTD, layer, scores)[0]
        return self._other()(query_QTD, layer, scores)

    def with_lse(self, query_QTD: torch.Tensor, layer: int, scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
        if self._serves(query_QTD, scores):
            return self._run(query_QTD, layer, scores)
        return self._other().with_lse(query_QTD, layer, scores)

    def _serves(self, query_QTD: torch.Tensor, scores: Scores) -> bool:
        return query_QTD.dtype in HALF and (scores.softcap is None or self._kernel.softcaps)

    def _run(self, query_QTD: torch.Tensor, layer: int, scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
        gather_UH = self._gather_UH
        key, value = self._kv.pages(layer) if gather_UH is None else self._kv.gather_rows(layer, gather_UH)
        return self._kernel(query_QTD.transpose(0, 1).contiguous(), key, value, self._batch, scores)

    def _other(self) -> AttendWithLse:
        self._fallback = self._fallback or self._prepare_fallback()
        return self._fallback


def _not_capturable() -> AttendWithLse:
    raise RuntimeError("a layer's attention is not the kernel's: its steps cannot be captured")


def _is_paged(key: torch.Tensor) -> bool:
    return key.dim() == 4


def _reads_pages(kernel: Kernel, kv: PagedKV) -> bool:
    """One query over one key of column 0: a kernel that does not take these pages says so before it computes."""
    key_CSHD, value_CSHD = kv.pages(0)
    query_1QD = torch.zeros(1, key_CSHD.shape[2], key_CSHD.shape[3], dtype=kv.dtype, device=kv.device)
    one = Batch.of(kv, [Span(row=0, tokens=1, start=0, table=(0,))])
    try:
        kernel(query_1QD, key_CSHD, value_CSHD, one, Scores(scaling=1.0))
    except (RuntimeError, ValueError):
        return False
    return True


def _packed_rows(kv: PagedKV, spans: Sequence[Span]) -> torch.Tensor:
    """Rows of layer 0 that hold the keys of all sequences, one after the other: rows_UH."""
    return kv.rows_of([Span(row=0, tokens=span.length, start=0, table=span.table) for span in spans])


def _reach(scores: Scores) -> int:
    """How many keys before itself a token sees; -1: all."""
    return -1 if scores.window is None else scores.window - 1


def _starts(lengths_N: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths_N.cumsum(0, dtype=torch.int32), (1, 0))


def _int32(values: Sequence[Any], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)
