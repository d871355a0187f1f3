"""Sampling is exact set arithmetic plus one counter-based uniform; both are checked apart and together."""

import math
from collections import Counter
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from engine.counter_random import uniform
from engine.sampling import nucleus, sample, sample_batch
from engine.types import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
# Chi-square at p = 0.001, by degrees of freedom. Seeds are fixed, so a passing test stays passing.
CHI_SQUARE_MAX = {2: 13.8, 3: 16.3, 7: 24.3, 15: 37.7}


def chi_square(observed: list[int], expected: list[float]) -> float:
    return sum((seen - due) ** 2 / due for seen, due in zip(observed, expected, strict=True))


# -- the counter -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("counters", "value"),
    [
        ((0, 0, 0), 0.13870941014555427),
        ((1, 0, 0), 0.6935121390102292),
        ((0, 1, 0), 0.2691303195904541),
        ((0, 0, 1), 0.18436667429957676),
        (((1 << 63) - 1, 3, 4095), 0.1291477686432393),
    ],
)
def test_uniform_is_the_same_for_ever(counters: tuple[int, int, int], value: float) -> None:
    """A request that moves between two releases of this code must continue its random sequence."""
    assert uniform(*counters) == value


def test_uniform_is_uniform_over_positions_and_over_seeds() -> None:
    for draws in (
        [uniform(5, 0, position) for position in range(8000)],
        [uniform(seed, 0, 5) for seed in range(8000)],
        [uniform(5, choice, 0) for choice in range(8000)],
    ):
        bins = Counter(int(16 * draw) for draw in draws)
        assert set(bins) == set(range(16))
        assert chi_square([bins[index] for index in range(16)], [500.0] * 16) < CHI_SQUARE_MAX[15]


def test_neighbouring_positions_are_uncorrelated() -> None:
    pairs = pairwise(uniform(9, 0, position) for position in range(8000))
    bins = Counter((first < 0.5, second < 0.5) for first, second in pairs)
    assert chi_square([bins[a, b] for a in (False, True) for b in (False, True)], [7999 / 4] * 4) < CHI_SQUARE_MAX[3]


# -- greedy ------------------------------------------------------------------------------------------------------------
def test_greedy_takes_the_largest_and_of_equals_the_first() -> None:
    logits_NV = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, -1.0, 5.0, 5.0], [-3.0, -2.0, -1.0, -math.inf]])
    assert sample_batch(logits_NV, [(GREEDY, 0)] * 3) == [1, 0, 2]
    assert [sample(logits_V, GREEDY, 0) for logits_V in logits_NV] == [1, 0, 2]


def test_no_rows_no_tokens() -> None:
    assert sample_batch(torch.empty(0, 8), []) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=0.7, top_p=0.9, seed=3)])
def test_logits_that_are_not_numbers_fail_their_row_only(bad: float, params: SamplingParams) -> None:
    logits_NV = torch.zeros(3, 6)
    logits_NV[0, 2] = logits_NV[2, 4] = 40.0
    logits_NV[1, 5] = bad
    assert sample_batch(logits_NV, [(params, 0)] * 3) == [2, None, 4]
    assert sample(logits_NV[1], params, 0) is None


def test_a_row_without_any_possible_token_has_failed() -> None:
    assert sample(torch.full((4,), -math.inf), GREEDY, 0) is None


# -- the nucleus -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1e-9, [3]),
        (0.5, [3]),
        (0.500001, [3, 0]),
        (0.75, [3, 0]),
        (0.8, [3, 0, 1]),
        (0.875, [3, 0, 1]),
        (0.9, [3, 0, 1, 2]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p(top_p: float, kept: list[int]) -> None:
    probabilities_V = torch.tensor([0.25, 0.125, 0.125, 0.5, 0.0], dtype=torch.float64)
    assert nucleus(probabilities_V, top_p).tolist() == kept


def test_equal_probabilities_are_taken_in_token_order() -> None:
    probabilities_V = torch.full((4096,), 1 / 4096, dtype=torch.float64)
    assert nucleus(probabilities_V, 0.25).tolist() == list(range(1024))


@given(
    weights=st.lists(st.integers(min_value=0, max_value=1 << 12), min_size=1, max_size=60).filter(any),
    percent=st.integers(min_value=1, max_value=99),
)
def test_the_nucleus_equals_its_definition(weights: list[int], percent: int) -> None:
    """In integers, so that no rounding decides; borders hit exactly are left to the table above."""
    total = sum(weights)
    expected: list[int] = []
    mass = 0
    for token in sorted(range(len(weights)), key=lambda token: -weights[token]):
        if 100 * mass >= percent * total:
            break
        expected.append(token)
        mass += weights[token]
    if 100 * mass == percent * total:
        return
    probabilities_V = torch.tensor(weights, dtype=torch.float64) / total
    assert nucleus(probabilities_V, percent / 100).tolist() == expected


# -- drawing -----------------------------------------------------------------------------------------------------------
LOGITS = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, 1.5, -0.5, 0.25])


