"""The bytes of one completion, streamed or whole, from what the edge has to say about its request.

    streamed   one event per delta; what became readable together is sent together. The last event carries `triptych`.
    whole      every choice's deltas joined, choices in order

A streamed token of a plain request costs one JSON string between two constant pieces. Everything else (log-
probabilities, token ids, echoed prompts, endings) is a dict like that of a whole answer, so that both say the same.

Response headers wait for the first delta, so that a request which fails before it gets its true status.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Send

from control_plane.router.choice import Delta, joined
from control_plane.router.logprobs import LogprobsFormat, Score, prompt_scores, text_offsets
from control_plane.router.request_stream import News, RequestStream
from control_plane.router.requests import Ended, PromptScored, RequestStats
from control_plane.router.responses import encode_json, error_body, event, last, part, send_error, send_whole, start
from control_plane.router.validation import ValidatedRequest
from control_plane.router.vocabulary import Vocabulary


class Answer:
    """One request's answer. What does not change between tokens is encoded once."""

    def __init__(self, stream: RequestStream, created: int, model: str, vocabulary: Vocabulary) -> None:
        self._stream = stream
        self._request = request = stream.request
        self._head = {"id": f"cmpl-{stream.id}", "object": "text_completion", "created": created, "model": model}
        self._choices = ChoiceFormat(request, vocabulary)
        self._plain = not (  # nothing but text until the end
            request.echo_text is not None or request.sampling.logprobs is not None or request.return_token_ids
        )
        # {"id":...,"model":...,"choices":[{"index":0,"text":  "..."  ,"logprobs":null,...}],"usage":  null  }
        before = b"data: " + encode_json(self._head)[:-1] + b',"choices":[{"index":'
        self._before_text = [before + b'%d,"text":' % choice for choice in range(request.choices)]
        self._after_text = b',"logprobs":null,"finish_reason":null,"stop_reason":null}],"usage":'
        self._completion_tokens = 0
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
        while news.ended is None:
            await send(part(b"".join(map(self.chunk, news.deltas))))
            news = await self._stream.next()
        await send(last(b"".join((*self._last_events(news.deltas, news.ended), b"data: [DONE]\n\n"))))

    def chunk(self, delta: Delta) -> bytes:
        """One event. The hot path: no dict, one string encoded."""
        self._completion_tokens += len(delta.token_ids)
        if delta.finish is not None or not self._plain:
            return event(self._chunk_value(delta))
        usage = encode_json(self._usage()) if self._request.continuous_usage else b"null"
        return b"".join((self._before_text[delta.choice], encode_json(delta.text), self._after_text, usage, b"}\n\n"))

    def _chunk_value(self, delta: Delta) -> dict[str, Any]:
        usage = self._usage() if self._request.continuous_usage else None
        return {**self._head, "choices": [self._choices.value(delta)], "usage": usage}

    def _last_events(self, deltas: Sequence[Delta], ended: Ended) -> Iterator[bytes]:
        """Everything that came with the ending, and the usage if asked for: `triptych` rides on whichever is last."""
        if ended.error is not None:
            yield from map(self.chunk, deltas)
            yield event(error_body(ended.error))
            return
        *before, delta = deltas
        yield from map(self.chunk, before)
        self._completion_tokens += len(delta.token_ids)
        final, statistics = self._chunk_value(delta), {"triptych": ended.stats}
        if self._request.include_usage:
            yield event(final)
            yield event({**self._head, "choices": [], "usage": self._usage(ended.stats)} | statistics)
        else:
            yield event(final | statistics)

    # -- whole ---------------------------------------------------------------------------------------------------------
    async def whole(self, send: Send) -> None:
        deltas: list[list[Delta]] = [[] for _ in range(self._request.choices)]
        news = await self._first()
        while True:
            for delta in news.deltas:
                deltas[delta.choice].append(delta)
            if news.ended is not None:
                break
            news = await self._stream.next()
        if news.ended.error is not None:
            await send_error(send, news.ended.error, self._label)
            return
        body = encode_json(self._whole_value(list(map(joined, deltas)), news.ended.stats))
        headers = self._headers()
        self.started = True
        await send_whole(send, 200, body, headers)

    def _whole_value(self, choices: list[Delta], stats: RequestStats) -> dict[str, Any]:
        self._completion_tokens = sum(len(choice.token_ids) for choice in choices)
        return {
            **self._head,
            "choices": [self._choices.value(choice) for choice in choices],
            "usage": self._usage(stats),
            "triptych": stats,
        }

    # -- both ----------------------------------------------------------------------------------------------------------
    async def _first(self) -> News:
        """The first news that a client can be told; scores of the prompt are told with the first token."""
        scored: list[PromptScored] = []
        news = await self._stream.next()
        while True:
            scored += news.scored
            if news.deltas or news.ended is not None:
                self._choices.open(scored)
                return news
            news = await self._stream.next()

    def _usage(self, stats: RequestStats | None = None) -> dict[str, Any]:
        """`stats` are known at the end only: before it nobody may be told how much of the prompt was cached."""
        prompt_tokens, completion_tokens = len(self._request.token_ids), self._completion_tokens
        usage: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
        return usage if stats is None else usage | {"prompt_tokens_details": {"cached_tokens": stats.cached_tokens}}

    @property
    def _label(self) -> str:
        return self._request.label or self._stream.id

    def _headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"x-request-id", self._label.encode()), (b"cache-control", b"no-cache")]


