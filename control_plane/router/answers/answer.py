"""The bytes of one answer, streamed or whole, from what the edge has to say about its requests.

    streamed   one event per delta; what became readable together is sent together. The last event carries `triptych`.
    whole      every choice's deltas joined, choices in order

A streamed token of a plain request costs one JSON string between two constant pieces. Everything else (log-
probabilities, token ids, echoed prompts, endings) is a dict like that of a whole answer, so that both say the same.

Response headers wait for the first delta, so that a request which fails before it gets its true status.

What does not belong here: what a completion and a chat look like (`completion_format`, `chat_format`).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import msgspec
from starlette.types import Send

from control_plane.router.answers.choice import Delta, joined
from control_plane.router.answers.request_stream import News, RequestStream
from control_plane.router.answers.several_prompts import PromptStreams
from control_plane.router.answers.slo import told_to_client
from control_plane.router.http.responses import (
    encode_json,
    error_body,
    event,
    last,
    part,
    send_error,
    send_whole,
    start,
)
from control_plane.router.requests import Ended, PromptScored

Fields = Mapping[str, Any]


class Format(Protocol):
    """What differs between a completion and a chat: names, and how a choice's text is wrapped."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    before_text: bytes  # of a chunk's choice that is nothing but text, after its index
    after_text: bytes
    plain: bool  # nothing but text until the end

    def scored(self, pieces: Sequence[PromptScored]) -> None:
        """All pieces of a prompt come before its first delta."""

    def opening(self) -> Sequence[Fields]:
        """The chunks before the first delta."""

    def chunk(self, delta: Delta) -> Fields:
        """A chunk's own fields: its one choice, and what is said beside it."""

    def whole(self, choices: Sequence[Delta]) -> Fields:
        """A whole answer's own fields: its choices, in order, and what is said beside them."""


