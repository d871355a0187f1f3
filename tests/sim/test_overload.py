"""Overload in virtual time: what is refused is refused early, so that what is accepted is finished; and prompts that
wait in the router cost no throughput."""

from collections import Counter

import pytest

from tests.sim.traffic import Outcome, Stream, Traffic, arrivals_of, paced_shape

SPAN_US = 12_000_000
CAPACITY_PER_S = 24.0  # of these prompts, about: two prefill workers
PROMPTS = (64, 1_536)
MIXED = (16, 2_048)


def offer(times: float) -> Outcome:
    traffic = Traffic(paced_shape(prefill=2, decode=2, queue_timeout_ms=4_000))
    stream = Stream(tenant="", per_second=CAPACITY_PER_S * times, prompt_tokens=PROMPTS)
    return traffic.play(arrivals_of([stream], seed=1, span_us=SPAN_US), until_us=SPAN_US, drain=False)


def goodput(outcome: Outcome) -> float:
    """Tokens of requests that were finished, per second."""
    return sum(outcome.served_tokens().values()) / (SPAN_US / 1e6)


@pytest.mark.timeout(150)
def test_goodput_stays_when_ten_times_too_much_is_offered() -> None:
    outcomes = {times: offer(times) for times in (0.8, 1.0, 2.0, 10.0)}
    print()
    for times, outcome in outcomes.items():
        errors = Counter(visit.error.message for visit in outcome.visits if visit.error is not None)
        print(
            f"{times:>4} x: {goodput(outcome):>7.0f} tokens/s, p99 {outcome.ttft_ms('', 0.99):>6.0f} ms, {dict(errors)}"
        )
    peak = max(map(goodput, outcomes.values()))
    assert goodput(outcomes[2.0]) >= 0.9 * peak
    assert goodput(outcomes[10.0]) >= 0.8 * peak
    refused = [visit.error for visit in outcomes[10.0].visits if visit.error is not None]
    assert refused and all(error.status == "resource_exhausted" and error.retry_after_ms for error in refused)


@pytest.mark.timeout(150)
def test_waiting_in_the_router_costs_no_throughput() -> None:
    """A burst of 200 mixed prompts: as soon done as if workers had all of them at once, within 2 %."""
    arrivals = arrivals_of([Stream(tenant="", per_second=1e6, prompt_tokens=MIXED)], seed=3, span_us=1_000)[:200]
    assert len(arrivals) == 200
    took_us = {}
    for ahead_tokens in (1_024, 1 << 30):
        shape = paced_shape(
            prefill=2, decode=2, columns=2_000, prefill_ahead_tokens=ahead_tokens, queue_timeout_ms=600_000
        )
        outcome = Traffic(shape).play(arrivals, until_us=1_000)
        assert len(outcome.finished) == 200
        took_us[ahead_tokens] = outcome.end_us
    assert took_us[1_024] <= 1.02 * took_us[1 << 30]
