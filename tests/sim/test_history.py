"""The checker itself: it must refuse every history that breaks a promise, or the virtual cluster proves nothing."""

from dataclasses import replace

import pytest

from control_plane.router.requests import Ended, PromptScored, RequestStats, Submit, TokensReady
from engine.base.errors import Cancelled, DeadlineExceeded, Internal, TriptychError, Unavailable
from engine.executors.oracle import OracleExecutor, reference_output, reference_prompt_logprobs
from engine.types import FinishReason, SamplingParams, TokenLogprobs
from tests.sim.history import History, Violation, expected

ORACLE = OracleExecutor.Config()
SUBMIT = Submit(key=1, token_ids=(5, 6, 7), sampling=SamplingParams(temperature=0.0, max_tokens=4), deadline_ms=100)
RIGHT, _ = expected(SUBMIT, ORACLE)


def history_of(*outputs: object, submit: Submit = SUBMIT, at_us: int = 1_000) -> History:
    history = History(lambda: at_us, ORACLE)
    history.invoke(submit)
    for output in outputs:
        history.on_output(output)
    return history


def ended(finish: FinishReason | None = None, error: TriptychError | None = None) -> Ended:
    return Ended(key=1, finish=finish, error=error, stats=RequestStats())


def tokens(*token_ids: int) -> TokensReady:
    return TokensReady(1, token_ids)


def test_a_right_history_passes() -> None:
    history = history_of(tokens(*RIGHT[:1]), tokens(*RIGHT[1:]), ended(FinishReason.LENGTH))
    history.check()
    assert history.figures()["ended length"] == 1


def test_a_cancelled_request_may_have_any_prefix() -> None:
    for count in range(len(RIGHT) + 1):
        history = history_of(tokens(*RIGHT[:count]))
        history.cancel(1)
        history.on_output(ended(error=Cancelled("gone")))
        history.check()


@pytest.mark.parametrize(
    "outputs",
    [
        pytest.param((tokens(*RIGHT[:3]), ended(FinishReason.LENGTH)), id="a token is missing"),
        pytest.param((tokens(*RIGHT, RIGHT[-1]), ended(FinishReason.LENGTH)), id="a token too many"),
        pytest.param((tokens(*RIGHT[:2], *RIGHT[1:]), ended(FinishReason.LENGTH)), id="a token twice"),
        pytest.param((tokens(*RIGHT[::-1]), ended(FinishReason.LENGTH)), id="reordered"),
        pytest.param((tokens(*RIGHT), ended(FinishReason.STOP)), id="wrong reason"),
        pytest.param((ended(error=Cancelled("?")),), id="cancelled by nobody"),
        pytest.param((ended(error=Unavailable("?")),), id="failed without a cause"),
        pytest.param((ended(error=Internal("?")),), id="a bug of ours"),
        pytest.param((ended(error=DeadlineExceeded("?")),), id="before its deadline"),
        pytest.param((ended(),), id="neither finished nor failed"),
    ],
)
def test_a_wrong_history_is_refused(outputs: tuple[object, ...]) -> None:
    history = history_of(*outputs)
    with pytest.raises(Violation):
        history.check()


@pytest.mark.parametrize("late", [tokens(1), ended(FinishReason.LENGTH)], ids=["tokens", "a second ending"])
def test_nothing_may_follow_the_end(late: object) -> None:
    history = history_of(tokens(*RIGHT), ended(FinishReason.LENGTH))
    with pytest.raises(Violation, match="after the end"):
        history.on_output(late)


def test_a_request_without_an_ending_stays_open() -> None:
    assert [call.submit.key for call in history_of(tokens(*RIGHT)).open_calls] == [1]


def test_expected_stops_behind_the_first_stop_token() -> None:
    stopping = SamplingParams(temperature=0.0, max_tokens=4, stop_token_ids=(RIGHT[1],))
    submit = Submit(key=1, token_ids=SUBMIT.token_ids, sampling=stopping)
    assert expected(submit, ORACLE) == (RIGHT[:2], FinishReason.STOP)


# -- several choices ---------------------------------------------------------------------------------------------------
LUCK = SamplingParams(temperature=0.8, seed=1, max_tokens=3)
SEVERAL = Submit(key=1, token_ids=(5, 6, 7), sampling=LUCK, choices=2)
FIRST, SECOND = (expected(SEVERAL, ORACLE, choice)[0] for choice in range(2))
END = ended(FinishReason.LENGTH)


