"""Log lines of every process: JSON for machines, colours for people, one call site for both.

    log.info("request", extra={"request_id": ..., "status": ...})

    json     {"event":"request","level":"info","process":"router","request_id":"8f..","status":"stop","time":"..."}
    pretty   03:14:15.926 info     router  request   request_id=8f.. status=stop

Call sites use the standard library's `logging`, so that libraries' own lines come out alike; structlog only writes
them. What may be in a line is the call site's care: ids and figures, never a prompt, an output or a key.
"""

import logging
import sys
import traceback
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, TextIO

import msgspec
import structlog

from control_plane.options import LogFormat

EventDict = MutableMapping[str, Any]
READS_CLIENTS = ("router",)  # processes whose exceptions may quote what a client sent
CHATTY = ("httpx", "httpcore", "uvicorn", "asyncio", "_cygrpc")  # a line per probe says nothing


def configure_logging(
    process: str, level: str, form: LogFormat = LogFormat.AUTO, *, stream: TextIO | None = None
) -> None:
    """All logging of this process to `stream` (standard error). `process`: its name on each line, because a launcher
    mixes them."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_formatter(process, _resolved(form, stream), colours=stream.isatty()))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _resolved(form: LogFormat, stream: TextIO) -> LogFormat:
    if form is not LogFormat.AUTO:
        return form
    return LogFormat.PRETTY if stream.isatty() else LogFormat.JSON


def _formatter(process: str, form: LogFormat, *, colours: bool) -> logging.Formatter:
    as_json = form is LogFormat.JSON

    def name_process(_: Any, __: str, event: EventDict) -> EventDict:
        return {"process": process, **event}

    where = _Where(messages=process not in READS_CLIENTS)
    write: list[Any] = [where.as_field, _write_json] if as_json else [_for_people(colours, where)]
    stamp = structlog.processors.TimeStamper(fmt="iso" if as_json else "%H:%M:%S.%f", utc=as_json, key=_time_key(form))
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.add_log_level, structlog.stdlib.ExtraAdder(), name_process, stamp],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *write],
    )


def _time_key(form: LogFormat) -> str:
    return "time" if form is LogFormat.JSON else "timestamp"  # the name that the console writer puts first


def _for_people(colours: bool, where: "_Where") -> Callable[[Any, str, EventDict], str]:
    def write_error(stream: TextIO, raised: Any) -> None:
        stream.write("\n" + where.text(raised))

    return structlog.dev.ConsoleRenderer(
        colors=colours, exception_formatter=write_error, sort_keys=False, pad_event_to=0
    )


@dataclass(frozen=True, slots=True)
class _Where:
    """How exceptions are written: their stacks without any variable, those that they came from first.

    `messages`: and what they say of themselves. In a process that reads what clients write an exception may quote it
    ("invalid literal: ..."); elsewhere the message is what an operator needs.
    """

    messages: bool

    def as_field(self, _: Any, __: str, event: EventDict) -> EventDict:
        raised = event.pop("exc_info", None)
        return {**event, "exception": self.text(raised)} if raised else event

    def text(self, raised: Any) -> str:
        _, error, _ = raised
        texts: list[str] = []
        while error is not None:
            stack = "".join(traceback.format_tb(error.__traceback__))
            said = f": {error}" if self.messages else ""
            texts.insert(0, f"Traceback (most recent call last):\n{stack}{type(error).__qualname__}{said}")
            error = error.__cause__ or error.__context__
        return "\n\n".join(texts)


def _write_json(_: Any, __: str, event: EventDict) -> str:
    """One line whatever is in it: JSON escapes line breaks, so nobody can forge the next line."""
    return msgspec.json.encode(dict(sorted(event.items())), enc_hook=str).decode()
