"""Log lines of every process: JSON for machines, colours for people, one call site for both.

    log.info("request", extra={"request_id": ..., "status": ...})

    json     {"event":"request","level":"info","process":"router","request_id":"8f..","status":"stop","time":"..."}
    pretty   03:14:15.926 info     router  request   request_id=8f.. status=stop

Call sites use the standard library's `logging`, so that libraries' own lines come out alike; structlog only writes
them. What may be in a line is the call site's care: ids and figures, never a prompt, an output or a key.
"""

import logging
import sys
from collections.abc import Callable, MutableMapping
from typing import Any, TextIO

import msgspec
import structlog

from control_plane.options import LogFormat

EventDict = MutableMapping[str, Any]
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

    write: list[Any] = [structlog.processors.format_exc_info, _write_json] if as_json else [_for_people(colours)]
    stamp = structlog.processors.TimeStamper(fmt="iso" if as_json else "%H:%M:%S.%f", utc=as_json, key=_time_key(form))
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.add_log_level, structlog.stdlib.ExtraAdder(), name_process, stamp],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *write],
    )


def _time_key(form: LogFormat) -> str:
    return "time" if form is LogFormat.JSON else "timestamp"  # the name that the console writer puts first


def _for_people(colours: bool) -> Callable[[Any, str, EventDict], str]:
    """Tracebacks plain: the rich ones print local variables, and those hold prompts."""
    return structlog.dev.ConsoleRenderer(
        colors=colours, exception_formatter=structlog.dev.plain_traceback, sort_keys=False, pad_event_to=0
    )


def _write_json(_: Any, __: str, event: EventDict) -> str:
    """One line whatever is in it: JSON escapes line breaks, so nobody can forge the next line."""
    return msgspec.json.encode(dict(sorted(event.items())), enc_hook=str).decode()
