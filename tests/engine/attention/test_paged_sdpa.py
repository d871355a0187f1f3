"""Attention over gathered pages against the formula, written down once without pages, packing, pieces or kernels.

Legend: Q query heads, H kv heads, D head dim, T packed tokens, K keys of one sequence.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from engine.attention import Scores
from engine.attention.paged_kv import PagedKV, Span
from engine.attention.paged_sdpa import PagedSdpa
from engine.base import limits
from engine.kv.arena import Arena
from engine.kv.schema import CacheSchema, Stream

LAYERS, Q, H, D, BLOCK = 2, 6, 2, 8, 4
LAYER = 1


class Memory:
    """An arena in which sequences of random keys and values lie; whatever they do not own is NaN."""

    def __init__(self, *lengths: int) -> None:
        stream = Stream(name="kv", layers=LAYERS, heads=H, head_dim=D, dtype="float32")
        blocks = [-(-length // BLOCK) for length in lengths]
        arena = Arena(CacheSchema("tiny", (stream,)), columns=sum(blocks) + 3, block_size=BLOCK)
        arena.poison(range(arena.columns))
        columns = iter(reversed(range(arena.columns)))
        self.tables = [tuple(next(columns) for _ in range(count)) for count in blocks]
        self.kv = PagedKV(arena)
        self._random = torch.Generator().manual_seed(7)
        self.keys_HKD = [self.draw(H, length, D) for length in lengths]
        self.values_HKD = [self.draw(H, length, D) for length in lengths]
        for table, key_HKD, value_HKD in zip(self.tables, self.keys_HKD, self.values_HKD, strict=True):
            rows = self.kv.rows_of([Span(0, key_HKD.shape[1], 0, table)])
            self.kv.write(LAYER, rows, key_HKD, value_HKD)

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._random)

    def spans(self, *tokens: int) -> list[Span]:
        """The last so many tokens of each sequence, packed one after the other."""
        spans, row = [], 0
        for table, key_HKD, count in zip(self.tables, self.keys_HKD, tokens, strict=True):
            spans.append(Span(row, count, key_HKD.shape[1] - count, table))
            row += count
        return spans

    def expected(self, query_QTD: torch.Tensor, spans: Sequence[Span], scores: Scores) -> tuple[Any, Any]:
        """(out_TQD, lse_TQ), one token at a time."""
        outs, lses = [], []
        for span, key_HKD, value_HKD in zip(spans, self.keys_HKD, self.values_HKD, strict=True):
            for position in range(span.start, span.length):
                seen = slice(0 if scores.window is None else max(0, position - scores.window + 1), position + 1)
                key_QKD, value_QKD = (kv[:, seen].repeat_interleave(Q // H, 0) for kv in (key_HKD, value_HKD))
                query_QD = query_QTD[:, span.row + position - span.start]
                weight_QK = torch.einsum("qd,qkd->qk", query_QD, key_QKD) * scores.scaling
                if scores.softcap is not None:
                    weight_QK = scores.softcap * torch.tanh(weight_QK / scores.softcap)
                lses.append(weight_QK.logsumexp(-1))
                outs.append(torch.einsum("qk,qkd->qd", weight_QK.softmax(-1), value_QKD))
        return torch.stack(outs), torch.stack(lses)


SHAPES = {
    "decodes": ((1, 4, 5, 23, 40), (1, 1, 1, 1, 1)),
    "fresh": ((1, 9, 16), (1, 9, 16)),
    "late": ((30, 41), (11, 25)),
    "mixed": ((17, 30, 6, 33, 12), (1, 13, 1, 1, 12)),
}


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 4, 7, 39])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scratch_bytes", [limits.ATTENTION_SCRATCH_BYTES_MAX, 900])
def test_every_token_gets_what_the_formula_says(
    scratch_bytes: int, shape: str, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "ATTENTION_SCRATCH_BYTES_MAX", scratch_bytes)
    lengths, tokens = SHAPES[shape]
    memory = Memory(*lengths)
    spans = memory.spans(*tokens)
    query_QTD = memory.draw(Q, sum(tokens), D)
    scores = Scores(0.4, window, softcap)
    expected_TQD, expected_TQ = memory.expected(query_QTD, spans, scores)
    attend = PagedSdpa().prepare(memory.kv, spans)
    torch.testing.assert_close(attend(query_QTD, LAYER, scores), expected_TQD, rtol=1e-5, atol=1e-5)
    out_TQD, lse_TQ = attend.with_lse(query_QTD, LAYER, scores)
    torch.testing.assert_close(out_TQD, expected_TQD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse_TQ, expected_TQ, rtol=1e-5, atol=1e-5)


def test_layers_of_one_step_may_differ() -> None:
    memory = Memory(30, 21)
    spans = memory.spans(9, 1)
    query_QTD = memory.draw(Q, 10, D)
    attend = PagedSdpa().prepare(memory.kv, spans)
    for scores in (Scores(0.4, 6), Scores(0.4), Scores(0.4, 6), Scores(0.2, 11), Scores(0.4, None, 2.0), Scores(0.4)):
        expected_TQD, _ = memory.expected(query_QTD, spans, scores)
        torch.testing.assert_close(attend(query_QTD, LAYER, scores), expected_TQD, rtol=1e-5, atol=1e-5)


def test_attention_over_two_halves_merges_exactly() -> None:
    """What `with_lse` is for: a query's weights over disjoint keys add up."""
    memory = Memory(24, 16, 8)
    memory.kv.write(LAYER, memory.kv.rows_of([Span(0, 16, 0, memory.tables[1])]), *_halves(memory, 0, 16))
    memory.kv.write(LAYER, memory.kv.rows_of([Span(0, 8, 0, memory.tables[2])]), *_halves(memory, 16, 24))
    query_Q1D, scores = memory.draw(Q, 1, D), Scores(0.4)
    (whole, _), (first, first_lse), (second, second_lse) = (
        PagedSdpa().prepare(memory.kv, [Span(0, 1, length - 1, table)]).with_lse(query_Q1D, LAYER, scores)
        for length, table in zip((24, 16, 8), memory.tables, strict=True)
    )
    lse_TQ1 = torch.logaddexp(first_lse, second_lse)[..., None]
    merged = (first_lse[..., None] - lse_TQ1).exp() * first + (second_lse[..., None] - lse_TQ1).exp() * second
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)


