"""The queue's rate: measured only while somebody waits, believed only after a while, and newer news counts more."""

from control_plane.router.dispatch.drain_rate import DrainRate

SECOND_US = 1_000_000


def drain(rate: DrainRate, start_s: int, end_s: int, tokens: int) -> None:
    for second in range(start_s, end_s):
        rate.note(tokens, waiting=True, now_us=second * SECOND_US)


def test_nothing_is_predicted_without_a_measurement() -> None:
    rate = DrainRate()
    assert rate.wait_us(100) is None
    rate.note(500, waiting=True, now_us=0)  # who was placed before anybody waited says nothing about the rate
    rate.note(500, waiting=True, now_us=SECOND_US // 2)
    assert rate.wait_us(100) is None


def test_tokens_before_it_are_a_wait() -> None:
    rate = DrainRate()
    drain(rate, 0, 10, 500)
    assert rate.wait_us(2_000) == 4 * SECOND_US
    assert rate.wait_us(0) == 0


def test_a_quiet_hour_is_no_part_of_it() -> None:
    rate = DrainRate()
    drain(rate, 0, 10, 500)
    rate.note(500, waiting=False, now_us=10 * SECOND_US)
    drain(rate, 3_600, 3_602, 500)
    assert rate.wait_us(2_000) == 4 * SECOND_US


def test_old_news_is_forgotten() -> None:
    rate = DrainRate()
    drain(rate, 0, 100, 500)
    drain(rate, 100, 160, 50)
    wait_us = rate.wait_us(50)
    assert wait_us is not None and 0.9 * SECOND_US < wait_us <= SECOND_US
