"""What an answer says of a prompt: its text again, its tokens, their log-probabilities, each as far as asked for.

What does not belong here: where in an answer that stands (`completion_format`, `chat_format`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from control_plane.router.answers.logprobs import LogprobsFormat, Score, prompt_scores, text_offsets
from control_plane.router.requests import PromptScored
from control_plane.router.text.vocabulary import Vocabulary
from control_plane.router.validation.validator import ValidatedRequest


@dataclass(frozen=True, slots=True)
class Echo:
    """What stands before a choice's own text, with lists as long as those of its tokens."""

    text: str = ""
    token_ids: Sequence[int] = ()
    scores: Sequence[Score] = ()
    offsets: Sequence[int] = ()


NO_ECHO: Final = Echo()


class PromptAnswer:
    """One prompt. Scores come first, piece by piece; what is read here is made when it is first asked for."""

    def __init__(self, request: ValidatedRequest, vocabulary: Vocabulary, logprobs: LogprobsFormat) -> None:
        self._request = request
        self._vocabulary = vocabulary
        self._logprobs = logprobs
        self._scored: list[PromptScored] = []

    def scored(self, piece: PromptScored) -> None:
        self._scored.append(piece)

    @cached_property
    def echo(self) -> Echo:
        request = self._request
        if request.echo_text is None:
            return NO_ECHO
        if request.sampling.logprobs is None:
            return Echo(request.echo_text)
        return Echo(request.echo_text, request.token_ids, self._scores, self._offsets())

    @cached_property
    def fields(self) -> Mapping[str, Any]:
        """vLLM's, each there if it was asked for."""
        request, fields = self._request, dict[str, Any]()
        if request.prompt_logprobs is not None:
            fields["prompt_logprobs"] = self._logprobs.prompt(request.token_ids, self._scores, request.prompt_logprobs)
        if request.return_token_ids:
            fields["prompt_token_ids"] = request.token_ids
        return fields

    @cached_property
    def _scores(self) -> list[Score]:
        return prompt_scores(len(self._request.token_ids), self._scored)

    def _offsets(self) -> list[int]:
        request = self._request
        detokenizer = self._vocabulary.detokenizer(frozenset(), skip_special_tokens=request.skip_special_tokens)
        return text_offsets(request.token_ids, detokenizer)
