"""A worker's process: the asyncio loop with the machine, one engine thread, a few codec threads (DESIGN 3).

    loop            links, keep-alives, WorkerCore; no Python section over ~0.2 ms
    engine thread   sole owner of the allocator and of torch; pinned to this worker's cores
    codec threads   GIL-free calls only; like the loop, they float over all other cores

The model is loaded and checked, and codecs are warm, before the worker registers: who is registered can take commands.
"""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from random import SystemRandom

from control_plane.addresses import advertised_host
from control_plane.agent.core import Config, Drain, Drained, WorkerCore
from control_plane.agent.memory import free_bytes
from control_plane.agent.trace import Trace, TracedMachine
from control_plane.agent.tuning import exempt_from_collection, leave_to_engine, settle_interpreter
from control_plane.codec_choice import choose_codecs, travels_raw
from control_plane.lifecycle import Shutdown
from control_plane.logs import configure_logging
from control_plane.model_choice import ModelChoice, choose_model
from control_plane.options import Device, EngineOptions, ExecutorKind, WorkerOptions
from engine.base.asyncio_host import AsyncioHost, JobPool
from engine.base.blas import use_calling_thread
from engine.base.failpoints import Failpoints
from engine.base.link import Link, LinkHandler
from engine.batching import Batching, build
from engine.commands import EngineEvent
from engine.core import EngineCore
from engine.executors import Executor
from engine.executors.oracle import OracleExecutor
from engine.executors.paced import SMOLLM2_ONE_CORE, PacedExecutor
from engine.kv.arena import Arena
from engine.scheduler import Scheduler
from engine.step_time import Setting, StepTimeModel
from engine.step_time import load as load_step_time
from engine.thread import EngineThread
from engine.types import Role
from kv_transfer.codecs import CodecSet
from kv_transfer.offers import AUTO
from kv_transfer.transports.grpc import GrpcTransport
from kv_transfer.warm_up import warm_up

log = logging.getLogger("triptych.worker")

FAILPOINTS_VARIABLE = "TRIPTYCH_FAILPOINTS"  # tests arm them; nothing can over the network
TRACE_VARIABLE = "TRIPTYCH_TRACE"  # a folder: benches read there what the workers did, and when
LOAD_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 10.0
MEMORY_SHARE = 0.25  # of what is free when the worker starts, unless told
DEVICE_MEMORY_SHARE = 0.5
COLUMNS_DEFAULT_MAX = 1 << 14  # the oracle's columns are tiny; their book-keeping is not
KV_BYTES_DEFAULT_MAX = 1 << 30  # a worker on a shared machine should not take it all without being asked


def main(options: WorkerOptions) -> int:
    configure_logging(options.name, options.log_level, options.log_format)
    settle_interpreter()
    use_calling_thread()
    leave_to_engine(options.cores)
    model = choose_model(options.engine)
    return asyncio.run(_serve(options, model, choose_codecs(options.engine, model.schema)))


async def _serve(options: WorkerOptions, model: ModelChoice, codecs: CodecSet) -> int:
    shutdown = Shutdown()
    shutdown.install()
    worker = _Worker(options, model, codecs, shutdown)
    if await worker.start():
        await shutdown.wait()
    await worker.stop()
    return shutdown.exit_status


