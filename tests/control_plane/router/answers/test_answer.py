"""Choices, stop strings, echo and log-probabilities: a streamed answer put together is the whole one."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.router import edge
from control_plane.router.requests import Stop
from control_plane.router.text.vocabulary import TokenizerVocabulary
from engine.base.errors import Unavailable
from engine.types import FinishReason, TokenLogprobs
from tests.control_plane.router.edge_fakes import (
    CARD,
    Call,
    FakeCore,
    Router,
    Script,
    answers,
    body,
    events,
    in_turns,
    says,
    score,
    turns,
)
from tests.control_plane.router.text.test_detokenizer import byte_level_tokenizer

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def assembled(chunks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The choices of a streamed answer, put together as a client would."""
    choices: dict[int, dict[str, Any]] = {}
    for part in (part for chunk in chunks for part in chunk["choices"]):
        first = {**part, "text": "", "logprobs": None, "finish_reason": None}
        if "token_ids" in part:
            first["token_ids"] = []
        choice = choices.setdefault(part["index"], first)
        assert choice["finish_reason"] is None  # nothing follows a choice's last chunk
        choice["text"] += part["text"]
        choice["finish_reason"], choice["stop_reason"] = part["finish_reason"], part["stop_reason"]
        if part["logprobs"] is not None:
            before = choice["logprobs"] or {name: [] for name in part["logprobs"]}
            choice["logprobs"] = {name: before[name] + part["logprobs"][name] for name in before}
        if "token_ids" in part:
            choice["token_ids"] += part["token_ids"]
    return [choices[index] for index in sorted(choices)]


