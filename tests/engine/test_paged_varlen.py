"""PagedVarlen and captured decode steps. The kernels need an accelerator; what they are told does not: here they are
stand-ins that compute, from the same arguments, what the libraries document."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from engine.attention import Scores
from engine.attention.paged_kv import PagedKV, Span
from engine.attention.paged_sdpa import PagedSdpa
from engine.attention.paged_varlen import FlashAttn, PagedVarlen, TorchVarlen
from engine.kv.device_arena import DeviceArena
from engine.kv.schema import CacheSchema, Stream

HEADS, GROUP, HEAD_DIM = 2, 3, 8
KV = Stream(name="kv", layers=2, heads=HEADS, head_dim=HEAD_DIM, dtype="bfloat16")


class FakeVarlenAttn:
    """`torch.nn.attention.varlen.varlen_attn`, in float32, one query at a time."""

    def __init__(self, page_multiple: int = 1) -> None:
        self.page_multiple = page_multiple
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self, query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, **options: Any
    ) -> Any:
        assert query.is_contiguous() and key.stride(-1) == 1
        table = options["block_table"]
        if table is not None and key.shape[1] % self.page_multiple:
            raise RuntimeError("page size not supported")
        self.calls.append({"paged": table is not None, "splits": options["num_splits"]})
        starts = cu_seq_q.tolist()
        outs, lses = [], []
        for n, (start, end) in enumerate(pairwise(starts)):
            if table is None:
                first, last = cu_seq_k[n : n + 2].tolist()
                keys, values = key[first:last], value[first:last]
            else:
                length = int(options["seqused_k"][n])
                pages = table[n, : math.ceil(length / key.shape[1])].long()
                keys, values = (part[pages].flatten(0, 1)[:length] for part in (key, value))
            assert end - start <= max_q and len(keys) <= max_k
            for row in range(start, end):
                reach = len(keys) - (end - row - 1)
                low = 0 if options["window_size"][0] < 0 else max(0, reach - 1 - options["window_size"][0])
                out, lse = _attend(query[row], keys[low:reach], values[low:reach], options["scale"])
                outs.append(out)
                lses.append(lse)
        return torch.stack(outs).to(query.dtype), torch.stack(lses)


def _attend(query_QD: Any, keys_KHD: Any, values_KHD: Any, scale: float) -> tuple[Any, Any]:
    keys_QKD, values_QKD = (
        part.float().repeat_interleave(len(query_QD) // part.shape[1], dim=1).transpose(0, 1)
        for part in (keys_KHD, values_KHD)
    )
    scores_QK = scale * (keys_QKD @ query_QD.float()[:, :, None])[..., 0]
    return (scores_QK.softmax(-1)[:, None] @ values_QKD)[:, 0], scores_QK.logsumexp(-1)


def filled(block_size: int, dtype: str = "bfloat16") -> PagedKV:
    stream = Stream(name="kv", layers=2, heads=HEADS, head_dim=HEAD_DIM, dtype=dtype)
    arena = DeviceArena(CacheSchema("m", (stream,)), columns=24, block_size=block_size, device="cpu")
    kv = PagedKV(arena)
    torch.manual_seed(block_size)
    for page in kv.pages(0) + kv.pages(1):
        page.copy_(torch.randn(page.shape))
    return kv


SPANS = [
    Span(row=0, tokens=1, start=16, table=(5, 2, 9, 11, 20)),
    Span(row=1, tokens=1, start=0, table=(7,)),
    Span(row=2, tokens=5, start=6, table=(3, 4, 6)),
    Span(row=7, tokens=4, start=0, table=(8,)),
]
QUERY_QTD = torch.randn(HEADS * GROUP, 11, HEAD_DIM, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("window", [None, 4])
def test_tells_the_kernel_what_sdpa_computes(in_place: bool, window: int | None) -> None:
    kv = filled(4)
    fake = FakeVarlenAttn(page_multiple=1 if in_place else 256)
    backend = PagedVarlen.choose(kv, TorchVarlen(fake))
    assert backend.in_place is in_place
    scores = Scores(scaling=0.3, window=window)
    for layer in (0, 1):
        got_TQD = backend.prepare(kv, SPANS)(QUERY_QTD, layer, scores)
        expected_TQD = PagedSdpa().prepare(kv, SPANS)(QUERY_QTD, layer, scores)
        torch.testing.assert_close(got_TQD, expected_TQD, atol=2e-2, rtol=2e-2)
    assert fake.calls[-1] == {"paged": in_place, "splits": 1}


def test_lse_merges_two_halves_of_the_keys() -> None:
    """What is learnt over keys [0, 8) and over [8, 12) merges into what is learnt over all of them (DESIGN 4)."""
    kv = filled(4)
    backend = PagedVarlen.choose(kv, TorchVarlen(FakeVarlenAttn()))
    query_QTD, scores = QUERY_QTD[:, :1], Scores(scaling=0.3)
    parts = [
        backend.prepare(kv, [Span(0, 1, length - 1, table)]).with_lse(query_QTD, 0, scores)
        for length, table in ((8, (5, 2)), (4, (9,)), (12, (5, 2, 9)))
    ]
    (out_a, lse_a), (out_b, lse_b), (whole, lse) = parts
    torch.testing.assert_close(torch.logaddexp(lse_a, lse_b), lse)
    weight_a, weight_b = (torch.exp(part - lse)[..., None] for part in (lse_a, lse_b))
    torch.testing.assert_close((weight_a * out_a + weight_b * out_b).bfloat16(), whole, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("dtype", "softcap"), [("bfloat16", 5.0), ("float32", None)])
def test_leaves_to_sdpa_what_the_kernel_has_not(dtype: str, softcap: float | None) -> None:
    kv = filled(4, dtype)
    fake = FakeVarlenAttn()
    query_QTD, scores = QUERY_QTD.to(kv.dtype), Scores(scaling=0.3, softcap=softcap)
    got_TQD = PagedVarlen.choose(kv, TorchVarlen(fake)).prepare(kv, SPANS)(query_QTD, 0, scores)
    asked = len(fake.calls)
    assert asked == (1 if dtype == "bfloat16" else 0)  # the try at load, and nothing since
    torch.testing.assert_close(got_TQD, PagedSdpa().prepare(kv, SPANS)(query_QTD, 0, scores))


def test_flash_attn_is_called_as_it_documents() -> None:
    told: dict[str, Any] = {}

    def flash_attn_varlen_func(query: Any, key: Any, value: Any, **options: Any) -> Any:
        told.update(options, key=key)
        return torch.zeros_like(query), torch.zeros(query.shape[1], query.shape[0]), None

    kv = filled(4)
    attend = PagedVarlen.choose(kv, FlashAttn(flash_attn_varlen_func)).prepare(kv, SPANS)
    attend(QUERY_QTD, 1, Scores(scaling=0.3, window=7, softcap=5.0))
    assert told["cu_seqlens_q"].tolist() == [0, 1, 2, 7, 11]
    assert told["cu_seqlens_k"].tolist() == [0, 17, 18, 29, 33]
    assert (told["max_seqlen_q"], told["max_seqlen_k"]) == (5, 17)
    assert (told["window_size"], told["softcap"], told["causal"]) == ((6, 0), 5.0, True)
    assert told["block_table"].tolist()[2] == [3, 4, 6, 3, 3]
    assert told["key"].shape == (25, 4, HEADS, HEAD_DIM)  # 24 columns and the spare one, in place
    attend(QUERY_QTD, 1, Scores(scaling=0.3))
    assert (told["window_size"], told["softcap"]) == ((-1, -1), 0.0)
