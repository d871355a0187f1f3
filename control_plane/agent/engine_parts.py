"""What a worker's engine is put together from: memory, cores and executors, as its options, model and roles ask.

    roles               KV memory   embedding memory   language model     tower
    prefill, decode     yes         no                 yes                -
    prefill, it sees    yes         a small one        yes                when the first image comes
    decode, it sees     yes         no                 yes                never
    encode              no          yes                no                 before the worker registers
    several             what each of them has

Here is what exists and how much of it. What it does is the engine's; when it is built, and on which thread, is
`process`'s.
"""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from control_plane.agent.memory import free_bytes
from control_plane.model_choice import ModelChoice
from control_plane.options import Device, EngineOptions, ExecutorKind, OptionError, WorkerOptions
from encode_worker.encoders.oracle import OracleEncoder
from encode_worker.encoders.paced import PacedEncoder
from engine.base import limits
from engine.batching import Batching, build
from engine.core import EngineCore
from engine.encode_core import EncodeCore
from engine.executors import Encoder, Executor
from engine.executors.joint import JointExecutor
from engine.executors.oracle import OracleExecutor
from engine.executors.paced import SMOLLM2_ONE_CORE, PacedExecutor
from engine.kv.arena import Arena, Arenas
from engine.kv.schema import CacheSchema
from engine.scheduler import Scheduler
from engine.step_time import Setting, StepTimeModel
from engine.step_time import load as load_step_time
from engine.types import Role
from engine.worker_engine import WorkerEngine

log = logging.getLogger("triptych.worker")

MEMORY_SHARE = 0.25  # of what is free when the worker starts, unless told
DEVICE_MEMORY_SHARE = 0.5
KV_BYTES_DEFAULT_MAX = 1 << 30  # a worker on a shared machine should not take it all without being asked
COLUMNS_DEFAULT_MAX = 1 << 14  # the oracle's columns are tiny; their book-keeping is not

EMBEDDING_MEMORY_SHARE = 0.0625
EMBEDDING_BYTES_ENCODE = 256 << 20  # 230,000 rows of a model of SmolLM2-135M's width, 37,000 of a 7B one's
EMBEDDING_BYTES_PREFILL = 64 << 20  # needs an embedding for a moment, and keeps some

# SigLIP-base's 93M weights over the 1,024 patches of 512 x 512 pixels, at the rate of `SMOLLM2_ONE_CORE`'s prefills.
PACED_IMAGE_MS = 300.0


def check_roles(roles: Collection[Role], model: ModelChoice) -> None:
    """Whether this model has work for them. Raises `OptionError`."""
    if Role.ENCODE in roles and model.vision is None:
        raise OptionError("role", "'encode' is for images, and this model takes none")


# -- memory ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Memory:
    """A worker's arenas: None where its roles have no use for one."""

    kv: Arena | None
    embeddings: Arena | None

    @property
    def kv_columns(self) -> int:
        return self.kv.columns if self.kv is not None else 0

    @property
    def embedding_columns(self) -> int:
        return self.embeddings.columns if self.embeddings is not None else 0

    @property
    def embedding_schema(self) -> CacheSchema | None:
        return self.embeddings.schema if self.embeddings is not None else None

    @property
    def arenas(self) -> Arenas:
        """For jobs, each of which knows whose bytes it carries."""
        return Arenas(*self._all())

    def touch(self) -> None:
        """The system gives pages on first touch, at a third of a memory's speed: not in the middle of a transfer."""
        for arena in self._all():
            arena.zero(range(arena.columns))

    def _all(self) -> tuple[Arena, ...]:
        return tuple(arena for arena in (self.kv, self.embeddings) if arena is not None)


def build_memory(options: WorkerOptions, model: ModelChoice) -> Memory:
    engine, roles = options.engine, options.roles
    kv = _kv_arena(engine, model) if roles & {Role.PREFILL, Role.DECODE} else None
    if model.embedding_schema is None or not roles & {Role.ENCODE, Role.PREFILL}:
        return Memory(kv, None)
    default_bytes = EMBEDDING_BYTES_ENCODE if Role.ENCODE in roles else EMBEDDING_BYTES_PREFILL
    prompts = 2 if Role.PREFILL in roles else 1  # where prompts are computed, encodes get no more than the other half
    columns = _embedding_columns(engine, model, model.embedding_schema, default_bytes, prompts)
    # In the host's memory, wherever the model runs: an embedding is read there once, and sent from there.
    return Memory(kv, Arena(model.embedding_schema, columns=columns, block_size=engine.block_size))


