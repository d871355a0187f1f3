"""From token ids to text, a few tokens at a time, so that the pieces joined are the text of the whole.

A code point may be split over tokens; a piece never ends inside one. Both detokenizers do bounded work per token,
whatever the tokens are: the obvious alternative (`tokenizers.DecodeStream`) decodes everything since the last whole
code point again for each token, which a model that emits broken bytes turns quadratic, and it drops an incomplete tail.

What does not belong here: which token ends a request (the worker decides), stop strings (`stop_strings`), and what a
single token is called in a list of log-probabilities (`Vocabulary.token_text`).
"""

import codecs
from collections.abc import Callable, Sequence
from typing import Final, Protocol

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
WINDOW_TOKENS_MAX: Final = 8  # a code point is at most 4 bytes, so 4 byte tokens; beyond that the bytes are broken


class IncrementalDetokenizer(Protocol):
    """One request's output text. `push` in order, then `finish` once."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; empty while a code point is still open."""

    def finish(self) -> str:
        """What is left: a code point that never became whole reads as U+FFFD."""


class ByteDetokenizer:
    """For vocabularies whose tokens are byte strings: look up, join, decode. Exact and linear.

    `token_bytes[id]` is empty for tokens that have no text (special tokens, unless the client wants to see them);
    `silent_ids` are this request's stop tokens, which end the text without being part of it.
    """

    def __init__(self, token_bytes: Sequence[bytes], silent_ids: frozenset[int] = frozenset()) -> None:
        self._token_bytes = token_bytes
        self._silent_ids = silent_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Sequence[int]) -> str:
        table, silent_ids = self._token_bytes, self._silent_ids
        return self._decoder.decode(b"".join([table[token] for token in token_ids if token not in silent_ids]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For every other vocabulary: decode a short window of tokens with and without the new one; the rest is new text.

        tokens   ... | context | open | new      context: its text is out, it only fixes how `open` joins on (spaces)
                      <------ window ----->       open:    no text yet, because it ends inside a code point

    An `open` part longer than the window is broken bytes and goes out as U+FFFD. `prompt`: the tokens before the first;
    the end of it is the first context, for otherwise an output that begins with a space would lose it.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        silent_ids: frozenset[int] = frozenset(),
        prompt: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._silent_ids = silent_ids
        self._context = list(prompt[-WINDOW_TOKENS_MAX:])
        self._open: list[int] = []
        self._context_text = decode(self._context)
        if REPLACEMENT in self._context_text:  # cut inside a code point: what follows would be measured wrongly
            self._context, self._context_text = [], ""

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push_one(token) for token in token_ids if token not in self._silent_ids])

    def finish(self) -> str:
        return self._release(self._window_text()) if self._open else ""

    def _push_one(self, token: int) -> str:
        self._open.append(token)
        text = self._window_text()
        if text.endswith(REPLACEMENT) and len(self._open) < WINDOW_TOKENS_MAX:
            return ""
        return self._release(text)

    def _window_text(self) -> str:
        return self._decode(self._context + self._open)

    def _release(self, window_text: str) -> str:
        """Hand out what the open tokens add; they become the context of the next ones."""
        new_text = window_text[len(self._context_text) :]
        if new_text:  # a special token adds none, and must not push the real context out
            self._context, self._context_text = self._open, self._decode(self._open)
        self._open = []
        return new_text