def draws(params: SamplingParams, count: int = 3000) -> Counter[int | None]:
    return Counter(sample(LOGITS, params, position) for position in range(count))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    seen = draws(SamplingParams(temperature=temperature, seed=11))
    expected_V = torch.softmax(LOGITS.double() / temperature, 0) * 3000
    assert chi_square([seen[token] for token in range(8)], expected_V.tolist()) < CHI_SQUARE_MAX[7]


def test_top_p_draws_from_the_nucleus_in_proportion() -> None:
    seen = draws(SamplingParams(temperature=1.0, top_p=0.8, seed=11))
    probabilities_V = torch.softmax(LOGITS.double(), 0)
    kept = nucleus(probabilities_V, 0.8)
    assert set(seen) == set(kept.tolist()) == {2, 5, 0, 4}
    expected_M = probabilities_V[kept] / probabilities_V[kept].sum() * 3000
    assert chi_square([seen[token] for token in kept.tolist()], expected_M.tolist()) < CHI_SQUARE_MAX[3]


def test_a_draw_depends_on_seed_choice_and_position_and_on_nothing_else() -> None:
    def run(seed: int, choice: int = 0, first: int = 0) -> list[int | None]:
        params = SamplingParams(temperature=5.0, seed=seed)
        return [sample(LOGITS, params, first + offset, choice) for offset in range(40)]

    assert run(1) == run(1)
    assert run(1, first=10)[:30] == run(1)[10:]
    assert len({tuple(line) for line in (run(1), run(2), run(1, choice=1), run(1, first=1))}) == 4


def test_neighbours_in_the_batch_change_nothing() -> None:
    logits_NV = torch.stack((LOGITS, LOGITS.flip(0), LOGITS * 2))
    wanted = [(SamplingParams(temperature=1.0, top_p=0.9, seed=row), 7 + row) for row in range(3)]
    alone = [sample(logits_NV[row], *wanted[row]) for row in range(3)]
    assert sample_batch(logits_NV, wanted) == alone
    assert sample_batch(logits_NV.flip(0), wanted[::-1]) == alone[::-1]


def test_the_smallest_temperature_is_greedy_and_finite() -> None:
    assert draws(SamplingParams(temperature=5e-324, seed=1), 50) == {2: 50}


@pytest.mark.parametrize("top_p", [1.0, 0.99])
@pytest.mark.parametrize("drawn", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_uniform_select_possible_tokens(
    drawn: float, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.sampling.uniform", lambda seed, choice, position: drawn)
    logits_V = torch.tensor([-math.inf, 0.1, 0.3, 0.2, -math.inf])
    assert sample(logits_V, SamplingParams(temperature=1.0, top_p=top_p), 0) in {1, 2, 3}


@given(logits=st.lists(st.floats(min_value=-30, max_value=30), min_size=1, max_size=40))
def test_the_largest_uniform_still_selects_a_token(logits: list[float]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.sampling.uniform", lambda seed, choice, position: 1.0 - 2.0**-53)
        token = sample(torch.tensor(logits), SamplingParams(temperature=1.0, top_p=1.0), 0)
    assert token is not None
    assert 0 <= token < len(logits)


def test_a_large_vocabulary_in_half_precision() -> None:
    logits_V = torch.linspace(-20, 20, 50_000).to(torch.bfloat16)
    token = sample(logits_V, SamplingParams(temperature=0.8, top_p=0.95, seed=4), 3)
    assert token is not None
    assert logits_V[token] > 10