def max_model_len(model: ModelChoice, memory: Memory) -> int:
    """A request that no amount of waiting can fit is refused at the door, by router and worker alike."""
    if memory.kv is None:
        return model.max_model_len
    return min(model.max_model_len, memory.kv.columns * memory.kv.block_size)


def _kv_arena(options: EngineOptions, model: ModelChoice) -> Arena:
    """Where the model runs."""
    columns = _kv_columns(options, model)
    if options.device is Device.CPU:
        return Arena(model.schema, columns=columns, block_size=options.block_size)
    from engine.kv.device_arena import DeviceArena

    return DeviceArena(model.schema, columns=columns, block_size=options.block_size, device=options.device.value)


def _kv_columns(options: EngineOptions, model: ModelChoice) -> int:
    """What was asked for, else a share of what is free."""
    column_bytes = model.schema.token_bytes * options.block_size
    if options.kv_cache_mib is not None:
        return max(1, (options.kv_cache_mib << 20) // column_bytes)
    budget_bytes = _kv_budget_bytes(options)
    columns = max(1, budget_bytes // column_bytes)
    longest = _blocks(model.max_model_len, options) + 1
    if columns < longest:
        room = {"tokens": model.max_model_len, "kv_cache_mib": budget_bytes >> 20}
        log.warning("no room for the longest request", extra=room)
    return min(columns, max(longest, COLUMNS_DEFAULT_MAX))


def _kv_budget_bytes(options: EngineOptions) -> int:
    """An accelerator is ours alone, and the weights are not there yet; the host's memory is shared."""
    if options.device is Device.CPU:
        return min(int(free_bytes() * MEMORY_SHARE), KV_BYTES_DEFAULT_MAX)
    import torch

    device_free_bytes, _ = torch.cuda.mem_get_info()
    return int(device_free_bytes * DEVICE_MEMORY_SHARE)


def _embedding_columns(
    options: EngineOptions, model: ModelChoice, schema: CacheSchema, default_bytes: int, prompts: int
) -> int:
    """What was asked for, else `default_bytes`, or as much as the images of so many prompts can be: every one of a
    prompt's tokens is a row of an embedding then, and the last column of each image may hold one row."""
    column_bytes = schema.token_bytes * options.block_size
    if options.embedding_cache_mib is not None:
        return max(1, (options.embedding_cache_mib << 20) // column_bytes)
    largest = prompts * (_blocks(model.max_model_len, options) + limits.IMAGES_MAX)
    affordable = max(1, int(free_bytes() * EMBEDDING_MEMORY_SHARE) // column_bytes)
    if affordable < largest:
        room = {"tokens": model.max_model_len, "embedding_cache_mib": affordable * column_bytes >> 20}
        log.warning("no room for all images of the longest request", extra=room)
    return min(affordable, max(largest, min(default_bytes // column_bytes, COLUMNS_DEFAULT_MAX)))


def _blocks(tokens: int, options: EngineOptions) -> int:
    return -(-tokens // options.block_size)


# -- cores -------------------------------------------------------------------------------------------------------------
def build_engine(options: WorkerOptions, model: ModelChoice, memory: Memory) -> WorkerEngine:
    """The engine's policy: of language, of images, or of both in turn."""
    longest = max_model_len(model, memory)
    language = _language_core(options, model, memory.kv, longest) if memory.kv is not None else None
    encode = _encode_core(options, memory.embeddings) if memory.embeddings is not None else None
    return WorkerEngine(language, encode)


def _language_core(options: WorkerOptions, model: ModelChoice, arena: Arena, longest: int) -> EngineCore:
    engine = options.engine
    config = Scheduler.Config(
        step_tokens=engine.step_tokens,
        block_size=engine.block_size,
        max_model_len=longest,
        eos_token_ids=frozenset(model.eos_token_ids),
        recompute=Role.PREFILL in options.roles,
        prefix_cache=engine.prefix_cache,
    )
    return EngineCore(config, model.schema, arena, _batching(options, model))


def _encode_core(options: WorkerOptions, arena: Arena) -> EncodeCore:
    """Beside a language model images go one by one: text waits for one of them, not for a batch."""
    config = EncodeCore.Config(
        batch_images=limits.ENCODE_BATCH_IMAGES if options.roles == {Role.ENCODE} else 1,
        lazy_tower=Role.ENCODE not in options.roles,
    )
    return EncodeCore(config, arena.schema, arena)


def _batching(options: WorkerOptions, model: ModelChoice) -> Batching:
    engine = options.engine
    step_time = _step_time(options, model)
    if engine.tbt_slo_ms is not None and step_time is None:
        log.warning("no step times of this model: run `triptych fit`", extra={"step_tokens": engine.step_tokens})
    return build(
        engine.batching,
        step_tokens=engine.step_tokens,
        tbt_slo_ms=engine.tbt_slo_ms,
        model=step_time,
        align_tokens=engine.block_size,
    )


def _step_time(options: WorkerOptions, model: ModelChoice) -> StepTimeModel | None:
    """How long steps take here: measured by `triptych fit`, if it was, or what a paced worker keeps to."""
    if options.engine.executor is not ExecutorKind.TORCH:
        return SMOLLM2_ONE_CORE if options.engine.executor is ExecutorKind.PACED else None
    setting = Setting(
        fingerprint=model.schema.model,
        dtype=model.dtype,
        device=options.engine.device.value,
        threads=options.threads,
    )
    return load_step_time(setting)


# -- executors ---------------------------------------------------------------------------------------------------------
Sleep = Callable[[float], None]


def build_executor(options: WorkerOptions, model: ModelChoice, memory: Memory, sleep: Sleep) -> JointExecutor:
    """On the engine thread. Imports torch only for the executor that is torch. `sleep`: what paced workers do."""
    language = _language(options, model, memory, memory.kv, sleep) if memory.kv is not None else None
    encoder = _encoder(options, model, memory.embeddings, sleep) if memory.embeddings is not None else None
    return JointExecutor(language, encoder)


def _language(options: WorkerOptions, model: ModelChoice, memory: Memory, arena: Arena, sleep: Sleep) -> Executor:
    if (kind := options.engine.executor) is not ExecutorKind.TORCH:
        paced = kind is ExecutorKind.PACED
        oracle = OracleExecutor(arena, _oracle_config(model, paced=paced), memory.embeddings)
        return PacedExecutor(oracle, SMOLLM2_ONE_CORE, sleep) if paced else oracle
    from engine.executors import torch

    assert model.path is not None
    settings = torch.Config(
        model=model.path,
        dtype=model.dtype,
        device=options.engine.device.value,
        threads=options.threads,
        layers_per_group=options.engine.layers_per_group,
    )
    return torch.TorchExecutor(settings, arena, memory.embeddings)


def _oracle_config(model: ModelChoice, *, paced: bool) -> OracleExecutor.Config:
    config = OracleExecutor.Config(schema=model.schema, trust_read_rows=paced)
    sees = model.embedding_schema
    return replace(config, embedding_schema=sees) if sees is not None else config


def _encoder(options: WorkerOptions, model: ModelChoice, arena: Arena, sleep: Sleep) -> Encoder:
    """A worker of several roles may never be asked to encode: its tower is loaded when it is."""
    if (kind := options.engine.executor) is not ExecutorKind.TORCH:
        oracle = OracleEncoder(arena)
        image_ms = options.engine.encode_image_ms or PACED_IMAGE_MS
        return PacedEncoder(oracle, round(image_ms * 1_000), sleep) if kind is ExecutorKind.PACED else oracle
    from encode_worker.encoders.tower import TowerEncoder

    assert model.path is not None
    settings = TowerEncoder.Config(
        model=model.path, dtype=model.dtype, device=options.engine.device.value, threads=options.threads
    )
    return TowerEncoder(settings, arena, lazy=Role.ENCODE not in options.roles)
