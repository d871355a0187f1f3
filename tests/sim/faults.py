"""FaultPlan: what goes wrong, when, as data drawn from a seed. Plain values: a plan prints, compares and can be cut.

Every fault ends by `FAULTS_END_US`, and no request can lose so many placements that giving up would be right: after
that moment, and with a worker of each role alive again, every request must end well (liveness).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from random import Random
from typing import TypeAlias

from engine.base import failpoints
from engine.types import Role
from tests.sim.cluster import CONTROLLER, ROUTER, VirtualCluster
from tests.sim.processes import Shape, WorkerShape
from tests.sim.weather import Noise
from tests.sim.workload import TENANTS

LAST_FAULT_US = 5_000_000  # none begins later, ambushes included
FAULTS_END_US = 10_000_000
EVENTS_MAX = 6  # each may cost a request a placement or two, of the eight that it has


@dataclass(frozen=True, slots=True)
class Kill:
    name: str
    down_us: int
    detected_after_us: int | None  # None: no reset is sent (power loss)


@dataclass(frozen=True, slots=True)
class Freeze:
    name: str
    duration_us: int


@dataclass(frozen=True, slots=True)
class Cut:
    one: str
    other: str
    one_way: bool
    duration_us: int


@dataclass(frozen=True, slots=True)
class Reset:
    one: str
    other: str


@dataclass(frozen=True, slots=True)
class Mishap:
    """The next control message between the two is doubled or overtaken: that session must end, and no more."""

    kind: str
    one: str
    other: str


@dataclass(frozen=True, slots=True)
class Drain:
    name: str
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Somebody has all caches forgotten."""


@dataclass(frozen=True, slots=True)
class Ambush:
    """A fault at a moment that matters: when a worker comes by a failpoint for the `hits`-th time from now."""

    name: str
    failpoint: str
    hits: int
    fault: Kill | Freeze | Cut | Reset


Fault: TypeAlias = Kill | Freeze | Cut | Reset | Mishap | Drain | Forget | Ambush


@dataclass(frozen=True, kw_only=True)
class FaultPlan:
    noise: Noise
    events: tuple[tuple[int, Fault], ...]  # (at_us, what)


# -- drawing -----------------------------------------------------------------------------------------------------------
def draw_shape(random: Random) -> Shape:
    """A small cluster with at least one worker of each role, and pools from hardly enough to roomy."""
    prefill, decode = frozenset({Role.PREFILL}), frozenset({Role.DECODE})
    layout = random.choice(("pd", "pdd", "ppdd", "ppd", "mm", "m", "pdm", "pmm", "ppdm"))
    roles = {"p": prefill, "d": decode, "m": prefill | decode}
    workers = tuple(
        WorkerShape(name=f"{letter}{index}", roles=roles[letter], columns=random.choice((16, 20, 30, 60)))
        for index, letter in enumerate(layout)
    )
    return Shape(
        workers=workers,
        growth_tokens=random.choice((0, 8, 32)),
        latency_us=random.choice((200, 2_000, 15_000)),
        bytes_per_second=random.choice((None, 200_000)),
        job_us=random.choice((50, 2_000, 15_000)),
    )


def with_sight(random: Random, shape: Shape) -> Shape:
    """The same workers, of a model that sees: with some encode workers beside them, or with none; one that does all
    else may encode, too. Memory for embeddings is from hardly enough for the images of one prompt to roomy."""
    sighted: list[WorkerShape] = []
    for worker in shape.workers:
        columns = random.choice((20, 24, 60)) if Role.PREFILL in worker.roles else 0
        everything = len(worker.roles) > 1 and random.random() < 0.3
        roles = worker.roles | {Role.ENCODE} if everything else worker.roles
        sighted.append(replace(worker, roles=roles, embedding_columns=columns))
    for index in range(random.choice((0, 1, 1, 2))):
        roles = frozenset({Role.ENCODE})
        sighted.append(WorkerShape(name=f"e{index}", roles=roles, embedding_columns=random.choice((10, 12, 40))))
    return replace(shape, workers=tuple(sighted), image_us=random.choice((1_000, 20_000, 200_000)))


def draw_router_options(random: Random) -> dict[str, int]:
    """As many tenants as the workload has, or one; prompts that wait in the router, or at workers."""
    return {
        "tenants": random.choice((1, len(TENANTS), len(TENANTS))),
        "prefill_ahead_tokens": random.choice((1, 48, 1_024)),
        "no_progress_ms": random.choice((2_000, 30_000)),
    }


