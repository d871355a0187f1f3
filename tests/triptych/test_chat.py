"""triptych.chat against a scripted server: in a pipe and on a terminal, with errors, and with a person's Ctrl-C."""

import io
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
import trustme

from control_plane.options import OptionError
from triptych.access import Certificates
from triptych.chat import Chat, ChatOptions, Screen, line_reader, read_message
from triptych.chat_server import Server

ROOT = Path(__file__).parents[2]
MODELS = {"data": [{"id": "first"}]}
USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
TRANSFER = {"codec": "raw", "kv_bytes_raw": 3 << 20, "kv_bytes_wire": 1 << 20, "attempts": 1}
TO_THE_MODEL = "/v1/chat/completions"


def delta(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


ANSWER = (delta("Hel"), delta("lo"), {"choices": [], "usage": USAGE, "triptych": TRANSFER}, "[DONE]")


class Events(httpx.SyncByteStream):
    def __init__(self, events: Sequence[object]) -> None:
        self._events = events
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        for event in self._events:
            if isinstance(event, BaseException):
                raise event
            data = event if isinstance(event, str) else json.dumps(event)
            yield f"data: {data}\n\n".encode()

    def close(self) -> None:
        self.closed = True


class Scripted(httpx.BaseTransport):
    """One answer after the other: events, or a whole response, or an exception to raise."""

    def __init__(self, *answers: Any) -> None:
        self._answers = iter(answers)
        self.asked: list[dict[str, Any]] = []
        self.streams: list[Events] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json=MODELS)
        assert request.url.path == TO_THE_MODEL
        self.asked.append(json.loads(request.read()))
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx.Response):
            return answer
        self.streams.append(Events(answer))
        return httpx.Response(200, stream=self.streams[-1])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Talk:
    """One session, its exit status and everything it printed."""

    def __init__(
        self, script: Scripted, lines: Sequence[str | type[BaseException]] = (), *, tty: bool = False, **options: Any
    ) -> None:
        out, errors, seconds = (Terminal() if tty else io.StringIO()), io.StringIO(), count()
        asked = ChatOptions(url="http://server", **options)
        screen = Screen(asked.timings, out=out, errors=errors)
        server = Server(asked.url, model=asked.model, transport=script, now_s=lambda: float(next(seconds)))
        with server:
            self.status = Chat(asked, server, screen, reading(lines)).run()
        self.out, self.errors = out.getvalue(), errors.getvalue()
        self.bodies = script.asked


def reading(lines: Sequence[str | type[BaseException]]) -> Callable[[], str | None]:
    left = iter(lines)

    def read() -> str | None:
        line = next(left, None)
        if isinstance(line, type):
            raise line
        return line

    return read


def refused(status: int, message: str, **headers: str) -> httpx.Response:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, json={"error": {"message": message}}, headers=given)


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "40")


