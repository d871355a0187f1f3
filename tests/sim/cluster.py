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
from control_plane.router.requests import Cancel, ResetCache, Stop, Submit
from engine.base.virtual_host import VirtualWorld
from kv_transfer.codecs import CodecSet
from kv_transfer.transports.memory import MemoryNetwork, MemoryTransport
from tests.sim.history import Violation
from tests.sim.processes import Core, EngineParts, Process, Shape
from tests.sim.weather import Weather

CONTROLLER = "controller"
ROUTER = "router"


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
        core = self._running[ROUTER].core if ROUTER in self._running else None
        assert core is None or isinstance(core, RouterCore)
        return core

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
        identity = self._mint_identity(name)
        core = self._build_core(name, identity)
        worker = self._shapes.get(name)
        engine = EngineParts(self.world, transport.process, self.shape, worker) if worker else None
        self._running[name] = Process(
            self.world,
            name,
            identity,
            core,
            transport,
            weather=self.weather,
            outputs=self._on_process_output,
            engine=engine,
            job_us=self.shape.job_us,
        )

    def _mint_identity(self, name: str) -> str:
        """Another one at each start, whatever the name."""
        return f"{self.world.random.getrandbits(64):016x}"

    def _build_core(self, name: str, identity: str) -> Core:
        if name == CONTROLLER:
            return ControllerCore()
        if name == ROUTER:
            return RouterCore(
                RouterConfig(router_id=identity, controller_address=CONTROLLER, **self.shape.router_options)
            )
        worker, oracle = self._shapes[name], self.shape.oracle
        config = WorkerConfig(
            worker_id=identity,
            name=name,
            address=name,
            controller_address=CONTROLLER,
            roles=worker.roles,
            model=oracle.schema.model,
            schema=oracle.schema,
            codecs=CodecSet(oracle.schema.kv, self.shape.profile),
            vocab_size=oracle.vocab_size,
            max_model_len=oracle.max_model_len,
            block_size=self.shape.block_size,
            columns=worker.columns,
            growth_tokens=self.shape.growth_tokens,
            embedding_schema=oracle.embedding_schema if self.shape.sees else None,
            embedding_columns=worker.embedding_columns,
        )
        return WorkerCore(config, random=Random(f"transfer ids of {identity}"), failpoint=partial(self._hit, name))

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

    def stop(self, key: int, choice: int) -> None:
        self._tell(ROUTER, Stop(key, choice))

    def reset_cache(self) -> None:
        self._tell(ROUTER, ResetCache())

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
        assert self.router is not None
        self._check_router_quiet(self.router)
        self._check_links()

    def _check_router_quiet(self, router: RouterCore) -> None:
        """It has forgotten every request and every dead worker, and knows the living ones."""
        lines = [line.queue for line in router._lines]
        held = (router.in_flight, len(router._register.requests), len(router._register.images), sum(map(len, lines)))
        if any(held):
            raise Violation(f"I7: a router of (submissions, requests at workers, images, queued requests) {held}")
        shares = (router._admission.choices, router._holders.decode_memory.shares, *(line.shares for line in lines))
        if any(share.total or share._held for share in shares):
            raise Violation(f"I7: shares that nobody gave back: {[share._held for share in shares]}")
        busy = {
            w.info.name: (w.bound, w.prefill_tokens, w.images.ahead_tokens, w.images.held_columns) for w in router.pool
        }
        listed = [w for w in router.pool if w.backlog.prompts or w.urgent.prompts or w.images.ahead or w.images.held]
        if listed or any(any(load) for load in busy.values()):
            raise Violation(f"I7: an idle router believes that workers are busy: {busy}")
        known = [(view.id, view.state, view.connected) for view in router.workers()]
        living = [(process.identity, "SERVING", True) for process in self.workers]
        if sorted(known) != sorted(living):
            raise Violation(f"I7: the router knows {known}, but those that live are {living}")

    def _check_links(self) -> None:
        """One for each pair that talks, and at most one for each direction of bulk: none was forgotten (I7)."""
        workers = len(self.workers)
        links_max = 1 + 2 * workers + workers * (workers - 1)
        if self.network.open_ends > 2 * links_max:
            raise Violation(f"I7: {self.network.open_ends} link ends are open; {2 * links_max} would be enough")
