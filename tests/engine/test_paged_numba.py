"""The decode kernel against attention spelled out in float64: ragged lengths, windows, soft caps, head shapes, blocks.

All memory that no sequence owns is NaN, and so are the slots behind each sequence's last token: one read too far and
NaN is in the answer. Legend: Q query heads, H kv heads, G = Q / H, T tokens, D head dim, N sequences.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention import Scores
from engine.attention.paged_kv import PagedKV, Span
from engine.attention.paged_numba import PagedNumba
from engine.kv.arena import Arena
from engine.kv.schema import CacheSchema, Stream

LAYERS = 2
# A quarter of a rounding of the stored type, of answers that are at most a few units large.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


class Memory:
    """Sequences of random KV in scattered columns."""

    def __init__(self, lengths: Sequence[int], heads: int, head_dim: int, block_size: int, dtype: str) -> None:
        blocks = [-(-length // block_size) for length in lengths]
        stream = Stream(name="kv", layers=LAYERS, heads=heads, head_dim=head_dim, dtype=dtype)
        arena = Arena(CacheSchema("m", (stream,)), columns=sum(blocks) + 3, block_size=block_size)
        arena.poison(range(arena.columns))
        self.kv = PagedKV(arena)
        self._random = torch.Generator().manual_seed(sum(lengths) + head_dim)
        columns = iter(torch.randperm(arena.columns, generator=self._random).tolist())
        tables = [tuple(next(columns) for _ in range(count)) for count in blocks]
        self.spans = [Span(row, 1, length - 1, tables[row]) for row, length in enumerate(lengths)]
        self.kv_NPHTD = [self._fill(span, heads, head_dim) for span in self.spans]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._random).to(self.kv.dtype)

    def _fill(self, span: Span, heads: int, head_dim: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        rows_TH = self.kv.rows_of([Span(0, span.length, 0, span.table)])
        layers = [
            (self.random(heads, span.length, head_dim), self.random(heads, span.length, head_dim))
            for _ in range(LAYERS)
        ]
        for layer, (key_HTD, value_HTD) in enumerate(layers):
            self.kv.write(layer, rows_TH, key_HTD, value_HTD)
        return layers

    def expected(self, query_QND: torch.Tensor, layer: int, scores: Scores) -> tuple[np.ndarray, np.ndarray]:
        """(out_NQD, lse_NQ) by the definition."""
        answers = []
        for sequence, layers in enumerate(self.kv_NPHTD):
            key_HTD, value_HTD = (tensor.double().numpy() for tensor in layers[layer])
            first = 0 if scores.window is None else max(0, key_HTD.shape[1] - scores.window)
            query_HGD = query_QND[:, sequence].double().numpy().reshape(len(key_HTD), -1, key_HTD.shape[2])
            score_HGT = np.einsum("hgd,htd->hgt", query_HGD, key_HTD[:, first:]) * scores.scaling
            if scores.softcap is not None:
                score_HGT = scores.softcap * np.tanh(score_HGT / scores.softcap)
            lse_HG = np.logaddexp.reduce(score_HGT, axis=-1)
            weight_HGT = np.exp(score_HGT - lse_HG[..., None])
            out_HGD = np.einsum("hgt,htd->hgd", weight_HGT, value_HTD[:, first:])
            answers.append((out_HGD.reshape(-1, key_HTD.shape[2]), lse_HG.reshape(-1)))
        return np.stack([out for out, _ in answers]), np.stack([lse for _, lse in answers])


def check(memory: Memory, group: int, head_dim: int, heads: int, dtype: str, scores: Scores) -> None:
    query_QND = memory.random(group * heads, len(memory.spans), head_dim)
    layer = LAYERS - 1
    out_NQD, lse_NQ = PagedNumba().prepare(memory.kv, memory.spans).with_lse(query_QND, layer, scores)
    expected_NQD, expected_NQ = memory.expected(query_QND, layer, scores)
    np.testing.assert_allclose(out_NQD.double().numpy(), expected_NQD, rtol=0, atol=TOLERANCE[dtype])
    np.testing.assert_allclose(lse_NQ.numpy(), expected_NQ, rtol=0, atol=1e-4)


# Each of these is compiled, which takes seconds, once; then the kernel cache has it.
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("head_dim", "group", "dtype"),
    [(24, 1, "float32"), (64, 3, "bfloat16"), (80, 7, "bfloat16"), (128, 4, "bfloat16"), (256, 8, "float32")],
)
def test_head_shapes(head_dim: int, group: int, dtype: str) -> None:
    memory = Memory([1, 16, 17, 300], heads=2, head_dim=head_dim, block_size=16, dtype=dtype)
    check(memory, group, head_dim, 2, dtype, Scores(head_dim**-0.5))


@pytest.mark.timeout(120)
@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=5),
    block_size=st.sampled_from([1, 2, 4, 16, 32]),
    heads=st.integers(1, 3),
    window=st.none() | st.integers(1, 300),
    softcap=st.none() | st.floats(0.5, 30.0),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_ragged_lengths_windows_and_soft_caps(
    lengths: list[int], block_size: int, heads: int, window: int | None, softcap: float | None, dtype: str
) -> None:
    memory = Memory(lengths, heads, 16, block_size, dtype)
    check(memory, 2, 16, heads, dtype, Scores(0.7, window, softcap))


def test_chunks_and_decodes_share_a_step() -> None:
    """The chunk's rows come from torch, the single rows from the kernel; each is what it would be alone."""
    memory = Memory([40, 25, 9], heads=2, head_dim=16, block_size=4, dtype="float32")
    a, chunk, b = memory.spans
    spans = [Span(0, 1, a.start, a.table), Span(1, 5, 20, chunk.table), Span(6, 1, b.start, b.table)]
    query_QTD, scores = memory.random(6, 7, 16), Scores(0.25)
    together_TQD = PagedNumba().prepare(memory.kv, spans)(query_QTD, 0, scores)
    for span in spans:
        alone = [Span(0, span.tokens, span.start, span.table)]
        rows = slice(span.row, span.row + span.tokens)
        alone_TQD = PagedNumba().prepare(memory.kv, alone)(query_QTD[:, rows], 0, scores)
        torch.testing.assert_close(together_TQD[rows], alone_TQD)


def test_a_nan_of_a_sequences_own_spoils_it_alone() -> None:
    memory = Memory([30, 30], heads=1, head_dim=16, block_size=4, dtype="float32")
    rows_TH = memory.kv.rows_of([memory.spans[0]])
    memory.kv.write(0, rows_TH, torch.full((1, 1, 16), torch.nan), torch.zeros(1, 1, 16))
    out_NQD = PagedNumba().prepare(memory.kv, memory.spans)(memory.random(2, 2, 16), 0, Scores(0.25))
    assert out_NQD[0].isnan().all()
    assert out_NQD[1].isfinite().all()