async def both(router: Router, script: Script, **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The whole answer, and the chunks of the streamed one, which must say the same."""
    router.core.script = script
    whole = (await router.complete(**fields)).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events((await router.complete(**fields, **options)).content)
    assert assembled(chunks) == whole["choices"]
    assert (chunks[-1]["usage"], chunks[-1]["triptych"]) == (whole["usage"], whole["triptych"])
    assert all("triptych" not in chunk for chunk in chunks[:-1])
    assert router.edge.in_flight == 0 and router.core.cancels == []
    return whole, chunks


# -- several choices ---------------------------------------------------------------------------------------------------
async def test_choices_come_in_order_and_their_tokens_add_up() -> None:
    script = says((1, [7], None), (0, [5], None), (2, [9], STOP), (1, [8], LENGTH), (0, [6, 4], LENGTH))
    whole, chunks = await both(Router(), script, n=3)
    assert [(choice["index"], choice["text"], choice["finish_reason"]) for choice in whole["choices"]] == [
        (0, " 5 6 4", "length"),
        (1, " 7 8", "length"),
        (2, " 9", "stop"),
    ]
    assert whole["usage"]["completion_tokens"] == 6 and whole["usage"]["total_tokens"] == 9
    assert [chunk["choices"][0]["index"] for chunk in chunks[:-1]] == [1, 0, 2, 1, 0]


async def test_what_becomes_readable_together_is_sent_together() -> None:
    router = Router()
    call = Call(router.app, body(n=3))
    await turns()
    for choice in range(3):
        router.core.tokens(1, 5 + choice, choice=choice)
    await turns()
    assert [len(message.get("body", b"").split(b"data: ")) - 1 for message in call.sent] == [0, 3]
    for choice in range(3):
        router.core.tokens(1, 8, choice=choice, finish=LENGTH)
    await call.task
    assert [choice["text"] for choice in assembled(events(call.body))] == [" 5 8", " 6 8", " 7 8"]


async def test_the_core_is_asked_for_as_many_choices_and_their_priority_and_tenant() -> None:
    router = Router()
    router.core.script = says(*((choice, [5], LENGTH) for choice in range(4)))
    await router.complete(n=4, best_of=4, priority=-3, cache_salt="s")
    submit = router.core.submits[0]
    assert (submit.choices, submit.priority, submit.cache_salt) == (4, -3, "s")


async def test_choices_that_the_core_says_nothing_of_end_with_the_request() -> None:
    whole, _ = await both(Router(), answers(ending=LENGTH), n=2, max_tokens=0)
    assert [(choice["text"], choice["finish_reason"]) for choice in whole["choices"]] == [("", "length")] * 2
    assert whole["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_fails_all_choices_also_those_that_were_done(stream: bool) -> None:
    router = Router()

    def script(core: FakeCore, key: int) -> None:
        failure = partial(core.end, key, Unavailable("no decode worker"))
        in_turns([partial(core.tokens, key, 5, choice=1, finish=LENGTH), partial(core.tokens, key, 6), failure])

    router.core.script = script
    answer = await router.complete(n=2, stream=stream)
    if not stream:
        assert answer.status_code == 503
        return
    *chunks, error = events(answer.content)
    assert [choice["finish_reason"] for choice in assembled(chunks)] == [None, "length"]
    assert error["error"]["code"] == 503


async def test_unread_tokens_of_all_choices_count_together() -> None:
    router = Router(edge_config=edge.Config(unread_tokens_max=8))
    call = Call(router.app, body(n=4))
    await turns()
    call.reading.clear()
    for token in range(3):
        for choice in range(4):
            router.core.tokens(1, token, choice=choice)
    await call.task
    await turns()
    assert len(router.core.cancels) == 1 and router.sample("triptych_slow_readers_total") == 1


async def test_time_per_token_is_a_choices_own() -> None:
    router = Router()
    call = Call(router.app, body(n=2))
    await turns()
    for at_us, token in ((10_000, 5), (30_000, 6), (50_000, 7)):
        router.now_us = at_us
        for choice in range(2):
            router.core.tokens(1, token, choice=choice, finish=LENGTH if token == 7 else None)
    await call.task
    assert router.sample("triptych_time_to_second_token_seconds_sum") == pytest.approx(0.030)
    assert router.sample("triptych_time_per_output_token_seconds_sum") == pytest.approx(0.020)
    assert router.sample("triptych_generation_tokens_total") == 6


# -- stop strings ------------------------------------------------------------------------------------------------------
async def test_a_stop_string_over_several_tokens_ends_the_choice_and_tells_the_core_once() -> None:
    router = Router()
    script = says((0, [5], None), (0, [6], None), (0, [7], None), (0, [8], None), (0, [9], LENGTH))
    whole, chunks = await both(router, script, stop=["6 7", "zzz"])
    choice = whole["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (" 5 ", "stop", "6 7")
    assert whole["usage"]["completion_tokens"] == 3  # up to the one that completed it
    assert router.core.stops == [Stop(1, 0), Stop(2, 0)]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == " 5 "


@pytest.mark.parametrize(("include", "text"), [(False, " 5"), (True, " 5 6")])
async def test_the_stop_string_is_in_the_text_only_if_asked_for(include: bool, text: str) -> None:
    script = says((0, [5, 6, 7], None), (0, [8], LENGTH))
    whole, _ = await both(Router(), script, stop=" 6", include_stop_str_in_output=include)
    assert whole["choices"][0]["text"] == text and whole["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(("include", "text"), [(False, " 5"), (True, " 5 42")])
async def test_a_stop_token_is_in_the_text_where_stop_strings_are(include: bool, text: str) -> None:
    script = says((0, [5, 42], STOP))
    whole, _ = await both(Router(), script, stop_token_ids=[42], include_stop_str_in_output=include)
    assert (whole["choices"][0]["text"], whole["choices"][0]["stop_reason"]) == (text, 42)


async def test_held_text_comes_with_the_end_if_nothing_completed_it() -> None:
    router = Router()
    script = says((0, [5], None), (0, [6], None), (0, [7], LENGTH))
    whole, chunks = await both(router, script, stop=" 6 7 8")
    assert [chunk["choices"][0]["text"] for chunk in chunks[:-1]] == [" 5", "", " 6 7"]
    assert (whole["choices"][0]["finish_reason"], whole["choices"][0]["stop_reason"]) == ("length", None)
    assert router.core.stops == []


async def test_no_stop_string_is_looked_for_before_min_tokens() -> None:
    script = says((0, [5, 6], None), (0, [5], None), (0, [7], None), (0, [8], LENGTH))
    whole, _ = await both(Router(), script, stop=" 5", min_tokens=2)
    assert (whole["choices"][0]["text"], whole["usage"]["completion_tokens"]) == (" 5 6", 3)


async def test_a_match_in_the_cores_last_tokens_wins_and_is_not_told_to_it() -> None:
    router = Router()
    whole, _ = await both(router, says((0, [5, 6, 7], LENGTH)), stop="6")
    assert (whole["choices"][0]["text"], whole["choices"][0]["finish_reason"]) == (" 5 ", "stop")
    assert router.core.stops == []


async def test_a_stopped_choice_leaves_the_others_running() -> None:
    router = Router()
    script = says((0, [6], None), (1, [5], None), (0, [7], None), (1, [8], LENGTH))
    whole, _ = await both(router, script, n=2, stop="6")
    assert [(choice["text"], choice["finish_reason"]) for choice in whole["choices"]] == [
        (" ", "stop"),
        (" 5 8", "length"),
    ]
    assert router.core.stops == [Stop(1, 0), Stop(2, 0)]


async def test_tokens_that_come_after_the_match_are_dropped() -> None:
    router = Router()
    call = Call(router.app, body(n=2, stop="6"))
    await turns()
    router.core.tokens(1, 6)
    await turns()
    assert router.core.stops == [Stop(1, 0)]
    router.core.edge.on_output(edge.TokensReady(1, (7,), 0, LENGTH))  # on its way when we said stop
    router.core.tokens(1, 8, choice=1, finish=LENGTH)
    await call.task
    assert [choice["text"] for choice in assembled(events(call.body))] == [" ", " 8"]


async def test_the_last_chunk_waits_for_the_ending_and_carries_the_statistics() -> None:
    router = Router()
    router.core.script = says((0, [5], None), (0, [6], None), (0, [7], LENGTH))
    chunks = events((await router.complete(stream=True, stop=" 6")).content)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop" and chunks[-1]["triptych"]["decode_worker"] == "d1"


async def test_a_client_that_leaves_while_its_last_stop_is_on_its_way_cancels() -> None:
    router = Router()
    router.core.over = lambda *ignored: None  # type: ignore[method-assign]  # the core is slow to hear of it
    call = Call(router.app, body(stop="6"))
    await turns()
    router.core.tokens(1, 6)
    await turns()
    assert router.core.stops == [Stop(1, 0)] and call.body == b""  # its last chunk carries what only the ending knows
    call.disconnect()
    await call.task
    await turns()
    assert len(router.core.cancels) == 1 and router.edge.in_flight == 0


@settings(max_examples=30)
@given(
    cuts=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=5),
    stops=st.lists(st.text(alphabet=" 123", min_size=1, max_size=5), min_size=1, max_size=3),
    include=st.booleans(),
    min_tokens=st.integers(0, 3),
)
async def test_any_tokens_cut_anyhow_stop_at_the_same_place(
    cuts: list[list[int]], stops: list[str], include: bool, min_tokens: int
) -> None:
    router = Router()
    fields = {"stop": stops, "include_stop_str_in_output": include, "min_tokens": min_tokens, "max_tokens": 20}
    whole, _ = await both(router, says(*((0, ids, None) for ids in cuts), (0, [], LENGTH)), **fields)
    tokens = [token for ids in cuts for token in ids]
    again, _ = await both(Router(), says((0, tokens, LENGTH)), **fields)
    assert whole["choices"] == again["choices"] and whole["usage"] == again["usage"]


# -- echo and log-probabilities ----------------------------------------------------------------------------------------
FIVE = score(-0.5, (5, -0.5), (9, -1.5))
SIX = score(-2.0, (9, -0.25), (6, -2.0))
SEVEN = score(-3.0, (9, -0.1), (8, -1.0))


def scores(
    *steps: tuple[Sequence[int], Sequence[TokenLogprobs]], prompt: Sequence[TokenLogprobs] = (), choices: int = 1
) -> Script:
    """The prompt's scores one by one, then tokens with theirs; the last step ends every choice."""

    def script(core: FakeCore, key: int) -> None:
        turns_ = [partial(core.scored, key, start, scored) for start, scored in enumerate(prompt, start=1)]
        for index, (ids, logprobs) in enumerate(steps):
            finish = LENGTH if index + 1 == len(steps) else None
            turns_ += [
                partial(core.tokens, key, *ids, choice=choice, finish=finish, logprobs=logprobs)
                for choice in range(choices)
            ]
        in_turns(turns_ or [partial(core.end, key, LENGTH)])

    return script


async def test_logprobs_are_four_parallel_lists() -> None:
    whole, chunks = await both(Router(), scores(([5], [FIVE]), ([6, 7], [SIX, SEVEN])), logprobs=1)
    assert whole["choices"][0]["logprobs"] == {
        "tokens": [" 5", " 6", " 7"],
        "token_logprobs": [-0.5, -2.0, -3.0],
        "top_logprobs": [{" 5": -0.5}, {" 9": -0.25, " 6": -2.0}, {" 9": -0.1, " 7": -3.0}],
        "text_offset": [0, 2, 4],
    }
    assert chunks[1]["choices"][0]["logprobs"]["text_offset"] == [2, 4]


async def test_no_alternatives_is_not_no_logprobs() -> None:
    whole, _ = await both(Router(), scores(([5], [score(float("-inf"))])), logprobs=0)
    logprobs = whole["choices"][0]["logprobs"]
    assert (logprobs["token_logprobs"], logprobs["top_logprobs"]) == ([-9999.0], [{" 5": -9999.0}])


async def test_tokens_can_be_named_by_their_ids() -> None:
    whole, _ = await both(Router(), scores(([6], [SIX])), logprobs=2, return_tokens_as_token_ids=True)
    logprobs = whole["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:6"]
    assert logprobs["top_logprobs"] == [{"token_id:9": -0.25, "token_id:6": -2.0}]


async def test_an_echoed_prompt_comes_first_in_every_choice_with_its_scores() -> None:
    script = scores(([6], [SIX]), ([7], [SEVEN]), prompt=[FIVE, SIX], choices=2)
    whole, chunks = await both(Router(), script, n=2, echo=True, logprobs=1, prompt=[8, 5, 6])
    for choice in whole["choices"]:
        assert choice["text"] == " 8 5 6 6 7"
        assert choice["logprobs"]["tokens"] == [" 8", " 5", " 6", " 6", " 7"]
        assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -2.0, -2.0, -3.0]
        assert choice["logprobs"]["top_logprobs"][:2] == [None, {" 5": -0.5}]
        assert choice["logprobs"]["text_offset"] == [0, 2, 4, 6, 8]
    assert [chunk["choices"][0]["text"] for chunk in chunks[:4]] == [" 8 5 6 6", " 8 5 6 6", " 7", " 7"]
    assert whole["usage"]["prompt_tokens"] == 3 and whole["usage"]["completion_tokens"] == 4


