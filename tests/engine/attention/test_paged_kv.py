"""Addresses: which pages hold what a span sees and takes, in host memory laid out as DESIGN section 4 says."""

from collections.abc import Iterator

import pytest
import torch

from engine.attention.paged_kv import PagedKV, Span
from engine.base.errors import Internal, InvalidArgument
from tests.engine.tiny_models import HEAD_DIM, KV_HEADS, LAYERS, tiny_arena

TABLE = (5, 2, 9, 7, 1)


def written(kv: PagedKV, span: Span, layer: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    key_HTD, value_HTD = torch.randn(2, KV_HEADS, span.tokens, HEAD_DIM)
    kv.write(layer, kv.rows_of([span]), key_HTD, value_HTD)
    return key_HTD, value_HTD


@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (0, 18), (3, 1), (4, 4), (6, 9), (17, 3)])
def test_new_tokens_go_where_the_arena_reads_them(start: int, tokens: int) -> None:
    arena = tiny_arena(block_size=4)
    key_HTD, value_HTD = written(PagedKV(arena), Span(0, tokens, start, TABLE))
    bytes_LHPTX = arena.read(TABLE, (1, 2), (start, start + tokens))
    stored_HPTD = torch.from_numpy(bytes_LHPTX).view(torch.float32)[0]
    assert torch.equal(stored_HPTD, torch.stack((key_HTD, value_HTD), dim=1))


def test_pages_are_the_same_numbers_in_place() -> None:
    kv = PagedKV(tiny_arena(block_size=4))
    key_HTD, value_HTD = written(kv, Span(0, 7, 0, TABLE), layer=LAYERS - 1)
    key_CSHD, value_CSHD = kv.pages(LAYERS - 1)
    assert torch.equal(key_CSHD[list(TABLE[:2])].flatten(0, 1)[:7], key_HTD.transpose(0, 1))
    assert torch.equal(value_CSHD[list(TABLE[:2])].flatten(0, 1)[:7], value_HTD.transpose(0, 1))
    assert key_CSHD.untyped_storage().data_ptr() == kv._rows.untyped_storage().data_ptr()


def test_single_tokens_are_gathered_by_their_rows() -> None:
    kv = PagedKV(tiny_arena(block_size=4))
    key_HTD, value_HTD = written(kv, Span(0, 11, 0, TABLE))
    key_UHD, value_UHD = kv.gather_rows(1, kv.rows_of([Span(0, 5, 6, TABLE)]))
    assert torch.equal(key_UHD, key_HTD[:, 6:].transpose(0, 1))
    assert torch.equal(value_UHD, value_HTD[:, 6:].transpose(0, 1))


@pytest.mark.parametrize(
    ("start", "tokens", "window", "blocks"),
    [
        (18, 1, None, range(5)),
        (18, 1, 1, range(4, 5)),
        (18, 1, 3, range(4, 5)),
        (18, 1, 4, range(3, 5)),
        (10, 9, 4, range(1, 5)),
        (0, 19, 4, range(5)),
        (18, 1, 99, range(5)),
    ],
)
def test_blocks_seen_start_where_the_first_tokens_window_reaches(
    start: int, tokens: int, window: int | None, blocks: range
) -> None:
    assert PagedKV(tiny_arena(block_size=4)).blocks_seen(Span(0, tokens, start, TABLE), window) == blocks


def test_a_step_looks_only_at_the_entries_of_a_table_that_it_touches() -> None:
    class Table(tuple[int, ...]):
        def __iter__(self) -> Iterator[int]:
            raise AssertionError("the whole table was read")

    kv = PagedKV(tiny_arena(block_size=4))
    span = Span(0, 1, 18, Table(TABLE))
    assert kv.rows_of([span]).equal(kv.rows_of([Span(0, 1, 18, TABLE)]))
    assert kv.strips_of([span], window=4).equal(kv.strips_of([Span(0, 1, 18, TABLE)], window=4))


def test_a_table_shorter_than_its_sequence_is_a_bug() -> None:
    with pytest.raises(Internal, match="9 tokens do not fit 2 blocks"):
        PagedKV(tiny_arena(block_size=4)).rows_of([Span(0, 9, 0, (3, 5))])


@pytest.mark.parametrize(
    ("layer", "heads", "head_dim"), [(0, KV_HEADS + 1, HEAD_DIM), (0, KV_HEADS, 4), (LAYERS, 2, 8)]
)
def test_what_memory_does_not_hold_is_refused(layer: int, heads: int, head_dim: int) -> None:
    kv = PagedKV(tiny_arena(block_size=4))
    new_HTD = torch.zeros(heads, 2, head_dim)
    with pytest.raises(
        InvalidArgument, match=f"layer {layer} makes {heads} KV heads of {head_dim} numbers, but memory"
    ):
        kv.write(layer, kv.rows_of([Span(0, 2, 0, TABLE)]), new_HTD, new_HTD)
