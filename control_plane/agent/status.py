"""What a worker is, and how it says so: its configuration and state, as the controller and routers hear of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from control_plane.wire import session_pb2 as pb
from control_plane.wire.session import WIRE_VERSION
from control_plane.wire.translate import offers_to_wire
from engine.base import limits
from engine.commands import EngineLoad
from engine.kv.schema import CacheSchema
from engine.types import Role
from kv_transfer.codecs import CodecSet
from kv_transfer.offers import Offer


class WorkerState(StrEnum):
    """The only list of worker states (DESIGN 7). SUSPECT and DEAD are the controller's views of a worker."""

    STARTING = "STARTING"
    STANDBY = "STANDBY"
    SERVING = "SERVING"
    QUIESCING = "QUIESCING"
    DRAINING = "DRAINING"
    REBINDING = "REBINDING"
    WARMING = "WARMING"
    ROLLING_BACK = "ROLLING_BACK"
    FAILED = "FAILED"


@dataclass(frozen=True, kw_only=True)
class Config:
    worker_id: str  # random per process start: identity never survives a restart (DESIGN 2.3)
    name: str
    address: str
    controller_address: str
    roles: frozenset[Role]
    model: str
    schema: CacheSchema
    codecs: CodecSet
    vocab_size: int
    max_model_len: int
    block_size: int
    columns: int
    growth_tokens: int = limits.GROWTH_RESERVE_TOKENS
    embedding_schema: CacheSchema | None = None  # of images' embeddings; None: a model that does not see
    embedding_columns: int = 0

    @property
    def embedding_digest(self) -> bytes:
        """As the wire has it: empty for a model that does not see."""
        return b"" if self.embedding_schema is None else self.embedding_schema.digest

    @property
    def encodes(self) -> bool:
        """Where prompts are computed, images can be, too: nobody else may be there to do it."""
        return self.embedding_schema is not None and not self.roles.isdisjoint({Role.ENCODE, Role.PREFILL})

    @property
    def empty_load(self) -> EngineLoad:
        """Before the engine has said anything."""
        return EngineLoad(
            free_columns=self.columns,
            total_columns=self.columns,
            free_embedding_columns=self.embedding_columns,
            embedding_columns=self.embedding_columns,
        )


def describe(config: Config, *, epoch: int, state: WorkerState, offers: Sequence[Offer]) -> pb.WorkerInfo:
    """For the controller's table."""
    return pb.WorkerInfo(
        worker=config.worker_id,
        name=config.name,
        address=config.address,
        epoch=epoch,
        state=state.value,
        roles=sorted(role.value for role in config.roles),
        model=config.model,
        schema_digest=config.schema.digest,
        block_size_tokens=config.block_size,
        total_columns=config.columns,
        max_model_len=config.max_model_len,
        wire_version=WIRE_VERSION,
        offers=offers_to_wire(offers),
        embedding_digest=config.embedding_digest,
        embedding_columns=config.embedding_columns,
    )


def status(
    config: Config,
    *,
    epoch: int,
    state: WorkerState,
    load: EngineLoad,
    attempts: int,
    held: int,
    tasks: int,
    counters: Mapping[str, int],
) -> pb.WorkerStatus:
    """For routers, every heartbeat."""
    return pb.WorkerStatus(
        worker=config.worker_id,
        epoch=epoch,
        state=state.value,
        roles=sorted(role.value for role in config.roles),
        free_columns=load.free_columns,
        total_columns=load.total_columns,
        running=load.running,
        waiting=load.waiting,
        waiting_tokens=load.waiting_tokens,
        step_us=int(load.step_ms * 1_000),
        attempts=attempts,
        counters={**counters, **_engine_counters(load)},
        lent_columns=load.lent_columns,
        held=held,
        tasks=tasks,
        cached_columns=load.cached_columns,
        prefix_hit_tokens=load.prefix_hit_tokens,
        prefix_query_tokens=load.prefix_query_tokens,
        encoding=load.encoding,
        free_embedding_columns=load.free_embedding_columns,
        embedding_columns=load.embedding_columns,
        encode_us=load.encode_us,
        tower_loaded=load.tower_loaded,
    )


def _engine_counters(load: EngineLoad) -> dict[str, int]:
    """Those that have counted something."""
    counters = {
        "preemptions": load.preemptions,
        "vision_forwards": load.vision_forwards,
        "embedding_hits": load.embedding_hits,
    }
    return {name: number for name, number in counters.items() if number}
