"""triptych.load: when it sends, what it sends, what it measures; against a scripted server on a clock of its own."""

import asyncio
import datetime
import json
import math
import signal
import socket
from array import array
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from statistics import fmean, pstdev
from typing import Any

import httpx
import pytest
from rich.console import Console

from control_plane.options import OptionError
from engine.base.errors import FrameError
from triptych.events import LINE_BYTES_MAX, EventLines
from triptych.load.arrivals import arrival_times_s
from triptych.load.client import headers
from triptych.load.command import run
from triptych.load.figures import Effort, figures
from triptych.load.measurement import Measured, ServerTrouble, measure
from triptych.load.options import Endpoint, LoadOptions, Slo, parse_slo
from triptych.load.prompts import bodies, prompts
from triptych.load.report import document, remarks, show
from triptych.load.samples import Distribution, Sample, Samples

URL = "http://server"
NO_EFFORT = Effort(cpu_s=0.0, in_flight_highest=0)


# -- options -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"url": "server:8000"}, "url"),
        ({"url": "http://"}, "url"),
        ({"url": "http://[::1"}, "url"),
        ({"url": "http://host:port"}, "url"),
        ({"url": "http://" + "a" * 64}, "url"),
        ({"url": "http://a b"}, "url"),
        ({"api_key": "a\nb"}, "api-key"),
        ({"api_key": "one two"}, "api-key"),
        ({"api_key": ""}, "api-key"),
        ({"requests": 0}, "num-prompts"),
        ({"rate": 0.0}, "request-rate"),
        ({"rate": math.nan}, "request-rate"),
        ({"burstiness": 0.0}, "burstiness"),
        ({"duration_s": 0.0}, "duration"),
        ({"concurrency": 0}, "max-concurrency"),
        ({"prefix_len": -1}, "random-prefix-len"),
        ({"slo_headers": True}, "slo-headers"),
        ({"slo_headers": True, "slo": Slo(e2el_ms=1.0)}, "slo-headers"),
        ({"out": Path("no-such-folder") / "file"}, "result-filename"),
        ({"range_ratio": 1.0}, "random-range-ratio"),
        ({"prompts": Path("no-such-file")}, "prompts"),
        ({"timeout_s": math.inf}, "timeout"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_what_cannot_work_is_refused_by_its_flag(values: dict[str, Any], option: str) -> None:
    with pytest.raises(OptionError) as caught:
        LoadOptions(**values)
    assert caught.value.option == option


@pytest.mark.parametrize("url", ["http://host", "https://host:1/prefix/", "http://[::1]:8000", "http://127.0.0.1:8000"])
def test_a_server_may_be_anywhere(url: str) -> None:
    assert LoadOptions(url=url).url == url


def test_an_slo_is_written_as_vllm_has_it() -> None:
    assert parse_slo(["ttft:300", "e2el:2000.5"]) == Slo(ttft_ms=300, e2el_ms=2000.5)
    assert not parse_slo([])
    for wrong in ("ttft", "ttft:", "itl:3", "ttft:-1", "ttft:nan"):
        with pytest.raises(OptionError):
            parse_slo([wrong])


def test_a_key_is_in_no_representation() -> None:
    assert "secret" not in repr(LoadOptions(api_key="secret"))


# -- arrivals ----------------------------------------------------------------------------------------------------------
def gaps(rate: float, burstiness: float, count: int = 20_000) -> list[float]:
    times = list(islice(arrival_times_s(rate, burstiness, seed=3), count))
    return [later - earlier for earlier, later in pairwise(times)]


def test_arrivals_are_of_their_seed() -> None:
    first, again, other = (list(islice(arrival_times_s(5.0, 1.0, seed), 50)) for seed in (1, 1, 2))
    assert first == again != other
    assert first[0] == 0.0
    assert first == sorted(first)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_burstiness_asked_for(burstiness: float) -> None:
    """Gamma: the mean is 1 / rate, the coefficient of variation 1 / sqrt(shape)."""
    drawn = gaps(50.0, burstiness)
    assert fmean(drawn) == pytest.approx(1 / 50.0, rel=0.05)
    assert pstdev(drawn) / fmean(drawn) == pytest.approx(burstiness**-0.5, rel=0.05)


def test_an_infinite_rate_is_everything_at_once() -> None:
    assert list(islice(arrival_times_s(math.inf, 1.0, 0), 3)) == [0.0, 0.0, 0.0]


# -- prompts -----------------------------------------------------------------------------------------------------------
def test_random_prompts_have_the_lengths_asked_for_and_one_prefix() -> None:
    """The prefix comes on top and does not vary, as in vLLM."""
    options = LoadOptions(input_len=100, prefix_len=20, output_len=10, range_ratio=0.5)
    drawn = list(islice(prompts(options), 300))
    lengths = {len(prompt.content) - 20 for prompt in drawn}
    assert (min(lengths), max(lengths)) == (50, 150)
    assert {prompt.max_tokens for prompt in drawn} == set(range(5, 16))
    assert len({tuple(prompt.content[:20]) for prompt in drawn}) == 1
    assert len({tuple(prompt.content[20:36]) for prompt in drawn}) == 300


def test_random_prompts_are_of_their_seed() -> None:
    first, again, other = (list(islice(prompts(LoadOptions(seed=seed)), 3)) for seed in (1, 1, 2))
    assert first == again != other


def test_a_body_asks_for_usage_and_for_nothing_that_was_not_wanted() -> None:
    body = json.loads(next(bodies(LoadOptions(input_len=4, output_len=2), "m")))
    assert body.keys() == {"model", "prompt", "max_tokens", "temperature", "stream", "stream_options"}
    assert len(body["prompt"]) == 4
    chat = LoadOptions(endpoint=Endpoint.CHAT, input_len=4, output_len=2, ignore_eos=True)
    body = json.loads(next(bodies(chat, "m")))
    assert len(body["messages"][0]["content"].split()) == 4
    assert (body["max_completion_tokens"], body["ignore_eos"]) == (2, True)


def test_prompts_of_a_file_go_round(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    drawn = islice(prompts(LoadOptions(prompts=file, output_len=7)), 3)
    assert [(prompt.content, prompt.max_tokens) for prompt in drawn] == [("one", 7), ("two", 7), ("one", 7)]


def test_a_line_of_json_may_say_how_long_its_answer_is(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": [1, 2], "max_tokens": 3}\n{"prompt": "hi"}\n')
    drawn = islice(prompts(LoadOptions(prompts=file, output_len=7)), 2)
    assert [(prompt.content, prompt.max_tokens) for prompt in drawn] == [([1, 2], 3), ("hi", 7)]


def test_a_chat_may_be_whole_messages(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    file.write_text(json.dumps({"messages": messages}))
    body = json.loads(next(bodies(LoadOptions(endpoint=Endpoint.CHAT, prompts=file), "m")))
    assert body["messages"] == messages


@pytest.mark.parametrize("line", ["[1]", "{", '{"prompt": 1}', '{"prompt": ""}', '{"messages": []}', "\ud800"])
def test_a_bad_line_is_named_before_anything_is_sent(line: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"prompt": "good"}\n' + line.encode("utf-8", "surrogatepass"))
    with pytest.raises(OptionError):
        bodies(LoadOptions(prompts=file), "m")


# -- events ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1_000])
def test_events_are_found_wherever_the_bytes_are_cut(size: int) -> None:
    stream = b': comment\n\ndata: {"a": 1}\n\nevent: x\ndata:{"b": "\xc3\xa9"}\r\n\r\ndata: [DONE]\n\ndata: not ended'
    lines = EventLines()
    received = (stream[start : start + size] for start in range(0, len(stream), size))
    assert [data for part in received for data in lines.feed_untrusted(part)] == [
        b'{"a": 1}',
        '{"b": "é"}'.encode(),
        b"[DONE]",
    ]


def test_a_line_without_end_is_not_collected_for_ever() -> None:
    lines = EventLines()
    lines.feed_untrusted(b"x" * LINE_BYTES_MAX)
    with pytest.raises(FrameError):
        lines.feed_untrusted(b"x")


# -- figures -----------------------------------------------------------------------------------------------------------
def completed(due_s: float, chunks_s: Sequence[float], *, tokens: int, sent_s: float | None = None) -> Sample:
    return Sample(
        due_s=due_s,
        sent_s=due_s if sent_s is None else sent_s,
        end_s=chunks_s[-1],
        status=200,
        chunks_s=array("d", chunks_s),
        prompt_tokens=10,
        cached_tokens=4,
        output_tokens=tokens,
    )


def test_figures_of_made_up_samples_are_exact() -> None:
    samples = Samples(Slo(ttft_ms=500, tpot_ms=100))
    samples.add(completed(0.0, [0.5, 0.6, 0.8], tokens=5))  # ttft 500, tpot 75: keeps both
    samples.add(completed(1.0, [2.0], tokens=1))  # ttft 1000, no second token: too late
    samples.add(completed(2.0, [2.1, 4.0], tokens=3, sent_s=2.05))  # tpot 950: too slow
    samples.add(Sample(due_s=3.0, sent_s=3.0, end_s=3.02, status=429, failure="status 429", retry_after=True))
    samples.add(Sample(due_s=3.0, sent_s=3.0, end_s=3.04, status=503, failure="status 503", text="no worker"))
    samples.add(Sample(due_s=3.0, sent_s=3.0, end_s=8.0, status=200, failure="cut off", chunks_s=array("d", [5.0])))
    values = figures(samples, Effort(cpu_s=0.7, in_flight_highest=3), has_slo=True)
    expected = {
        "duration": 8.0,
        "completed": 3,
        "failed": 1,
        "refused": 2,
        "refused_with_retry_after": 1,
        "total_input_tokens": 30,
        "total_cached_tokens": 12,
        "total_output_tokens": 9,
        "request_throughput": 3 / 8,
        "request_goodput": 1 / 8,
        "output_throughput": 9 / 8,
        "total_token_throughput": 39 / 8,
        "mean_ttft_ms": (500 + 1_000 + 100) / 3,
        "median_ttft_ms": 500.0,
        "p99_ttft_ms": 990.0,
        "mean_second_token_ms": (100 + 1_900) / 2,
        "mean_tpot_ms": (75 + 950) / 2,
        "mean_itl_ms": (100 + 200 + 1_900) / 3,
        "median_e2el_ms": 1_000.0,
        "median_refusal_ms": 30.0,
        "mean_lag_ms": 50 / 6,
        "max_lag_ms": 50.0,
        "max_concurrent_requests": 3,
        "client_cpu_share": 0.7 / 8,
        "client_cpu_us_per_chunk": 1e5,
    }
    assert values["failed_by_reason"] == {"cut off": 1}
    assert values["refused_by_status"] == {"429": 1, "503": 1}
    assert values["messages"] == {"503": "no worker"}
    assert {name: values[name] for name in expected} == pytest.approx(expected)


def test_without_an_slo_there_is_no_goodput_and_without_answers_no_latency() -> None:
    values = figures(Samples(Slo()), NO_EFFORT, has_slo=False)
    assert (values["request_goodput"], values["mean_ttft_ms"], values["request_throughput"]) == (None, None, None)


def test_a_distribution_is_bounded_and_fair() -> None:
    values = Distribution(Random(1), values_max=1_000)
    for number in range(50_000):
        values.add(float(number))
    assert (len(values.values), values.count, values.sum) == (1_000, 50_000, sum(range(50_000)))
    assert fmean(values.values) == pytest.approx(25_000, rel=0.05)


# -- a server that keeps to a script, on a clock of its own ------------------------------------------------------------
class VirtualLoop(asyncio.SelectorEventLoop):
    """Nobody waits for time: when nothing else is to be done it is the next timer's."""

    def __init__(self) -> None:
        self._virtual_s = 100.0
        super().__init__()

    def time(self) -> float:
        return self._virtual_s

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._virtual_s = max(self._virtual_s, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


class VirtualClock:
    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep_until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - self.now_s()))


def token(text: str = "a") -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text}], "usage": None}


USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 3, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 1}},
}
DONE = "[DONE]"


@dataclass
class Script(httpx.AsyncBaseTransport, httpx.AsyncByteStream):
    """Answers after `(delay, event)` after `(delay, event)`; a refusal has a status and no events."""

    events: Sequence[tuple[float, dict[str, Any] | str]] = ()
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    requests: list[httpx.Request] = field(default_factory=list)
    running: int = 0
    running_highest: int = 0
    opened: int = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if request.url.path == "/v1/models":
            return httpx.Response(200, stream=httpx.ByteStream(b'{"data": [{"id": "first"}, {"id": "second"}]}'))
        return httpx.Response(self.status, headers=self.headers, stream=self)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.running += 1
        self.running_highest = max(self.running_highest, self.running)
        try:
            for delay_s, event in self.events:
                await asyncio.sleep(delay_s)
                data = event if isinstance(event, str) else json.dumps(event)
                yield f"data: {data}\n\n".encode()
            if self.status != 200:
                yield b'{"error": {"message": "come back later"}}'
        finally:
            self.running -= 1

    def open(self) -> httpx.AsyncBaseTransport:
        self.opened += 1
        return self


ANSWER: Sequence[tuple[float, dict[str, Any] | str]] = (
    (1.0, token()),
    (0.5, token()),
    (0.25, token()),
    (0.0, USAGE),
    (0.0, DONE),
)
OPTIONS = LoadOptions(url=URL, model="m", requests=1, warmup=0, input_len=4, output_len=4)