def draw_plan(random: Random, shape: Shape) -> FaultPlan:
    events = [(_draw_instant(random), _draw_fault(random, shape)) for _ in range(random.randrange(EVENTS_MAX + 1))]
    return FaultPlan(noise=_draw_noise(random), events=tuple(sorted(events, key=lambda event: event[0])))


def _draw_instant(random: Random) -> int:
    return random.randrange(300_000, LAST_FAULT_US)


def _draw_noise(random: Random) -> Noise:
    """Each kind is often off, so that the others are seen alone (swarm testing)."""

    def chance(*values: float) -> float:
        return random.choice((0.0, *values))

    return Noise(
        drop=chance(0.02, 0.08),
        duplicate=chance(0.05, 0.2),
        overtake=chance(0.05, 0.3),
        delay=chance(0.05),
        damage=chance(0.02, 0.08),
        control_delay=chance(0.03, 0.1),
    )


def _draw_fault(random: Random, shape: Shape) -> Fault:
    workers = shape.names
    match random.choice(("ambush", "ambush", "process", "process", "network", "network", "mishap", "drain", "forget")):
        case "ambush":
            return _draw_ambush(random, workers)
        case "process":
            return _draw_process_fault(random, random.choice((*workers, *workers, ROUTER, CONTROLLER)))
        case "network":
            return _draw_network_fault(random, *random.choice(_pairs(workers)))
        case "mishap":
            return Mishap(random.choice(("double", "overtake")), *random.choice(_pairs(workers, bulk=False)))
        case "forget":
            return Forget()
        case _:
            return Drain(random.choice(workers), random.choice((0, 200, 2_000)))


def _draw_ambush(random: Random, workers: Sequence[str]) -> Ambush:
    name = random.choice(workers)
    peer = random.choice([other for other in (*workers, *workers, ROUTER) if other != name])
    process = random.random() < 0.7
    fault = _draw_process_fault(random, name) if process else _draw_network_fault(random, name, peer)
    return Ambush(name, random.choice(failpoints.NAMES), random.randint(1, 12), fault)


def _draw_process_fault(random: Random, name: str) -> Kill | Freeze:
    if random.random() < 0.6:
        return Kill(name, _draw_down_us(random), random.choice((0, 200_000, None)))
    return Freeze(name, random.choice((random.randrange(3_000_000), random.randrange(5_000_000))))


def _draw_network_fault(random: Random, one: str, other: str) -> Cut | Reset:
    if random.random() < 0.3:
        return Reset(one, other)
    return Cut(one, other, random.random() < 0.5, random.randrange(100_000, 4_500_000))


def _draw_down_us(random: Random) -> int:
    return random.choice((random.randrange(100_000), random.randrange(3_000_000)))


def _pairs(workers: Sequence[str], *, bulk: bool = True) -> list[tuple[str, str]]:
    """Who talks to whom."""
    control = [(ROUTER, CONTROLLER)] + [(end, name) for name in workers for end in (ROUTER, CONTROLLER)]
    return control + (2 * list(combinations(workers, 2)) if bulk else [])


# -- carrying out ------------------------------------------------------------------------------------------------------
def inject(cluster: VirtualCluster, fault: Fault) -> None:
    later = cluster.world.schedule
    match fault:
        case Kill(name, down_us, detected_after_us):
            cluster.kill(name, detected_after_us)
            later(down_us, partial(cluster.restart, name))
        case Freeze(name, duration_us):
            cluster.freeze(name, duration_us)
        case Cut(one, other, one_way, duration_us):
            cluster.network.cut(one, other, one_way=one_way)
            later(duration_us, partial(cluster.network.heal, one, other))
        case Reset(one, other):
            cluster.network.reset(one, other)
        case Mishap(kind, one, other):
            cluster.weather.arm(kind, one, other)
        case Drain(name, timeout_ms):
            cluster.drain(name, timeout_ms)
        case Forget():
            cluster.reset_cache()
        case Ambush(name, failpoint, hits, then):
            cluster.on_failpoint(name, failpoint, hits, partial(inject, cluster, then))
    cluster.weather.injected[type(fault).__name__.lower()] += 1
