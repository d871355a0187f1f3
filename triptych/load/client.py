"""One request of the load: sends a body, notes when each chunk comes. Reads no text, keeps no text.

httpx carries the bytes; what is spared is everything around them (redirects, cookies, decoding, line iteration), which
would cost more than a small server spends on the same request.
"""

import asyncio
import math
import ssl
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import httpx
import msgspec

from engine.base.errors import FrameError
from triptych.dialect import Usage, error_message
from triptych.events import DONE, EventLines
from triptych.load.clock import Clock
from triptych.load.options import LoadOptions
from triptych.load.samples import Sample

ERROR_BYTES_MAX: Final = 64 << 10
ERROR_CHARACTERS_MAX: Final = 300  # that are shown

NULL: Final = msgspec.Raw(b"null")

MakeTransport = Callable[[], httpx.AsyncBaseTransport]


class _Chunk(msgspec.Struct):
    choices: list[msgspec.Raw] = []
    usage: Usage | None = None
    error: msgspec.Raw = NULL


_chunk = msgspec.json.Decoder(_Chunk)


class Connections:
    """A transport for each connection. httpcore's own pool looks at all of its connections for every request: with 256
    in flight that was 13 ms of CPU a request, and 0.6 ms like this."""

    def __init__(self, make: MakeTransport) -> None:
        self._make = make
        self._idle: list[httpx.AsyncBaseTransport] = []

    @asynccontextmanager
    async def one(self) -> AsyncIterator[httpx.AsyncBaseTransport]:
        """The one used last, for that is the likeliest to be open still. After trouble it is not used again."""
        transport = self._idle.pop() if self._idle else self._make()
        try:
            yield transport
        except BaseException:
            await transport.aclose()
            raise
        self._idle.append(transport)

    async def close(self) -> None:
        while self._idle:
            await self._idle.pop().aclose()


def http_transports(context: ssl.SSLContext) -> MakeTransport:
    """Straight to the server: a proxy is not what is measured."""
    one_each = httpx.Limits(max_connections=1, max_keepalive_connections=1)
    return lambda: httpx.AsyncHTTPTransport(verify=context, limits=one_each, trust_env=False)


class Client:
    def __init__(self, options: LoadOptions, connections: Connections, clock: Clock) -> None:
        self._url = httpx.URL(options.url.rstrip("/") + options.endpoint.path)
        self._headers = headers(options)
        self._timeout_s = options.timeout_s
        self._connections = connections
        self._clock = clock

    async def ask(self, body: bytes, due_s: float) -> Sample:
        """Whatever happens is in the sample, but for cancellation."""
        sample = Sample(due_s=due_s, sent_s=self._clock.now_s())
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(body, sample)
        except TimeoutError:
            sample.failure = "no whole answer in time"
        except httpx.TransportError as error:
            sample.failure, sample.text = "connection", str(error)
        except (FrameError, msgspec.MsgspecError):
            sample.failure = "not a stream of completions"
        sample.end_s = self._clock.now_s()
        return sample

    async def _exchange(self, body: bytes, sample: Sample) -> None:
        request = httpx.Request("POST", self._url, headers=self._headers, content=body)
        async with self._connections.one() as transport:
            response = await transport.handle_async_request(request)
            try:
                assert isinstance(response.stream, httpx.AsyncByteStream)
                sample.status = response.status_code
                if sample.status == httpx.codes.OK:
                    await self._read(response.stream, sample)
                else:
                    sample.failure = f"status {sample.status}"
                    sample.retry_after = "retry-after" in response.headers
                    sample.text = await _error_text(response.stream)
            finally:
                await response.aclose()

    async def _read(self, stream: AsyncIterable[bytes], sample: Sample) -> None:
        lines, sample.failure = EventLines(), "cut off"
        async for received in stream:
            now_s = self._clock.now_s()
            for data in lines.feed_untrusted(received):
                if data == DONE:
                    sample.failure = "" if sample.chunks_s else "no token"
                elif not _note(_chunk.decode(data), now_s, sample):
                    sample.failure, sample.text = "error in the stream", told(data)
                    return
        if not sample.failure and not sample.output_tokens:
            sample.output_tokens = len(sample.chunks_s)  # the server does not say; a token a chunk is likely


def _note(chunk: _Chunk, now_s: float, sample: Sample) -> bool:
    """False if the chunk is an error."""
    if chunk.choices:
        sample.chunks_s.append(now_s)
    if (usage := chunk.usage) is not None:
        sample.prompt_tokens = usage.prompt_tokens
        sample.output_tokens = usage.output_tokens
        sample.cached_tokens = usage.cached_tokens
    return chunk.error == NULL


async def _error_text(stream: AsyncIterable[bytes]) -> str:
    body = b""
    async for received in stream:
        if len(body) < ERROR_BYTES_MAX:
            body += received
    return told(body)


def told(body: bytes) -> str:
    """What the server says of an error; "": nothing that could be shown."""
    try:
        return error_message(body)[:ERROR_CHARACTERS_MAX]
    except msgspec.MsgspecError:
        return ""


def headers(options: LoadOptions) -> dict[str, str]:
    values = {"content-type": "application/json", "accept": "text/event-stream", "user-agent": "triptych-bench"}
    if options.api_key is not None:
        values["authorization"] = f"Bearer {options.api_key}"
    if options.slo_headers and options.slo.ttft_ms is not None:
        values["x-slo-ttft-ms"] = _whole_ms(options.slo.ttft_ms)
    if options.slo_headers and options.slo.tpot_ms is not None:
        values["x-slo-tpot-ms"] = _whole_ms(options.slo.tpot_ms)
    return values


def _whole_ms(ms: float) -> str:
    """Servers take whole ones from 1; what is kept at the next whole one is nearly kept, and the figures are exact."""
    return str(max(1, math.ceil(ms)))
