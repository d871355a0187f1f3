"""The other end of `triptych chat`: one client of one server's /v1/chat/completions, and what an answer cost.

Pieces of text come out as they come in. Whatever goes wrong on the way is a `ServerError`, one line for a person.
"""

import json
import ssl
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Self

import httpx
import msgspec

from engine.base import limits
from engine.base.errors import FrameError
from triptych.dialect import Error, Usage, error_message, first_model
from triptych.events import DONE, EventLines

PATH: Final = "/v1/chat/completions"
CONNECT_TIMEOUT_S: Final = 5.0
SILENCE_TIMEOUT_S: Final = limits.REQUEST_DEADLINE_MS_MAX / 1_000  # no answer takes longer, at our server at least
ERROR_BYTES_MAX: Final = 64 << 10


class ServerError(Exception):
    """An answer that is none: one line for a person."""


class Unreachable(ServerError):
    """There is nobody to talk to."""


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None


class _Transfer(msgspec.Struct):
    """Of our own servers' `triptych`."""

    codec: str = ""
    kv_bytes_raw: int = 0
    kv_bytes_wire: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Error | None = None
    triptych: _Transfer | None = None


@dataclass(slots=True)
class Receipt:
    """What an answer cost; filled in while it comes."""

    sent_s: float = 0.0
    first_s: float | None = None
    last_s: float = 0.0
    usage: Usage = field(default_factory=Usage)
    transfer: _Transfer | None = None

    def __str__(self) -> str:
        return "   ".join(self._parts())

    def _parts(self) -> Iterator[str]:
        if self.first_s is None:
            return
        yield f"first token {(self.first_s - self.sent_s) * 1e3:.0f} ms"
        tokens, seconds = self.usage.output_tokens, self.last_s - self.first_s
        if tokens > 1 and seconds > 0:
            yield f"{(tokens - 1) / seconds:.1f} tokens/s"
        yield f"{self.usage.prompt_tokens} in ({self.usage.cached_tokens} cached), {tokens} out"
        if self.transfer is not None and self.transfer.codec:
            wire, raw = self.transfer.kv_bytes_wire, self.transfer.kv_bytes_raw
            yield f"KV {self.transfer.codec} {_size(wire)} of {_size(raw)}"


class Server:
    """One client of one server."""

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        context: ssl.SSLContext | None = None,
        transport: httpx.BaseTransport | None = None,
        now_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        headers = {"content-type": "application/json"}
        if api_key is not None:
            headers["authorization"] = f"Bearer {api_key}"
        timeout = httpx.Timeout(SILENCE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        self._url = url.rstrip("/")
        self._client = httpx.Client(headers=headers, timeout=timeout, verify=context or True, transport=transport)
        self._now_s = now_s
        self._model = model  # None: the first that it lists

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @property
    def model(self) -> str:
        """Asked for once. Raises `Unreachable`: a server that does not say has nothing to talk with."""
        if self._model is None:
            try:
                with self._telling():
                    self._model = self._first_model()
            except ServerError as error:
                raise Unreachable(str(error)) from error
        return self._model

    def _first_model(self) -> str:
        response = self._client.get(f"{self._url}/v1/models")
        if response.status_code != httpx.codes.OK:
            raise _refused(response, response.content)
        model = first_model(response.content)
        if model is None:
            raise ServerError("the server has no model")
        return model

    def answer(self, body: dict[str, Any], receipt: Receipt) -> Generator[str, None, None]:
        """Pieces of text as they come. Raises `ServerError`. Closing it ends the answer at the server too."""
        content = json.dumps({"model": self.model, **body}).encode()  # ASCII: an argument may hold what is no UTF-8
        with self._telling():
            receipt.sent_s = self._now_s()
            with self._client.stream("POST", f"{self._url}{PATH}", content=content) as response:
                if response.status_code != httpx.codes.OK:
                    raise _refused(response, _beginning(response))
                yield from self._pieces(response, receipt)

    def _pieces(self, response: httpx.Response, receipt: Receipt) -> Iterator[str]:
        lines = EventLines()
        for received in response.iter_bytes():
            for data in lines.feed_untrusted(received):
                if data == DONE:
                    return
                yield from self._note(msgspec.json.decode(data, type=_Chunk), receipt)
        raise ServerError("the answer was cut off")

    def _note(self, chunk: _Chunk, receipt: Receipt) -> Iterator[str]:
        if chunk.error is not None:
            raise ServerError(chunk.error.message)
        receipt.usage = chunk.usage or receipt.usage
        receipt.transfer = chunk.triptych or receipt.transfer
        if chunk.choices:
            receipt.last_s = self._now_s()
            receipt.first_s = receipt.last_s if receipt.first_s is None else receipt.first_s
        for choice in chunk.choices:
            if choice.delta is not None and choice.delta.content:
                yield choice.delta.content

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Whatever goes wrong on the way becomes one line."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Unreachable(f"{self._url} cannot be reached: {error}") from error
        except httpx.TimeoutException as error:
            raise ServerError("the server has said nothing for too long") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerError(f"the connection was lost: {error}") from error
        except (msgspec.MsgspecError, FrameError) as error:
            raise ServerError("the server does not speak OpenAI's dialect") from error


def _beginning(response: httpx.Response) -> bytes:
    body = b""
    for received in response.iter_bytes():
        body += received
        if len(body) > ERROR_BYTES_MAX:
            break
    return body


def _refused(response: httpx.Response, body: bytes) -> ServerError:
    try:
        message = error_message(body)
    except msgspec.MsgspecError:
        message = ""
    message = message or response.reason_phrase
    retry_after = response.headers.get("retry-after")
    return ServerError(
        f"{response.status_code}: {message}" + (f" (retry after {retry_after} s)" if retry_after else "")
    )


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