def measured(script: Script, options: LoadOptions) -> Measured:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(measure(options, clock=VirtualClock(), transports=script.open))


def values_of(script: Script, options: LoadOptions) -> dict[str, Any]:
    return measured(script, options).values


def test_one_answer_is_timed_to_the_chunk() -> None:
    values = values_of(Script(ANSWER), OPTIONS)
    expected = {
        "completed": 1,
        "total_input_tokens": 3,
        "total_cached_tokens": 1,
        "total_output_tokens": 4,
        "mean_ttft_ms": 1_000.0,
        "mean_second_token_ms": 500.0,
        "mean_itl_ms": 375.0,
        "mean_tpot_ms": 250.0,
        "mean_e2el_ms": 1_750.0,
        "mean_lag_ms": 0.0,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)


def test_tokens_are_counted_by_chunks_where_the_server_does_not_say() -> None:
    without_usage = [event for event in ANSWER if event[1] is not USAGE]
    assert values_of(Script(without_usage), OPTIONS)["total_output_tokens"] == 3


def test_a_chunk_without_choices_is_no_first_token() -> None:
    values = values_of(Script([(0.5, {"choices": []}), *ANSWER]), OPTIONS)
    assert values["mean_ttft_ms"] == pytest.approx(1_500.0)


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        (ANSWER[:3], "cut off"),
        ([(0.0, DONE)], "no token"),
        ([(0.0, token()), (0.0, {"error": {"message": "broken"}}), (0.0, DONE)], "error in the stream"),
        ([(0.0, "nonsense")], "not a stream of completions"),
        ([(0.0, '{"choices": 3}')], "not a stream of completions"),
        ([(100.0, token())], "no whole answer in time"),
    ],
)
def test_an_answer_that_is_not_whole_is_a_failure(
    events: Sequence[tuple[float, dict[str, Any] | str]], reason: str
) -> None:
    values = values_of(Script(events), replace(OPTIONS, timeout_s=50.0))
    assert values["failed_by_reason"] == {reason: 1}
    assert values["completed"] == 0


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("headers", [{}, {"retry-after": "1"}])
def test_a_refusal_is_no_failure(status: int, headers: dict[str, str]) -> None:
    values = values_of(Script(status=status, headers=headers), replace(OPTIONS, requests=3))
    assert (values["refused"], values["failed"], values["completed"]) == (3, 0, 0)
    assert values["refused_by_status"] == {str(status): 3}
    assert values["refused_with_retry_after"] == 3 * len(headers)
    assert values["messages"] == {str(status): "come back later"}


