"""Several prompts in one call: one answer, all or nothing, and nothing left behind however it ends."""

import asyncio
from collections.abc import Sequence
from functools import partial

import pytest

from control_plane.router import edge
from control_plane.router.access.tenants import Tenant
from control_plane.router.answers.several_prompts import PromptStreams
from control_plane.router.requests import Ended, RequestStats
from control_plane.router.text.stop_strings import StopStrings
from engine.base import limits
from engine.base.errors import ResourceExhausted, TriptychError, Unavailable
from engine.types import FinishReason
from tests.control_plane.router.answers.test_answer import assembled, both
from tests.control_plane.router.edge_fakes import (
    Call,
    FakeCore,
    Router,
    Script,
    body,
    events,
    in_turns,
    says,
    score,
    turns,
)

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
PROMPTS = [[1, 2], [3], [4, 5, 6]]


def each(*scripts: Script) -> Script:
    """The first script for the first prompt of a call, and so on; a second call begins again."""

    def script(core: FakeCore, key: int) -> None:
        scripts[(key - 1) % len(scripts)](core, key)

    return script


def ends(error: TriptychError, after: Sequence[int] = ()) -> Script:
    def script(core: FakeCore, key: int) -> None:
        in_turns([*(partial(core.tokens, key, token) for token in after), partial(core.end, key, error)])

    return script


# -- one answer --------------------------------------------------------------------------------------------------------
async def test_choices_are_numbered_prompt_by_prompt_and_usage_is_summed() -> None:
    router = Router()
    script = each(
        says((1, [11], None), (0, [10], LENGTH), (1, [12], LENGTH)),
        says((0, [20, 21], LENGTH), (1, [22], STOP)),
        says((0, [30], LENGTH), (1, [31], LENGTH)),
    )
    whole, chunks = await both(router, script, prompt=PROMPTS, n=2)
    assert [(choice["index"], choice["text"]) for choice in whole["choices"]] == [
        (0, " 10"),
        (1, " 11 12"),
        (2, " 20 21"),
        (3, " 22"),
        (4, " 30"),
        (5, " 31"),
    ]
    assert whole["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": 8,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 6},
    }
    assert [prompt["decode_worker"] for prompt in whole["triptych"]["prompts"]] == ["d1"] * 3
    assert whole["id"] == "cmpl-id1" and {chunk["id"] for chunk in chunks} == {"cmpl-id4"}


async def test_every_prompt_is_a_request_of_its_own() -> None:
    router = Router()
    router.core.script = says((0, [5], LENGTH))
    await router.complete(prompt=PROMPTS, max_tokens=4, cache_salt="s")
    assert [list(submit.token_ids) for submit in router.core.submits] == PROMPTS
    assert {submit.sampling.max_tokens for submit in router.core.submits} == {4}
    assert router.sample("triptych_requests_total", outcome="length") == 3


async def test_one_prompt_in_a_list_is_one_prompt() -> None:
    router = Router()
    whole, _ = await both(router, says((0, [5], LENGTH)), prompt=[[1, 2]])
    assert "prompts" not in whole["triptych"]


async def test_prompts_are_answered_as_they_come_and_nothing_is_sent_before_the_first_token() -> None:
    router = Router()
    call = Call(router.app, body(prompt=PROMPTS))
    await turns()
    assert call.sent == []
    router.core.tokens(2, 20)
    await turns()
    router.core.tokens(3, 30, finish=LENGTH)
    router.core.tokens(1, 10)
    await turns()
    assert [len(message.get("body", b"").split(b"data: ")) - 1 for message in call.sent] == [0, 1, 2]
    router.core.tokens(1, 11, finish=LENGTH)
    router.core.tokens(2, 21, finish=LENGTH)
    await call.task
    assert [choice["text"] for choice in assembled(events(call.body))] == [" 10 11", " 20 21", " 30"]