async def test_scoring_a_prompt_needs_no_output() -> None:
    script = scores(prompt=[FIVE, SIX])

    def then_end(core: FakeCore, key: int) -> None:
        script(core, key)
        in_turns([lambda: None] * 8 + [partial(core.end, key, LENGTH)])

    router = Router()
    whole, _ = await both(router, then_end, echo=True, logprobs=1, max_tokens=0, prompt=" 8 5 6")
    choice = whole["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (" 8 5 6", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -2.0]
    assert choice["logprobs"]["text_offset"] == [0, 2, 4]
    assert (whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"]) == (3, 0)
    sampling = router.core.submits[0].sampling
    assert (sampling.max_tokens, sampling.logprobs, sampling.prompt_logprobs) == (0, 1, 1)


async def test_an_echo_without_logprobs_is_text_only() -> None:
    whole, _ = await both(Router(), says((0, [7], LENGTH)), echo=True, prompt="\x07")
    assert (whole["choices"][0]["text"], whole["choices"][0]["logprobs"]) == ("\x07 7", None)


async def test_stop_strings_are_not_sought_in_an_echoed_prompt() -> None:
    whole, _ = await both(Router(), says((0, [7], None), (0, [5], LENGTH)), echo=True, prompt=[5], stop="5")
    assert whole["choices"][0]["text"] == " 5 7 "


async def test_logprobs_cover_the_tokens_up_to_the_match_though_their_text_is_cut() -> None:
    script = scores(([5], [FIVE]), ([6, 7], [SIX, SEVEN]), ([8], [FIVE]))
    whole, _ = await both(Router(), script, logprobs=0, stop="5 6")
    choice = whole["choices"][0]
    assert choice["text"] == " " and choice["logprobs"]["tokens"] == [" 5", " 6"]
    assert choice["logprobs"]["text_offset"] == [0, 2]


async def test_prompt_logprobs_are_vllms_list() -> None:
    router = Router()
    router.core.script = scores(([7], []), prompt=[FIVE, SIX])
    choice = (await router.complete(prompt_logprobs=1, prompt=[8, 5, 6])).json()["choices"][0]
    assert choice["logprobs"] is None and choice["text"] == " 7"
    assert choice["prompt_logprobs"] == [
        None,
        {"5": {"logprob": -0.5, "rank": 1, "decoded_token": " 5"}},
        {
            "6": {"logprob": -2.0, "rank": 2, "decoded_token": " 6"},
            "9": {"logprob": -0.25, "rank": 1, "decoded_token": " 9"},
        },
    ]


async def test_scores_that_were_read_before_the_ending_they_go_with_are_not_lost() -> None:
    router = Router()
    router.core.over = lambda *ignored: None  # type: ignore[method-assign]  # the core is slow to hear of a stop
    call = Call(router.app, body(stop="6", echo=True, logprobs=0, prompt=[8, 5]))
    await turns()
    router.core.scored(1, 1, FIVE)
    router.core.tokens(1, 6, logprobs=[SIX])
    await turns()
    assert call.sent == [] and router.core.stops == [Stop(1, 0)]
    router.core.end(1)
    await call.task
    (choice,) = assembled(events(call.body))
    assert (choice["text"], choice["logprobs"]["token_logprobs"]) == (" 8 5 ", [None, -0.5, -2.0])


async def test_token_ids_are_returned_on_request() -> None:
    whole, chunks = await both(Router(), says((0, [5], None), (0, [6, 999], STOP)), return_token_ids=True)
    assert whole["choices"][0]["token_ids"] == [5, 6, 999]
    assert whole["choices"][0]["prompt_token_ids"] == [1, 2, 3]
    assert ["prompt_token_ids" in chunk["choices"][0] for chunk in chunks[:-1]] == [True, False]


async def test_scores_alone_send_nothing_so_that_a_failure_keeps_its_status() -> None:
    router = Router()

    def script(core: FakeCore, key: int) -> None:
        in_turns([partial(core.scored, key, 1, FIVE, SIX), partial(core.end, key, Unavailable("gone"))])

    router.core.script = script
    assert (await router.complete(stream=True, echo=True, logprobs=1)).status_code == 503


# -- a real tokenizer --------------------------------------------------------------------------------------------------
@pytest.fixture
def byte_level(tmp_path: Path) -> Router:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return Router(vocabulary=TokenizerVocabulary.from_model_dir(tmp_path, CARD.vocab_size))


async def test_tokens_inside_a_code_point_share_its_offset_and_have_names_of_their_own(byte_level: Router) -> None:
    ids = byte_level.edge.vocabulary.encode("a😀b")
    whole, _ = await both(byte_level, scores(*(([id], [score(-1.0)]) for id in ids)), logprobs=0, max_tokens=16)
    choice = whole["choices"][0]
    assert choice["text"] == "a😀b"
    assert choice["logprobs"]["tokens"] == ["a", r"bytes:\xf0", r"bytes:\x9f", r"bytes:\x98", r"bytes:\x80", "b"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 1, 1, 2]


async def test_a_stop_string_inside_pieces_of_code_points(byte_level: Router) -> None:
    ids = byte_level.edge.vocabulary.encode("a😀😀b")
    whole, _ = await both(byte_level, says(*((0, [id], None) for id in ids), (0, [], LENGTH)), stop="😀b")
    assert whole["choices"][0]["text"] == "a😀"


@pytest.mark.parametrize(("skip", "text"), [(True, "hi"), (False, "<|im_start|>hi<|im_end|>")])
async def test_special_tokens_are_shown_on_request(byte_level: Router, skip: bool, text: str) -> None:
    tokenizer = byte_level_tokenizer()
    first, last = (tokenizer.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    ids = [first, *byte_level.edge.vocabulary.encode("hi"), last]
    whole, _ = await both(byte_level, says((0, ids, LENGTH)), skip_special_tokens=skip)
    assert whole["choices"][0]["text"] == text
