"""A worker's process: the asyncio loop with the machine, one engine thread, a few codec threads (DESIGN 3).

    loop            links, keep-alives, WorkerCore; no Python section over ~0.2 ms
    engine thread   sole owner of the allocator and of torch; pinned to this worker's cores
    codec threads   GIL-free calls only; like the loop, they float over all other cores

The model is loaded and checked, and codecs are warm, before the worker registers: who is registered can take commands.
What there is to load is `engine_parts`' to say.
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
from control_plane.agent.core import Drain, Drained, WorkerCore
from control_plane.agent.engine_parts import build_engine, build_executor, build_memory, check_roles, max_model_len
from control_plane.agent.status import Config
from control_plane.agent.trace import Trace, TracedMachine
from control_plane.agent.tuning import exempt_from_collection, leave_to_engine, settle_interpreter
from control_plane.codec_choice import choose_codecs, travels_raw
from control_plane.lifecycle import Shutdown
from control_plane.logs import configure_logging
from control_plane.model_choice import ModelChoice, choose_model
from control_plane.options import WorkerOptions
from engine.base.asyncio_host import AsyncioHost, JobPool
from engine.base.blas import use_calling_thread
from engine.base.failpoints import Failpoints
from engine.base.link import Link, LinkHandler
from engine.commands import EngineEvent
from engine.executors import StepExecutor
from engine.thread import EngineThread
from kv_transfer.codecs import CodecSet
from kv_transfer.offers import AUTO
from kv_transfer.transports.grpc import GrpcTransport
from kv_transfer.warm_up import warm_up

log = logging.getLogger("triptych.worker")

FAILPOINTS_VARIABLE = "TRIPTYCH_FAILPOINTS"  # tests arm them; nothing can over the network
TRACE_VARIABLE = "TRIPTYCH_TRACE"  # a folder: benches read there what the workers did, and when
LOAD_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 10.0


def main(options: WorkerOptions) -> int:
    configure_logging(options.name, options.log_level, options.log_format)
    settle_interpreter()
    use_calling_thread()
    leave_to_engine(options.cores)
    model = choose_model(options.engine)
    check_roles(options.roles, model)
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
        self._memory = build_memory(options, model)
        self._engine = self._build_engine()

    def _build_engine(self) -> EngineThread:
        loop = asyncio.get_running_loop()
        self._loaded = asyncio.Event()

        def load() -> StepExecutor:
            self._memory.touch()
            executor = build_executor(self._options, self._model, self._memory, sleep=time.sleep)
            for name in self._likely_codecs():
                warm_up(self._codecs, name)
            exempt_from_collection()
            loop.call_soon_threadsafe(self._loaded.set)
            return executor

        def on_crash(error: Exception) -> None:
            loop.call_soon_threadsafe(self._shutdown.crash, error)

        engine = build_engine(self._options, self._model, self._memory)
        cores = self._options.cores or None
        return EngineThread(engine, load, self._on_engine_events, on_crash=on_crash, cpu_set=cores)

    def _likely_codecs(self) -> tuple[str, ...]:
        """Those of KV that requests get which name none. One that a request names is loaded when it does."""
        names = self._codecs.names() if self._memory.kv is not None else ()
        return tuple(name for name in names if self._options.engine.codec in (name, AUTO))

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
            jobs=JobPool(memory=self._memory.arenas),
            on_crash=self._shutdown.crash,
        )
        self._host.start()
        ready = {
            "worker": core.config.worker_id,
            "roles": sorted(role.value for role in core.config.roles),
            "address": core.config.address,
            "columns": core.config.columns,
            "embedding_columns": core.config.embedding_columns,
            "codecs": self._codecs.names(),
            "load_s": round(time.monotonic() - started_s, 1),
        }
        log.info("worker ready", extra=ready)
        if self._memory.kv is not None and travels_raw(self._options.engine, self._codecs):
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
            max_model_len=max_model_len(model, self._memory),
            block_size=options.engine.block_size,
            columns=self._memory.kv_columns,
            embedding_schema=self._memory.embedding_schema,
            embedding_columns=self._memory.embedding_columns,
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


def _open_trace(name: str) -> Trace | None:
    folder = os.environ.get(TRACE_VARIABLE)
    return Trace(Path(folder) / f"{name}.jsonl", lambda: time.monotonic_ns() // 1_000) if folder else None