async def test_an_echo_and_its_scores_are_each_prompts_own() -> None:
    def scored(core: FakeCore, key: int) -> None:
        prompt = PROMPTS[(key - 1) % 3]
        scores = [score(-float(token)) for token in prompt[1:]]
        last = partial(core.tokens, key, 7, finish=LENGTH, logprobs=[score(-7.0)])
        in_turns([*([partial(core.scored, key, 1, *scores)] if scores else ()), last])

    whole, _ = await both(Router(), scored, prompt=PROMPTS, echo=True, logprobs=0)
    assert [choice["text"] for choice in whole["choices"]] == [" 1 2 7", " 3 7", " 4 5 6 7"]
    assert [choice["logprobs"]["token_logprobs"] for choice in whole["choices"]] == [
        [None, -2.0, -7.0],
        [None, -7.0],
        [None, -5.0, -6.0, -7.0],
    ]


async def test_the_most_prompts_that_there_may_be() -> None:
    router = Router()
    prompts = [[1 + index] for index in range(limits.PROMPTS_MAX)]

    def its_own(core: FakeCore, key: int) -> None:
        token = prompts[(key - 1) % len(prompts)][0]
        in_turns([partial(core.tokens, key, token), partial(core.tokens, key, token, finish=LENGTH)])

    whole, _ = await both(router, its_own, prompt=prompts)
    assert [choice["text"] for choice in whole["choices"]] == [f" {1 + i} {1 + i}" for i in range(limits.PROMPTS_MAX)]


# -- room --------------------------------------------------------------------------------------------------------------
async def test_there_is_room_for_all_prompts_or_none_is_started() -> None:
    router = Router(edge_config=edge.Config(requests_max=3))
    first = Call(router.app, body())
    await turns()
    refused = await router.complete(prompt=PROMPTS)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert len(router.core.submits) == 1 and router.edge.in_flight == 1
    router.core.script = says((0, [5], LENGTH))
    assert (await router.complete(prompt=PROMPTS[:2])).status_code == 200
    first.disconnect()
    await first.task


# -- endings -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failing", [0, 1, 2])
async def test_one_failing_prompt_is_the_whole_calls_failure_and_the_others_are_closed(
    failing: int, stream: bool
) -> None:
    router = Router()
    silent: list[Script] = [lambda core, key: None] * 3
    silent[failing] = ends(ResourceExhausted("full", retry_after_ms=2_500))
    router.core.script = each(*silent)
    answer = await router.complete(prompt=PROMPTS, stream=stream)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    await turns()
    assert sorted(cancel.key for cancel in router.core.cancels) == [key for key in (1, 2, 3) if key != failing + 1]
    assert router.edge.in_flight == 0


async def test_a_prompt_that_the_core_refuses_on_the_spot_fails_the_call() -> None:
    router = Router()

    def refuse(core: FakeCore, key: int) -> None:
        if key == 2:
            core.end(key, ResourceExhausted("full"))

    router.core.script = refuse
    assert (await router.complete(prompt=PROMPTS, stream=True)).status_code == 429
    await turns()
    assert sorted(cancel.key for cancel in router.core.cancels) == [1, 3] and router.edge.in_flight == 0


async def test_a_prompt_that_fails_in_mid_stream_is_an_error_event_and_then_done() -> None:
    router = Router()
    router.core.script = each(says((0, [10], None)), ends(Unavailable("gone"), [20]), says((0, [30], LENGTH)))
    *chunks, error = events((await router.complete(prompt=PROMPTS, stream=True)).content)
    assert error["error"]["code"] == 503
    assert {choice["text"] for choice in assembled(chunks)} == {" 10", " 20", " 30"}
    await turns()
    assert [cancel.key for cancel in router.core.cancels] == [1] and router.edge.in_flight == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ended", [(), (2,), (1, 3)])
async def test_a_client_that_leaves_cancels_what_has_not_ended(ended: tuple[int, ...], stream: bool) -> None:
    router = Router()
    call = Call(router.app, body(prompt=PROMPTS, stream=stream))
    await turns()
    for key in ended:
        router.core.tokens(key, 5, finish=LENGTH)
        await turns()
    call.disconnect()
    await call.task
    await turns()
    assert [cancel.key for cancel in router.core.cancels] == [key for key in (1, 2, 3) if key not in ended]
    assert router.edge.in_flight == 0


