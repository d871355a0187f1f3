"""Alarms: many deadlines, most of which are moved or dropped before they come.

Who moves one does not say so: `due_us(key)` is asked when its old time comes, and says when it is due now, or that it
is not any more. So what happens for every token (a sign of life) costs one write to an attribute and nothing here.

    watch(key)      looked at no later than `due_us(key)` says now
    ring(now_us)    the keys that are due

A heap, with one valid entry for each key. Entries of keys that are over go when their time comes, or when they are more
than half.
"""

import heapq
from collections.abc import Callable, Iterator

from engine.base import limits


class Alarms:
    def __init__(self, due_us: Callable[[int], int | None]) -> None:
        """`due_us` of a key that is over, or unknown, is None."""
        self._due_us = due_us
        self._heap: list[tuple[int, int]] = []  # (when to look, key)
        self._looks_us: dict[int, int] = {}  # of each key: its valid entry
        self._dense = limits.WATCHED_MIN  # entries at which those that are over are dropped

    def __len__(self) -> int:
        return len(self._heap)

    def watch(self, key: int) -> None:
        due_us = self._due_us(key)
        if due_us is None or self._looks_us.get(key, due_us + 1) <= due_us:
            return  # it is looked at by then
        self._looks_us[key] = due_us
        heapq.heappush(self._heap, (due_us, key))
        if len(self._heap) > self._dense:
            self._drop_those_over()

    @property
    def next_us(self) -> int | None:
        """When to look, at the latest: the first may have been moved since."""
        while self._heap:
            looks_us, key = self._heap[0]
            if self._looks_us.get(key) == looks_us and self._due_us(key) is not None:
                return looks_us
            self._replace_first(key, looks_us, None)
        return None

    def ring(self, now_us: int) -> Iterator[int]:
        """Each key that is due, once. The caller ends what it stands for, or moves it, before asking for the next."""
        while (looks_us := self.next_us) is not None and looks_us <= now_us:
            key = self._heap[0][1]
            due_us = self._due_us(key)
            if due_us is not None and due_us > now_us:
                self._replace_first(key, looks_us, due_us)
                continue
            self._replace_first(key, looks_us, None)
            yield key

    def _replace_first(self, key: int, looks_us: int, due_us: int | None) -> None:
        if due_us is not None:
            self._looks_us[key] = due_us
            heapq.heapreplace(self._heap, (due_us, key))
            return
        heapq.heappop(self._heap)
        if self._looks_us.get(key) == looks_us:
            del self._looks_us[key]

    def _drop_those_over(self) -> None:
        due_us = {key: due_us for key in self._looks_us if (due_us := self._due_us(key)) is not None}
        self._looks_us = due_us
        self._heap = [(due_us, key) for key, due_us in due_us.items()]
        heapq.heapify(self._heap)
        self._dense = max(limits.WATCHED_MIN, 2 * len(self._heap))