def test_another_status_is_a_failure() -> None:
    assert values_of(Script(status=400), OPTIONS)["failed_by_reason"] == {"status 400": 1}


def test_an_open_loop_does_not_wait_for_answers() -> None:
    script = Script(ANSWER)
    values_of(script, replace(OPTIONS, requests=100, rate=100.0))
    assert script.running_highest > 80


def test_a_closed_loop_has_so_many_in_flight_and_no_more() -> None:
    script = Script(ANSWER)
    values = values_of(script, replace(OPTIONS, requests=20, concurrency=4))
    assert script.running_highest == values["max_concurrent_requests"] == 4
    assert values["duration"] == pytest.approx(20 / 4 * 1.75)
    assert values["mean_ttft_ms"] == pytest.approx(1_000.0), "time before there was room is nobody's waiting"
    assert script.opened == 4, "a connection is used again"


@pytest.mark.parametrize("load", [{"rate": 10.0, "burstiness": 1e6}, {"concurrency": 7}])
def test_after_the_duration_nothing_is_sent_and_what_was_is_waited_for(load: dict[str, Any]) -> None:
    values = values_of(Script(ANSWER), replace(OPTIONS, requests=1_000, duration_s=3.45, **load))
    assert values["completed"] == (35 if "rate" in load else 14)
    assert values["failed"] == 0


