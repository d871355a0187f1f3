"""One seed, one run: draw a cluster, clients and faults; let it all happen; check every promise (I1 to I5).

    0 ........ clients come, faults happen ........ FAULTS_END .... all requests end .... SETTLE .... quiet

A `Violation` names the seed and the command that replays it.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random

from tests.sim.cluster import ROUTER, VirtualCluster
from tests.sim.faults import (
    FAULTS_END_US,
    LAST_FAULT_US,
    Fault,
    FaultPlan,
    Kill,
    draw_plan,
    draw_router_options,
    draw_shape,
    inject,
    with_sight,
)
from tests.sim.history import History, Violation
from tests.sim.processes import ORACLE, Shape
from tests.sim.weather import Weather
from tests.sim.workload import Visit, draw_workload, show_pictures

REQUESTS = 20
SPAN_US = 5_000_000
START_US = 100_000  # everybody has met everybody
PATIENCE_US = 60_000_000  # from the end of the faults to the end of the last request
SETTLE_US = 8_000_000  # silent links are found, dead workers' leases end
LOOK_EVERY_US = 250_000


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Everything that a seed decides, as values."""

    seed: int
    shape: Shape
    plan: FaultPlan
    visits: tuple[Visit, ...]


@dataclass(slots=True)
class Report:
    """What a run did, for the figures at the end."""

    figures: Counter[str] = field(default_factory=Counter)
    log: list[str] = field(default_factory=list)


def draw_scenario(seed: int, *, requests: int = REQUESTS) -> Scenario:
    random = Random(seed)
    router_options = draw_router_options(Random(f"router of {seed}"))
    shape = replace(draw_shape(random), router_options=router_options)
    pictures = Random(f"pictures of {seed}")
    sees = pictures.random() < 0.5
    if sees:
        shape = with_sight(pictures, shape)
    plan = draw_plan(random, shape)
    visits = draw_workload(random, ORACLE, requests=requests, span_us=SPAN_US)
    if sees:
        visits = show_pictures(pictures, visits)
    return Scenario(seed=seed, shape=shape, plan=plan, visits=tuple(visits))


def simulate(scenario: Scenario, *, recording: bool = False) -> Report:
    """Run it to its quiet end. Raises Violation."""
    simulation = Simulation(scenario, recording=recording)
    try:
        simulation.run()
    except Exception as error:
        replay = f"replay: python -m tests.sim.replay {scenario.seed}"
        raise Violation(f"seed {scenario.seed}: {str(error) or repr(error)}\n{replay}") from error
    return simulation.report()


def simulate_seed(seed: int, *, recording: bool = False) -> Report:
    return simulate(draw_scenario(seed), recording=recording)


class Simulation:
    def __init__(self, scenario: Scenario, *, recording: bool) -> None:
        self.scenario = scenario
        self.weather = Weather(Random(f"weather of {scenario.seed}"), scenario.plan.noise)
        self.history = History(lambda: self.cluster.world.now_us, ORACLE, self._stop)
        self.cluster = VirtualCluster(
            scenario.seed, scenario.shape, self.weather, self.history.on_output, recording=recording
        )
        self.world = self.cluster.world

    def run(self) -> None:
        self._schedule()
        self.world.run(until_us=START_US + FAULTS_END_US)
        self._end_faults()
        self._await_endings()
        self.world.run(until_us=self.world.now_us + SETTLE_US)
        self.cluster.check_integrity()
        self.cluster.check_quiet()
        self.history.check()

    def report(self) -> Report:
        figures = self.history.figures() + self.weather.injected
        figures["restarts"] = self.cluster.restarts
        figures["messages"] = self.weather.messages
        figures["virtual seconds"] = self.world.now_us // 1_000_000
        figures.update({f"failpoint {name}": hits for name, hits in self.cluster.failpoints.items()})
        for process in self.cluster.processes:
            figures["frames placed"] += process.host.frames_placed
            figures["damaged frames refused"] += process.host.damaged_arrivals
            figures["relocations"] += sum(n for name, n in process.counters.items() if name.startswith("relocations"))
            figures["preemptions"] += process.engine.core.load().preemptions if process.engine else 0
        return Report(figures, self.world.log)

    # -- what happens --------------------------------------------------------------------------------------------------
    def _schedule(self) -> None:
        for visit in self.scenario.visits:
            self.world.schedule(START_US + visit.at_us, partial(self._come, visit))
        for at_us, fault in self.scenario.plan.events:
            self.world.schedule(START_US + at_us, partial(self._break, fault))
        self.world.schedule(START_US + LAST_FAULT_US, self.cluster.disarm)
        self.world.schedule(LOOK_EVERY_US, self._look)

    def _come(self, visit: Visit) -> None:
        if self.cluster.router is None:
            return  # connection refused: nothing was accepted
        self.history.invoke(visit.submit, visit.stops)
        self.cluster.submit(visit.submit)
        if visit.cancel_us is not None:
            self.world.schedule(visit.cancel_us - visit.at_us, partial(self._leave, visit.submit.key))

    def _leave(self, key: int) -> None:
        """Also after the end, and also twice: a client's connection says so at any time."""
        self.history.cancel(key)
        self.cluster.cancel(key)

    def _stop(self, key: int, choice: int) -> None:
        self.cluster.stop(key, choice)

    def _break(self, fault: Fault) -> None:
        if isinstance(fault, Kill) and fault.name == ROUTER:
            self.history.router_died()
        inject(self.cluster, fault)

    def _look(self) -> None:
        self.cluster.check_integrity()
        self.world.schedule(LOOK_EVERY_US, self._look)

    def _end_faults(self) -> None:
        """From here on the weather is good and everybody lives: nothing excuses a request that does not end."""
        self.weather.calm()

    def _await_endings(self) -> None:
        ended = self.world.run(until_us=self.world.now_us + PATIENCE_US, until=lambda: not self.history.open_calls)
        if not ended:
            open_calls = "; ".join(call.describe() for call in self.history.open_calls)
            raise Violation(f"I1: without any fault left, still open: {open_calls}")