# -- talking -----------------------------------------------------------------------------------------------------------
def test_one_question_is_answered_and_that_is_all() -> None:
    talk = Talk(Scripted(ANSWER), prompt="hi", system="be short", max_tokens=7, temperature=0.5)
    assert (talk.status, talk.out, talk.errors) == (0, "Hello\n", "")
    assert talk.bodies == [
        {
            "model": "first",
            "messages": [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}],
            "max_completion_tokens": 7,
            "temperature": 0.5,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_a_conversation_is_remembered_until_it_is_reset() -> None:
    talk = Talk(
        Scripted(ANSWER, ANSWER, ANSWER), ["one", "two", "/reset", "/system  be kind ", "three", "/exit", "four"]
    )
    assert (talk.status, talk.out) == (0, "Hello\n" * 3)
    sent = [[(message["role"], message["content"]) for message in body["messages"]] for body in talk.bodies]
    assert sent == [
        [("user", "one")],
        [("user", "one"), ("assistant", "Hello"), ("user", "two")],
        [("system", "be kind"), ("user", "three")],
    ]


def test_an_argument_that_is_no_utf8_is_sent_as_it_is() -> None:
    assert Talk(Scripted(ANSWER), prompt="a\udcff").bodies[0]["messages"][0]["content"] == "a\udcff"


def test_what_is_no_command_is_said_to_the_model_and_what_is_empty_is_not() -> None:
    talk = Talk(Scripted(ANSWER), ["", "  ", "/usr/bin: what is it?"])
    assert [body["messages"][0]["content"] for body in talk.bodies] == ["/usr/bin: what is it?"]


def test_a_backslash_continues_a_line() -> None:
    lines = reading(["one\\", "two\\", "", "three\\"])
    assert [read_message(lines) for _ in range(3)] == ["one\ntwo\n", "three", None]


def test_a_pipe_is_read_line_by_line() -> None:
    read = line_reader(io.StringIO("one\n\nlast"))
    assert [read() for _ in range(4)] == ["one", "", "last", None]


# -- the screen --------------------------------------------------------------------------------------------------------
def test_a_terminal_shows_what_an_answer_cost() -> None:
    talk = Talk(Scripted(ANSWER), ["hi"], tty=True)
    assert "first token 1000 ms   2.0 tokens/s   12 in (4 cached), 3 out   KV raw 1.0 MiB of 3.0 MiB" in talk.out


def test_in_a_pipe_timings_are_beside_the_text_and_only_if_wanted() -> None:
    talk = Talk(Scripted(ANSWER), ["hi"], timings=True)
    assert talk.out == "Hello\n"
    assert "2.0 tokens/s" in talk.errors
    assert Talk(Scripted(ANSWER), ["hi"], tty=True, timings=False).out.endswith("Hello\n")


def test_an_answer_cannot_take_over_the_terminal() -> None:
    text = "a\x1b]0;title\x07\x9b2J\r\x00[red]b[/red]\tc\n"
    answer = (delta(text), "[DONE]")
    assert Talk(Scripted(answer), ["hi"], tty=True, timings=False).out.endswith("a�]0;title��2J��[red]b[/red]\tc\n")
    assert Talk(Scripted(answer), ["hi"]).out == text, "a pipe gets what the model said"


def test_a_server_that_says_neither_usage_nor_bytes_is_fine() -> None:
    talk = Talk(Scripted((delta("Hi"), "[DONE]")), ["hi"], tty=True)
    assert "0 in (0 cached), 0 out" in talk.out
    assert "KV" not in talk.out


# -- errors ------------------------------------------------------------------------------------------------------------
def test_a_refusal_is_one_line_and_the_conversation_goes_on_without_it() -> None:
    talk = Talk(Scripted(refused(429, "too many\nrequests", retry_after="3"), ANSWER), ["one", "two"])
    assert talk.errors == "429: too many requests (retry after 3 s)\n"
    assert (talk.status, talk.out) == (1, "Hello\n")
    assert talk.bodies[1]["messages"] == [{"role": "user", "content": "two"}]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (httpx.Response(502, text="<html>"), "502: Bad Gateway"),
        ((delta("He"), {"error": {"message": "no worker"}}, "[DONE]"), "no worker"),
        ((delta("He"),), "the answer was cut off"),
        ((delta("He"), httpx.ReadError("broken")), "the connection was lost"),
        ((delta("He"), httpx.ReadTimeout("broken")), "nothing for too long"),
        (("nonsense",), "does not speak"),
        (("[1]",), "does not speak"),
    ],
)
def test_trouble_on_the_way_is_one_line(answer: Any, words: str) -> None:
    talk = Talk(Scripted(answer), prompt="hi")
    assert talk.status == 1
    assert words in talk.errors
    assert len(talk.errors.splitlines()) == 1


def test_what_was_seen_of_a_broken_answer_stays_in_the_conversation() -> None:
    talk = Talk(Scripted((delta("He"),), ANSWER), ["one", "two"])
    assert [message["content"] for message in talk.bodies[1]["messages"]] == ["one", "He", "two"]


def test_a_server_that_is_gone_ends_the_session() -> None:
    talk = Talk(Scripted(ANSWER, httpx.ConnectError("refused")), ["one", "two", "three"])
    assert (talk.status, len(talk.bodies)) == (1, 2)
    assert talk.errors == "http://server cannot be reached: refused\n"


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------
def test_ctrl_c_stops_an_answer_and_frees_it_at_the_server() -> None:
    script = Scripted((delta("He"), KeyboardInterrupt()), ANSWER)
    talk = Talk(script, ["one", "two"], tty=True)
    assert talk.status == 0
    assert script.streams[0].closed
    assert "stopped" in talk.out
    assert [message["content"] for message in talk.bodies[1]["messages"]] == ["one", "He", "two"]


def test_ctrl_c_while_nothing_is_answered_leaves() -> None:
    assert Talk(Scripted((delta("He"), KeyboardInterrupt())), ["one", KeyboardInterrupt], tty=True).status == 130


def test_ctrl_c_ends_a_single_question() -> None:
    talk = Talk(Scripted((delta("He"), KeyboardInterrupt())), prompt="hi")
    assert (talk.status, talk.out) == (130, "He\n")


# -- options, and the process ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"url": "host:1"}, "url"),
        ({"api_key": "é"}, "api-key"),
        ({"api_key": "one two"}, "api-key"),
        ({"max_tokens": 0}, "max-tokens"),
        ({"temperature": -0.1}, "temperature"),
    ],
)
def test_what_cannot_work_is_refused_by_its_flag(values: dict[str, Any], option: str) -> None:
    with pytest.raises(OptionError) as caught:
        ChatOptions(**values)
    assert caught.value.option == option


