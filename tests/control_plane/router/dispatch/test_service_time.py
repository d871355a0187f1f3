"""A bound that most durations keep, soon after they change."""

from random import Random

from control_plane.router.dispatch.service_time import ServiceTime


def test_nothing_is_known_before_the_first() -> None:
    assert ServiceTime().bound_us == 0


def test_of_equal_durations_it_is_that_one() -> None:
    times = ServiceTime()
    for _ in range(50):
        times.note(1_000)
    assert times.bound_us == 1_000


def test_most_are_within_it_and_it_is_not_far_off() -> None:
    random, times = Random(1), ServiceTime()
    late = 0
    for number in range(2_000):
        duration_us = int(random.gammavariate(4, 25_000))
        late += number >= 100 and duration_us > times.bound_us
        times.note(duration_us)
    assert 0.02 < late / 1_900 < 0.15
    assert 120_000 < times.bound_us < 320_000


def test_it_follows() -> None:
    times = ServiceTime()
    for duration_us in [1_000] * 50 + [100_000] * 10:
        times.note(duration_us)
    assert times.bound_us > 70_000
    for _ in range(60):
        times.note(1_000)
    assert times.bound_us < 2_000
