"""AttemptTable: which attempt of which router each sequence of this worker is.

    (router link, request, attempt)  <->  seq_id

A link stands for one router's one session: when it is lost, everything under it is void (DESIGN 1: every worker
frees that router's attempts). `seq_id` is never reused, so late events for a forgotten sequence find nobody.
"""

import heapq
from collections import defaultdict
from dataclasses import dataclass

from engine.base.machine import LinkName
from kv_transfer.reports import EncodeWork, Work


@dataclass(slots=True)
class Attempt:
    link: LinkName
    request: int
    attempt: int
    seq_id: int
    deadline_us: int
    work: Work | EncodeWork

    @property
    def seq_ids(self) -> tuple[int, ...]:
        """Its own, and those of a group's choices."""
        return (self.seq_id, *(self.work.children if isinstance(self.work, Work) else ()))

    @property
    def key(self) -> tuple[LinkName, int, int]:
        return (self.link, self.request, self.attempt)


class AttemptTable:
    def __init__(self) -> None:
        self._by_sequence: dict[int, Attempt] = {}
        self._by_key: dict[tuple[LinkName, int, int], Attempt] = {}
        self._by_link: defaultdict[LinkName, dict[int, Attempt]] = defaultdict(dict)
        self._deadlines: list[tuple[int, int]] = []  # heap of (deadline_us, seq_id); forgotten ones are skipped
        self._next_seq_id = 1

    def mint(self) -> int:
        seq_id = self._next_seq_id
        self._next_seq_id += 1
        return seq_id

    def add(self, attempt: Attempt) -> None:
        self._by_sequence[attempt.seq_id] = attempt
        self._by_key[attempt.key] = attempt
        self._by_link[attempt.link][attempt.seq_id] = attempt
        heapq.heappush(self._deadlines, (attempt.deadline_us, attempt.seq_id))

    def rename(self, attempt: Attempt, number: int) -> None:
        """A binding to this very worker: the same sequence goes on under the target's attempt number."""
        del self._by_key[attempt.key]
        attempt.attempt = number
        self._by_key[attempt.key] = attempt

    def find(self, link: LinkName, request: int, attempt: int) -> Attempt | None:
        return self._by_key.get((link, request, attempt))

    def of_sequence(self, seq_id: int) -> Attempt | None:
        return self._by_sequence.get(seq_id)

    def of_link(self, link: LinkName) -> list[Attempt]:
        return list(self._by_link.get(link, {}).values())

    def forget(self, seq_id: int) -> None:
        attempt = self._by_sequence.pop(seq_id, None)
        if attempt is None:
            return
        del self._by_key[attempt.key]
        del self._by_link[attempt.link][seq_id]
        if not self._by_link[attempt.link]:
            del self._by_link[attempt.link]

    def expired(self, now_us: int) -> list[Attempt]:
        """Attempts whose time is up, each once."""
        due = []
        while (deadline_us := self.next_deadline_us) is not None and deadline_us <= now_us:
            _, seq_id = heapq.heappop(self._deadlines)
            due.append(self._by_sequence[seq_id])
        return due

    @property
    def next_deadline_us(self) -> int | None:
        while self._deadlines and self._deadlines[0][1] not in self._by_sequence:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def __len__(self) -> int:
        return len(self._by_sequence)
