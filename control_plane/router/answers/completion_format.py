"""What a completion looks like: OpenAI's `text_completion` with vLLM's fields beside it.

A choice has the same shape streamed and whole; what is said of its prompt comes with its first delta.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from control_plane.router.answers.choice import Delta
from control_plane.router.answers.logprobs import LogprobsFormat
from control_plane.router.answers.prompt_answer import NO_ECHO, Echo, PromptAnswer
from control_plane.router.answers.request_stream import RequestStream
from control_plane.router.requests import PromptScored
from control_plane.router.text.vocabulary import Vocabulary


class CompletionFormat:
    """`answer.Format` of one call, with one prompt or several."""

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"
    before_text = b',"text":'
    after_text = b',"logprobs":null,"finish_reason":null,"stop_reason":null'

    def __init__(self, streams: Sequence[RequestStream], vocabulary: Vocabulary) -> None:
        self._request = request = streams[0].request  # of several prompts all have the same fields
        self.plain = not (
            request.echo_text is not None or request.sampling.logprobs is not None or request.return_token_ids
        )
        self._logprobs = LogprobsFormat(vocabulary, as_ids=request.tokens_as_ids)
        self._prompts = [PromptAnswer(stream.request, vocabulary, self._logprobs) for stream in streams]
        self._prompt_of = {stream.key: prompt for stream, prompt in zip(streams, self._prompts, strict=True)}
        self._begun: set[int] = set()  # choices whose first delta is written

    def scored(self, pieces: Sequence[PromptScored]) -> None:
        for piece in pieces:
            self._prompt_of[piece.key].scored(piece)

    def opening(self) -> Sequence[Mapping[str, Any]]:
        return ()

    def chunk(self, delta: Delta) -> Mapping[str, Any]:
        return {"choices": [self._choice(delta)]}

    def whole(self, choices: Sequence[Delta]) -> Mapping[str, Any]:
        return {"choices": list(map(self._choice, choices))}

    def _choice(self, delta: Delta) -> Mapping[str, Any]:
        prompt, is_first = self._prompts[delta.choice // self._request.choices], delta.choice not in self._begun
        self._begun.add(delta.choice)
        echo = prompt.echo if is_first else NO_ECHO
        value = {
            "index": delta.choice,
            "text": echo.text + delta.text,
            "logprobs": self._lists(echo, delta),
            "finish_reason": delta.finish.value if delta.finish is not None else None,
            "stop_reason": delta.stop,
        }
        if is_first:
            value |= prompt.fields
        if self._request.return_token_ids:
            value["token_ids"] = delta.token_ids
        return value

    def _lists(self, echo: Echo, delta: Delta) -> Mapping[str, Any] | None:
        count = self._request.sampling.logprobs
        if count is None:
            return None
        return self._logprobs.completion(
            [*echo.token_ids, *delta.token_ids],
            [*echo.scores, *delta.logprobs],
            [*echo.offsets, *delta.offsets],
            count,
        )
