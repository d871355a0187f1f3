"""Custody: units are released once, after both the request and the last codec job have ended (DESIGN 2.2)."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from engine.base.machine import Command
from engine.commands import Release
from kv_transfer.custody import Custody

RELEASE_1 = [Command(Release(seq_id=1))]


@pytest.fixture
def custody() -> Custody:
    custody = Custody()
    custody.begin(1)
    return custody


def test_without_jobs_the_end_releases_at_once(custody: Custody) -> None:
    assert custody.end(1) == RELEASE_1
    assert len(custody) == 0


def test_a_job_holds_the_units_beyond_the_end(custody: Custody) -> None:
    custody.enter(1)
    assert custody.end(1) == []
    assert custody.ended(1)
    assert len(custody) == 1
    assert custody.leave(1) == RELEASE_1


def test_every_job_counts(custody: Custody) -> None:
    """Two pending transfers behind one boolean crashed an engine (reliability lesson 3)."""
    custody.enter(1)
    custody.enter(1)
    custody.end(1)
    assert custody.leave(1) == []
    assert custody.leave(1) == RELEASE_1


def test_jobs_come_and_go_while_the_request_lives(custody: Custody) -> None:
    custody.enter(1)
    assert custody.leave(1) == []
    assert not custody.ended(1)
    custody.enter(1)
    assert custody.leave(1) == []


def test_the_end_is_idempotent_also_while_a_job_runs_and_after_the_release(custody: Custody) -> None:
    custody.enter(1)
    assert custody.end(1) == custody.end(1) == []
    custody.leave(1)
    assert custody.end(1) == []


def test_an_unknown_sequence_has_ended(custody: Custody) -> None:
    assert custody.end(2) == []
    assert custody.ended(2)


def test_sequences_do_not_hold_each_other(custody: Custody) -> None:
    custody.begin(2)
    custody.enter(2)
    assert custody.end(1) == RELEASE_1
    assert custody.end(2) == []


def test_no_job_may_start_after_the_end(custody: Custody) -> None:
    custody.enter(1)
    custody.end(1)
    with pytest.raises(AssertionError, match="job on ended sequence 1"):
        custody.enter(1)


def test_mistakes_of_its_callers_are_loud(custody: Custody) -> None:
    with pytest.raises(AssertionError, match="sequence 1 begun twice"):
        custody.begin(1)
    with pytest.raises(AssertionError, match="more jobs left than entered"):
        custody.leave(1)


# -- embeddings that a prefill reads -----------------------------------------------------------------------------------
def released(*seq_ids: int) -> list[Command]:
    return [Command(Release(seq_id=seq_id)) for seq_id in seq_ids]


@pytest.fixture
def reading(custody: Custody) -> Custody:
    """1 reads 2 and 3, which nobody else needs."""
    for image in (2, 3):
        custody.begin(image)
    custody.reads(1, (2, 3))
    assert custody.end(2) == custody.end(3) == []
    return custody


def test_what_is_read_is_let_go_when_it_has_been_read(reading: Custody) -> None:
    assert reading.has_read(1) == released(2, 3)
    assert reading.has_read(1) == []
    assert reading.end(1) == released(1)


def test_what_is_read_is_let_go_after_its_reader(reading: Custody) -> None:
    assert reading.end(1) == released(1, 2, 3)
    assert len(reading) == 0
    assert reading.has_read(1) == []


def test_a_job_on_the_reader_delays_what_it_reads(reading: Custody) -> None:
    """The engine goes on reading until it is told of the release, and that waits for the job."""
    reading.enter(1)
    assert reading.end(1) == []
    assert reading.leave(1) == released(1, 2, 3)


def test_who_still_needs_what_was_read_keeps_it(custody: Custody) -> None:
    custody.begin(2)
    custody.reads(1, (2,))
    assert custody.end(1) == released(1)
    assert custody.end(2) == released(2)


class CustodyMachine(RuleBasedStateMachine):
    """Any interleaving: one release per sequence, never while a job of it runs."""

    sequences = Bundle("sequences")
    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.custody = Custody()
        self.running: dict[int, int] = {}
        self.ended: set[int] = set()
        self.released: list[int] = []

    @rule(target=sequences)
    def begin(self) -> int:
        seq_id = len(self.running) + 1
        self.custody.begin(seq_id)
        self.running[seq_id] = 0
        return seq_id

    @rule(target=jobs, seq_id=sequences, data=st.data())
    @precondition(lambda self: len(self.ended) < len(self.running))
    def enter(self, seq_id: int, data: st.DataObject) -> int:
        if seq_id in self.ended:
            seq_id = data.draw(st.sampled_from(sorted(self.running.keys() - self.ended)))
        self.custody.enter(seq_id)
        self.running[seq_id] += 1
        return seq_id

    @rule(seq_id=consumes(jobs))
    def leave(self, seq_id: int) -> None:
        self.running[seq_id] -= 1
        self.take(self.custody.leave(seq_id))

    @rule(seq_id=sequences)
    def end(self, seq_id: int) -> None:
        self.ended.add(seq_id)
        self.take(self.custody.end(seq_id))

    def take(self, commands: list[Command]) -> None:
        for command in commands:
            assert self.running[command.command.seq_id] == 0
            self.released.append(command.command.seq_id)

    @invariant()
    def released_once_and_only_what_is_idle_and_over(self) -> None:
        over = {seq_id for seq_id in self.ended if self.running[seq_id] == 0}
        assert sorted(self.released) == sorted(over)
        assert len(self.custody) == len(self.running) - len(over)


TestCustodyMachine = CustodyMachine.TestCase
