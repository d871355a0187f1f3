"""VirtualCluster: a controller, a router and workers in one virtual world. The real machines, hosts and engine core.

Only what touches the outside is a stand-in: time, the network, and the model (an oracle, whose tokens are right only if
every KV byte that was read was right). What can break is what can break in production: a process is killed, frozen,
drained, or restarted under its old name and address with a new id; the network misbehaves (`weather`).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from control_plane.agent.core import Config as WorkerConfig
from control_plane.agent.core import Drain, Drained, WorkerCore
from control_plane.controller.core import ControllerCore
from control_plane.router.core import Config as RouterConfig
from control_plane.router.core import RouterCore
from control_plane.router.requests import Cancel, Submit
from engine.base.virtual_host import VirtualProcess, VirtualWorld
from engine.commands import EngineEvent
from engine.core import assert_quiet
from engine.executors.oracle import OracleExecutor
from engine.executors.paced import StepTimeModel
from engine.kv.arena import Arena
from engine.scheduler import Scheduler
from engine.types import Role
from engine.virtual import VirtualEngine
from kv_transfer.transports.memory import MemoryNetwork, MemoryTransport
from tests.sim.history import Violation
from tests.sim.watchers import WatchedEngine, WatchedHost
from tests.sim.weather import Weather

CONTROLLER = "controller"
ROUTER = "router"
POISON_TOKEN = 999  # a step that is fed it raises; no output has it
ORACLE = OracleExecutor.Config(
    layers_per_group=1,  # a frame for each layer: the more frames, the more to go wrong
    poison_token=POISON_TOKEN,
)


@dataclass(frozen=True, kw_only=True)
class WorkerShape:
    """What a worker is started with, each time."""

    name: str
    roles: frozenset[Role]
    columns: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A cluster's fixed properties. Small steps, blocks and pools: many borders to get wrong in a short prompt."""

    workers: tuple[WorkerShape, ...]
    block_size: int = 8
    step_tokens: int = 24
    growth_tokens: int = 8
    latency_us: int = 500
    bytes_per_second: int | None = None
    job_us: int = 500
    step_time: StepTimeModel = StepTimeModel(step_us=10_000, prefill_token_us=100, decode_sequence_us=500)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(worker.name for worker in self.workers)

    def holding(self, role: Role) -> tuple[str, ...]:
        return tuple(worker.name for worker in self.workers if role in worker.roles)


class Process:
    """One process: a machine, its host and, in a worker, an engine."""

    def __init__(
        self,
        world: VirtualWorld,
        name: str,
        core: ControllerCore | RouterCore | WorkerCore,
        transport: MemoryTransport,
        *,
        weather: Weather,
        outputs: Callable[["Process", Any], None],
        engine: "WorkerEngine | None" = None,
        job_us: int = 0,
    ) -> None:
        self.name = name
        self.core = core
        self.transport = transport
        self.engine = engine
        self.host = WatchedHost(
            world,
            name,
            core,
            transport,
            outputs=partial(outputs, self),
            engine=engine.port if engine else None,
            memory=engine.arena if engine else None,
            job_us=lambda job: job_us,
            clock_offset_us=world.random.randrange(1_000_000_000),  # clocks agree with nobody's
            weather=weather,
            counters=self.counters,
        )
        if engine is not None:
            engine.on_events = self.host.deliver_engine_events
        transport.listen(name, self.host.accept)
        self.host.start()

    @property
    def counters(self) -> Counter[str]:
        return self.core.counters if isinstance(self.core, WorkerCore) else Counter()

    def check_holds_nothing(self) -> None:
        if isinstance(self.core, WorkerCore) and self.core.held:
            raise Violation(f"I7: {self.name} still holds something for {self.core.held} attempts or transfers")

    def check_quiet(self) -> None:
        """Nothing is held for anybody, and the engine knows it (I3, I7)."""
        self.check_holds_nothing()
        if self.engine is not None:
            try:
                assert_quiet(self.engine.core)
            except AssertionError as error:
                raise Violation(f"I3: {self.name}: {error}") from error


class WorkerEngine:
    """A worker's engine: the core under watch, an oracle, an arena."""

    def __init__(self, world: VirtualWorld, process: VirtualProcess, shape: Shape, columns: int) -> None:
        self.arena = Arena(ORACLE.schema, columns=columns, block_size=shape.block_size)
        config = Scheduler.Config(
            block_size=shape.block_size,
            step_tokens=shape.step_tokens,
            growth_reserve_tokens=shape.growth_tokens,
            near_turn_tokens=2 * shape.step_tokens,
            max_model_len=ORACLE.max_model_len,
        )
        self.core = WatchedEngine(config, ORACLE.schema, self.arena)
        self.on_events: Callable[[tuple[EngineEvent, ...]], None] = lambda events: None
        oracle = OracleExecutor(self.arena, ORACLE)
        self.port = VirtualEngine(
            world, lambda events: self.on_events(events), self.core, oracle, shape.step_time, process=process
        )


@dataclass(slots=True)
class _Snare:
    """Waits for a worker to come by a failpoint `hits` times."""

    name: str
    failpoint: str
    hits: int
    happens: Callable[[], None]


