"""What a chat's answer looks like: OpenAI's `chat.completion`, and its chunks in vLLM's order.

Nothing is sent before the first token is there. Then every choice says who speaks, one after the other; an echo, if
asked for, follows in the same way; then come the tokens. What is said of the prompt stands beside the choices: whole
in a whole answer, on the very first chunk of a streamed one.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from control_plane.router.answers.choice import Delta
from control_plane.router.answers.logprobs import LogprobsFormat
from control_plane.router.answers.prompt_answer import PromptAnswer
from control_plane.router.answers.request_stream import RequestStream
from control_plane.router.requests import PromptScored
from control_plane.router.text.vocabulary import Vocabulary

ROLE: Final = "assistant"


class ChatFormat:
    """`answer.Format` of one conversation."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    before_text = b',"delta":{"content":'
    after_text = b'},"logprobs":null,"finish_reason":null,"stop_reason":null'

    def __init__(self, stream: RequestStream, vocabulary: Vocabulary) -> None:
        self._request = request = stream.request
        self.plain = request.sampling.logprobs is None and not request.return_token_ids
        self._logprobs = LogprobsFormat(vocabulary, as_ids=request.tokens_as_ids)
        self._prompt = PromptAnswer(request, vocabulary, self._logprobs)

    def scored(self, pieces: Sequence[PromptScored]) -> None:
        for piece in pieces:
            self._prompt.scored(piece)

    # -- streamed ------------------------------------------------------------------------------------------------------
    def opening(self) -> Sequence[Mapping[str, Any]]:
        first, *others = self._said_by_all({"role": ROLE, "content": ""})
        echoed = self._said_by_all({"content": self._request.echo_text}) if self._request.echo_text else ()
        return [{**first, **self._prompt.fields}, *others, *echoed]

    def _said_by_all(self, delta: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        for index in range(self._request.choices):
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, "stop_reason": None}
            yield {"choices": [choice]}

    def chunk(self, delta: Delta) -> Mapping[str, Any]:
        return {"choices": [self._choice(delta, {"delta": {"content": delta.text}})]}

    # -- whole ---------------------------------------------------------------------------------------------------------
    def whole(self, choices: Sequence[Delta]) -> Mapping[str, Any]:
        return {
            "choices": [self._choice(choice, {"message": self._message(choice.text)}) for choice in choices],
            "service_tier": None,
            "system_fingerprint": None,
            **self._prompt.fields,
        }

    def _message(self, text: str) -> Mapping[str, Any]:
        content = (self._request.echo_text or "") + text
        return {"role": ROLE, "content": content, "refusal": None, "tool_calls": []}

    # -- both ----------------------------------------------------------------------------------------------------------
    def _choice(self, delta: Delta, said: Mapping[str, Any]) -> Mapping[str, Any]:
        count = self._request.sampling.logprobs
        value: dict[str, Any] = {
            "index": delta.choice,
            **said,
            "logprobs": None if count is None else self._logprobs.chat(delta.token_ids, delta.logprobs, count),
            "finish_reason": delta.finish.value if delta.finish is not None else None,
            "stop_reason": delta.stop,
        }
        if self._request.return_token_ids:
            value["token_ids"] = delta.token_ids
        return value
