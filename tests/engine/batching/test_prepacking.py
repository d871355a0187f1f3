"""Prepacking: whole prompts, packed well; and bins for backends that want rows."""

import random
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.base.errors import InvalidArgument
from engine.batching import Chunk
from engine.batching.prepacking import Prepacking, pack_rows
from tests.engine.batching.batches import batch_of


def packed(*lengths: int, decodes: int = 0, step_tokens: int = 100, sequences_left: int = 9) -> list[Chunk]:
    batching = Prepacking(Prepacking.Config(step_tokens=step_tokens))
    return batching.chunks(batch_of([(0, length) for length in lengths], (5,) * decodes, sequences_left))


# -- steps -------------------------------------------------------------------------------------------------------------
def test_the_oldest_first_then_what_fills_the_step_best() -> None:
    assert packed(30, 20, 50, 60, 10) == [Chunk(0, 30), Chunk(3, 60), Chunk(4, 10)]


def test_of_equal_prompts_the_older() -> None:
    assert packed(60, 30, 30) == [Chunk(0, 60), Chunk(1, 30)]


def test_no_prompt_but_the_oldest_is_ever_cut() -> None:
    assert packed(30, 200, 71) == [Chunk(0, 30)]


def test_a_prompt_longer_than_the_budget_has_the_step_for_itself() -> None:
    assert packed(250, 1) == [Chunk(0, 100)]


def test_decodes_and_sequences_count() -> None:
    assert packed(30, 60, decodes=20) == [Chunk(0, 30)]
    assert packed(10, 10, 10, sequences_left=2) == [Chunk(0, 10), Chunk(1, 10)]


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=8))
def test_nothing_that_fits_is_left_behind(lengths: list[int]) -> None:
    chunks = packed(*lengths)
    left = 100 - sum(chunk.tokens for chunk in chunks)
    waiting = [length for index, length in enumerate(lengths) if index not in dict(chunks)]
    assert all(length > left for length in waiting)


# -- rows --------------------------------------------------------------------------------------------------------------
lengths_of_rows = st.lists(st.integers(1, 20), max_size=40)


@given(lengths=lengths_of_rows)
def test_everything_is_placed_once_and_no_row_is_over_full(lengths: list[int]) -> None:
    rows = pack_rows(lengths, 20)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= 20 for row in rows)


@given(lengths=lengths_of_rows, seed=st.integers(0, 99))
def test_the_waste_does_not_depend_on_the_order(lengths: list[int], seed: int) -> None:
    shuffled = random.Random(seed).sample(lengths, len(lengths))
    assert _fill(shuffled) == _fill(lengths)


def _fill(lengths: list[int]) -> list[int]:
    return [sum(lengths[index] for index in row) for row in pack_rows(lengths, 20)]


@pytest.mark.parametrize("seed", range(40))
def test_at_most_11_ninths_of_the_optimum_and_one(seed: int) -> None:
    """Optimum by brute force: some order of the prompts, cut greedily, is the best packing."""
    draw = random.Random(seed)
    lengths = [draw.randint(1, 10) for _ in range(draw.randint(1, 7))]
    optimum = min(_next_fit(order) for order in permutations(lengths))
    assert optimum <= len(pack_rows(lengths, 10)) <= 11 / 9 * optimum + 1


def _next_fit(lengths: tuple[int, ...]) -> int:
    rows, room = 0, 0
    for length in lengths:
        if length > room:
            rows, room = rows + 1, 10
        room -= length
    return rows


def test_first_fit_decreasing_on_the_textbook_case() -> None:
    assert pack_rows([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]


@pytest.mark.parametrize("length", [0, -1, 21])
def test_a_length_that_no_row_can_hold_is_named(length: int) -> None:
    with pytest.raises(InvalidArgument, match=r"lengths\[1\]: must be in \[1, 20\]"):
        pack_rows([5, length], 20)
