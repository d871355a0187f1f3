"""Drawing is exact set arithmetic plus one counter-based uniform; both are checked apart and together."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given

from engine.counter_random import uniform
from engine.sampling import Failure, Row, sample_batch
from engine.sampling.drawing import shortlist
from engine.sampling.scores import BLOCK_TOKENS, blocks_of
from engine.types import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
# Chi-square at p = 0.001, by degrees of freedom. Seeds are fixed, so a passing test stays passing.
CHI_SQUARE_MAX = {2: 13.8, 3: 16.3, 7: 24.3, 15: 37.7}


def chi_square(observed: list[int], expected: list[float]) -> float:
    return sum((seen - due) ** 2 / due for seen, due in zip(observed, expected, strict=True))


def row_of(params: SamplingParams, position: int = 0, choices: tuple[int, ...] = (0,)) -> Row:
    return Row(params=params, position=position, choices=choices)


def tokens_of(logits_NV: torch.Tensor, rows: Sequence[Row]) -> list[list[int] | Failure]:
    """Token ids instead of `Sampled`."""
    return [
        picked if isinstance(picked, Failure) else [sampled.token_id for sampled in picked]
        for picked in sample_batch(logits_NV, rows)
    ]


def sample(logits_V: torch.Tensor, params: SamplingParams, position: int = 0, choice: int = 0) -> int:
    (tokens,) = tokens_of(logits_V[None], [row_of(params, position, (choice,))])
    assert not isinstance(tokens, Failure), tokens
    return tokens[0]


def kept_of(weights: Sequence[float], **truncation: float) -> list[int]:
    """The short list of a distribution that is given by its weights, whatever they add up to."""
    weights_V = torch.tensor(weights)
    weights_BS = blocks_of((weights_V / weights_V.max())[None])[0].clamp(min=0)
    params = SamplingParams(**truncation)  # type: ignore[arg-type]
    return list(shortlist(weights_BS, weights_BS.sum(dim=-1).double(), params)[0].tolist())


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
    assert tokens_of(logits_NV, [row_of(GREEDY)] * 3) == [[1], [0], [2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 1000])
def test_greedy_is_the_argmax_of_a_vocabulary_of_any_size(vocab: int, dtype: torch.dtype) -> None:
    """Coarse logits, so that most maxima are shared by several tokens."""
    logits_NV = torch.randint(0, 6, (20, vocab), generator=torch.Generator().manual_seed(vocab)).to(dtype)
    expected = [[line.index(max(line))] for line in logits_NV.tolist()]
    assert tokens_of(logits_NV, [row_of(GREEDY)] * 20) == expected


def test_every_greedy_choice_is_the_argmax() -> None:
    assert tokens_of(torch.tensor([[0.0, 2.0, 1.0]]), [row_of(GREEDY, choices=(0, 1, 5))]) == [[1, 1, 1]]


def test_no_rows_no_tokens() -> None:
    assert sample_batch(torch.empty(0, 8), []) == []


def test_the_callers_logits_stay_as_they_are() -> None:
    logits_NV = torch.randn(2, 2 * BLOCK_TOKENS, generator=torch.Generator().manual_seed(0))
    before_NV = logits_NV.clone()
    params = SamplingParams(temperature=0.5, top_p=0.9, logit_bias=((3, 2.0),))
    sample_batch(logits_NV, [row_of(params), row_of(GREEDY)])
    assert torch.equal(logits_NV, before_NV)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=0.7, top_p=0.9, seed=3)])
def test_logits_that_are_not_numbers_fail_their_row_only(bad: float, params: SamplingParams) -> None:
    logits_NV = torch.zeros(3, 6)
    logits_NV[0, 2] = logits_NV[2, 4] = 40.0
    logits_NV[1, 5] = bad
    assert tokens_of(logits_NV, [row_of(params)] * 3) == [[2], Failure.NAN_LOGITS, [4]]


def test_a_row_without_any_possible_token_has_failed() -> None:
    assert tokens_of(torch.full((1, 4), -math.inf), [row_of(GREEDY)]) == [Failure.NAN_LOGITS]


# -- the short list ----------------------------------------------------------------------------------------------------
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
    ],
)
def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p(top_p: float, kept: list[int]) -> None:
    assert kept_of([0.25, 0.125, 0.125, 0.5, 0.0], top_p=top_p) == kept


@pytest.mark.parametrize(
    ("truncation", "kept"),
    [
        ({"top_k": 1}, [3]),
        ({"top_k": 3}, [3, 0, 1]),  # of equals the first
        ({"min_p": 0.5}, [3, 0]),  # relative to the likeliest; the border is in
        ({"min_p": 0.51}, [3]),
        ({"min_p": 1.0}, [3]),
        ({"top_k": 2, "top_p": 0.6}, [3]),  # of the mass that top_k left: 0.5 of 0.75 is more than 0.6
        ({"top_k": 2, "top_p": 0.7}, [3, 0]),
        ({"min_p": 0.5, "top_p": 0.6}, [3]),
        ({"min_p": 0.25, "top_k": 3, "top_p": 0.99}, [3, 0, 1]),
    ],
)
def test_min_p_then_top_k_then_top_p(truncation: dict[str, float], kept: list[int]) -> None:
    assert kept_of([0.25, 0.125, 0.125, 0.5, 0.0], **truncation) == kept


def test_equal_probabilities_are_taken_in_token_order() -> None:
    assert kept_of([1 / 4096] * 4096, top_p=0.25) == list(range(1024))
    assert kept_of([1 / 4096] * 4096, top_k=100) == list(range(100))


WEIGHTS = st.lists(st.integers(min_value=0, max_value=1 << 12), min_size=1, max_size=3 * BLOCK_TOKENS)


@given(weights=WEIGHTS.filter(any), percent=st.integers(min_value=1, max_value=99))
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
    if abs(100 * mass - percent * total) < 1e-4 * total:
        return
    assert kept_of(weights, top_p=percent / 100) == expected


@given(weights=WEIGHTS.filter(any), k=st.integers(min_value=1, max_value=4 * BLOCK_TOKENS))
def test_top_k_equals_its_definition(weights: list[int], k: int) -> None:
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    kept = kept_of(weights, top_k=k)
    assert [token for token in kept if token < len(weights) and weights[token]] == [
        token for token in order[:k] if weights[token]
    ]


@pytest.mark.parametrize("k", [1, 2, 3, 15, 16, 17, 40])
def test_top_k_over_sixteen_blocks(k: int) -> None:
    weights = torch.rand(16 * BLOCK_TOKENS, generator=torch.Generator().manual_seed(k)).tolist()
    weights[::BLOCK_TOKENS] = [2.0 + index for index in range(16)]  # the best ones are in a block each
    assert kept_of(weights, top_k=k) == sorted(range(len(weights)), key=lambda token: -weights[token])[:k]


# -- drawing -----------------------------------------------------------------------------------------------------------
LOGITS = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, 1.5, -0.5, 0.25])


def draws(params: SamplingParams, count: int = 3000, logits_V: torch.Tensor = LOGITS) -> Counter[int]:
    """`count` positions, by sixteen choices at a time."""
    rows = [row_of(params, position, tuple(range(16))) for position in range(-(-count // 16))]
    picked = [tokens for tokens in tokens_of(logits_V.expand(len(rows), -1), rows) if not isinstance(tokens, Failure)]
    return Counter([token for tokens in picked for token in tokens][:count])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    seen = draws(SamplingParams(temperature=temperature, seed=11))
    expected_V = torch.softmax(LOGITS.double() / temperature, 0) * 3000
    assert chi_square([seen[token] for token in range(8)], expected_V.tolist()) < CHI_SQUARE_MAX[7]


def test_frequencies_follow_the_softmax_over_many_blocks() -> None:
    """Eight likely tokens in eight blocks, among 4,000 that are impossible: first the block, then the token in it."""
    logits_V = torch.full((8 * 500,), -math.inf)
    places = [index * 500 + 7 * index for index in range(8)]
    logits_V[places] = LOGITS
    seen = draws(SamplingParams(temperature=1.0, seed=12), logits_V=logits_V)
    assert set(seen) == set(places)
    expected_V = torch.softmax(LOGITS.double(), 0) * 3000
    assert chi_square([seen[place] for place in places], expected_V.tolist()) < CHI_SQUARE_MAX[7]


@pytest.mark.parametrize(
    ("truncation", "kept"),
    [({"top_p": 0.8}, [2, 5, 0, 4]), ({"top_k": 4}, [2, 5, 0, 4]), ({"min_p": 0.2}, [2, 5, 0, 4])],
)
def test_truncation_draws_from_what_is_left_in_proportion(truncation: dict[str, float], kept: list[int]) -> None:
    seen = draws(SamplingParams(temperature=1.0, seed=11, **truncation))  # type: ignore[arg-type]
    assert set(seen) == set(kept)
    expected_M = torch.softmax(LOGITS[kept].double(), 0) * 3000
    assert chi_square([seen[token] for token in kept], expected_M.tolist()) < CHI_SQUARE_MAX[3]


def test_a_draw_depends_on_seed_choice_and_position_and_on_nothing_else() -> None:
    def run(seed: int, choice: int = 0, first: int = 0) -> list[int]:
        params = SamplingParams(temperature=5.0, seed=seed)
        return [sample(LOGITS, params, first + offset, choice) for offset in range(40)]

    assert run(1) == run(1)
    assert run(1, first=10)[:30] == run(1)[10:]
    assert len({tuple(line) for line in (run(1), run(2), run(1, choice=1), run(1, first=1))}) == 4


def test_choices_of_one_row_draw_as_if_each_were_alone() -> None:
    params = SamplingParams(temperature=4.0, seed=2)
    together = tokens_of(LOGITS[None], [row_of(params, 5, tuple(range(16)))])[0]
    assert together == [sample(LOGITS, params, 5, choice) for choice in range(16)]
    assert len(set(together)) > 3


PARAMETERS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    top_k=st.sampled_from([0, 1, 7, 500]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([(), ((3, 4.0), (90, -2.0))]),
    min_tokens=st.sampled_from([0, 4]),
    logprobs=st.sampled_from([None, 0, 3]),
    seed=st.integers(min_value=0, max_value=99),
)


@given(params=st.lists(PARAMETERS, min_size=1, max_size=6), data=st.data())
def test_the_company_in_a_batch_and_its_order_change_nothing(params: list[SamplingParams], data: st.DataObject) -> None:
    """Purity: the same inputs give the same tokens and log-probabilities, alone and in any batch."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits_NV = (3 * torch.randn(len(params), 200, generator=generator)).bfloat16()
    rows = [
        Row(params=each, position=index, choices=(0, index + 1), context=[5, 3, 3, 9, 5], prompt_tokens=2)
        for index, each in enumerate(params)
    ]
    alone = [sample_batch(logits_NV[index : index + 1], [row], [7])[0] for index, row in enumerate(rows)]
    shuffled = data.draw(st.permutations(range(len(rows))))
    together = sample_batch(logits_NV[shuffled], [rows[index] for index in shuffled], [7])
    assert together == [alone[index] for index in shuffled]


