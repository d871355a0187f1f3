"""What parameters do to logits and what log-probabilities say, against a plain reference on Python lists."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from engine.sampling import Failure, Row, sample_batch, score
from engine.sampling.adjustments import adjust
from engine.types import SamplingParams

VOCAB = 130  # two blocks and a bit
EOS = 7


def logits(seed: int = 0) -> torch.Tensor:
    return 4 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


def row_of(context: Sequence[int] = (), prompt_tokens: int = 0, mask: bytes | None = None, **params: Any) -> Row:
    return Row(
        params=SamplingParams(**{"temperature": 0.0, **params}),
        position=len(context) - prompt_tokens,
        context=list(context),
        prompt_tokens=prompt_tokens,
        mask=mask,
    )


def adjusted(row: Row, scores_V: torch.Tensor | None = None) -> list[float]:
    scores_V = logits() if scores_V is None else scores_V.clone()
    adjust(scores_V, row, [EOS])
    return list(scores_V.tolist())


def token_of(scores_V: torch.Tensor, row: Row) -> int | Failure:
    (picked,) = sample_batch(scores_V[None], [row], [EOS])
    return picked if isinstance(picked, Failure) else picked[0].token_id


def possible(row: Row) -> set[int]:
    return {token for token, value in enumerate(adjusted(row)) if value > -math.inf}


def bits(*tokens: int) -> bytes:
    mask = bytearray(-(-VOCAB // 8))
    for token in tokens:
        mask[token // 8] |= 1 << token % 8
    return bytes(mask)


# -- penalties and biases ----------------------------------------------------------------------------------------------
def reference(scores: list[float], row: Row) -> list[float]:
    """vLLM's formulas: bias, then repetition over prompt and output, then frequency and presence over the output."""
    params = row.params
    for token, bias in params.logit_bias:
        scores[token] += bias
    for token in set(row.context):
        scores[token] *= params.repetition_penalty if scores[token] < 0 else 1 / params.repetition_penalty
    for token, count in Counter(row.context[row.prompt_tokens :]).items():
        scores[token] -= params.frequency_penalty * count + params.presence_penalty
    return scores


@given(
    context=st.lists(st.integers(0, VOCAB - 1), max_size=40),
    prompt_share=st.floats(0, 1),
    repetition=st.floats(0.1, 10),
    frequency=st.floats(-2, 2),
    presence=st.floats(-2, 2),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=5),
)
def test_penalties_and_biases_are_those_of_the_reference(
    context: list[int],
    prompt_share: float,
    repetition: float,
    frequency: float,
    presence: float,
    bias: dict[int, float],
) -> None:
    row = row_of(
        context,
        int(prompt_share * len(context)),
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        logit_bias=tuple(bias.items()),
    )
    assert adjusted(row) == pytest.approx(reference(logits().tolist(), row), rel=1e-4, abs=1e-4)


def test_presence_and_frequency_look_at_the_output_only() -> None:
    row = row_of([3, 3, 4, 5, 5], 3, presence_penalty=1.0, frequency_penalty=0.5)
    change = [after - before for before, after in zip(logits().tolist(), adjusted(row), strict=True)]
    assert {token: round(value, 3) for token, value in enumerate(change) if value} == {5: -2.0}


@pytest.mark.parametrize("bias", [1e308, -1e308])
@pytest.mark.parametrize("repetition", [5e-324, 100.0])
def test_extreme_biases_and_penalties_give_a_token_and_no_nan(bias: float, repetition: float) -> None:
    row = row_of([0, 1, 2], 1, logit_bias=((0, bias), (1, bias)), repetition_penalty=repetition, presence_penalty=2.0)
    values = adjusted(row, torch.zeros(VOCAB))
    assert not any(math.isnan(value) or value == math.inf for value in values)
    assert isinstance(token_of(torch.zeros(VOCAB), row), int)


def test_a_bias_decides_and_shows_in_no_logprob() -> None:
    (picked,) = sample_batch(logits()[None], [row_of(logit_bias=((9, 100.0),), logprobs=0)])
    assert not isinstance(picked, Failure)
    (sampled,) = picked
    assert sampled.token_id == 9
    assert sampled.logprobs is not None
    assert sampled.logprobs.logprob == pytest.approx(float(torch.log_softmax(logits(), 0)[9]), abs=1e-4)


# -- what is forbidden -------------------------------------------------------------------------------------------------
def test_allowed_token_ids_leave_only_those() -> None:
    assert possible(row_of(allowed_token_ids=(3, 64, 129))) == {3, 64, 129}


def test_a_mask_allows_its_bits_and_intersects_with_allowed_ids() -> None:
    assert possible(row_of(mask=bits(0, 8, 65, 129))) == {0, 8, 65, 129}
    assert possible(row_of(mask=bits(0, 8, 65), allowed_token_ids=(8, 9))) == {8}
    assert possible(row_of(mask=b"\xff")) == set(range(8))  # what it does not reach is forbidden


@pytest.mark.parametrize(
    ("output", "forbidden"),
    [
        ([], {9}),
        ([1], {9, 2}),
        ([1, 2], {9, 3}),
        ([5, 1, 2], {9, 3}),
        ([2, 1], {9, 2}),
        ([1, 2, 3], {9}),
    ],
)
def test_bad_words_are_never_completed(output: list[int], forbidden: set[int]) -> None:
    row = row_of([1, 2, *output], 2, bad_words=((9,), (1, 2), (1, 2, 3)))
    assert set(range(VOCAB)) - possible(row) == forbidden


