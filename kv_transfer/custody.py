"""Custody: who still touches a sequence's units, and the one place that lets them go.

A block has two lifetimes, the request's and the writer's (DESIGN 2.2). The request may end at any moment: cancel,
deadline, loss of a peer. A codec thread that is reading or writing the units at that moment does not know. Freeing
the units under it hands the next request someone else's bytes (reliability lessons 1-3), so:

    request lifetime   |------------------ end() |
    codec jobs             |--job--|   |--job-------|
    units              |============================| released here, once

A prefill reads the embeddings of its images, which are sequences too. To those it is a job like any other, until the
prompt is computed, or the prefill's own units are released, whatever delays that:

    prefill            |--reads--------------- end() ...|  Release(prefill)
    embedding          |=================================| Release(embedding), in this order

`Custody` counts jobs; it does not start them, and it knows nothing about transfers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.base.machine import Command
from engine.commands import Release


@dataclass(slots=True)
class _Holding:
    jobs: int = 0
    ended: bool = False
    reads: tuple[int, ...] = ()  # sequences to which this one is a job


class Custody:
    """Every sequence whose units this worker's engine has granted and not yet been told to release."""

    def __init__(self) -> None:
        self._holdings: dict[int, _Holding] = {}

    def begin(self, seq_id: int) -> None:
        """The engine has been, or is about to be, asked for units in this sequence's name."""
        assert seq_id not in self._holdings, f"sequence {seq_id} begun twice"
        self._holdings[seq_id] = _Holding()

    def enter(self, seq_id: int) -> None:
        """A codec job on these units is about to start. Never after `end`."""
        holding = self._holdings[seq_id]
        assert not holding.ended, f"job on ended sequence {seq_id}"
        holding.jobs += 1

    def leave(self, seq_id: int) -> list[Command]:
        """A codec job has returned. Releases the units if it was the last one of an ended sequence."""
        holding = self._holdings[seq_id]
        holding.jobs -= 1
        assert holding.jobs >= 0, f"more jobs left than entered sequence {seq_id}"
        return self._release_if_idle(seq_id)

    def reads(self, seq_id: int, others: Sequence[int]) -> None:
        """Steps of this sequence are about to read the units of others."""
        for other in others:
            self.enter(other)
        self._holdings[seq_id].reads = tuple(others)

    def has_read(self, seq_id: int) -> list[Command]:
        """No step of this sequence reads other units than its own any more. Idempotent."""
        holding = self._holdings.get(seq_id)
        if holding is None:
            return []
        others, holding.reads = holding.reads, ()
        return [command for other in others for command in self.leave(other)]

    def end(self, seq_id: int) -> list[Command]:
        """The request needs these units no more. Idempotent."""
        holding = self._holdings.get(seq_id)
        if holding is None:
            return []
        holding.ended = True
        return self._release_if_idle(seq_id)

    def ended(self, seq_id: int) -> bool:
        """True once nothing may start to touch these units any more."""
        holding = self._holdings.get(seq_id)
        return holding is None or holding.ended

    def _release_if_idle(self, seq_id: int) -> list[Command]:
        holding = self._holdings[seq_id]
        if not holding.ended or holding.jobs:
            return []
        let_go = self.has_read(seq_id)
        del self._holdings[seq_id]
        return [Command(Release(seq_id=seq_id)), *let_go]

    def __len__(self) -> int:
        return len(self._holdings)
