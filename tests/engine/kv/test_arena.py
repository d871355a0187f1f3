"""Arena: wire order comes back whatever the ranges and the block sizes, and a write touches nothing else."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kv.arena import POISON, Arena, Arenas, Range
from engine.kv.schema import CacheSchema, Stream

KV = Stream(name="kv", layers=4, heads=3, head_dim=4, dtype="bfloat16")
SCHEMA = CacheSchema("m", (KV,))
HEAD_BYTES = KV.head_dim * KV.item_bytes
TOKENS = 40


def random_LHPTX(tokens: int = TOKENS, *, seed: int = 0) -> np.ndarray:
    shape = (KV.layers, KV.heads, KV.parts, tokens, HEAD_BYTES)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def new_arena(block_size: int, *, seed: int = 0) -> tuple[Arena, tuple[int, ...]]:
    """An arena with room to spare, and a table for TOKENS tokens in no particular column order."""
    blocks = -(-TOKENS // block_size)
    arena = Arena(SCHEMA, columns=blocks + 3, block_size=block_size)
    table = np.random.default_rng(seed).permutation(arena.columns)[:blocks]
    return arena, tuple(int(column) for column in table)


def ranges(size: int) -> st.SearchStrategy[Range]:
    return st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda pair: (min(pair), max(pair)))


def cut(data_LHPTX: np.ndarray, layers: Range, tokens: Range, heads: Range) -> np.ndarray:
    return data_LHPTX[slice(*layers), slice(*heads), :, slice(*tokens)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    block_size=st.sampled_from([1, 3, 8, 16, 64]),
    layers=ranges(KV.layers),
    tokens=ranges(TOKENS),
    heads=ranges(KV.heads),
    whole=ranges(TOKENS // 8).map(lambda pair: (pair[0] * 8, pair[1] * 8)),
)
def test_any_range_reads_as_written(block_size: int, layers: Range, tokens: Range, heads: Range, whole: Range) -> None:
    arena, table = new_arena(block_size)
    data_LHPTX = random_LHPTX()
    arena.write(table, (0, KV.layers), (0, TOKENS), None, data_LHPTX)
    for wanted in (tokens, whole):
        got = arena.read(table, layers, wanted, heads)
        assert got.flags.c_contiguous and got.dtype == np.uint8
        np.testing.assert_array_equal(got, cut(data_LHPTX, layers, wanted, heads))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    block_size=st.sampled_from([1, 3, 8, 16, 64]),
    layers=ranges(KV.layers),
    tokens=ranges(TOKENS),
    heads=ranges(KV.heads),
)
def test_a_write_touches_its_range_only(block_size: int, layers: Range, tokens: Range, heads: Range) -> None:
    arena, table = new_arena(block_size)
    before_LHPTX, patch_LHPTX = random_LHPTX(seed=1), random_LHPTX(seed=2)
    arena.poison(range(arena.columns))
    arena.write(table, (0, KV.layers), (0, TOKENS), None, before_LHPTX)
    others = [column for column in range(arena.columns) if column not in table]

    arena.write(table, layers, tokens, heads, cut(patch_LHPTX, layers, tokens, heads))

    expected_LHPTX = before_LHPTX.copy()
    cut(expected_LHPTX, layers, tokens, heads)[:] = cut(patch_LHPTX, layers, tokens, heads)
    np.testing.assert_array_equal(arena.read(table, (0, KV.layers), (0, TOKENS)), expected_LHPTX)
    assert (arena.bytes_CLHPSX[others] == POISON).all()
    unused_slots = slice((TOKENS - 1) % block_size + 1, None)
    assert (arena.bytes_CLHPSX[table[-1], ..., unused_slots, :] == POISON).all()


def test_memory_is_where_the_table_says() -> None:
    arena, table = new_arena(block_size=16)
    data_LHPTX = random_LHPTX()
    arena.write(table, (0, KV.layers), (0, TOKENS), None, data_LHPTX)
    for token in range(TOKENS):
        stored_LHPX = arena.array[table[token // 16], :, :, :, token % 16]
        np.testing.assert_array_equal(stored_LHPX, data_LHPTX[:, :, :, token])


def test_workers_with_other_block_sizes_exchange_tokens() -> None:
    source, source_table = new_arena(block_size=16, seed=1)
    target, target_table = new_arena(block_size=8, seed=2)
    data_LHPTX = random_LHPTX()
    source.write(source_table, (0, KV.layers), (0, TOKENS), None, data_LHPTX)
    for layers in [(0, 3), (3, 4)]:
        for tokens in [(0, 5), (5, 21), (21, TOKENS)]:
            target.write(target_table, layers, tokens, None, source.read(source_table, layers, tokens))
    np.testing.assert_array_equal(target.read(target_table, (0, KV.layers), (0, TOKENS)), data_LHPTX)


def test_a_read_is_a_copy() -> None:
    arena, table = new_arena(block_size=16)
    got = arena.read(table, (0, KV.layers), (0, TOKENS))
    got[:] = 1
    assert not arena.bytes_CLHPSX.any()


def test_writes_accept_read_only_bytes_from_a_wire() -> None:
    arena, table = new_arena(block_size=16)
    data_LHPTX = random_LHPTX()
    received = np.frombuffer(data_LHPTX.tobytes(), np.uint8).reshape(data_LHPTX.shape)
    arena.write(table, (0, KV.layers), (0, TOKENS), None, received)
    np.testing.assert_array_equal(arena.read(table, (0, KV.layers), (0, TOKENS)), data_LHPTX)


def test_an_empty_range_is_empty() -> None:
    arena, _ = new_arena(block_size=16)
    assert arena.read((), (0, KV.layers), (0, 0)).shape == (KV.layers, KV.heads, KV.parts, 0, HEAD_BYTES)


def test_units_and_pages_are_rows_of_the_same_buffer() -> None:
    arena, _ = new_arena(block_size=16)
    column, layer, head = 2, 3, 1
    unit = column * KV.layers + layer
    page = unit * KV.heads + head
    arena.page_view(page)[:] = 7
    assert arena.page_view(page).flags.c_contiguous
    assert np.shares_memory(arena.page_view(page), arena.unit_view(unit))
    expected_CLHPSX = np.zeros_like(arena.bytes_CLHPSX)
    expected_CLHPSX[column, layer, head] = 7
    np.testing.assert_array_equal(arena.bytes_CLHPSX, expected_CLHPSX)


def test_a_new_arena_is_zero_and_columns_can_be_zeroed_poisoned_and_copied() -> None:
    arena, _ = new_arena(block_size=16)
    assert not arena.bytes_CLHPSX.any()
    arena.poison([1, 3])
    arena.zero([3])
    arena.copy_column(1, 2)
    poisoned = [bool((arena.bytes_CLHPSX[column] == POISON).all()) for column in range(4)]
    clean = [not arena.bytes_CLHPSX[column].any() for column in range(4)]
    assert poisoned == [False, True, True, False]
    assert clean == [True, False, False, True]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_poison_is_not_a_number(dtype: type[np.floating]) -> None:
    arena, _ = new_arena(block_size=16)
    arena.poison([0])
    assert np.isnan(arena.bytes_CLHPSX[0].view(dtype)).all()


REFUSED: dict[str, Callable[[Arena, tuple[int, ...]], object]] = {
    "layers beyond the model": lambda a, t: a.read(t, (0, KV.layers + 1), (0, 1)),
    "layers backwards": lambda a, t: a.read(t, (2, 1), (0, 1)),
    "negative tokens": lambda a, t: a.read(t, (0, 1), (-1, 1)),
    "tokens beyond the table": lambda a, t: a.read(t, (0, 1), (0, len(t) * 16 + 1)),
    "heads beyond the model": lambda a, t: a.read(t, (0, 1), (0, 1), (0, KV.heads + 1)),
    "a foreign column": lambda a, t: a.read((a.columns,), (0, 1), (0, 1)),
    "a negative column": lambda a, t: a.read((-1,), (0, 1), (0, 1)),
    "data of another shape": lambda a, t: a.write(t, (0, KV.layers), (0, TOKENS), None, random_LHPTX(TOKENS - 1)),
    "data of another type": lambda a, t: a.write(t, (0, KV.layers), (0, TOKENS), None, random_LHPTX().view(np.int8)),
    "a unit beyond the arena": lambda a, t: a.unit_view(a.columns * KV.layers),
    "a negative page": lambda a, t: a.page_view(-1),
    "poison for a foreign column": lambda a, t: a.poison([a.columns]),
    "zero for a negative column": lambda a, t: a.zero([-1]),
    "a copy to a foreign column": lambda a, t: a.copy_column(0, a.columns),
}


@pytest.mark.parametrize("name", REFUSED)
def test_misuse_is_refused_and_changes_nothing(name: str) -> None:
    arena, table = new_arena(block_size=16)
    with pytest.raises(ValueError):
        REFUSED[name](arena, table)
    assert not arena.bytes_CLHPSX.any()


@pytest.mark.parametrize("sizes", [(0, 16), (4, 0)])
def test_an_arena_has_columns_and_slots(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=">= 1"):
        Arena(SCHEMA, columns=sizes[0], block_size=sizes[1])


def test_bytes_per_column_follow_from_the_schema() -> None:
    wide = replace(KV, dtype="float32")
    arena = Arena(CacheSchema("m", (wide,)), columns=2, block_size=8)
    assert arena.bytes_CLHPSX.nbytes == 2 * 8 * arena.schema.token_bytes


# -- several of them ---------------------------------------------------------------------------------------------------
def test_arenas_are_found_by_what_they_hold() -> None:
    other = CacheSchema("m", (replace(KV, role="embedding"),))
    kv, embeddings = Arena(SCHEMA, columns=1), Arena(other, columns=2)
    both = Arenas(kv, embeddings)
    assert both.of(SCHEMA.digest) is kv
    assert both.of(other.digest) is embeddings
    assert kv.of(SCHEMA.digest) is kv
    for memory in (kv, both):
        with pytest.raises(KeyError):
            memory.of(bytes(16))