@given(seed=st.integers(0, 50))
def test_no_output_holds_a_bad_word(seed: int) -> None:
    words = ((1, 2), (2, 2, 0), (3,))
    context = [1, 2]
    for position in range(40):
        params = SamplingParams(temperature=2.0, seed=seed, bad_words=words)
        row = Row(params=params, position=position, context=list(context), prompt_tokens=2)
        (picked,) = sample_batch(torch.zeros(1, 4), [row])
        assert not isinstance(picked, Failure)
        context.append(picked[0].token_id)
    output = context[2:]
    assert 3 not in output
    assert (1, 2) not in pairwise(output)
    assert all(output[at : at + 3] != [2, 2, 0] for at in range(len(output)))


def test_min_tokens_forbids_every_end_until_then() -> None:
    ends = {"min_tokens": 2, "stop_token_ids": (11,), "ignore_eos": True}
    assert set(range(VOCAB)) - possible(row_of([1, 1], 1, **ends)) == {EOS, 11}
    assert possible(row_of([1, 1, 1], 1, **ends)) == set(range(VOCAB))


def test_min_tokens_gives_way_to_a_grammar_that_can_only_end() -> None:
    assert token_of(logits(), row_of(mask=bits(EOS), min_tokens=5)) == EOS
    assert token_of(logits(), row_of(mask=bits(EOS, 3), min_tokens=5)) == 3


def test_ids_beyond_the_vocabulary_do_nothing() -> None:
    row = row_of(
        [VOCAB + 3],
        0,
        bad_words=((VOCAB,),),
        logit_bias=((VOCAB + 1, 5.0),),
        stop_token_ids=(VOCAB + 2,),
        min_tokens=9,
        repetition_penalty=2.0,
        frequency_penalty=1.0,
    )
    assert possible(row) == set(range(VOCAB)) - {EOS}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "limits",
    [
        {"allowed_token_ids": (5,), "bad_words": ((5,),)},
        {"allowed_token_ids": (VOCAB,)},
        {"mask": b""},
        {"mask": bits(5), "logit_bias": ((5, -1e308),)},
    ],
)
def test_a_row_that_may_have_no_token_fails_alone_and_by_name(limits: dict[str, Any], temperature: float) -> None:
    rows = [row_of(), row_of(temperature=temperature, **limits), row_of()]
    picked = sample_batch(torch.stack([logits(seed) for seed in range(3)]), rows, [EOS])
    assert [isinstance(each, Failure) for each in picked] == [False, True, False]
    assert picked[1] is Failure.NOTHING_ALLOWED


def test_broken_logits_are_not_blamed_on_the_parameters() -> None:
    scores_V = logits()
    scores_V[3] = math.nan
    assert token_of(scores_V, row_of(allowed_token_ids=(5,))) is Failure.NAN_LOGITS


# -- log-probabilities -------------------------------------------------------------------------------------------------
@given(
    values=st.lists(st.integers(-20, 20), min_size=1, max_size=60), top=st.integers(0, 20), pick=st.integers(0, 1 << 20)
)
def test_logprobs_ranks_and_the_likeliest_are_those_of_the_reference(values: list[int], top: int, pick: int) -> None:
    token = pick % len(values)
    mass = math.log(sum(math.exp(value) for value in values))
    (entry,) = score(torch.tensor([values], dtype=torch.float32), [token], top)
    assert entry.logprob == pytest.approx(values[token] - mass, abs=1e-4)
    assert entry.rank == 1 + sum(value > values[token] for value in values)
    assert len(entry.top) == min(top, len(values))
    expected = sorted(values, reverse=True)[:top]
    assert [logprob for _, logprob in entry.top] == pytest.approx([value - mass for value in expected], abs=1e-4)
    assert all(values[each] == pytest.approx(logprob + mass, abs=1e-4) for each, logprob in entry.top)
    assert list(entry.top) == sorted(entry.top, key=lambda pair: (-pair[1], pair[0]))


def test_more_rows_than_are_scored_at_once() -> None:
    logits_TV = torch.stack([logits(seed) for seed in range(70)])
    tokens = [3 * row % VOCAB for row in range(70)]
    entries = score(logits_TV, tokens, 2)
    assert entries == [score(logits_TV[row : row + 1], [token], 2)[0] for row, token in enumerate(tokens)]


def test_logprobs_are_for_rows_that_ask_and_one_per_choice() -> None:
    params = SamplingParams(temperature=3.0, logprobs=1, seed=1)
    rows = [row_of(), Row(params=params, position=0, choices=(0, 1, 2)), row_of(logprobs=0)]
    logits_NV = torch.stack([logits(seed) for seed in range(3)])
    silent, asked, own = sample_batch(logits_NV, rows)
    assert not isinstance(silent, Failure) and not isinstance(asked, Failure) and not isinstance(own, Failure)
    assert [sampled.logprobs for sampled in silent] == [None]
    assert [sampled.logprobs for sampled in asked] == [
        score(logits_NV[1:2], [sampled.token_id], 1)[0] for sampled in asked
    ]
    assert own[0].logprobs is not None
    assert own[0].logprobs.top == ()
    assert own[0].logprobs.rank == 1
