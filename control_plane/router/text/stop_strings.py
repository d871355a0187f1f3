"""Finds the stop strings of a request in its output while the output is still being written.

    text so far   ...certain, sent ... | held: the longest end that begins some stop string
                                                     (never sent before it is known that none follows)

One automaton per client's call (Aho and Corasick, "Efficient string matching", CACM 1975), one cursor per choice. The
automaton's state *is* the held text: its depth is how much must be held back, and a step costs amortised constant time
per character, however long and many the strings are.

Which match counts: the one that ends first; of several that end together, the longest. So what a client reads does not
depend on how the text was cut into tokens, messages or chunks.

What does not belong here: tokens, and what happens to a choice that was stopped (`choice`).
"""

from collections.abc import Sequence
from typing import Final

_END: Final = "\ud800"  # no character: half of one in UTF-16, which no text holds


class StopStrings:
    """The automaton of a set of strings: immutable, shared by all choices of a client's call. Node 0 is the empty text.

    A call may bring thousands of characters, so a node is a place in four lists and no object of its own: a string's
    nodes lie one behind the other, and only where a string leaves an earlier one an edge has to be written down.
    """

    __slots__ = ("_branches", "_onwards", "held", "matches", "suffixes")

    def __init__(self, strings: Sequence[str]) -> None:
        self._onwards = _END  # of each node: the character by which it goes on to the node behind it
        self._branches: dict[int, dict[str, int]] = {}  # all other edges: fewer than there are strings
        self.suffixes = [0]  # the node of the longest proper suffix that is a node
        self.matches: list[str | None] = [None]  # the longest of the strings that the node's text ends with
        self.held = [0]  # how many of the node's last characters some string may still grow from
        for string in strings:
            self._add(string)
        self._link()

    def __len__(self) -> int:
        return len(self._onwards)

    def step(self, node: int, character: str) -> int:
        while True:
            if self._onwards[node] == character:
                return node + 1
            if node in self._branches and character in self._branches[node]:
                return self._branches[node][character]
            if node == 0:
                return 0
            node = self.suffixes[node]

    def _add(self, string: str) -> None:
        node, depth = self._beginning(string)
        rest = string[depth:]
        if rest:
            self._open_edge(node, rest[0])
            self._onwards += rest[1:] + _END
            self.suffixes += [0] * len(rest)
            self.matches += [None] * len(rest)
            self.held += range(depth + 1, len(string) + 1)  # all of its text; where it ends, `_link` knows better
            node = len(self) - 1
        self.matches[node] = string

    def _beginning(self, string: str) -> tuple[int, int]:
        """The node of the longest beginning that is there already, and how long that is."""
        node = 0
        for depth, character in enumerate(string):
            child = node + 1 if self._onwards[node] == character else self._branches.get(node, {}).get(character)
            if child is None:
                return node, depth
            node = child
        return node, len(string)

    def _open_edge(self, node: int, character: str) -> None:
        """To the node that is made next."""
        if node == len(self) - 1:
            self._onwards = self._onwards[:-1] + character
        else:
            self._branches.setdefault(node, {})[character] = len(self)

    def _link(self) -> None:
        """Breadth first: a node's suffix is shorter than the node, so everything about it is known already."""
        queue = [child for _, child in self._children(0)]
        for node in queue:
            suffix, children = self.suffixes[node], self._children(node)
            self.matches[node] = self.matches[node] or self.matches[suffix]
            if not children:
                self.held[node] = self.held[suffix]
            for character, child in children:
                self.suffixes[child] = self.step(suffix, character)
                queue.append(child)

    def _children(self, node: int) -> list[tuple[str, int]]:
        character = self._onwards[node]
        children = [] if character == _END else [(character, node + 1)]
        return [*children, *self._branches[node].items()] if node in self._branches else children


class StopMatcher:
    """One choice's cursor. `push` its text in order; what comes back, joined, is what the client may read."""

    __slots__ = ("_held", "_include", "_node", "_strings", "matched")

    def __init__(self, strings: StopStrings, *, include: bool) -> None:
        self.matched: str | None = None  # nothing comes back after a match
        self._strings = strings
        self._include = include  # the client wants to read the stop string as well
        self._node = 0
        self._held = ""

    def push(self, text: str, *, armed: bool = True) -> str:
        """The text that is certain now. A match that ends in this text counts only if `armed`."""
        strings, node = self._strings, self._node
        for end, character in enumerate(text, start=1):
            node = strings.step(node, character)
            match = strings.matches[node]
            if match is not None and armed:
                return self._stop(self._held + text[:end], match)
        self._node = node
        return self._hold(self._held + text, strings.held[node])

    def finish(self) -> str:
        """The output has ended otherwise: nothing can complete what was held back."""
        held, self._held = self._held, ""
        return held

    def _stop(self, text: str, match: str) -> str:
        self.matched = match
        self._held = ""
        return text if self._include else text[: len(text) - len(match)]

    def _hold(self, text: str, held_characters: int) -> str:
        certain = len(text) - held_characters
        self._held = text[certain:]
        return text[:certain]