@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.9}, {"top_k": 3}])
def test_the_smallest_temperature_is_greedy_and_finite(truncation: dict[str, float]) -> None:
    params = SamplingParams(temperature=5e-324, seed=1, **truncation)  # type: ignore[arg-type]
    assert draws(params, 50) == {2: 50}


@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.99}, {"min_p": 0.01}])
@pytest.mark.parametrize("drawn", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_uniform_select_possible_tokens(
    drawn: float, truncation: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.sampling.drawing.uniform", lambda seed, choice, position: drawn)
    logits_V = torch.full((200,), -math.inf)
    logits_V[[70, 71, 140]] = torch.tensor([0.1, 0.3, 0.2])
    params = SamplingParams(temperature=1.0, **truncation)  # type: ignore[arg-type]
    assert sample(logits_V, params) in {70, 71, 140}


@given(logits=st.lists(st.floats(min_value=-30, max_value=30), min_size=1, max_size=200))
@example([0.0] * 200)
def test_the_largest_uniform_still_selects_a_token(logits: list[float]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.sampling.drawing.uniform", lambda seed, choice, position: 1.0 - 2.0**-53)
        token = sample(torch.tensor(logits), SamplingParams(temperature=1.0, top_p=1.0))
    assert 0 <= token < len(logits)


def test_a_large_vocabulary_in_half_precision() -> None:
    logits_V = torch.linspace(-20, 20, 50_000).to(torch.bfloat16)
    token = sample(logits_V, SamplingParams(temperature=0.8, top_p=0.95, seed=4), 3)
    assert logits_V[token] > 10
