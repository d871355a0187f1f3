"""The special tokens of a vocabulary, and where their names stand in a text.

Only a chat template may write one by name. The same characters inside what a user wrote are text (reliability D9):
otherwise he could close the system prompt's turn from inside his own. So a name in a user's text is *marked*, broken
by a character that occurs nowhere else, before the template puts the texts together; what is still a name afterwards
is the template's own, and the marks are taken out again.

What does not belong here: encoding (`vocabulary`), rendering (`chat_template`).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, groupby
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
    def end(self) -> str:
        """The pattern of what must stand around the name, for behind the name."""
        return rf"(?<!\w{re.escape(self.name)})(?!\w)" if self.single_word else ""


class SpecialTokens:
    """Thread-safe. Without any tokens, no text is touched by one: that is how they are permitted to users."""

    def __init__(self, tokens: Iterable[SpecialToken] = ()) -> None:
        self._tokens = {token.name: token for token in tokens if token.name}
        self._one = re.compile(_any_of({name: token.end for name, token in self._tokens.items()}))
        self._first = re.compile(_first_of(self._tokens))
        cuts = [(name[:cut], name[cut:]) for name in self._tokens for cut in range(1, len(name))]
        self._beginnings = frozenset(beginning for beginning, _ in cuts)
        self._endings = frozenset(ending for _, ending in cuts)
        self._longest = max(map(len, self._tokens), default=0)
        self._listed = "\0".join(self._tokens)
        self.ids: Final = frozenset(token.id for token in self._tokens.values())

    def touched_by(self, text: str) -> bool:
        """A name is in this text, or could be once other texts stand around it."""
        return bool(self._tokens) and (self._first.search(text) is not None or self._is_part(text))

    def marked(self, text: str, mark: str) -> str:
        """No name, whatever stands around it: the mark follows each name's first character, inside other names too."""
        pieces = self._first.split(text)
        pieces[1::2] = [first + mark for first in pieces[1::2]]
        broken = "".join(pieces)
        if not self._is_part(text):
            return broken
        inner = broken.lstrip()
        before, bare = broken[: len(broken) - len(inner)], inner.rstrip()
        after = inner[len(bare) :]
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
            or (0 < len(bare) < self._longest and bare in self._listed)
        )


# -- patterns ----------------------------------------------------------------------------------------------------------
_NESTED_MAX: Final = 50  # groups inside groups; `re` itself gives up at some hundreds


def _any_of(ends: Mapping[str, str], nested: int = 0) -> str:
    """Any of these names, the longest that fits, each followed by its end. What names begin with in common stands there
    once: models have hundreds of names such as <|reserved_special_token_7|>, and a text that repeats their beginning
    must not be compared with every one of them at each place."""
    if not ends:
        return "(?!)"
    if nested == _NESTED_MAX:
        return "|".join(re.escape(name) + ends[name] for name in sorted(ends, key=len, reverse=True))
    branches = []
    for _, group in groupby(sorted(ends, reverse=True), key=lambda name: name[:1]):
        names = list(group)
        shared = _shared(names[0], names[-1])  # of sorted names: what all of them share
        rests = {name[len(shared) :]: ends[name] for name in names}
        inner = ends[shared] if len(names) == 1 else f"(?:{_any_of(rests, nested + 1)})"
        branches.append(re.escape(shared) + inner)
    return "|".join(branches)


def _shared(one: str, other: str) -> str:
    """What both begin with."""
    length = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _first_of(names: Iterable[str]) -> str:
    """The first character of any of these names, followed by the rest of it."""
    branches = []
    for first, group in groupby(sorted(names), key=lambda name: name[0]):
        rests = dict.fromkeys((name[1:] for name in group), "")
        branches.append(f"{re.escape(first)}(?={_any_of(rests)})")
    return f"({'|'.join(branches) or '(?!)'})"


def _stripped(text: str, *, left: bool, right: bool) -> str:
    text = text.lstrip() if left else text
    return text.rstrip() if right else text


def unused_mark(texts: Iterable[str]) -> str | None:
    """A character that is in none of the texts; None: they hold all that would do. Nearly always the first is free."""
    texts = list(texts)
    return next((mark for mark in NONCHARACTERS if not any(mark in text for text in texts)), None)
