"""VirtualCluster: a controller, a router and workers in one virtual world. The real machines, hosts and engine core.

Only what touches the outside is a stand-in: time, the network, and the model (an oracle, whose tokens are right only if
every KV byte that was read was right). What can break is what can break in production: a process stops (killed,
frozen, restarted under its old name and address with a new id), or the network misbehaves (`faults`).

While it runs, three watchers look for what no client could see:

    WatchedEngine   freed columns are poisoned; one that is granted again must be as it was left (late writes, I3)
    WatchedJob      every frame that a codec thread places was sealed by a source, and is not one that was damaged (I5)
    WatchedHost     every damaged frame that arrives is counted as refused, or fails in its job (I5)
"""

from collections.abc import Callable, Iterator
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
from engine.base.errors import FrameError
from engine.base.machine import Job, LinkName, Run
from engine.base.virtual_host import VirtualHost, VirtualWorld
from engine.commands import EngineCommand, EngineEvent, StepPlan
from engine.core import EngineCore, assert_quiet
from engine.executors.oracle import OracleExecutor
from engine.executors.paced import StepTimeModel
from engine.kv.arena import POISON, Arena
from engine.scheduler import Scheduler
from engine.types import Role
from engine.virtual import VirtualEngine
from kv_transfer.jobs import DecodeJob
from kv_transfer.transports.memory import MemoryNetwork, MemoryTransport
from tests.sim.faults import Weather
from tests.sim.history import Violation

CONTROLLER = "controller"
ROUTER = "router"
ORACLE = OracleExecutor.Config(layers_per_group=1)  # as many frames as there are layers: more for faults to hit
P, D = Role.PREFILL, Role.DECODE


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


class VirtualCluster:
    """Starts whole; `kill`, `restart` and `freeze` take names. `on_output` hears what the router tells its edge."""

    def __init__(self, seed: int, shape: Shape, weather: Weather, on_output: Callable[[Any], None], *, recording: bool):
        self.world = VirtualWorld(seed, recording=recording)
        self.shape = shape
        self.weather = weather
        self.network = MemoryNetwork(
            self.world, MemoryNetwork.Config(shape.latency_us, shape.bytes_per_second), faults=weather
        )
        self._on_output = on_output
        self._workers = {worker.name: worker for worker in shape.workers}
        self._running: dict[str, Process] = {}
        self.past: list[Process] = []  # dead ones: their counters still count
        self.restarts = 0
        for name in (CONTROLLER, ROUTER, *shape.names):
            self._start(name)

    # -- processes -----------------------------------------------------------------------------------------------------
    def _start(self, name: str) -> None:
        """A new process in this place: new id, new memory, a clock of its own that agrees with nobody's."""
        transport = MemoryTransport(self.network, name)
        identity = f"{self.world.random.getrandbits(64):016x}"
        offset_us = self.world.random.randrange(1_000_000_000)
        start = partial(Process, self, name, transport, identity, offset_us)
        self._running[name] = start()

    def process(self, name: str) -> "Process":
        return self._running[name]

    @property
    def processes(self) -> Iterator["Process"]:
        """Living and dead."""
        yield from self.past
        yield from self._running.values()

    @property
    def workers(self) -> list["Process"]:
        """The living ones."""
        return [self._running[name] for name in self._workers if name in self._running]

    @property
    def router(self) -> RouterCore:
        core = self._running[ROUTER].core
        assert isinstance(core, RouterCore)
        return core

    def alive(self, name: str) -> bool:
        return name in self._running

    def kill(self, name: str, detected_after_us: int | None = 0) -> None:
        if process := self._running.pop(name, None):
            process.host.kill(detected_after_us=detected_after_us)
            self.past.append(process)

    def restart(self, name: str) -> None:
        """Under the old name and address. Whoever still had the address has lost it."""
        if name not in self._running:
            for process in self.past:
                if process.name == name:
                    process.transport.close()
            self.restarts += 1
            self._start(name)

    def freeze(self, name: str, duration_us: int) -> None:
        if process := self._running.get(name):
            process.host.freeze(duration_us)

    def drain(self, name: str, timeout_ms: int) -> None:
        """SIGTERM: it gives its work away and its process ends; a new one takes its place at once."""
        process = self._running.get(name)
        if process is not None and not process.drained:
            process.host.deliver(Drain(timeout_ms))

    def _replace(self, process: "Process") -> None:
        if self._running.get(process.name) is process:
            self.kill(process.name)
            self.restart(process.name)

    def hear(self, process: "Process", output: Any) -> None:
        if isinstance(output, Drained):
            process.drained = True
            assert_worker_quiet(process)
            self.world.schedule(1_000, partial(self._replace, process))
        elif self._running.get(ROUTER) is process:
            self._on_output(output)

    def build_core(self, name: str, identity: str) -> ControllerCore | RouterCore | WorkerCore:
        if name == CONTROLLER:
            return ControllerCore()
        if name == ROUTER:
            return RouterCore(RouterConfig(router_id=identity, controller_address=CONTROLLER))
        worker = self._workers[name]
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
        return WorkerCore(config, random=Random(f"transfers of {identity}"))

    # -- clients -------------------------------------------------------------------------------------------------------
    def submit(self, submit: Submit) -> None:
        self._running[ROUTER].host.deliver(submit)

    def cancel(self, key: int) -> None:
        self._running[ROUTER].host.deliver(Cancel(key))

    # -- checks --------------------------------------------------------------------------------------------------------
    def check_integrity(self) -> None:
        """I3, at any time."""
        for process in self.workers:
            process.engine_core.check_integrity()

    def check_quiet(self) -> None:
        """I3 and I7, once nobody wants anything: whatever was held has been given back, everywhere."""
        for process in self.workers:
            assert_worker_quiet(process)
        router = self.router
        load = {view.name: (w.bound, w.prefill_tokens) for w, view in zip(router.pool, router.workers(), strict=True)}
        _require(router.in_flight == 0, f"the router still has {router.in_flight} requests")
        _require(not any(map(any, load.values())), f"the router believes that workers are busy: {load}")


class Process:
    """One process: a machine, its host and, in a worker, an engine."""

    def __init__(
        self, cluster: VirtualCluster, name: str, transport: MemoryTransport, identity: str, clock_offset_us: int
    ) -> None:
        self.name = name
        self.transport = transport
        self.core = cluster.build_core(name, identity)
        self.drained = False
        self._engine: VirtualEngine | None = None
        self.host = WatchedHost(
            cluster,
            self,
            clock_offset_us=clock_offset_us,
        )
        transport.listen(name, self.host.accept)
        self.host.start()


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise Violation(text)
