"""Processes of a virtual cluster: how one is put together, as its program would do it, with the watchers inside."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from control_plane.agent.core import WorkerCore
from control_plane.controller.core import ControllerCore
from control_plane.router.core import RouterCore
from encode_worker.encoders.oracle import OracleEncoder
from engine.base import limits
from engine.base.virtual_host import VirtualProcess, VirtualWorld
from engine.commands import EncodePlan, EngineEvent, StepPlan
from engine.core import EngineCore, assert_quiet
from engine.encode_core import EncodeCore
from engine.executors.joint import JointExecutor
from engine.executors.oracle import OracleExecutor
from engine.kv.arena import Arena, Arenas
from engine.kv.schema import CacheSchema
from engine.scheduler import Scheduler
from engine.step_time import StepTimeModel
from engine.types import Role
from engine.virtual import VirtualEngine
from engine.worker_engine import WorkerEngine
from kv_transfer.profile import Profile
from kv_transfer.transports.memory import MemoryTransport
from tests.sim.history import Violation
from tests.sim.watchers import WatchedEncoder, WatchedEngine, WatchedHost
from tests.sim.weather import Weather

POISON_TOKEN = 999  # a step that is fed it raises; no output has it
ORACLE = OracleExecutor.Config(
    layers_per_group=1,  # a frame for each layer: the more frames, the more to go wrong
    poison_token=POISON_TOKEN,
)
Core: TypeAlias = ControllerCore | RouterCore | WorkerCore
STEP_TIME = StepTimeModel(step_us=10_000, prefill_token_us=100, decode_sequence_us=500)


@dataclass(frozen=True, kw_only=True)
class WorkerShape:
    """What a worker is started with, each time."""

    name: str
    roles: frozenset[Role]
    columns: int = 0
    embedding_columns: int = 0  # 0: its model does not see


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
    step_time: StepTimeModel = STEP_TIME
    image_us: int = 20_000  # of an encoder
    profile: Profile | None = None  # of every worker
    oracle: OracleExecutor.Config = ORACLE
    watched: bool = True  # False where only times matter: watching costs more than everything else
    router_options: Mapping[str, int] = field(default_factory=dict)  # fields of the router's `Config`

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(worker.name for worker in self.workers)

    @property
    def sees(self) -> bool:
        return any(worker.embedding_columns for worker in self.workers)

    def cost_us(self, plan: StepPlan | EncodePlan) -> int:
        return self.image_us * len(plan.items) if isinstance(plan, EncodePlan) else self.step_time(plan)


class EngineParts:
    """A worker's engine: cores under watch, oracles, arenas; for KV, for embeddings, or for both."""

    def __init__(self, world: VirtualWorld, process: VirtualProcess, shape: Shape, worker: WorkerShape) -> None:
        self._shape, self._worker = shape, worker
        kv = self._arena(shape.oracle.schema, worker.columns)
        embeddings = self._arena(shape.oracle.embedding_schema, worker.embedding_columns)
        self.memory = Arenas(*(arena for arena in (kv, embeddings) if arena is not None))
        self.core = WorkerEngine(
            self._language_core(kv) if kv is not None else None,
            self._encode_core(embeddings) if embeddings is not None else None,
        )
        executor = JointExecutor(
            OracleExecutor(kv, shape.oracle, embeddings) if kv is not None else None,
            OracleEncoder(embeddings) if embeddings is not None else None,
        )
        self.on_events: Callable[[tuple[EngineEvent, ...]], None] = lambda events: None
        self.port = VirtualEngine(
            world, lambda events: self.on_events(events), self.core, executor, shape.cost_us, process=process
        )

    def _arena(self, schema: CacheSchema, columns: int) -> Arena | None:
        return Arena(schema, columns=columns, block_size=self._shape.block_size) if columns else None

    def _language_core(self, arena: Arena) -> EngineCore:
        shape = self._shape
        config = Scheduler.Config(
            block_size=shape.block_size,
            step_tokens=shape.step_tokens,
            growth_reserve_tokens=shape.growth_tokens,
            near_turn_tokens=2 * shape.step_tokens,
            max_model_len=shape.oracle.max_model_len,
            recompute=Role.PREFILL in self._worker.roles,
        )
        return (WatchedEngine if shape.watched else EngineCore)(config, arena.schema, arena)

    def _encode_core(self, arena: Arena) -> EncodeCore:
        alone = self._worker.roles == {Role.ENCODE}
        images = limits.ENCODE_BATCH_IMAGES if alone else 1
        config = EncodeCore.Config(batch_images=images, lazy_tower=Role.ENCODE not in self._worker.roles)
        return (WatchedEncoder if self._shape.watched else EncodeCore)(config, arena.schema, arena)


class Process:
    """A machine, its host and, in a worker, an engine. `name` outlives a restart, `identity` does not."""

    def __init__(
        self,
        world: VirtualWorld,
        name: str,
        identity: str,
        core: Core,
        transport: MemoryTransport,
        *,
        weather: Weather,
        outputs: Callable[["Process", Any], None],
        engine: EngineParts | None = None,
        job_us: int = 0,
    ) -> None:
        self.name = name
        self.identity = identity
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
            memory=engine.memory if engine else None,
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
