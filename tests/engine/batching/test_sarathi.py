"""Sarathi-Serve: the budget is what the bound on time between tokens leaves, and follows what steps really take."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batching import Batch, Chunk, Prompt
from engine.batching.sarathi import HEADROOM, Sarathi, largest_budget
from engine.step_time import StepTimeModel
from tests.engine.batching.batches import batch_of, step_of

MODEL = StepTimeModel(
    step_us=30_000, prefill_token_us=1_000, prefill_pair_us=0.5, decode_context_us=2, decode_sequence_us=1_000
)
CONFIG = Sarathi.Config(step_tokens=512, tbt_slo_ms=200, model=MODEL, retune_steps=10)
LONG = [(0, 2_000)]


def tokens_of(chunks: list[Chunk]) -> list[int]:
    return [chunk.tokens for chunk in chunks]


def slow_down(batching: Sarathi, factor: float, *, steps: int = 10, decodes: tuple[int, ...] = (100,) * 4) -> None:
    """Steps that took `factor` times what the model says."""
    batch = batch_of(LONG, decodes)
    plan = step_of(batch, batching.chunks(batch))
    for _ in range(steps):
        batching.observe(plan, round(factor * MODEL(plan)))


# -- what a step holds -------------------------------------------------------------------------------------------------
def test_the_budget_is_shared_in_order_of_arrival() -> None:
    batching = Sarathi(Sarathi.Config(step_tokens=100))
    assert batching.chunks(batch_of([(0, 60), (0, 30), (0, 50), (0, 5)], (9, 9))) == [
        Chunk(0, 60),
        Chunk(1, 30),
        Chunk(2, 8),
    ]


def test_sequences_left_ends_the_step() -> None:
    batching = Sarathi(Sarathi.Config(step_tokens=100))
    assert tokens_of(batching.chunks(batch_of([(0, 10), (0, 10), (0, 10)], sequences_left=2))) == [10, 10]


def test_borders_are_counted_from_the_prompts_beginning() -> None:
    """A cache hit of 20 tokens: the chunk ends at token 96, not after 96 tokens."""
    batching = Sarathi(Sarathi.Config(step_tokens=100, align_tokens=16))
    assert tokens_of(batching.chunks(batch_of([(20, 500)], (9,) * 10))) == [96 - 20]


def test_what_is_less_than_a_block_is_left_over() -> None:
    batching = Sarathi(Sarathi.Config(step_tokens=100, align_tokens=16))
    assert tokens_of(batching.chunks(batch_of([(0, 90), (0, 50)]))) == [90]


@pytest.mark.parametrize(("decodes", "tokens"), [(0, 128), (100, 28), (112, 16), (127, 16), (128, 16), (200, 16)])
def test_decodes_that_fill_the_budget_leave_an_eighth_of_it(decodes: int, tokens: int) -> None:
    batching = Sarathi(Sarathi.Config(step_tokens=128))
    assert tokens_of(batching.chunks(batch_of(LONG, (50,) * decodes))) == [tokens]


@pytest.mark.parametrize("config", [replace(CONFIG, model=None), replace(CONFIG, tbt_slo_ms=None)])
def test_without_model_or_bound_the_budget_is_fixed(config: Sarathi.Config) -> None:
    batching = Sarathi(config)
    plan = step_of(batch_of(LONG, (9,)), [Chunk(0, 10)])
    for _ in range(50):
        batching.observe(plan, 10**9)
    assert tokens_of(batching.chunks(batch_of(LONG, (1_000,) * 12))) == [500]


def test_without_decodes_nobody_waits_and_the_bound_does_not_bind() -> None:
    batching = Sarathi(replace(CONFIG, tbt_slo_ms=1))
    assert tokens_of(batching.chunks(batch_of(LONG))) == [512]


# -- tau ---------------------------------------------------------------------------------------------------------------
def test_tau_is_the_largest_tile_within_the_bound() -> None:
    """190 ms = 30 fixed + 8 of decodes + 0.8 of their contexts: room for about 150 tokens -> 158 in all -> 128."""
    batch = batch_of(LONG, (50,) * 8)
    assert tokens_of(Sarathi(CONFIG).chunks(batch)) == [128 - 8]
    assert MODEL.predict([(0, 120)], batch.decode_contexts) <= HEADROOM * 200_000
    assert MODEL.predict([(0, 152)], batch.decode_contexts) > HEADROOM * 200_000


def test_deeper_chunks_are_smaller() -> None:
    sizes = [tokens_of(Sarathi(CONFIG).chunks(batch_of([(start, 500)], (50,))))[0] for start in (0, 1_000, 4_000)]
    assert sizes == [127, 95, 31]


def test_one_tile_beyond_the_decodes_where_they_break_the_bound_alone() -> None:
    decodes = (10_000,) * 40
    assert MODEL.predict([], decodes) > 200_000
    assert tokens_of(Sarathi(CONFIG).chunks(batch_of(LONG, decodes))) == [64 - 40]


@given(
    slo_ms=st.floats(1, 2_000),
    computed=st.integers(0, 4_000),
    decodes=st.lists(st.integers(1, 4_000), min_size=1, max_size=64).map(tuple),
    tile=st.sampled_from([1, 16, 32, 128]),
)
def test_bisection_finds_what_a_scan_finds(slo_ms: float, computed: int, decodes: tuple[int, ...], tile: int) -> None:
    batch = Batch(decodes, [Prompt(1, computed, 5_000)], 9)

    def fits(tau: int) -> bool:
        tokens = max(tau - len(decodes), tau // 8, 1)
        return MODEL.predict([(computed, tokens)], decodes) <= slo_ms * 1_000

    choices = range(tile * (len(decodes) // tile + 1), 512 + 1, tile)
    expected = max((tau for tau in choices if fits(tau)), default=choices.start)
    assert largest_budget(MODEL, batch, slo_ms * 1_000, tile, 512) == min(expected, 512)


# -- closed loop -------------------------------------------------------------------------------------------------------
def test_slower_steps_than_predicted_shrink_the_budget_and_faster_ones_grow_it() -> None:
    batching = Sarathi(CONFIG)
    batch = batch_of(LONG, (100,) * 4)
    before = batching.chunks(batch)
    slow_down(batching, 1.4)
    slower = batching.chunks(batch)
    slow_down(batching, 0.9)
    faster = batching.chunks(batch)
    assert tokens_of(before) == [124]
    assert tokens_of(slower) == [92]
    assert tokens_of(faster) == [156]


def test_what_the_loop_settles_on_keeps_the_bound() -> None:
    """The machine is twice as slow as the one that the model was fitted on."""
    batching = Sarathi(replace(CONFIG, tile_tokens=4))
    for _ in range(4):
        slow_down(batching, 2.0)
    batch = batch_of(LONG, (100,) * 4)
    took_us = 2 * MODEL(step_of(batch, batching.chunks(batch)))
    assert 0.9 * 200_000 < took_us <= HEADROOM * 200_000


def test_one_retuning_changes_by_the_factor_at_most() -> None:
    batching = Sarathi(CONFIG)
    slow_down(batching, 100.0)
    expected = Sarathi(CONFIG)
    slow_down(expected, 1.5)
    batch = batch_of(LONG, (100,) * 4)
    assert batching.chunks(batch) == expected.chunks(batch)


def test_nothing_changes_before_enough_steps_were_seen() -> None:
    batching = Sarathi(CONFIG)
    slow_down(batching, 3.0, steps=9)
    assert tokens_of(batching.chunks(batch_of(LONG, (100,) * 4))) == [124]


def test_steps_of_one_kind_teach_nothing() -> None:
    """A lone decode or a lone chunk may be slow for reasons that tau cannot change."""
    batching = Sarathi(CONFIG)
    alone = step_of(batch_of([], (100,) * 4), [])
    chunk = step_of(batch_of(LONG), [Chunk(0, 512)])
    for plan in (alone, chunk) * 20:
        batching.observe(plan, 10 * MODEL(plan))
    assert tokens_of(batching.chunks(batch_of(LONG, (100,) * 4))) == [124]


def test_the_99th_percentile_forgives_one_in_a_hundred() -> None:
    batching = Sarathi(replace(CONFIG, retune_steps=200))
    slow_down(batching, 1.4, steps=2)
    slow_down(batching, 1.0, steps=198)
    assert tokens_of(batching.chunks(batch_of(LONG, (100,) * 4))) == [124]
