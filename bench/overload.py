"""What is left of the goodput when far more is asked than can be served: 2x and 10x of the peak, in an open loop.

    python -m bench.overload

    peak     closed loop, at the concurrency of a few that gives the most
    2x, 10x  Poisson arrivals at a multiple of the peak; a client says which TTFT it needs and does not come back

Goodput is requests per second that were answered whole and within the SLO, and counts from when a request was meant to
be sent. A server that queues what it cannot serve in time answers everybody late: goodput 0 at full throughput. One
that refuses at a price of its own has less left for those it accepts.

Workers are paced, so capacity is theirs and not the machine's; the router, its sockets and the clients are real.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from bench.cluster import cluster, cpu_s
from bench.figures import Bar, Figure, figure_of, save
from control_plane.options import EngineOptions, ExecutorKind
from deploy.local import LocalCluster
from triptych.load.measurement import measure as measure_load
from triptych.load.options import LoadOptions, Slo

ENGINE = EngineOptions(model="oracle", executor=ExecutorKind.PACED, max_model_len=1_024, kv_cache_mib=256)
SLO = Slo(ttft_ms=2_000, tpot_ms=100)
CONCURRENCIES = (8, 12, 16)
PHASE_S = 20.0
ROUNDS = 3
MULTIPLES = (2, 10)
QUIET_TIMEOUT_S = 10.0
POLL_S = 0.1

GOODPUT = {
    multiple: Bar(
        name=f"overload {multiple}x",
        claim=f"goodput at {multiple} times the rate of the peak, beside the peak's",
        unit="x",
        limit=limit,
        at_least=True,
    )
    for multiple, limit in zip(MULTIPLES, (0.9, 0.8), strict=True)
}
SILENT = Bar(
    name="overload, untold",
    claim="requests that were neither answered whole nor refused with Retry-After",
    unit="requests",
    limit=0,
)
MEMORY = Bar(
    name="overload, memory",
    claim="the router's resident memory after the last round, beyond that after the first",
    unit="MiB",
    limit=8,
)
LEFT = Bar(
    name="overload, left",
    claim="requests that the router still holds when all clients are gone",
    unit="requests",
    limit=0,
)


@dataclass(frozen=True, slots=True)
class Phase:
    """One load, and what it cost the router."""

    values: Mapping[str, Any]  # as `triptych bench serve` has them
    router_cpu_s: float

    @property
    def goodput(self) -> float:
        return float(self.values["request_goodput"] or 0.0)

    @property
    def untold(self) -> int:
        return int(self.values["failed"] + self.values["refused"] - self.values["refused_with_retry_after"])


@dataclass(frozen=True, slots=True)
class Round:
    peak: Phase
    overloads: Mapping[int, Phase]
    router_bytes: int
    left: int


class Overload:
    """A running cluster under one load after the other, never twice with the same prompts."""

    def __init__(self, running: LocalCluster, phase_s: float) -> None:
        self._running = running
        self._phase_s = phase_s
        self._seed = 0

    async def round(self) -> Round:
        peak = max([await self.closed(concurrency) for concurrency in CONCURRENCIES], key=lambda phase: phase.goodput)
        overloads = {multiple: await self.open(multiple * peak.goodput) for multiple in MULTIPLES}
        left = await self._left()
        return Round(peak, overloads, resident_bytes(self._running.router.pid), left)

    async def closed(self, concurrency: int) -> Phase:
        return await self._phase(concurrency=concurrency)

    async def open(self, rate: float) -> Phase:
        return await self._phase(rate=rate)

    async def _phase(self, **load: Any) -> Phase:
        self._seed += 1
        options = replace(workload(self._running.url), seed=self._seed, duration_s=self._phase_s, **load)
        before_s = cpu_s(self._running.router.pid)
        measured = await measure_load(options)
        return Phase(measured.values, cpu_s(self._running.router.pid) - before_s)

    async def _left(self) -> int:
        """Requests that are still there after a while in which nobody asks for anything."""
        loop, in_flight = asyncio.get_running_loop(), -1
        deadline_s = loop.time() + QUIET_TIMEOUT_S
        async with httpx.AsyncClient(trust_env=False) as client:
            while in_flight and loop.time() < deadline_s:
                await asyncio.sleep(POLL_S)
                in_flight = int((await client.get(f"{self._running.admin_url}/ready")).json()["in_flight"])
        return in_flight


def workload(url: str) -> LoadOptions:
    """Prompts of 128 tokens, answers of 16: prefill is what there is too little of, as where people wait for it."""
    return LoadOptions(
        url=url,
        requests=1_000_000,
        input_len=128,
        output_len=16,
        ignore_eos=True,
        slo=SLO,
        slo_headers=True,
        warmup=8,
        timeout_s=120,
    )


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4_096


async def measure(rounds: int = ROUNDS, phase_s: float = PHASE_S) -> list[Figure]:
    async with cluster(ENGINE) as running:
        overload = Overload(running, phase_s)
        taken = [await overload.round() for _ in range(rounds)]
    return figures_of(taken)


def figures_of(rounds: Sequence[Round]) -> list[Figure]:
    goodput = [_goodput(rounds, multiple) for multiple in MULTIPLES]
    return [*goodput, _untold(rounds), _memory(rounds), _left(rounds)]


def _goodput(rounds: Sequence[Round], multiple: int) -> Figure:
    ratios = [each.overloads[multiple].goodput / each.peak.goodput for each in rounds]
    last, peak = rounds[-1].overloads[multiple], rounds[-1].peak
    return figure_of(
        GOODPUT[multiple],
        ratios,
        peak_per_s=round(peak.goodput, 2),
        peak_concurrency=peak.values["max_concurrent_requests"],
        goodput_per_s=round(last.goodput, 2),
        completed=last.values["completed"],
        refused=last.values["refused_by_status"],
        p99_ttft_ms=_rounded(last.values["p99_ttft_ms"]),
        median_refusal_ms=_rounded(last.values["median_refusal_ms"]),
        p99_refusal_ms=_rounded(last.values["p99_refusal_ms"]),
        router_cpu_share=round(last.router_cpu_s / last.values["duration"], 3),
        router_cpu_us_per_refusal=_refusal_cost_us(last, peak),
        client_cpu_share=round(last.values["client_cpu_share"], 3),
        p99_lag_ms=_rounded(last.values["p99_lag_ms"]),
    )


def _refusal_cost_us(phase: Phase, peak: Phase) -> int | None:
    """What is left of the router's time when every answer has cost what it costs at the peak."""
    if not phase.values["refused"]:
        return None
    per_answer_s = peak.router_cpu_s / peak.values["completed"]
    refusals_s: float = phase.router_cpu_s - per_answer_s * phase.values["completed"]
    return round(refusals_s * 1e6 / int(phase.values["refused"]))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _untold(rounds: Sequence[Round]) -> Figure:
    phases = [phase for each in rounds for phase in each.overloads.values()]
    trouble = {reason: count for phase in phases for reason, count in phase.values["failed_by_reason"].items()}
    return _worst(SILENT, [phase.untold for phase in phases], **trouble)


def _memory(rounds: Sequence[Round]) -> Figure:
    first, *_, last = (each.router_bytes for each in rounds)
    return _worst(MEMORY, [(last - first) / 2**20], resident_mib=last >> 20)


def _left(rounds: Sequence[Round]) -> Figure:
    return _worst(LEFT, [each.left for each in rounds])


def _worst(bar: Bar, counts: Sequence[float], **notes: Any) -> Figure:
    worst = max(counts)
    return Figure(bar=bar, value=worst, interval=(worst, worst), samples=len(counts), notes=notes)


def main() -> None:
    figures = asyncio.run(measure())
    for figure in figures:
        print(figure)
    print(f"wrote {save('overload', figures)}")


if __name__ == "__main__":
    main()
