"""The special tokens of a vocabulary, and where their names stand in a text.

Only a chat template may write one by name. The same characters inside what a user wrote are text (reliability D9):
otherwise he could close the system prompt's turn from inside his own. So a name in a user's text is *marked*, broken
by a character that occurs nowhere else, before the template puts the texts together; what is still a name afterwards
is the template's own, and the marks are taken out again.

What does not belong here: encoding (`vocabulary`), rendering (`chat_template`).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Final

# Unicode keeps these for use inside a program; they are not characters, and no text needs one.
NONCHARACTERS: Final = "".join(
    map(chr, chain(range(0xFDD0, 0xFDF0), *((plane + 0xFFFE, plane + 0xFFFF) for plane in range(0, 0x110000, 0x10000))))
)


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """`lstrip` and `rstrip`: it swallows white space on that side. `single_word`: it is no part of a longer word."""

    id: int
    name: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def pattern(self) -> str:
        name = re.escape(self.name)
        return rf"(?<!\w){name}(?!\w)" if self.single_word else name


class SpecialTokens:
    """Thread-safe. Without any tokens, no text is touched by one: that is how they are permitted to users."""

    def __init__(self, tokens: Iterable[SpecialToken] = ()) -> None:
        self._tokens = {token.name: token for token in tokens if token.name}
        longest_first = sorted(self._tokens.values(), key=lambda token: -len(token.name))
        self._one = re.compile("|".join(token.pattern for token in longest_first) or "(?!)")
        self._names = re.compile("|".join(re.escape(token.name) for token in longest_first) or "(?!)")
        cuts = [(name[:cut], name[cut:]) for name in self._tokens for cut in range(1, len(name))]
        self._beginnings = frozenset(beginning for beginning, _ in cuts)
        self._endings = frozenset(ending for _, ending in cuts)
        self._longest = max(map(len, self._tokens), default=0)
        self.ids: Final = frozenset(token.id for token in self._tokens.values())

    def touched_by(self, text: str) -> bool:
        """A name is in this text, or could be once other texts stand around it."""
        return self._names.search(text) is not None or self._is_part(text)

    def marked(self, text: str, mark: str) -> str:
        """No name, whatever stands around it."""
        broken = self._names.sub(lambda name: name[0][0] + mark + name[0][1:], text)
        if not self._is_part(text):
            return broken
        bare = broken.strip()
        start = broken.index(bare)
        before, after = broken[:start], broken[start + len(bare) :]
        return before + mark + bare + mark + after  # white space stays outside, where a template finds it

    def count(self, text: str) -> int:
        return sum(1 for _ in self._one.finditer(text))

    def split(self, text: str) -> Iterator[str | int]:
        """In order: ids of the tokens that are named, and the texts between them, none of them empty."""
        start, swallows = 0, False
        for found in self._one.finditer(text):
            token = self._tokens[found[0]]
            if before := _stripped(text[start : found.start()], left=swallows, right=token.lstrip):
                yield before
            yield token.id
            start, swallows = found.end(), token.rstrip
        if rest := _stripped(text[start:], left=swallows, right=False):
            yield rest

    def _is_part(self, text: str) -> bool:
        """With or without the white space around it, which templates like to trim."""
        bare = text.strip()
        ends = range(1, min(self._longest, len(bare)) + 1)
        return (
            any(bare[-length:] in self._beginnings for length in ends)
            or any(bare[:length] in self._endings for length in ends)
            or (0 < len(bare) < self._longest and any(bare in name for name in self._tokens))
        )


def _stripped(text: str, *, left: bool, right: bool) -> str:
    text = text.lstrip() if left else text
    return text.rstrip() if right else text


def unused_mark(texts: Iterable[str]) -> str | None:
    """A character that is in none of the texts; None: they hold all that would do."""
    used = set().union(*(set(NONCHARACTERS).intersection(text) for text in texts))
    return next((mark for mark in NONCHARACTERS if mark not in used), None)