def test_a_key_is_in_no_representation() -> None:
    assert "secret" not in repr(ChatOptions(api_key="secret"))


def process(url: str, stdin: bytes) -> subprocess.CompletedProcess[bytes]:
    program = f"import sys; from triptych.chat import *; sys.exit(run(ChatOptions(url={url!r})))"
    environment = {**os.environ, "LC_ALL": "C", "NO_PROXY": "*"}
    return subprocess.run(
        [sys.executable, "-c", program], input=stdin, capture_output=True, env=environment, timeout=15, check=False
    )


@contextmanager
def listening(context: ssl.SSLContext | None = None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server over a real socket that always answers the same; its address, and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(json.dumps(MODELS).encode())

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self._send(b"".join(Events(ANSWER)))

        def _send(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *values: Any) -> None: ...

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request: Any, address: Any) -> None: ...

    with Quiet(("127.0.0.1", 0), Handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http{'s' if context else ''}://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def test_a_piped_session_is_plain_text_whatever_bytes_are_in_it() -> None:
    with listening() as (url, asked):
        ended = process(url, b"hi\xff\nand?")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"Hello\nHello\n", b"")
    said = [[message["content"] for message in body["messages"]] for body in asked]
    assert said == [["hi\N{REPLACEMENT CHARACTER}"], ["hi\N{REPLACEMENT CHARACTER}", "Hello", "and?"]]


# -- certificates ------------------------------------------------------------------------------------------------------
@pytest.fixture
def private_server(tmp_path: Path) -> Iterator[str]:
    """Of an authority that nobody knows (`ca.pem`), which wants a certificate from its clients too (`own.pem`)."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    own = authority.issue_cert("client@example.org")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    own.private_key_and_cert_chain_pem.write_to_path(tmp_path / "own.pem")
    own.private_key_pem.write_to_path(tmp_path / "own.key")
    own.cert_chain_pems[0].write_to_path(tmp_path / "own.crt")
    with listening(context) as (url, _):
        yield url


@pytest.mark.parametrize("own", ["--cert own.pem", "--cert own.crt --key own.key"])
@pytest.mark.parametrize(
    ("command", "shows"), [("chat hi", "Hello\n"), ("bench serve --num-prompts 1 --num-warmups 0", "completed")]
)
def test_a_server_with_a_private_authority_is_reached(
    command: str, shows: str, own: str, private_server: str, tmp_path: Path
) -> None:
    ended = triptych(f"{command} --url {private_server} --cacert ca.pem {own}", tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert shows in ended.stdout


@pytest.mark.parametrize("command", ["chat hi", "bench serve --num-prompts 1"])
def test_a_server_of_unknown_authority_is_not_believed(command: str, private_server: str, tmp_path: Path) -> None:
    ended = triptych(f"{command} --url {private_server} --cert own.pem", tmp_path)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "certificate verify failed" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("files", "option"),
    [
        ({"cacert": "none.pem"}, "cacert"),
        ({"key": "own.key"}, "cert"),
        ({"cacert": "own.key"}, "cacert"),
        ({"cert": "own.crt"}, "cert"),
    ],
)
@pytest.mark.usefixtures("private_server")
def test_what_is_no_certificate_is_refused_by_its_flag(files: dict[str, str], option: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        Certificates(**{name: tmp_path / file for name, file in files.items()}).context()
    assert caught.value.option == option


def triptych(arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_PROXY": "*", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "triptych", *arguments.split()],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
        timeout=15,
        check=False,
    )


def test_nobody_there_is_one_line_and_status_1() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        ended = process(f"http://127.0.0.1:{unused.getsockname()[1]}", b"hi\n")
    assert (ended.returncode, ended.stdout) == (1, b"")
    assert len(ended.stderr.splitlines()) == 1
    assert b"cannot be reached" in ended.stderr


def test_nobody_who_reads_any_more_is_no_traceback() -> None:
    program = """if True:
        import io, sys
        from tests.triptych.test_chat import ANSWER, Scripted, reading
        from triptych.chat import Chat, ChatOptions, Screen, Server
        with Server("http://server", transport=Scripted(ANSWER)) as server:
            sys.exit(Chat(ChatOptions(prompt="hi"), server, Screen(None), reading([])).run())
    """
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "wb") as nobody:
        ended = subprocess.run(
            [sys.executable, "-c", program], stdout=nobody, stderr=subprocess.PIPE, cwd=ROOT, timeout=15, check=False
        )
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, b"")