def test_a_sender_that_is_held_up_counts_from_when_it_should_have_sent() -> None:
    """Two at a time of 1.75 s each cannot be 10 a second: the last is sent 7 s and more after it was due."""
    values = values_of(Script(ANSWER), replace(OPTIONS, requests=10, rate=10.0, concurrency=2))
    assert values["max_lag_ms"] > 5_000
    assert values["mean_ttft_ms"] == pytest.approx(1_000 + values["mean_lag_ms"])
    assert any("the generator was late" in remark for remark in remarks(values))


def test_the_first_model_is_asked_for_and_warm_up_is_in_no_figure() -> None:
    script = Script(ANSWER)
    result = measured(script, replace(OPTIONS, model=None, warmup=3, api_key="k"))
    assert (result.model, result.values["completed"], len(script.requests)) == ("first", 1, 1 + 3 + 1)
    assert {request.headers["authorization"] for request in script.requests} == {"Bearer k"}
    sent = [json.loads(request.content)["prompt"] for request in script.requests[1:]]
    assert sent[-1] not in sent[:-1], "the load's prompt is in the server's cache already"


def test_the_server_is_told_of_the_slo_if_that_is_wanted() -> None:
    for wanted in (False, True):
        script = Script(ANSWER)
        values_of(script, replace(OPTIONS, slo=Slo(ttft_ms=300), slo_headers=wanted))
        assert script.requests[0].headers.get("x-slo-ttft-ms") == ("300" if wanted else None)
        assert "x-slo-tpot-ms" not in script.requests[0].headers


@pytest.mark.parametrize(("ms", "said"), [(0.2, "1"), (1.0, "1"), (299.4, "300"), (300.0, "300")])
def test_the_server_is_told_whole_milliseconds_and_never_none(ms: float, said: str) -> None:
    told = headers(LoadOptions(slo=Slo(ttft_ms=ms, tpot_ms=ms), slo_headers=True))
    assert (told["x-slo-ttft-ms"], told["x-slo-tpot-ms"]) == (said, said)


