"""Finds the stop strings of a request in its output while the output is still being written.

    text so far   ...certain, sent ... | held: the longest end that begins some stop string
                                                     (never sent before it is known that none follows)

One automaton per request (Aho and Corasick, "Efficient string matching", CACM 1975), one cursor per choice. The
automaton's state *is* the held text: its depth is how much must be held back, and a step costs amortised constant time
per character, however long and many the strings are.

Which match counts: the one that ends first; of several that end together, the longest. So what a client reads does not
depend on how the text was cut into tokens, messages or chunks.

What does not belong here: tokens, and what happens to a choice that was stopped (`choice`).
"""

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """The automaton of a set of strings: immutable, shared by the choices of a request. Node 0 is the empty text."""

    __slots__ = ("held", "matches", "next_nodes", "suffixes")

    def __init__(self, strings: Sequence[str]) -> None:
        self.next_nodes: list[dict[str, int]] = [{}]
        self.suffixes = [0]  # the node of the longest proper suffix that is a node
        self.matches: list[str | None] = [None]  # the longest of the strings that the node's text ends with
        self.held = [0]  # how many of the node's last characters some string may still grow from
        depths = [0]
        for string in strings:
            self._add(string, depths)
        self._link(depths)

    def _add(self, string: str, depths: list[int]) -> None:
        node = 0
        for character in string:
            child = self.next_nodes[node].setdefault(character, len(self.next_nodes))
            if child == len(self.next_nodes):
                self.next_nodes.append({})
                self.suffixes.append(0)
                self.matches.append(None)
                self.held.append(0)
                depths.append(depths[node] + 1)
            node = child
        self.matches[node] = string

    def _link(self, depths: list[int]) -> None:
        """Breadth first: a node's suffix is shorter than the node, so everything about it is known already."""
        queue = deque(self.next_nodes[0].values())
        while queue:
            node = queue.popleft()
            suffix = self.suffixes[node]
            self.matches[node] = self.matches[node] or self.matches[suffix]
            self.held[node] = depths[node] if self.next_nodes[node] else self.held[suffix]
            for character, child in self.next_nodes[node].items():
                self.suffixes[child] = self.step(suffix, character)
                queue.append(child)

    def step(self, node: int, character: str) -> int:
        while node and character not in self.next_nodes[node]:
            node = self.suffixes[node]
        return self.next_nodes[node].get(character, 0)


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
