"""The router's process: one loop with the machine and its edge, three listeners, no torch.

public HTTP (8000)   OpenAI clients            admin HTTP (8001)   operators, Prometheus
gRPC (50051)         triptych.v1.Inference, health, reflection
links                dialled from here: the controller, every worker
"""

import asyncio
import contextlib
import importlib.metadata
import logging
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import grpc
import uvicorn

from control_plane.lifecycle import Shutdown, configure_logging
from control_plane.model_choice import ModelChoice, choose_model
from control_plane.options import RouterOptions
from control_plane.router import core, http
from control_plane.router.edge import Config as EdgeConfig
from control_plane.router.edge import Edge, Labels
from control_plane.router.inference_service import InferenceService, ReadinessHealth, add_services
from control_plane.router.metrics import RouterMetrics
from control_plane.router.requests import WorkerView
from control_plane.router.validation import Config as ValidationConfig
from control_plane.router.validation import Validator
from control_plane.router.vocabulary import ModelCard, OracleVocabulary, TokenizerVocabulary, Vocabulary
from engine.base import limits
from engine.base.asyncio_host import AsyncioHost
from kv_transfer.codecs import codecs
from kv_transfer.transports.grpc import GrpcTransport

log = logging.getLogger("triptych.router")

REFRESH_S = 0.1  # how soon a health watcher hears of a change
LABELS: Final[Mapping[str, str]] = {
    "rejections": "reason",
    "placements": "choice",
    "links_lost": "reason",
    "sessions_refused": "reason",
    "reservations_refused": "reason",
    "attempts_failed": "reason",
    "relocations": "reason",
    "kv_transfers": "codec",
    "stale_tokens": "",
    "stale_tables": "",
    "token_gaps": "",
}


class CoreState:
    """`RouterState` over the machine: what /ready, /admin and /metrics read."""

    def __init__(self, machine: core.RouterCore) -> None:
        self._core = machine

    @property
    def ready(self) -> bool:
        return self._core.ready

    @property
    def in_flight(self) -> int:
        return self._core.in_flight

    def workers(self) -> Sequence[WorkerView]:
        return self._core.workers()

    def counters(self) -> Mapping[tuple[str, Labels], float]:
        own = dict(self._own())
        for worker in self._core.pool:
            for event, count in worker.status.counters.items():
                key: tuple[str, Labels] = ("worker_events", (("event", event),))
                own[key] = own.get(key, 0) + count
        return own

    def _own(self) -> Iterator[tuple[tuple[str, Labels], float]]:
        for (name, label), count in self._core.counters.items():
            if name in LABELS:
                yield (name, ((LABELS[name], label),) if LABELS[name] else ()), count


class _QuietServer(uvicorn.Server):
    """uvicorn without its own signal handling: the process has one owner of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def main(options: RouterOptions) -> int:
    configure_logging("router", options.log_level)
    return asyncio.run(_serve(options))


async def _serve(options: RouterOptions) -> int:
    shutdown = Shutdown()
    shutdown.install()
    router = _Router(options, choose_model(options.engine), shutdown)
    await router.start()
    await shutdown.wait()
    await router.stop()
    return shutdown.exit_status


class _Router:
    """The parts of one router process and the order in which they start and end."""

    def __init__(self, options: RouterOptions, model: ModelChoice, shutdown: Shutdown) -> None:
        self._options = options
        config = core.Config(
            router_id=secrets.token_hex(8), controller_address=options.controller, codec=options.engine.codec
        )
        self._core = core.RouterCore(config)
        self._state = CoreState(self._core)
        self._transport = GrpcTransport()
        self._metrics = RouterMetrics()
        self._metrics.export(self._state)
        self._host = AsyncioHost(self._core, self._transport, outputs=self._on_output, on_crash=shutdown.crash)
        card = ModelCard(
            name=model.name,
            vocab_size=model.vocab_size,
            max_model_len=model.max_model_len,
            eos_token_ids=model.eos_token_ids,
        )
        vocabulary = _vocabulary(model)
        self._edge = Edge(
            EdgeConfig(),
            card=card,
            vocabulary=vocabulary,
            deliver=self._host.deliver,
            observer=self._metrics,
            clock_us=lambda: time.monotonic_ns() // 1_000,
            mint_id=lambda: secrets.token_hex(12),
        )
        self._validator = Validator(
            ValidationConfig(codecs=tuple(codecs.names())),
            card=card,
            vocabulary=vocabulary,
            draw_seed=lambda: secrets.randbelow(limits.SEED_MAX),
            count_unknown=self._metrics.unknown_fields,
        )
        self._health = ReadinessHealth(self._state)
        self._quiet = asyncio.Event()  # set when nothing is in flight any more; cleared by who waits for it
        self._tasks: list[asyncio.Task[None]] = []
        self._http: list[_QuietServer] = []

    def _on_output(self, output: Any) -> None:
        self._edge.on_output(output)
        if self._core.in_flight == 0:
            self._quiet.set()

    # -- start ---------------------------------------------------------------------------------------------------------
    async def start(self) -> None:
        options = self._options
        self._host.start()
        public = http.public_app(
            edge=self._edge,
            validator=self._validator,
            state=self._state,
            metrics=self._metrics,
            wall_s=time.time,
            config=http.Config(version=importlib.metadata.version("triptych")),
        )
        admin = http.admin_app(state=self._state, metrics=self._metrics)
        self._listen_http(public, options.port)
        self._listen_http(admin, options.admin_port)
        await self._listen_grpc()
        self._tasks.append(asyncio.create_task(self._refresh_health()))
        log.info("router listens http=%d admin=%d grpc=%d", options.port, options.admin_port, options.grpc_port)

    def _listen_http(self, app: Any, port: int) -> None:
        config = uvicorn.Config(
            app,
            host=self._options.host,
            port=port,
            lifespan="off",
            log_config=None,
            access_log=False,
            http="httptools",
            ws="none",
            backlog=2_048,
            limit_concurrency=4 * limits.ROUTER_REQUESTS_MAX,
            timeout_keep_alive=30,
            server_header=False,
        )
        server = _QuietServer(config)
        self._http.append(server)
        self._tasks.append(asyncio.create_task(server.serve()))

    async def _listen_grpc(self) -> None:
        self._grpc = grpc.aio.server(options=(("grpc.max_receive_message_length", limits.MESSAGE_BYTES_MAX),))
        add_services(self._grpc, InferenceService(self._edge, self._validator), self._health)
        self._grpc.add_insecure_port(f"{self._options.host}:{self._options.grpc_port}")
        await self._grpc.start()

    async def _refresh_health(self) -> None:
        while True:
            self._health.refresh()
            await asyncio.sleep(REFRESH_S)

    # -- end -----------------------------------------------------------------------------------------------------------
    async def stop(self) -> None:
        """Stop admitting, let accepted requests end, then close the listeners and the links."""
        self._host.deliver(core.StopAdmitting())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._options.drain_timeout_s):
                self._quiet.clear()
                if self._core.in_flight:
                    await self._quiet.wait()
        for server in self._http:
            server.should_exit = True
        await self._grpc.stop(grace=1.0)
        self._tasks.pop().cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._validator.close()
        await self._host.close("shutdown")
        await self._transport.close()


def _vocabulary(model: ModelChoice) -> Vocabulary:
    if model.path is None:
        return OracleVocabulary(model.vocab_size)
    return TokenizerVocabulary.from_model_dir(model.path, model.vocab_size)
