"""One choice of a request: its tokens on one side, its text on the other, and its one ending.

    core --push--> unread tokens --read--> Delta       detokenised, and searched for stop strings, when the client reads

A choice is over when the core said so or when a stop string is found in its text; tokens after that string were never
part of the answer. Text comes out only once it is certain: nothing that was read is ever taken back.

What does not belong here: waking readers and telling the core (`edge`), and how an answer is written (`answer`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from control_plane.router.text.detokenizer import IncrementalDetokenizer
from control_plane.router.text.stop_strings import StopMatcher
from control_plane.router.validation.validator import ValidatedRequest
from engine.types import FinishReason, TokenLogprobs


class Delta(NamedTuple):
    """What became readable of one choice since the last one. With `finish` it is the choice's last."""

    choice: int
    text: str
    token_ids: Sequence[int]
    finish: FinishReason | None = None
    stop: int | str | None = None  # which of the client's own stop tokens or strings ended it
    logprobs: Sequence[TokenLogprobs] = ()  # one per token, if the client asked for them
    offsets: Sequence[int] = ()  # where each token's text begins in the choice's, if so


def joined(deltas: Sequence[Delta]) -> Delta:
    """A choice's deltas in one: an answer in one piece is, by construction, the streamed one put together."""
    last = deltas[-1]
    if len(deltas) == 1:
        return last
    return Delta(
        choice=last.choice,
        text="".join([delta.text for delta in deltas]),
        token_ids=_chained([delta.token_ids for delta in deltas]),
        finish=last.finish,
        stop=last.stop,
        logprobs=_chained([delta.logprobs for delta in deltas]),
        offsets=_chained([delta.offsets for delta in deltas]),
    )


def _chained(parts: Sequence[Sequence[Any]]) -> list[Any]:
    return [item for part in parts for item in part]


class Choice:
    """Written by the core's outputs, read by one client."""

    __slots__ = (
        "_characters",
        "_detokenizer",
        "_finish",
        "_last_token",
        "_logprobs",
        "_matcher",
        "_min_tokens",
        "_one_by_one",
        "_read_tokens",
        "_stop_token_ids",
        "_unread",
        "index",
        "over",
        "readable",
    )

    def __init__(
        self, index: int, request: ValidatedRequest, detokenizer: IncrementalDetokenizer, matcher: StopMatcher | None
    ) -> None:
        self.index = index
        self.readable = False  # something was pushed since the last `read`
        self.over = False  # its last delta has been read
        self._detokenizer = detokenizer
        self._matcher = matcher
        self._min_tokens = request.sampling.min_tokens
        self._stop_token_ids = request.sampling.stop_token_ids
        # Which token a character belongs to matters only to stop strings and to the offsets of log-probabilities.
        self._one_by_one = matcher is not None or request.sampling.logprobs is not None
        self._unread: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._finish: FinishReason | None = None
        self._read_tokens = 0
        self._last_token: int | None = None
        self._characters = len(request.echo_text or "")  # detokenised so far, echoed prompt included

    # -- the core's side -----------------------------------------------------------------------------------------------
    @property
    def finished_by_core(self) -> bool:
        return self._finish is not None

    def push(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], finish: FinishReason | None) -> None:
        self.readable = True
        self._unread.extend(token_ids)
        if logprobs:
            self._logprobs.extend(logprobs)
        if finish is not None:
            self._finish = finish

    # -- the reader's side ---------------------------------------------------------------------------------------------
    def read(self) -> Delta:
        """Everything since the last call, in one piece."""
        token_ids, self._unread = self._unread, []
        self.readable = False
        if self._one_by_one:
            return self._read_one_by_one(token_ids)
        text = self._detokenizer.push(token_ids)
        if self._finish is not None:
            return self._delta(text + self._detokenizer.finish(), token_ids)
        if token_ids:
            self._last_token = token_ids[-1]
        return Delta(self.index, text, token_ids)  # the hot path

    def _read_one_by_one(self, token_ids: list[int]) -> Delta:
        logprobs, self._logprobs = self._logprobs, []
        pieces: list[str] = []
        offsets: list[int] = []
        for token in token_ids:
            offsets.append(self._characters)
            pieces.append(self._search(self._detokenizer.push((token,)), self._read_tokens + len(offsets)))
            if self._matched is not None:
                break
        if self._finish is not None and self._matched is None:
            pieces.append(self._rest(self._read_tokens + len(offsets)))
        return self._delta("".join(pieces), token_ids[: len(offsets)], logprobs[: len(offsets)], offsets)

    def _search(self, text: str, tokens: int) -> str:
        """The part of `text` that is certain, and what was held back before. vLLM does not look for stop strings in
        the text of the first `min_tokens` tokens; they may begin there."""
        self._characters += len(text)
        if self._matcher is None:
            return text
        return self._matcher.push(text, armed=tokens > self._min_tokens)

    def _rest(self, tokens: int) -> str:
        text = self._search(self._detokenizer.finish(), tokens)
        return text if self._matcher is None else text + self._matcher.finish()

    @property
    def _matched(self) -> str | None:
        return self._matcher.matched if self._matcher is not None else None

    def _delta(
        self,
        text: str,
        token_ids: list[int],
        logprobs: Sequence[TokenLogprobs] = (),
        offsets: Sequence[int] = (),
    ) -> Delta:
        if token_ids:
            self._read_tokens += len(token_ids)
            self._last_token = token_ids[-1]
        finish = self._finish if self._matched is None else FinishReason.STOP
        self.over = finish is not None
        return Delta(self.index, text, token_ids, finish, self._stop(finish), logprobs, offsets if logprobs else ())

    def _stop(self, finish: FinishReason | None) -> int | str | None:
        """vLLM's `stop_reason`; None for the model's own end of sequence, and for a length."""
        if finish is not FinishReason.STOP:
            return None
        if self._matched is not None:
            return self._matched
        return self._last_token if self._last_token in self._stop_token_ids else None
