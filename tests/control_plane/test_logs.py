"""One call site, two ways to write: each line whole, named, and nobody's to forge."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from control_plane.logs import configure_logging
from control_plane.options import LogFormat

log = logging.getLogger("triptych.test")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """The root logger is the process's: what a test does to it is undone."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_has_a_field_for_each_thing(stream: io.StringIO) -> None:
    configure_logging("router", "info", LogFormat.JSON, stream=stream)
    log.info("request", extra={"request_id": "ab", "attempts": 2, "transfer_id": None})
    line = json.loads(stream.getvalue())
    assert line.pop("time").endswith("Z")
    assert line == {
        "event": "request",
        "level": "info",
        "process": "router",
        "request_id": "ab",
        "attempts": 2,
        "transfer_id": None,
    }


def test_pretty_reads_in_one_line(stream: io.StringIO) -> None:
    configure_logging("prefill-0", "info", LogFormat.PRETTY, stream=stream)
    log.warning("drain timed out after_s=%.1f", 2.0, extra={"in_flight": 3})
    (line,) = stream.getvalue().splitlines()
    assert line.endswith("[warning  ] drain timed out after_s=2.0 process=prefill-0 in_flight=3")


@pytest.mark.parametrize("form", [LogFormat.JSON, LogFormat.PRETTY])
def test_nobody_forges_a_line(stream: io.StringIO, form: LogFormat) -> None:
    configure_logging("router", "info", form, stream=stream)
    log.info("request", extra={"label": 'a\n{"event":"forged"}\x1b[31m'})
    assert len(stream.getvalue().splitlines()) == 1
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("form", [LogFormat.JSON, LogFormat.PRETTY])
def test_a_traceback_holds_no_values(stream: io.StringIO, form: LogFormat) -> None:
    configure_logging("router", "info", form, stream=stream)
    prompt = "a secret of the client's"
    try:
        try:
            int(prompt)
        except ValueError as cause:
            raise RuntimeError(f"bug: {prompt}") from cause
    except RuntimeError as error:
        log.error("bug in the edge", exc_info=error)
    text = stream.getvalue()
    assert "RuntimeError" in text and "ValueError" in text and "test_logs.py" in text
    assert "secret" not in text


def test_a_worker_says_what_went_wrong(stream: io.StringIO) -> None:
    configure_logging("decode-0", "info", LogFormat.JSON, stream=stream)
    try:
        raise MemoryError("no room for 12 MiB")
    except MemoryError as error:
        log.error("the engine thread ends", exc_info=error)
    assert json.loads(stream.getvalue())["exception"].endswith("MemoryError: no room for 12 MiB")


def test_where_nobody_looks_it_is_json(stream: io.StringIO) -> None:
    configure_logging("router", "info", stream=stream)
    log.info("up")
    assert json.loads(stream.getvalue())["event"] == "up"


def test_levels_and_chatty_libraries(stream: io.StringIO) -> None:
    configure_logging("router", "warning", LogFormat.JSON, stream=stream)
    log.info("not now")
    logging.getLogger("httpx").info("HTTP Request: GET ...")
    assert stream.getvalue() == ""
