"""`triptych chat`: a conversation with any server that has /v1/chat/completions, in a terminal or in a pipe.

    you ----read_line----> Chat ----body----> Server ----events----> Chat ----pieces----> Screen
                             |  keeps the conversation            and after the last piece a Receipt: what it cost

Text of the model goes to the terminal without control characters: an answer must not move the cursor or set a title.
In a pipe it is passed on as it is. Errors are one line; whoever types Ctrl-C during an answer stops it (the connection
is closed, which frees it at the server), and leaves with a second one.
"""

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Final, TextIO

from rich.console import Console

from control_plane.options import OptionError, require_at_least
from engine.base import limits
from triptych.access import URL_DEFAULT, Certificates, require_key, require_url
from triptych.chat_server import Receipt, Server, ServerError, Unreachable
from triptych.statuses import BROKEN_PIPE, FAILED, INTERRUPTED

KEPT_CONTROLS: Final = "\n\t"
CONTROLS: Final = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(0x20), *range(0x7F, 0xA0))}
VISIBLE: Final = {code: mark for code, mark in CONTROLS.items() if chr(code) not in KEPT_CONTROLS}
HELP: Final = "/reset forgets the conversation, /system TEXT sets the system prompt, /exit leaves; \\ continues a line"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """Whom to talk to, and how."""

    url: str = URL_DEFAULT
    model: str | None = None  # None: the first of /v1/models
    api_key: str | None = field(default=None, repr=False)
    certificates: Certificates = field(default_factory=Certificates)
    system: str | None = None
    max_tokens: int | None = None  # None: the server's default
    temperature: float | None = None  # likewise
    prompt: str | None = None  # ask this, print the answer, end
    timings: bool | None = None  # a line after each answer; None: on a terminal

    def __post_init__(self) -> None:
        require_url(self.url)
        require_key(self.api_key)
        if self.max_tokens is not None:
            require_at_least("max-tokens", self.max_tokens, 1)
        if self.temperature is not None and not 0 <= self.temperature <= limits.TEMPERATURE_MAX:
            raise OptionError("temperature", f"must be from 0 to {limits.TEMPERATURE_MAX:g}, not {self.temperature}")


def run(options: ChatOptions) -> int:
    """The exit status. Reads standard input unless there is a prompt."""
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # odd bytes are no reason to end
    context = options.certificates.context()
    with Server(options.url, model=options.model, api_key=options.api_key, context=context) as server:
        return Chat(options, server, Screen(options.timings), line_reader(sys.stdin)).run()


# -- the conversation --------------------------------------------------------------------------------------------------
class Chat:
    """One person and one model, taking turns."""

    def __init__(
        self, options: ChatOptions, server: Server, screen: "Screen", read_line: Callable[[], str | None]
    ) -> None:
        self._options = options
        self._server = server
        self._screen = screen
        self._read_line = read_line
        self._system = options.system
        self._messages: list[dict[str, str]] = []

    def run(self) -> int:
        """Until the person has enough, or the server cannot be reached."""
        try:
            if self._options.prompt is not None:
                return self._turn(self._options.prompt)
            return self._turns()
        except Unreachable as error:
            self._screen.trouble(str(error))
            return FAILED
        except KeyboardInterrupt:
            self._screen.leave()
            return INTERRUPTED
        except BrokenPipeError:  # `triptych chat | head`: nobody reads any more
            return BROKEN_PIPE

    def _turns(self) -> int:
        status = 0
        self._screen.greet(self._server.model)
        while (text := read_message(self._read_line)) is not None:
            if text.strip() == "/exit":
                break
            if text.strip() and not self._obeys(text.strip()):
                status = max(status, self._turn(text))
        return 0 if self._screen.is_terminal else status

    def _obeys(self, text: str) -> bool:
        """Whether the text was a command. A command that there is not is text, like any other."""
        command, _, rest = text.partition(" ")
        match command:
            case "/reset":
                self._messages.clear()
            case "/system":
                self._system = rest.strip() or None
            case "/help":
                self._screen.remark(HELP)
            case _:
                return False
        return True

    def _turn(self, text: str) -> int:
        """One question and its answer. What failed leaves no trace in the conversation, what was seen does."""
        self._messages.append({"role": "user", "content": text})
        answer, receipt, status = "", Receipt(), 0
        try:
            with closing(self._server.answer(self._body(), receipt)) as pieces:
                for piece in pieces:
                    answer += piece
                    self._screen.piece(piece)
        except Unreachable:
            raise
        except ServerError as error:
            status = FAILED
            self._screen.end_answer(answer)
            self._screen.trouble(str(error))
        except KeyboardInterrupt:
            status = INTERRUPTED
            self._screen.end_answer(answer)
            self._screen.remark("stopped")
        else:
            self._screen.end_answer(answer)
            self._screen.receipt(receipt)
        self._remember(answer)
        return status

    def _remember(self, answer: str) -> None:
        if answer:
            self._messages.append({"role": "assistant", "content": answer})
        else:
            self._messages.pop()

    def _body(self) -> dict[str, Any]:
        options, system = self._options, self._system
        wanted = {"max_completion_tokens": options.max_tokens, "temperature": options.temperature}
        return {
            "messages": [*([{"role": "system", "content": system}] if system else []), *self._messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            **{name: value for name, value in wanted.items() if value is not None},
        }


def read_message(read_line: Callable[[], str | None]) -> str | None:
    """Lines are joined while they end in a backslash. None at the end."""
    line = read_line()
    lines = [line]
    while line is not None and line.endswith("\\"):
        lines[-1] = line[:-1]
        line = read_line()
        lines.append(line)
    whole = [line for line in lines if line is not None]
    return "\n".join(whole) if whole else None


def line_reader(stream: TextIO) -> Callable[[], str | None]:
    """From a terminal with editing and history; from anything else as the lines come."""
    if not stream.isatty():
        return lambda: line.removesuffix("\n") if (line := stream.readline()) else None
    import readline  # noqa: F401  # `input` uses it once it is there

    def ask() -> str | None:
        try:
            return input("> ")
        except EOFError:
            return None

    return ask


# -- the screen --------------------------------------------------------------------------------------------------------
class Screen:
    """The answer on standard output, everything else on standard error where standard output is no terminal."""

    def __init__(self, timings: bool | None, *, out: TextIO | None = None, errors: TextIO | None = None) -> None:
        self._out = Console(file=out, highlight=False)
        self.is_terminal = self._out.is_terminal
        self._aside = self._out if self.is_terminal else Console(file=errors, stderr=errors is None, highlight=False)
        self._timings = self.is_terminal if timings is None else timings

    def greet(self, model: str) -> None:
        if self.is_terminal:
            self.remark(f"{model}   {HELP}")

    def piece(self, text: str) -> None:
        """Past rich, which would wrap lines and expand tabs."""
        self._out.file.write(text.translate(VISIBLE) if self.is_terminal else text)
        self._out.file.flush()

    def end_answer(self, answer: str) -> None:
        if answer and not answer.endswith("\n"):
            self.piece("\n")

    def leave(self) -> None:
        """Whoever typed Ctrl-C is in the middle of a line."""
        if self.is_terminal:
            self.piece("\n")

    def receipt(self, receipt: Receipt) -> None:
        if self._timings:
            self.remark(str(receipt))

    def remark(self, text: str) -> None:
        self._aside.print(text.translate(VISIBLE), style="dim", markup=False, soft_wrap=True)

    def trouble(self, text: str) -> None:
        line = " ".join(text.translate(VISIBLE).split())
        self._aside.print(line, style="red", markup=False, soft_wrap=True)
