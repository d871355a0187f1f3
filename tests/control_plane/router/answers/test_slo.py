"""Was it as fast as its client wanted? What the final piece, the record and the log say of it."""

from dataclasses import replace

import msgspec
import pytest

from control_plane.router.answers.slo import SloVerdict
from control_plane.router.edge import RequestRecord
from engine.base.errors import Cancelled, DeadlineExceeded, InvalidArgument, ResourceExhausted, TriptychError
from engine.types import FinishReason
from tests.control_plane.router.edge_fakes import Call, Router, answers, body, says, turns

ASKED = [(b"x-slo-ttft-ms", b"10"), (b"x-slo-tpot-ms", b"20")]


class Records:
    """An observer that keeps what it is told."""

    def __init__(self, router: Router) -> None:
        self.records: list[RequestRecord] = []
        router.edge._observer = self

    def request_ended(self, record: RequestRecord) -> None:
        self.records.append(record)

    def slow_reader(self) -> None: ...


@pytest.mark.parametrize(
    ("ttft_ms", "tpot_ms", "met"),
    [
        (None, None, None),
        (b"10", None, True),
        (b"9", None, False),
        (None, b"20", True),
        (None, b"19", False),
        (b"10", b"19", False),
        (b"10", b"20", True),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_final_piece_says_whether_the_slo_was_met(
    ttft_ms: bytes | None, tpot_ms: bytes | None, met: bool | None, stream: bool
) -> None:
    router = Router()
    asked = [(b"x-slo-ttft-ms", ttft_ms), (b"x-slo-tpot-ms", tpot_ms)]
    call = Call(router.app, body(stream=stream), [(name, value) for name, value in asked if value is not None])
    await turns()
    for at_us, token in ((10_000, 5), (30_000, 6), (50_000, 7)):
        router.now_us = at_us
        router.core.tokens(1, token, finish=FinishReason.LENGTH if token == 7 else None)
        await turns()
    await call.task
    pieces = call.body.removesuffix(b"data: [DONE]\n\n").rsplit(b"data: ", 1)
    triptych = msgspec.json.decode(pieces[-1])["triptych"]
    assert (triptych["ttft_ms"], triptych["tpot_ms"], triptych["slo_met"]) == (10.0, 20.0, met)


async def test_one_token_has_no_time_per_token_and_is_not_late() -> None:
    router = Router()
    router.core.script = says((0, [5], FinishReason.LENGTH))
    call = Call(router.app, body(stream=False), [(b"x-slo-tpot-ms", b"1")])
    await call.task
    triptych = msgspec.json.decode(call.body)["triptych"]
    assert (triptych["tpot_ms"], triptych["slo_met"]) == (None, True)


async def test_an_answer_without_tokens_is_judged_by_its_ending() -> None:
    router = Router()
    call = Call(router.app, body(stream=False, max_tokens=0), [(b"x-slo-ttft-ms", b"10")])
    await turns()
    router.now_us = 11_000
    router.core.end(1, FinishReason.LENGTH)
    await call.task
    triptych = msgspec.json.decode(call.body)["triptych"]
    assert (triptych["ttft_ms"], triptych["slo_met"]) == (None, False)


async def test_each_of_several_prompts_is_judged_by_itself() -> None:
    router = Router()
    call = Call(router.app, body(stream=False, prompt=[[1], [2]]), [(b"x-slo-ttft-ms", b"10")])
    await turns()
    for key, at_us in ((1, 10_000), (2, 10_001)):
        router.now_us = at_us
        router.core.tokens(key, 5, finish=FinishReason.LENGTH)
    await call.task
    prompts = msgspec.json.decode(call.body)["triptych"]["prompts"]
    assert [prompt["slo_met"] for prompt in prompts] == [True, False]


@pytest.mark.parametrize(
    ("error", "met"),
    [
        (ResourceExhausted("full"), False),
        (DeadlineExceeded("too late"), False),
        (Cancelled("gone"), None),
        (InvalidArgument("constraint: too much"), None),
    ],
)
async def test_a_failure_of_ours_misses_and_one_of_the_clients_own_says_nothing(
    error: TriptychError, met: bool | None
) -> None:
    router = Router()
    observer = Records(router)
    router.core.script = answers(ending=error)
    for headers in (ASKED, ASKED[:1], []):
        await Call(router.app, body(), headers).task
    both, first, none = (record.slo for record in observer.records)
    assert (both.ttft_met, both.tpot_met, both.met) == (met, met, met)
    assert (first.ttft_met, first.tpot_met, first.met) == (met, None, met)
    assert none == SloVerdict() and none.met is None


async def test_a_record_says_which_of_the_two_was_missed() -> None:
    router = Router()
    observer = Records(router)
    call = Call(router.app, body(), ASKED)
    await turns()
    for at_us, token in ((10_000, 5), (30_001, 6)):
        router.now_us = at_us
        router.core.tokens(1, token, finish=FinishReason.LENGTH if token == 6 else None)
    await call.task
    (record,) = observer.records
    assert record.slo == SloVerdict(ttft_met=True, tpot_met=False)
    assert replace(record.slo, tpot_met=True).met and not record.slo.met
