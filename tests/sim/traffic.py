"""Traffic: open-loop clients of several tenants in a virtual cluster that is paced like a real one, and what they got.

Nothing breaks here and no byte is checked (`simulation` does both); what counts is when. Clients do not wait for one
another: who is slow gets behind, as in production.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from random import Random
from typing import Any

from control_plane.router.requests import Ended, RequestStats, Submit, TokensReady
from engine.executors.oracle import OracleExecutor, oracle_schema
from engine.executors.paced import SMOLLM2_ONE_CORE
from engine.step_time import StepTimeModel
from engine.types import Role, SamplingParams
from tests.sim.cluster import VirtualCluster
from tests.sim.processes import Shape, WorkerShape
from tests.sim.weather import Noise, Weather

START_US = 100_000  # everybody has met everybody
VOCABULARY = 1_000
SPEED = 8  # times as fast as one core: a step of 512 prompt tokens takes about 35 ms, as on a small accelerator


def faster(model: StepTimeModel, times: float) -> StepTimeModel:
    return StepTimeModel(**{name: value / times for name, value in asdict(model).items()})


def paced_shape(*, prefill: int, decode: int, columns: int = 1_000, **router_options: int) -> Shape:
    """Realistic steps: budgets and blocks as in production, costs as measured, divided by SPEED."""
    roles = [Role.PREFILL] * prefill + [Role.DECODE] * decode
    workers = tuple(
        WorkerShape(name=f"{role.value}{index}", roles=frozenset({role}), columns=columns)
        for index, role in enumerate(roles)
    )
    return Shape(
        workers=workers,
        block_size=16,
        step_tokens=512,
        growth_tokens=64,
        job_us=100,
        step_time=faster(SMOLLM2_ONE_CORE, SPEED),
        oracle=OracleExecutor.Config(
            schema=oracle_schema(layers=1, heads=1, head_dim=8), vocab_size=VOCABULARY, trust_read_rows=True
        ),
        watched=False,
        router_options=router_options,
    )


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One tenant's requests: Poisson arrivals, lengths drawn evenly between two bounds."""

    tenant: str
    per_second: float
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int] = (8, 64)
    priority: int = 0
    ttft_slo_ms: int | None = None

    def draw(self, random: Random, span_us: int) -> Iterable[tuple[int, Submit]]:
        at_us = random.expovariate(self.per_second) * 1e6
        while at_us < span_us:
            yield int(at_us), self._submit(random)
            at_us += random.expovariate(self.per_second) * 1e6

    def _submit(self, random: Random) -> Submit:
        return Submit(
            key=0,
            token_ids=tuple(random.choices(range(VOCABULARY), k=random.randint(*self.prompt_tokens))),
            sampling=SamplingParams(temperature=0.0, max_tokens=random.randint(*self.output_tokens)),
            tenant=self.tenant,
            priority=self.priority,
            ttft_slo_ms=self.ttft_slo_ms,
        )


@dataclass(slots=True)
class Visit:
    """One request as its client saw it."""

    submit: Submit
    at_us: int
    first_us: int | None = None
    ended_us: int | None = None
    tokens: int = 0
    stats: RequestStats | None = None
    error: Any = None

    @property
    def finished(self) -> bool:
        return self.ended_us is not None and self.error is None

    @property
    def ttft_ms(self) -> float:
        assert self.first_us is not None
        return (self.first_us - self.at_us) / 1_000


@dataclass(slots=True)
class Outcome:
    visits: list[Visit] = field(default_factory=list)
    end_us: int = 0

    def of(self, tenant: str) -> list[Visit]:
        return [visit for visit in self.visits if visit.submit.tenant == tenant]

    def ttft_ms(self, tenant: str, quantile: float) -> float:
        """Of those that were served; who counts must see to it that none was refused."""
        return quantile_of([visit.ttft_ms for visit in self.of(tenant) if visit.first_us is not None], quantile)

    @property
    def finished(self) -> list[Visit]:
        return [visit for visit in self.visits if visit.finished]

    def served_tokens(self) -> Mapping[str, int]:
        served: dict[str, int] = defaultdict(int)
        for visit in self.finished:
            served[visit.submit.tenant] += len(visit.submit.token_ids) + visit.tokens
        return served


class Traffic:
    """Plays arrivals into a cluster and listens."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self._visits: dict[int, Visit] = {}
        self.cluster = VirtualCluster(seed, shape, Weather(Random(seed), Noise()), self._on_output)
        self._world = self.cluster.world
        self._world.run(until_us=START_US)

    def play(self, arrivals: Sequence[tuple[int, Submit]], *, until_us: int, drain: bool = True) -> Outcome:
        """Let them come, and time pass until `until_us`; with `drain` until the last one has ended."""
        started_us = self._world.now_us
        for at_us, submit in arrivals:
            self._world.schedule(at_us, partial(self._come, submit))
        self._world.run(until_us=started_us + until_us)
        if drain:
            self._world.run(until_us=self._world.now_us + 600_000_000, until=lambda: not self._open)
        return Outcome(list(self._visits.values()), self._world.now_us)

    def _come(self, submit: Submit) -> None:
        key = len(self._visits) + 1
        self._visits[key] = Visit(replace(submit, key=key), self._world.now_us)
        self.cluster.submit(self._visits[key].submit)

    @property
    def _open(self) -> bool:
        return any(visit.ended_us is None for visit in self._visits.values())

    def _on_output(self, output: Any) -> None:
        visit = self._visits[output.key]
        match output:
            case TokensReady():
                visit.tokens += len(output.token_ids)
                visit.first_us = visit.first_us or self._world.now_us
            case Ended():
                visit.ended_us, visit.stats, visit.error = self._world.now_us, output.stats, output.error


def arrivals_of(streams: Sequence[Stream], *, seed: int, span_us: int) -> list[tuple[int, Submit]]:
    """Each stream has its own randomness: a tenant asks for the same, whoever else comes."""
    drawn = [stream.draw(Random(f"{stream.tenant} {seed}"), span_us) for stream in streams]
    return sorted((arrival for stream in drawn for arrival in stream), key=lambda arrival: arrival[0])


def quantile_of(values: Sequence[float], quantile: float) -> float:
    """The smallest value that so large a part of all does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]