async def test_a_client_that_does_not_read_one_prompt_loses_all() -> None:
    router = Router(edge_config=edge.Config(unread_tokens_max=8))
    slow, quick = Call(router.app, body(prompt=PROMPTS)), Call(router.app, body())
    await turns()
    slow.reading.clear()
    for token in range(12):
        router.core.tokens(2, token)
        router.core.tokens(4, token)
        await turns(3)
    assert await asyncio.wait_for(slow.task, timeout=5) is None  # interrupted inside its send
    await turns()
    assert sorted(cancel.key for cancel in router.core.cancels) == [1, 2, 3]
    assert router.sample("triptych_slow_readers_total") == 1 and router.edge.in_flight == 1
    router.core.end(4)
    await quick.task


async def test_a_cancelled_handler_frees_every_prompt() -> None:
    router = Router()
    call = Call(router.app, body(prompt=PROMPTS))
    await turns()
    call.task.cancel()
    await asyncio.gather(call.task, return_exceptions=True)
    await turns()
    assert len(router.core.cancels) == 3 and router.edge.in_flight == 0


async def test_all_prompts_of_a_call_share_one_automaton_of_their_stop_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Sequence[str]] = []

    class Counted(StopStrings):
        def __init__(self, strings: Sequence[str]) -> None:
            built.append(strings)
            super().__init__(strings)

    monkeypatch.setattr(edge, "StopStrings", Counted)
    script = says((0, [1, 7, 2], LENGTH), (1, [3], LENGTH))
    whole, _ = await both(Router(), script, prompt=PROMPTS, n=2, stop=["7"])
    assert [choice["text"] for choice in whole["choices"]] == [" 1 ", " 3"] * 3
    assert built == [("7",), ("7",)]  # one for the whole answer, one for the streamed one


async def test_aborting_the_calls_id_ends_all_its_prompts() -> None:
    router = Router()
    call = Call(router.app, body(prompt=PROMPTS))
    await turns()
    router.edge.abort("cmpl-id1")
    await call.task
    await turns()
    assert call.sent[0]["status"] == 499
    assert sorted(cancel.key for cancel in router.core.cancels) == [1, 2, 3] and router.edge.in_flight == 0


async def test_the_calls_id_stands_for_all_of_it_also_when_its_first_prompt_has_ended() -> None:
    router = Router()
    call = Call(router.app, body(prompt=PROMPTS))
    await turns()
    router.edge.on_output(Ended(key=1, finish=FinishReason.STOP, stats=RequestStats()))
    router.edge.abort("cmpl-id1", Tenant("somebody"))
    assert router.core.cancels == []
    router.edge.abort("cmpl-id1")
    await call.task
    await turns()
    assert sorted(cancel.key for cancel in router.core.cancels) == [2, 3] and router.edge.in_flight == 0


async def test_a_token_that_cannot_be_decoded_fails_its_own_call_only() -> None:
    router = Router()
    router.core.script = each(says((0, [5], LENGTH)), says((0, [123_456], None)), says((0, [5], LENGTH)))
    assert (await router.complete(prompt=PROMPTS)).status_code == 500
    await turns()
    assert router.edge.in_flight == 0


# -- reading -----------------------------------------------------------------------------------------------------------
async def test_a_call_of_one_prompt_reads_its_stream_itself() -> None:
    router = Router()
    (request,) = await router.validator.completion(body())
    stream = router.edge.open(request)
    with PromptStreams([stream]) as streams:
        assert streams.next == stream.next  # nothing in between that a token would pay for
    await turns()
    assert router.edge.in_flight == 0


async def test_last_deltas_wait_for_the_ending_of_their_own_prompt_only() -> None:
    router = Router()
    call = Call(router.app, body(prompt=PROMPTS[:2], stop="6"))
    router.core.over = lambda *ignored: None  # type: ignore[method-assign]  # the core is slow to hear of a stop
    await turns()
    router.core.tokens(1, 6)
    router.core.tokens(2, 20)
    await turns()
    assert [text for text in (b" 20", b'"finish_reason":"stop"') if text in call.body] == [b" 20"]
    router.core.end(1)
    router.core.end(2)
    await call.task
    assert [(choice["text"], choice["finish_reason"]) for choice in assembled(events(call.body))] == [
        (" ", "stop"),
        (" 20", "stop"),
    ]
