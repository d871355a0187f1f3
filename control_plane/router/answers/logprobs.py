"""Log-probabilities as clients read them: OpenAI's lists for completions and for chats, and vLLM's `prompt_logprobs`.

Completions have four parallel lists:

    tokens          the tokens' texts (see `Vocabulary.token_text`), or "token_id:5" on request
    token_logprobs  natural logarithms; null for the first token of a prompt, which nothing came before
    top_logprobs    {text: logprob} of the likeliest, and of the token itself where it is not among them
    text_offset     where the token's text begins in the choice's `text`, echoed prompt included

An offset counts characters of text, so tokens inside one code point share the offset at which it begins; of tokens that
a stop string cut off, it may lie beyond the text's end.

Chats have one entry per token: `token`, `logprob`, `bytes` (of the token's own text, however it is named) and
`top_logprobs`, the likeliest in the same form.
"""

import re
from collections.abc import Sequence
from typing import Any, Final

from control_plane.router.requests import PromptScored
from control_plane.router.text.detokenizer import IncrementalDetokenizer
from control_plane.router.text.vocabulary import Vocabulary
from engine.types import TokenLogprobs

LOGPROB_MIN: Final = -9999.0  # vLLM's; JSON has no infinity

Score = TokenLogprobs | None
"""None: the first token of a prompt."""


class LogprobsFormat:
    """Writes lists of scored tokens. `as_ids`: tokens are named by their ids instead of their texts."""

    def __init__(self, vocabulary: Vocabulary, *, as_ids: bool) -> None:
        self._text = vocabulary.token_text
        self._name = _id_name if as_ids else vocabulary.token_text

    def completion(
        self, token_ids: Sequence[int], scores: Sequence[Score], offsets: Sequence[int], count: int
    ) -> dict[str, Any]:
        return {
            "tokens": list(map(self._name, token_ids)),
            "token_logprobs": [None if score is None else _finite(score.logprob) for score in scores],
            "top_logprobs": [self._top(*scored, count) for scored in zip(token_ids, scores, strict=True)],
            "text_offset": offsets,
        }

    def chat(self, token_ids: Sequence[int], scores: Sequence[TokenLogprobs], count: int) -> dict[str, Any]:
        entries = []
        for token_id, score in zip(token_ids, scores, strict=True):
            likeliest = [self._entry(*scored) for scored in score.top[:count]]
            entries.append(self._entry(token_id, score.logprob) | {"top_logprobs": likeliest})
        return {"content": entries}

    def prompt(self, token_ids: Sequence[int], scores: Sequence[Score], count: int) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`: {token id: {logprob, rank, decoded_token}} for each token."""
        return [self._ranked(*scored, count) for scored in zip(token_ids, scores, strict=True)]

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        token_bytes = list(_bytes_of(self._text(token_id)))
        return {"token": self._name(token_id), "logprob": _finite(logprob), "bytes": token_bytes}

    def _top(self, token_id: int, score: Score, count: int) -> dict[str, float] | None:
        """Likeliest first; of two tokens with one name the likelier keeps it."""
        if score is None:
            return None
        named: dict[str, float] = {}
        for id, logprob in (*score.top[:count], (token_id, score.logprob)):
            named.setdefault(self._name(id), _finite(logprob))
        return named

    def _ranked(self, token_id: int, score: Score, count: int) -> dict[str, Any] | None:
        if score is None:
            return None
        likeliest = [(id, logprob, rank) for rank, (id, logprob) in enumerate(score.top[:count], start=1)]
        return {
            str(id): {"logprob": _finite(logprob), "rank": rank, "decoded_token": self._name(id)}
            for id, logprob, rank in ((token_id, score.logprob, score.rank), *likeliest)
        }


def prompt_scores(prompt_tokens: int, pieces: Sequence[PromptScored]) -> list[Score]:
    """One for each token, from pieces that came as the prompt was computed."""
    scores: list[Score] = [None] * prompt_tokens
    for piece in pieces:
        scores[piece.start : piece.start + len(piece.logprobs)] = piece.logprobs
    return scores


def text_offsets(token_ids: Sequence[int], detokenizer: IncrementalDetokenizer) -> list[int]:
    """Where each token's text begins in the text of all."""
    offsets, characters = [], 0
    for token in token_ids:
        offsets.append(characters)
        characters += len(detokenizer.push((token,)))
    return offsets


_NO_WHOLE_TEXT: Final = re.compile(r"bytes:((?:\\x[0-9a-f]{2})+)")


def _bytes_of(token_text: str) -> bytes:
    """So that all tokens' bytes together are the text's; `Vocabulary.token_text` spells what is none by itself."""
    spelt = _NO_WHOLE_TEXT.fullmatch(token_text)
    return token_text.encode() if spelt is None else bytes.fromhex(spelt[1].replace("\\x", ""))


def _finite(logprob: float) -> float:
    return max(logprob, LOGPROB_MIN)


def _id_name(token_id: int) -> str:
    return f"token_id:{token_id}"