@dataclass(frozen=True, slots=True)
class Opening:
    """What the first delta of a choice says of the prompt."""

    text: str = ""
    token_ids: Sequence[int] = ()
    scores: Sequence[Score] = ()
    offsets: Sequence[int] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)


class ChoiceFormat:
    """One element of `choices`, from a delta, or from a choice's deltas joined."""

    def __init__(self, request: ValidatedRequest, vocabulary: Vocabulary) -> None:
        self._request = request
        self._vocabulary = vocabulary
        self._logprobs = LogprobsFormat(vocabulary, as_ids=request.tokens_as_ids)
        self._opening = self._nothing = Opening()
        self._opened: set[int] = set()  # choices whose first delta is written

    def open(self, scored: Sequence[PromptScored]) -> None:
        """All that is known of the prompt is here; comes before the first delta."""
        request = self._request
        scores = prompt_scores(len(request.token_ids), scored)
        fields: dict[str, Any] = {}
        if request.prompt_logprobs is not None:
            fields["prompt_logprobs"] = self._logprobs.prompt(request.token_ids, scores, request.prompt_logprobs)
        if request.return_token_ids:
            fields["prompt_token_ids"] = request.token_ids
        if request.echo_text is None:
            self._opening = Opening(fields=fields)
        elif request.sampling.logprobs is None:
            self._opening = Opening(request.echo_text, fields=fields)
        else:
            self._opening = Opening(request.echo_text, request.token_ids, scores, self._prompt_offsets(), fields)

    def value(self, delta: Delta) -> dict[str, Any]:
        opening = self._nothing if delta.choice in self._opened else self._opening
        self._opened.add(delta.choice)
        value = {
            "index": delta.choice,
            "text": opening.text + delta.text,
            "logprobs": self._lists(opening, delta),
            "finish_reason": delta.finish.value if delta.finish is not None else None,
            "stop_reason": delta.stop,
            **opening.fields,
        }
        if self._request.return_token_ids:
            value["token_ids"] = delta.token_ids
        return value

    def _lists(self, opening: Opening, delta: Delta) -> dict[str, Any] | None:
        count = self._request.sampling.logprobs
        if count is None:
            return None
        return self._logprobs.completion(
            [*opening.token_ids, *delta.token_ids],
            [*opening.scores, *delta.logprobs],
            [*opening.offsets, *delta.offsets],
            count,
        )

    def _prompt_offsets(self) -> list[int]:
        request = self._request
        detokenizer = self._vocabulary.detokenizer(frozenset(), skip_special_tokens=request.skip_special_tokens)
        return text_offsets(request.token_ids, detokenizer)