def of_choice(
    choice: int, token_ids: tuple[int, ...], finish: FinishReason | None = FinishReason.LENGTH
) -> TokensReady:
    return TokensReady(1, token_ids, choice, finish)


def test_choices_are_right_each_for_itself() -> None:
    assert FIRST != SECOND
    history = history_of(of_choice(1, SECOND), of_choice(0, FIRST), END, submit=SEVERAL)
    history.check()
    assert history.figures()["tokens"] == 6


@pytest.mark.parametrize(
    "outputs",
    [
        pytest.param((of_choice(0, FIRST), of_choice(1, FIRST)), id="the other one's tokens"),
        pytest.param((of_choice(0, FIRST), of_choice(1, SECOND[:2])), id="cut short"),
        pytest.param((of_choice(0, FIRST),), id="one is missing"),
        pytest.param((of_choice(0, FIRST), of_choice(1, SECOND, FinishReason.STOP)), id="the wrong reason"),
    ],
)
def test_a_wrong_choice_is_refused(outputs: tuple[object, ...]) -> None:
    with pytest.raises(Violation, match="choice 1"):
        history_of(*outputs, END, submit=SEVERAL).check()


def test_nothing_may_follow_the_end_of_a_choice() -> None:
    with pytest.raises(Violation, match="after the end of choice 0"):
        history_of(of_choice(0, FIRST), of_choice(0, (1,)), submit=SEVERAL)


def test_a_choice_that_the_client_stops_may_end_anywhere_behind_it() -> None:
    stopped: list[tuple[int, int]] = []
    history = History(lambda: 1_000, ORACLE, lambda *stop: stopped.append(stop))
    history.invoke(SEVERAL, stops=(0, 2))
    history.on_output(of_choice(1, SECOND[:1], None))
    assert stopped == []
    history.on_output(of_choice(1, SECOND[1:2], None))
    assert stopped == [(1, 1)]
    history.on_output(of_choice(0, FIRST))
    history.on_output(ended(FinishReason.LENGTH))
    history.check()


# -- log-probabilities -------------------------------------------------------------------------------------------------
SCORED = replace(SUBMIT, sampling=SamplingParams(temperature=0.0, max_tokens=2, logprobs=1, prompt_logprobs=1))
PICKS = reference_output(SCORED.token_ids, "", SCORED.sampling, 2, ORACLE)
SCORES = reference_prompt_logprobs(SCORED.token_ids, "", 1, ORACLE)
WRONG = TokenLogprobs(-9.0, 1)


def picked(*logprobs: TokenLogprobs | None) -> TokensReady:
    given = tuple(logprob for logprob in logprobs if logprob is not None)
    return TokensReady(1, tuple(pick.token_id for pick in PICKS), logprobs=given)


def test_right_logprobs_pass() -> None:
    outputs = (PromptScored(1, 1, SCORES[:1]), PromptScored(1, 2, SCORES[1:]))
    history = history_of(*outputs, picked(*(pick.logprobs for pick in PICKS)), END, submit=SCORED)
    history.check()
    assert history.figures()["prompt tokens scored"] == 2


@pytest.mark.parametrize(
    ("scores", "ready", "text"),
    [
        pytest.param(SCORES, picked(PICKS[0].logprobs, WRONG), "wrong tokens", id="a wrong logprob"),
        pytest.param(SCORES, picked(None, None), "wrong tokens", id="no logprobs"),
        pytest.param((SCORES[0], WRONG), picked(*(pick.logprobs for pick in PICKS)), "wrong scores", id="wrong score"),
        pytest.param(SCORES[:1], picked(*(pick.logprobs for pick in PICKS)), "1 scores of 2", id="a score too few"),
    ],
)
def test_wrong_logprobs_are_refused(scores: tuple[TokenLogprobs, ...], ready: TokensReady, text: str) -> None:
    with pytest.raises(Violation, match=text):
        history_of(PromptScored(1, 1, scores), ready, END, submit=SCORED).check()


@pytest.mark.parametrize("start", [0, 2])
def test_scores_out_of_order_are_refused(start: int) -> None:
    with pytest.raises(Violation, match="out of order"):
        history_of(PromptScored(1, start, SCORES[:1]), submit=SCORED)


def test_scores_come_before_the_first_token() -> None:
    with pytest.raises(Violation, match="out of order"):
        history_of(picked(*(pick.logprobs for pick in PICKS)), PromptScored(1, 1, SCORES), submit=SCORED)