def test_a_server_that_does_not_say_its_models_is_quoted() -> None:
    class Locked(Script):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            return httpx.Response(401, stream=httpx.ByteStream(b'{"error": {"message": "a key is needed"}}'))

    with pytest.raises(ServerTrouble, match=r"/v1/models: status 401: a key is needed$"):
        measured(Locked(), replace(OPTIONS, model=None))


def test_trouble_in_the_warm_up_is_told_in_one_line() -> None:
    with pytest.raises(ServerTrouble, match="status 400: come back later"):
        measured(Script(status=400), replace(OPTIONS, warmup=1))


def test_an_interrupted_run_shows_what_there_is() -> None:
    script = Script([(0.0, token()), (10.0, DONE)])

    async def interrupted() -> Measured:
        work = asyncio.create_task(
            measure(replace(OPTIONS, requests=10, concurrency=1), clock=VirtualClock(), transports=script.open)
        )
        await asyncio.sleep(35.0)
        signal.raise_signal(signal.SIGINT)
        for _ in range(5):  # the loop looks for signals while there is something else to do: time stands still
            await asyncio.sleep(0.0)
        return await work

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        result = runner.run(interrupted())
    assert result.interrupted
    assert result.values["completed"] == 3
    assert script.running == 0, "a request goes on although nobody waits for it"


# -- the report --------------------------------------------------------------------------------------------------------
def test_the_report_has_everything_a_person_must_know(capsys: pytest.CaptureFixture[str]) -> None:
    samples = Samples(Slo(ttft_ms=500))
    samples.add(completed(0.0, [0.5, 0.6], tokens=2))
    samples.add(Sample(due_s=0.0, sent_s=0.0, end_s=0.1, status=429, failure="status 429"))
    samples.add(Sample(due_s=0.0, sent_s=0.0, end_s=0.1, failure="connection", text="[red]refused"))
    show(figures(samples, NO_EFFORT, has_slo=True), Console(width=100))
    text = capsys.readouterr().out
    for words in (
        "good requests/s",
        "time to first token",
        "1 x 429; 1 without Retry-After",
        "connection: [red]refused",
    ):
        assert words in text


def test_the_document_has_vllms_keys_and_is_json() -> None:
    values = figures(Samples(Slo()), NO_EFFORT, has_slo=False)
    written = json.loads(json.dumps(document(OPTIONS, "m", values, datetime.datetime(2025, 1, 2, 3, 4, 5))))
    latencies = {
        f"{figure}_{name}_ms" for figure in ("mean", "median", "p99") for name in ("ttft", "tpot", "itl", "e2el")
    }
    others = {
        "completed",
        "failed",
        "request_throughput",
        "request_goodput",
        "output_throughput",
        "total_token_throughput",
    }
    assert latencies | others | {"duration", "num_prompts", "model_id"} <= written.keys()
    assert (written["date"], written["request_rate"]) == ("20250102-030405", "inf")


def test_the_document_counts_the_prompts_that_were_sent() -> None:
    values = values_of(Script(ANSWER), replace(OPTIONS, requests=1_000, concurrency=1, duration_s=10.0))
    assert document(OPTIONS, "m", values, datetime.datetime(2025, 1, 2))["num_prompts"] == values["completed"] == 6


# -- the command -------------------------------------------------------------------------------------------------------
def test_nobody_there_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert run(LoadOptions(url=url, requests=1)) == 1
    out, errors = capsys.readouterr()
    assert (out, len(errors.splitlines())) == ("", 1)
    assert errors.startswith(f"{url} cannot be reached")


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        run(LoadOptions(url="http://127.0.0.1:9", out=tmp_path))
    assert caught.value.option == "result-filename"