class _Worker:
    """The parts of one worker process and the order in which they start and end."""

    def __init__(self, options: WorkerOptions, model: ModelChoice, codecs: CodecSet, shutdown: Shutdown) -> None:
        self._options = options
        self._model = model
        self._codecs = codecs
        self._shutdown = shutdown
        self._drained = asyncio.Event()
        self._trace = _open_trace(options.name)
        self._transport = GrpcTransport()
        self._host: AsyncioHost | None = None
        columns = _columns(options.engine, model)
        self._arena = _arena(options.engine, model, columns)
        # A request that no amount of waiting can fit is refused at the door, by router and worker alike.
        self._max_model_len = min(model.max_model_len, columns * options.engine.block_size)
        self._engine = self._build_engine()

    def _build_engine(self) -> EngineThread:
        engine = self._options.engine
        config = Scheduler.Config(
            step_tokens=engine.step_tokens,
            block_size=engine.block_size,
            max_model_len=self._max_model_len,
            eos_token_ids=frozenset(self._model.eos_token_ids),
            recompute=Role.PREFILL in self._options.roles,
            prefix_cache=engine.prefix_cache,
        )
        loop = asyncio.get_running_loop()
        self._loaded = asyncio.Event()

        def build_executor() -> Executor:
            # The system gives pages on first touch, at a third of a memory's speed: not in the middle of a transfer.
            self._arena.zero(range(self._arena.columns))
            executor = _executor(self._options, self._model, self._arena)
            for name in _likely_codecs(engine, self._codecs):
                warm_up(self._codecs, name)
            exempt_from_collection()
            loop.call_soon_threadsafe(self._loaded.set)
            return executor

        def on_crash(error: Exception) -> None:
            loop.call_soon_threadsafe(self._shutdown.crash, error)

        core = EngineCore(config, self._model.schema, self._arena, _batching(self._options, self._model))
        cores = self._options.cores or None
        return EngineThread(core, build_executor, self._on_engine_events, on_crash=on_crash, cpu_set=cores)

    def _on_engine_events(self, events: tuple[EngineEvent, ...]) -> None:
        if self._trace is not None:
            self._trace.note_engine(events)
        if self._host is not None:
            self._host.deliver_engine_events(events)

    # -- start ---------------------------------------------------------------------------------------------------------
    async def start(self) -> bool:
        """False when asked to end before the model was loaded, or when that took too long."""
        started_s = time.monotonic()
        self._engine.start()
        if not await self._load():
            return False
        self._transport.listen(self._options.listen, self._accept)
        await self._transport.start()
        core = WorkerCore(
            self._core_config(), random=SystemRandom(), failpoint=self._failpoint(), count_tasks=count_tasks
        )
        self._host = AsyncioHost(
            core if self._trace is None else TracedMachine(core, self._trace),
            self._transport,
            outputs=self._on_output,
            engine=self._engine,
            jobs=JobPool(memory=self._arena),
            on_crash=self._shutdown.crash,
        )
        self._host.start()
        ready = {
            "worker": core.config.worker_id,
            "roles": sorted(role.value for role in core.config.roles),
            "address": core.config.address,
            "columns": core.config.columns,
            "codecs": self._codecs.names(),
            "load_s": round(time.monotonic() - started_s, 1),
        }
        log.info("worker ready", extra=ready)
        if travels_raw(self._options.engine, self._codecs):
            log.warning("KV travels raw: no level of --codec is known to keep within --kl-budget with this model")
        return True

    async def _load(self) -> bool:
        asked = asyncio.ensure_future(self._shutdown.wait())
        loaded = asyncio.ensure_future(self._loaded.wait())
        try:
            await asyncio.wait((asked, loaded), timeout=LOAD_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if not (self._loaded.is_set() or asked.done()):
                log.error("the model was not loaded", extra={"after_s": LOAD_TIMEOUT_S})
                self._shutdown.crash(TimeoutError())
            return self._loaded.is_set() and not asked.done()
        finally:
            asked.cancel()
            loaded.cancel()

    def _accept(self, link: Link, hello: bytes) -> LinkHandler:
        assert self._host is not None, "nobody knows our port yet"
        return self._host.accept(link, hello)

    def _core_config(self) -> Config:
        options, model = self._options, self._model
        assert self._transport.port is not None
        return Config(
            worker_id=secrets.token_hex(8),
            name=options.name,
            address=f"{advertised_host(options.listen, options.controller)}:{self._transport.port}",
            controller_address=options.controller,
            roles=options.roles,
            model=model.name,
            schema=model.schema,
            codecs=self._codecs,
            vocab_size=model.vocab_size,
            max_model_len=self._max_model_len,
            block_size=options.engine.block_size,
            columns=self._arena.columns,
        )

    @staticmethod
    def _failpoint() -> Callable[[str], None]:
        return Failpoints(os.environ.get(FAILPOINTS_VARIABLE, "")).hit

    # -- end -----------------------------------------------------------------------------------------------------------
    def _on_output(self, output: object) -> None:
        if isinstance(output, Drained):
            self._drained.set()

    async def stop(self) -> None:
        """Drain, then take the parts down in the reverse of the order in which they depend on each other."""
        if self._host is not None:
            await self._drain(self._host)
            await self._host.close("shutdown")
        await self._transport.close()
        if self._loaded.is_set():  # a thread that is still loading hears of nothing; it is a daemon and dies with us
            await asyncio.to_thread(self._engine.stop, STOP_TIMEOUT_S)
        if self._trace is not None:
            self._trace.close()

    async def _drain(self, host: AsyncioHost) -> None:
        if self._shutdown.crashed:
            return
        timeout_s = self._options.drain_timeout_s
        host.deliver(Drain(timeout_ms=int(timeout_s * 1_000)))
        try:
            async with asyncio.timeout(timeout_s):
                await self._drained.wait()
        except TimeoutError:
            log.warning("drain timed out", extra={"after_s": timeout_s})


def count_tasks() -> int:
    return len(asyncio.all_tasks())


# -- parts -------------------------------------------------------------------------------------------------------------
def _open_trace(name: str) -> Trace | None:
    folder = os.environ.get(TRACE_VARIABLE)
    return Trace(Path(folder) / f"{name}.jsonl", lambda: time.monotonic_ns() // 1_000) if folder else None


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


def _likely_codecs(options: EngineOptions, codecs: CodecSet) -> tuple[str, ...]:
    """Those that requests get which name none. One that a request names is loaded when it does."""
    return tuple(name for name in codecs.names() if options.codec in (name, AUTO))


def _executor(options: WorkerOptions, model: ModelChoice, arena: Arena) -> Executor:
    """Built on the engine thread. Imports torch only for the executor that is torch."""
    kind = options.engine.executor
    if kind is not ExecutorKind.TORCH:
        paced = kind is ExecutorKind.PACED
        oracle = OracleExecutor(arena, OracleExecutor.Config(schema=model.schema, trust_read_rows=paced))
        return PacedExecutor(oracle, SMOLLM2_ONE_CORE, time.sleep) if paced else oracle
    from engine.executors import torch

    assert model.path is not None
    config = torch.Config(
        model=model.path,
        dtype=model.dtype,
        device=options.engine.device.value,
        threads=options.threads,
        layers_per_group=options.engine.layers_per_group,
    )
    return torch.TorchExecutor(config, arena)


def _arena(options: EngineOptions, model: ModelChoice, columns: int) -> Arena:
    """KV memory where the model runs."""
    if options.device is Device.CPU:
        return Arena(model.schema, columns=columns, block_size=options.block_size)
    from engine.kv.device_arena import DeviceArena

    return DeviceArena(model.schema, columns=columns, block_size=options.block_size, device=options.device.value)


def _kv_budget_bytes(options: EngineOptions) -> int:
    """An accelerator is ours alone, and the weights are not there yet; the host's memory is shared."""
    if options.device is Device.CPU:
        return min(int(free_bytes() * MEMORY_SHARE), KV_BYTES_DEFAULT_MAX)
    import torch

    device_free_bytes, _ = torch.cuda.mem_get_info()
    return int(device_free_bytes * DEVICE_MEMORY_SHARE)


def _columns(options: EngineOptions, model: ModelChoice) -> int:
    """KV memory in columns: what was asked for, else a share of what is free."""
    column_bytes = model.schema.token_bytes * options.block_size
    if options.kv_cache_mib is not None:
        return max(1, (options.kv_cache_mib << 20) // column_bytes)
    budget_bytes = _kv_budget_bytes(options)
    columns = max(1, budget_bytes // column_bytes)
    longest = -(-model.max_model_len // options.block_size) + 1
    if columns < longest:
        room = {"tokens": model.max_model_len, "kv_cache_mib": budget_bytes >> 20}
        log.warning("no room for the longest request", extra=room)
    return min(columns, max(longest, COLUMNS_DEFAULT_MAX))