def _halves(memory: Memory, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    return memory.keys_HKD[0][:, start:end], memory.values_HKD[0][:, start:end]


# -- what it costs -----------------------------------------------------------------------------------------------------
class Watched(PagedKV):
    """Counts the blocks that leave memory."""

    blocks_gathered = 0

    def gather(self, layer: int, strips_PNHB: torch.Tensor) -> torch.Tensor:
        self.blocks_gathered += strips_PNHB.shape[1] * strips_PNHB.shape[3]
        return super().gather(layer, strips_PNHB)


@pytest.mark.parametrize(("tokens", "window", "blocks"), [(1, 16, 4), (1, 17, 5), (8, 16, 6), (1, None, 50)])
def test_a_window_gathers_the_blocks_that_it_reaches_and_no_more(tokens: int, window: int | None, blocks: int) -> None:
    memory = Memory(200)
    memory.kv.__class__ = Watched
    (span,) = memory.spans(tokens)
    attend = PagedSdpa().prepare(memory.kv, [span])
    for _ in range(3):
        attend(memory.draw(Q, tokens, D), LAYER, Scores(0.4, window))
    assert isinstance(memory.kv, Watched)
    assert memory.kv.blocks_gathered == 3 * blocks


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest_bytes = max(self.largest_bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_late_chunk_never_holds_a_mask_or_scores_of_all_its_rows(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch_bytes = 48 << 10
    monkeypatch.setattr(limits, "ATTENTION_SCRATCH_BYTES_MAX", scratch_bytes)
    memory = Memory(512)
    (span,) = memory.spans(256)  # a mask of all: 512 KiB
    query_QTD = memory.draw(Q, 256, D)
    gathered_bytes = 2 * H * 512 * D * 4
    with LargestTensor() as watch:
        PagedSdpa().prepare(memory.kv, [span])(query_QTD, 0, Scores(0.4, None, softcap))
    arena_bytes = memory.kv._rows.untyped_storage().nbytes()
    assert watch.largest_bytes <= max(scratch_bytes, gathered_bytes, query_QTD.nbytes, arena_bytes) < 256 * 512 * 4
