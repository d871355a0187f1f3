"""Ragged tables: layers or heads that keep different tokens attend to exactly those tokens.

KV enters the arena the uniform way, whole columns through `write`. Retention then moves the tokens that each layer (or
head) keeps into units (or pages) of split columns, and the rest goes back to the allocator. All other memory is NaN.
Attention reads the survivors through unit and page views. One wrong address, and a wrong token or NaN is in the answer.

Legend: L layers, H kv heads, Q query heads per kv head, P parts (K, V), T tokens, S slots, D head dim.
"""

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kv.allocator import ColumnAllocator
from engine.kv.arena import Arena
from engine.kv.schema import CacheSchema, Stream

L, H, Q, D, S, T = 3, 2, 2, 8, 4, 22
BLOCKS = -(-T // S)
SEQUENCE = 1
SCHEMA = CacheSchema("m", (Stream(name="kv", layers=L, heads=H, head_dim=D, dtype="float32"),))
Kept = tuple[int, ...]

kept_tokens = st.sets(st.integers(0, T - 1), min_size=1).map(lambda tokens: tuple(sorted(tokens)))


def attend(queries_QD: np.ndarray, keys_TD: np.ndarray, values_TD: np.ndarray) -> np.ndarray:
    scores_QT = queries_QD @ keys_TD.T / np.float32(np.sqrt(D))
    weights_QT = np.exp(scores_QT - scores_QT.max(axis=1, keepdims=True))
    return weights_QT / weights_QT.sum(axis=1, keepdims=True) @ values_TD


def as_floats(view: np.ndarray) -> np.ndarray:
    return view.view(np.float32)


class Prefilled:
    """One sequence whose T tokens are in uniform columns, in a worker where others came and went."""

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        self.kv_LHPTD = rng.standard_normal((L, H, 2, T, D), dtype=np.float32)
        self.queries_LHQD = rng.standard_normal((L, H, Q, D), dtype=np.float32)
        self.allocator = ColumnAllocator(3 * BLOCKS, layers=L, heads=H)
        self.arena = Arena(SCHEMA, columns=3 * BLOCKS, block_size=S)
        self.arena.poison(range(3 * BLOCKS))
        for other in range(100, 100 + 2 * BLOCKS):  # leave holes, so that a table is not 0, 1, 2 ...
            self.allocator.allocate(other, 1)
        for other in range(100, 100 + 2 * BLOCKS, 2):
            self.allocator.release(other)
        self.table = self.allocator.allocate(SEQUENCE, BLOCKS + 2) or ()
        self.arena.write(self.table[:BLOCKS], (0, L), (0, T), None, self.kv_LHPTD.view(np.uint8))

    def split_all(self) -> list[int]:
        return [unit for _ in range(len(self.table)) for unit in self.allocator.split_column(SEQUENCE, 0)]

    def dense(self, layer: int, head: int, kept: Kept) -> np.ndarray:
        keys_TD, values_TD = self.kv_LHPTD[layer, head][:, list(kept)]
        return attend(self.queries_LHQD[layer, head], keys_TD, values_TD)

    def take_out(self) -> np.ndarray:
        """Read the sequence's KV and poison all memory: from here on only what is written back is a number."""
        kv_LHPTX = self.arena.read(self.table, (0, L), (0, T))
        self.arena.poison(range(self.arena.columns))
        return as_floats(kv_LHPTX)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(kept_L=st.tuples(*[kept_tokens] * L), order=st.randoms(use_true_random=False))
def test_layers_that_keep_different_tokens(kept_L: tuple[Kept, ...], order: random.Random) -> None:
    state = Prefilled()
    kv_LHPTD = state.take_out()
    units = state.split_all()
    order.shuffle(units)  # a unit of a split column may hold any layer's tokens
    tables = [[units.pop() for _ in range(-(-len(kept) // S))] for kept in kept_L]
    for unit in units:
        state.allocator.release_unit(SEQUENCE, unit)
    for layer, (kept, table) in enumerate(zip(kept_L, tables, strict=True)):
        for slot, token in enumerate(kept):
            unit_HPSD = as_floats(state.arena.unit_view(table[slot // S]))
            unit_HPSD[:, :, slot % S] = kv_LHPTD[layer, :, :, token]

    state.allocator.check_integrity()
    assert set(state.allocator.units(SEQUENCE)) == {unit for table in tables for unit in table}
    for layer, (kept, table) in enumerate(zip(kept_L, tables, strict=True)):
        for head in range(H):
            pages_PTD = np.concatenate([as_floats(state.arena.unit_view(u))[head] for u in table], axis=1)
            keys_TD, values_TD = pages_PTD[:, : len(kept)]
            got_QD = attend(state.queries_LHQD[layer, head], keys_TD, values_TD)
            np.testing.assert_allclose(got_QD, state.dense(layer, head, kept), rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(kept_LH=st.lists(kept_tokens, min_size=L * H, max_size=L * H), order=st.randoms(use_true_random=False))
def test_heads_that_keep_different_tokens(kept_LH: list[Kept], order: random.Random) -> None:
    state = Prefilled()
    kv_LHPTD = state.take_out()
    pages = [page for unit in state.split_all() for page in state.allocator.split_unit(SEQUENCE, unit)]
    order.shuffle(pages)
    tables = [[pages.pop() for _ in range(-(-len(kept) // S))] for kept in kept_LH]
    for page in pages:
        state.allocator.release_page(SEQUENCE, page)
    for row, (kept, table) in enumerate(zip(kept_LH, tables, strict=True)):
        for slot, token in enumerate(kept):
            page_PSD = as_floats(state.arena.page_view(table[slot // S]))
            page_PSD[:, slot % S] = kv_LHPTD[row // H, row % H, :, token]

    state.allocator.check_integrity()
    assert set(state.allocator.pages(SEQUENCE)) == {page for table in tables for page in table}
    for row, (kept, table) in enumerate(zip(kept_LH, tables, strict=True)):
        pages_PTD = np.concatenate([as_floats(state.arena.page_view(page)) for page in table], axis=1)
        keys_TD, values_TD = pages_PTD[:, : len(kept)]
        got_QD = attend(state.queries_LHQD[row // H, row % H], keys_TD, values_TD)
        np.testing.assert_allclose(got_QD, state.dense(row // H, row % H, kept), rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(kept_L=st.tuples(*[kept_tokens] * L))
def test_units_and_pages_of_a_uniform_table_are_where_write_put_them(kept_L: tuple[Kept, ...]) -> None:
    """No copy: block b, layer l of a uniform table *is* unit table[b] * L + l, and its pages follow."""
    state = Prefilled()
    for layer, kept in enumerate(kept_L):
        for head in range(H):
            pages = [(column * L + layer) * H + head for column in state.table[:BLOCKS]]
            gathered_PTD = np.stack([as_floats(state.arena.page_view(pages[t // S]))[:, t % S] for t in kept], axis=1)
            got_QD = attend(state.queries_LHQD[layer, head], *gathered_PTD)
            np.testing.assert_allclose(got_QD, state.dense(layer, head, kept), rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(kept_L=st.tuples(*[kept_tokens] * L))
def test_what_layers_do_not_keep_is_free_for_others(kept_L: tuple[Kept, ...]) -> None:
    state = Prefilled()
    free_before = state.allocator.free_columns
    units = state.split_all()
    needed = sum(-(-len(kept) // S) for kept in kept_L)
    freed = sum(state.allocator.release_unit(SEQUENCE, unit) for unit in units[needed:])
    assert freed == len(state.table) - -(-needed // L), "units packed from the front leave the back columns whole"
    assert state.allocator.allocate(2, free_before + freed) is not None
    state.allocator.check_integrity()