class Answer:
    """One call's answer. What does not change between tokens is encoded once."""

    def __init__(self, streams: PromptStreams, answer_format: Format, created: int, model: str, label: str) -> None:
        self._streams = streams
        self._format = answer_format
        self._label = label
        self._request = request = streams.streams[0].request  # of several prompts all have the same fields
        self._prompt_tokens = sum(len(stream.request.token_ids) for stream in streams.streams)
        self._completion_tokens = 0
        named = {"created": created, "model": model}
        id = f"{answer_format.id_prefix}{streams.id}"
        self._whole_head = {"id": id, "object": answer_format.whole_object, **named}
        self._chunk_head = {"id": id, "object": answer_format.chunk_object, **named}
        # {"id":...,"model":...,"choices":[{"index":0,"text":  "..."  ,"logprobs":null,...}],"usage":  null  }
        before = b"data: " + encode_json(self._chunk_head)[:-1] + b',"choices":[{"index":'
        self._before_text = [
            before + b"%d" % choice + answer_format.before_text
            for choice in range(len(streams.streams) * request.choices if request.stream else 0)
        ]
        self._after_text = answer_format.after_text + b'}],"usage":'
        self._plain = answer_format.plain
        self.started = False  # being sent

    # -- streamed ------------------------------------------------------------------------------------------------------
    async def stream(self, send: Send) -> None:
        news = await self._first()
        error = news.ended.error if news.ended is not None else None
        if error is not None and not news.deltas:
            await send_error(send, error, self._label)
            return
        self.started = True
        await send(start(200, b"text/event-stream; charset=utf-8", self._headers()))
        opening = [event(self._chunk_value(fields)) for fields in self._format.opening()]
        if opening:
            await send(part(b"".join(opening)))
        while news.ended is None:
            await send(part(b"".join(map(self.chunk, news.deltas))))
            news = self._heard(await self._streams.next())
        await send(last(b"".join((*self._last_events(news.deltas, news.ended), b"data: [DONE]\n\n"))))

    def chunk(self, delta: Delta) -> bytes:
        """One event. The hot path: no dict, one string encoded."""
        self._completion_tokens += len(delta.token_ids)
        if delta.finish is not None or not self._plain:
            return event(self._chunk_value(self._format.chunk(delta)))
        usage = encode_json(self._usage()) if self._request.continuous_usage else b"null"
        return b"".join((self._before_text[delta.choice], encode_json(delta.text), self._after_text, usage, b"}\n\n"))

    def _chunk_value(self, fields: Fields) -> dict[str, Any]:
        usage = self._usage() if self._request.continuous_usage else None
        return {**self._chunk_head, **fields, "usage": usage}

    def _last_events(self, deltas: Sequence[Delta], ended: Ended) -> Iterator[bytes]:
        """Everything that came with the ending, and the usage if asked for: `triptych` rides on whichever is last."""
        if ended.error is not None:
            yield from map(self.chunk, deltas)
            yield event(error_body(ended.error))
            return
        *before, delta = deltas
        yield from map(self.chunk, before)
        self._completion_tokens += len(delta.token_ids)
        final, figures = self._chunk_value(self._format.chunk(delta)), {"triptych": self._figures()}
        if self._request.include_usage:
            yield event(final)
            yield event({**self._chunk_head, "choices": [], "usage": self._final_usage(), **figures})
        else:
            yield event(final | figures)

    # -- whole ---------------------------------------------------------------------------------------------------------
    async def whole(self, send: Send) -> None:
        deltas: list[list[Delta]] = [[] for _ in range(len(self._streams.streams) * self._request.choices)]
        news = await self._first()
        while True:
            for delta in news.deltas:
                deltas[delta.choice].append(delta)
            if news.ended is not None:
                break
            news = self._heard(await self._streams.next())
        if news.ended.error is not None:
            await send_error(send, news.ended.error, self._label)
            return
        body = encode_json(self._whole_value(list(map(joined, deltas))))
        headers = self._headers()
        self.started = True
        await send_whole(send, 200, body, headers)

    def _whole_value(self, choices: Sequence[Delta]) -> dict[str, Any]:
        self._completion_tokens = sum(len(choice.token_ids) for choice in choices)
        fields = self._format.whole(choices)
        return {**self._whole_head, **fields, "usage": self._final_usage(), "triptych": self._figures()}

    # -- both ----------------------------------------------------------------------------------------------------------
    async def _first(self) -> News:
        """The first news that a client can be told; scores of the prompt are told with the first token."""
        news = self._heard(await self._streams.next())
        while not news.deltas and news.ended is None:
            news = self._heard(await self._streams.next())
        return news

    def _heard(self, news: News) -> News:
        if news.scored:
            self._format.scored(news.scored)
        return news

    def _usage(self) -> dict[str, Any]:
        """Until the end nobody may be told how much of the prompt was cached."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
        }

    def _final_usage(self) -> dict[str, Any]:
        cached_tokens = sum(stream.stats.cached_tokens for stream in self._streams.streams)
        details: dict[str, Any] = {"cached_tokens": cached_tokens}
        if self._request.image_tokens:
            cached_image_tokens = sum(stream.stats.cached_image_tokens for stream in self._streams.streams)
            details["multimodal_tokens"] = {"image": self._request.image_tokens}
            details["cached_multimodal_tokens"] = {"image": cached_image_tokens}
        return self._usage() | {"prompt_tokens_details": details}

    def _figures(self) -> dict[str, Any]:
        """`triptych`: of one prompt an object, of several one for each."""
        figures = [figures_of(stream) for stream in self._streams.streams]
        return figures[0] if len(figures) == 1 else {"prompts": figures}

    def _headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"x-request-id", self._label.encode()), (b"cache-control", b"no-cache")]


def figures_of(stream: RequestStream) -> dict[str, Any]:
    """What a client may read of how one prompt was served."""
    core: dict[str, Any] = msgspec.to_builtins(stream.stats)
    return core | told_to_client(stream)
