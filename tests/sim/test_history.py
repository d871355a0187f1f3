"""The checker itself: it must refuse every history that breaks a promise, or the virtual cluster proves nothing."""

import pytest

from control_plane.router.requests import Ended, RequestStats, Submit, TokensReady
from engine.base.errors import Cancelled, DeadlineExceeded, Internal, TriptychError, Unavailable
from engine.executors.oracle import OracleExecutor
from engine.types import FinishReason, SamplingParams
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
