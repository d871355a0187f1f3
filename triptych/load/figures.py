"""Samples to numbers, under the names of `vllm bench serve`. Pure.

ttft           due -> first chunk with choices         itl   chunk -> next chunk
second_token   first chunk -> second: with prefill and decode apart, the KV's way lies in between
tpot           (last chunk - first) / (tokens - 1)     e2el  due -> last chunk with choices
lag            due -> sent: the generator's own lateness, contained in ttft and e2el
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from triptych.load.samples import Distribution, Outcome, Samples

PERCENTILES: Final = (90, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What the load cost the generator itself."""

    cpu_s: float
    in_flight_highest: int


def figures(samples: Samples, effort: Effort, *, has_slo: bool) -> dict[str, Any]:
    """As JSON has them. What there is no value for is null."""
    return {
        **_counts(samples),
        **_rates(samples, has_slo=has_slo),
        **_latencies(samples),
        **_generator(samples, effort),
    }


def distributions(samples: Samples) -> Mapping[str, Distribution]:
    return {
        "ttft": samples.ttft_ms,
        "second_token": samples.second_ms,
        "tpot": samples.tpot_ms,
        "itl": samples.itl_ms,
        "e2el": samples.e2el_ms,
        "refusal": samples.refusal_ms,
    }


def _counts(samples: Samples) -> dict[str, Any]:
    outcomes = samples.outcomes
    return {
        "duration": samples.duration_s,
        "completed": outcomes[Outcome.COMPLETED],
        "failed": outcomes[Outcome.FAILED],
        "failed_by_reason": dict(samples.failures),
        "refused": outcomes[Outcome.REFUSED],
        "refused_by_status": {str(status): count for status, count in sorted(samples.refusals.items())},
        "refused_with_retry_after": samples.refusals_with_retry_after,
        "messages": dict(samples.texts),
        "total_input_tokens": samples.prompt_tokens,
        "total_cached_tokens": samples.cached_tokens,
        "total_output_tokens": samples.output_tokens,
    }


def _rates(samples: Samples, *, has_slo: bool) -> dict[str, Any]:
    per_s = (lambda amount: amount / samples.duration_s) if samples.duration_s > 0 else (lambda amount: None)
    return {
        "request_throughput": per_s(samples.outcomes[Outcome.COMPLETED]),
        "request_goodput": per_s(samples.good) if has_slo else None,
        "output_throughput": per_s(samples.output_tokens),
        "total_token_throughput": per_s(samples.prompt_tokens + samples.output_tokens),
    }


def _latencies(samples: Samples) -> dict[str, Any]:
    return {
        f"{figure}_{name}_ms": value
        for name, distribution in distributions(samples).items()
        for figure, value in described(distribution).items()
    }


def described(distribution: Distribution) -> dict[str, float | None]:
    """Mean, median, deviation, percentiles; interpolated as numpy, and so vLLM, does it."""
    names = ("mean", "median", "std", *(f"p{percentile}" for percentile in PERCENTILES))
    if not distribution.count:
        return dict.fromkeys(names)
    values = np.frombuffer(distribution.values)
    median, *percentiles = np.percentile(values, (50, *PERCENTILES)).tolist()
    numbers = (distribution.sum / distribution.count, median, float(values.std()), *percentiles)
    return dict(zip(names, numbers, strict=True))


def _generator(samples: Samples, effort: Effort) -> dict[str, Any]:
    lag = described(samples.lag_ms)
    return {
        "max_concurrent_requests": effort.in_flight_highest,
        "mean_lag_ms": lag["mean"],
        "p99_lag_ms": lag["p99"],
        "max_lag_ms": max(samples.lag_ms.values, default=None),
        "client_cpu_share": effort.cpu_s / samples.duration_s if samples.duration_s > 0 else None,
        "client_cpu_us_per_chunk": effort.cpu_s * 1e6 / samples.chunks if samples.chunks else None,
    }
