"""Deadlines that move without a word ring when they should; what is kept of those that are over is bounded."""

from random import Random

import pytest

from control_plane.router.dispatch.alarms import Alarms
from engine.base import limits


def test_a_deadline_that_moved_rings_at_its_new_time() -> None:
    due_us = {1: 100, 2: 150}
    alarms = Alarms(due_us.get)
    alarms.watch(1)
    alarms.watch(2)
    due_us[1] = 300
    assert alarms.next_us == 100  # nobody has said that it moved
    assert list(alarms.ring(200)) == [2]
    assert alarms.next_us == 300
    assert list(alarms.ring(300)) == [1] and alarms.next_us is None


def test_an_earlier_deadline_is_watched_by_saying_so() -> None:
    due_us = {1: 100}
    alarms = Alarms(due_us.get)
    alarms.watch(1)
    due_us[1] = 50
    alarms.watch(1)
    assert alarms.next_us == 50
    assert list(alarms.ring(100)) == [1]


def test_what_is_over_does_not_ring() -> None:
    due_us = {1: 100, 2: 100}
    alarms = Alarms(due_us.get)
    for key in (1, 2, 3):
        alarms.watch(key)
    for key in alarms.ring(100):
        due_us.pop(3 - key)  # the first ends the second
    assert alarms.next_us is None and len(alarms) == 0


@pytest.mark.parametrize("seed", range(20))
def test_each_rings_once_and_on_time_whatever_moves(seed: int) -> None:
    random = Random(seed)
    due_us: dict[int, int] = {}
    alarms = Alarms(due_us.get)
    for now_us in range(1_000):
        assert all(due >= now_us for due in due_us.values())
        if random.random() < 0.5:
            due_us[now_us] = now_us + random.randint(1, 50)
            alarms.watch(now_us)
        for key in list(due_us):
            if random.random() < 0.1:
                due_us[key] += random.randrange(30)
            elif random.random() < 0.02:
                del due_us[key]
        for key in alarms.ring(now_us):
            assert due_us.pop(key) == now_us
        assert (alarms.next_us or 0) <= min(due_us.values(), default=now_us) and (alarms.next_us is None or due_us)
        assert alarms.next_us is None or alarms.next_us > now_us


def test_those_over_are_dropped_long_before_their_time() -> None:
    due_us: dict[int, int] = {}
    alarms = Alarms(due_us.get)
    for key in range(20 * limits.WATCHED_MIN):
        due_us[key] = 1_000_000
        alarms.watch(key)
        if key >= 10:
            del due_us[key - 10]
        assert len(alarms) <= limits.WATCHED_MIN