class VirtualCluster:
    """Starts whole. Every method takes names; `on_output` hears what the router tells its edge."""

    def __init__(
        self, seed: int, shape: Shape, weather: Weather, on_output: Callable[[Any], None], *, recording: bool = False
    ) -> None:
        self.world = VirtualWorld(seed, recording=recording)
        self.shape = shape
        self.weather = weather
        config = MemoryNetwork.Config(latency_us=shape.latency_us, bytes_per_second=shape.bytes_per_second)
        self.network = MemoryNetwork(self.world, config, faults=weather)
        self._on_output = on_output
        self._shapes = {worker.name: worker for worker in shape.workers}
        self._running: dict[str, Process] = {}
        self._past: list[Process] = []
        self._snares: list[_Snare] = []
        self.failpoints: Counter[str] = Counter()  # how often each was come by
        self.restarts = 0
        for name in (CONTROLLER, ROUTER, *shape.names):
            self._start(name)

    # -- processes -----------------------------------------------------------------------------------------------------
    @property
    def workers(self) -> list[Process]:
        """Those that live."""
        return [self._running[name] for name in self.shape.names if name in self._running]

    @property
    def processes(self) -> Sequence[Process]:
        """Those that live and those that have."""
        return [*self._past, *self._running.values()]

    @property
    def router(self) -> RouterCore | None:
        process = self._running.get(ROUTER)
        assert process is None or isinstance(process.core, RouterCore)
        return process.core if process else None

    def kill(self, name: str, detected_after_us: int | None = 0) -> None:
        if process := self._running.pop(name, None):
            process.host.kill(detected_after_us=detected_after_us)
            self._past.append(process)

    def restart(self, name: str) -> None:
        """Under the old name and address, with a new id and empty memory. Does nothing if it lives."""
        if name in self._running:
            return
        for process in self._past:
            if process.name == name:
                process.transport.close()  # a dead machine's address is free again once another takes it
        self.restarts += 1
        self._start(name)

    def freeze(self, name: str, duration_us: int) -> None:
        if process := self._running.get(name):
            process.host.freeze(duration_us)

    def drain(self, name: str, timeout_ms: int) -> None:
        """SIGTERM: the worker gives its work away and ends; a new one takes its place."""
        self._tell(name, Drain(timeout_ms))

    def on_failpoint(self, name: str, failpoint: str, hits: int, happens: Callable[[], None]) -> None:
        """Let it happen right after the step in which this worker comes by it for the `hits`-th time from now."""
        self._snares.append(_Snare(name, failpoint, hits, happens))

    def disarm(self) -> None:
        self._snares.clear()

    def _start(self, name: str) -> None:
        transport = MemoryTransport(self.network, name)
        core = self._build_core(name, identity=f"{self.world.random.getrandbits(64):016x}")
        worker = self._shapes.get(name)
        engine = WorkerEngine(self.world, transport.process, self.shape, worker.columns) if worker else None
        self._running[name] = Process(
            self.world,
            name,
            core,
            transport,
            weather=self.weather,
            outputs=self._on_process_output,
            engine=engine,
            job_us=self.shape.job_us,
        )

    def _build_core(self, name: str, identity: str) -> ControllerCore | RouterCore | WorkerCore:
        if name == CONTROLLER:
            return ControllerCore()
        if name == ROUTER:
            return RouterCore(RouterConfig(router_id=identity, controller_address=CONTROLLER))
        worker = self._shapes[name]
        config = WorkerConfig(
            worker_id=identity,
            name=name,
            address=name,
            controller_address=CONTROLLER,
            roles=worker.roles,
            model=ORACLE.schema.model,
            schema=ORACLE.schema,
            vocab_size=ORACLE.vocab_size,
            max_model_len=ORACLE.max_model_len,
            block_size=self.shape.block_size,
            columns=worker.columns,
            growth_tokens=self.shape.growth_tokens,
        )
        return WorkerCore(
            config, random=Random(f"transfer ids of {identity}"), failpoint=partial(self._hit, name)
        )

    def _on_process_output(self, process: Process, output: Any) -> None:
        if isinstance(output, Drained):
            process.check_holds_nothing()
            self.world.schedule(0, partial(self._replace, process))
        else:
            self._on_output(output)

    def _hit(self, name: str, failpoint: str) -> None:
        self.failpoints[failpoint] += 1
        for snare in [snare for snare in self._snares if (snare.name, snare.failpoint) == (name, failpoint)]:
            snare.hits -= 1
            if snare.hits == 0:
                self._snares.remove(snare)
                self.world.schedule(0, snare.happens)

    def _replace(self, process: Process) -> None:
        if self._running.get(process.name) is process:
            self.kill(process.name)
            self.restart(process.name)

    # -- clients -------------------------------------------------------------------------------------------------------
    def submit(self, submit: Submit) -> None:
        self._tell(ROUTER, submit)

    def cancel(self, key: int) -> None:
        self._tell(ROUTER, Cancel(key))

    def _tell(self, name: str, event: Any) -> None:
        """As a message would: a frozen process hears of it when it wakes."""
        if process := self._running.get(name):
            process.host.schedule(0, partial(process.host.deliver, event))

    # -- checks --------------------------------------------------------------------------------------------------------
    def check_integrity(self) -> None:
        """I3, at any time."""
        for process in self.workers:
            assert process.engine is not None
            process.engine.core.check_integrity()

    def check_quiet(self) -> None:
        """I3 and I7, once nobody wants anything any more: what was held has been given back, everywhere."""
        for process in self.workers:
            process.check_quiet()
        router = self.router
        assert router is not None
        if router.in_flight:
            raise Violation(f"I7: the router still has {router.in_flight} requests")
        busy = {worker.info.name: (worker.bound, worker.prefill_tokens) for worker in router.pool}
        if any(any(load) for load in busy.values()):
            raise Violation(f"I7: an idle router believes that workers are busy: {busy}")
