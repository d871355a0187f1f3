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
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import grpc
from prometheus_client import Gauge

from control_plane import addresses
from control_plane.lifecycle import Shutdown, configure_logging
from control_plane.model_choice import ModelChoice, choose_model
from control_plane.options import RouterOptions
from control_plane.router import core, http
from control_plane.router.edge import Config as EdgeConfig
from control_plane.router.edge import Edge, Labels
from control_plane.router.http_server import HttpServer, raise_open_files_limit
from control_plane.router.inference_service import InferenceService, ReadinessHealth, add_services
from control_plane.router.metrics import RouterMetrics
from control_plane.router.requests import WorkerView
from control_plane.router.validation import Config as ValidationConfig
from control_plane.router.validation import Validator
from control_plane.router.vocabulary import ModelCard, OracleVocabulary, TokenizerVocabulary, Vocabulary
from engine.base import limits
from engine.base.asyncio_host import AsyncioHost
from engine.base.errors import InvalidArgument, Unavailable
from engine.grammar import check_constraint
from engine.types import Constraint
from kv_transfer.codecs import codecs
from kv_transfer.offers import AUTO
from kv_transfer.transports.grpc import GrpcTransport

log = logging.getLogger("triptych.router")

REFRESH_S = 0.1  # how soon a health watcher hears of a change
FLUSH_S = 1.0  # for the last bytes to reach clients that read
CALLS_MAX = 2 * limits.ROUTER_REQUESTS_MAX  # those over the limit of requests still get our own answer
GRPC_OPTIONS: Final = (
    ("grpc.max_receive_message_length", limits.MESSAGE_BYTES_MAX),
    ("grpc.so_reuseport", 0),  # two routers on one port must fail, not share its clients
)
PREEMPTIONS: Final = "preemptions"  # the workers' name for it
LABELS: Final[Mapping[str, str]] = {
    "rejections": "reason",
    "requests_by_n": "n",
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

    def __init__(self, machine: core.RouterCore, host: AsyncioHost) -> None:
        self._core = machine
        self._host = host

    @property
    def ready(self) -> bool:
        return self._host.running and self._core.ready

    @property
    def in_flight(self) -> int:
        return self._core.in_flight

    def workers(self) -> Sequence[WorkerView]:
        return self._core.workers()

    def counters(self) -> Mapping[tuple[str, Labels], float]:
        counted = dict(self._own())
        for event, count in self._core.pool.events.items():
            counted["worker_events", (("event", event),)] = count
        counted["num_preemptions", ()] = self._core.pool.events.get(PREEMPTIONS, 0)
        for name in ("hits", "queries"):
            counted[f"prefix_cache_{name}", ()] = self._core.pool.prefix_cache[name]
        return counted

    def _own(self) -> Iterator[tuple[tuple[str, Labels], float]]:
        for (name, label), count in self._core.counters.items():
            if name in LABELS:
                yield (name, ((LABELS[name], label),) if LABELS[name] else ()), count


@dataclass(frozen=True)
class _Listening:
    """The router's three ports, taken before anything else: who finds one taken has nothing to take down."""

    public: socket.socket
    admin: socket.socket
    grpc: socket.socket  # held only: gRPC binds it again

    @classmethod
    def at(cls, options: RouterOptions, stack: contextlib.ExitStack) -> Self:
        return cls(
            public=stack.enter_context(addresses.listen("port", options.host, options.port)),
            admin=stack.enter_context(addresses.listen("admin-port", options.host, options.admin_port)),
            grpc=stack.enter_context(addresses.hold("grpc-port", options.host, options.grpc_port)),
        )


def main(options: RouterOptions) -> int:
    configure_logging("router", options.log_level)
    raise_open_files_limit()
    with contextlib.ExitStack() as stack:
        listening = _Listening.at(options, stack)
        return asyncio.run(_serve(options, choose_model(options.engine), listening))


async def _serve(options: RouterOptions, model: ModelChoice, listening: _Listening) -> int:
    shutdown = Shutdown()
    shutdown.install()
    router = _Router(options, model, shutdown)
    await router.start(listening)
    await shutdown.wait()
    await router.stop()
    return shutdown.exit_status


class _Router:
    """The parts of one router process and the order in which they start and end."""

    def __init__(self, options: RouterOptions, model: ModelChoice, shutdown: Shutdown) -> None:
        self._drain_timeout_s = options.drain_timeout_s
        self._shutdown = shutdown
        config = core.Config(
            router_id=secrets.token_hex(8),
            controller_address=options.controller,
            codec=options.engine.codec,
            kl_budget=options.engine.kl_budget,
        )
        self._core = core.RouterCore(config)
        self._transport = GrpcTransport()
        self._host = AsyncioHost(self._core, self._transport, outputs=self._on_output, on_crash=shutdown.crash)
        self._state = CoreState(self._core, self._host)
        self._metrics = RouterMetrics()
        self._metrics.export(self._state)
        _export_tasks(self._metrics)
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
            ValidationConfig(codecs=(*codecs.names(), AUTO)),
            card=card,
            vocabulary=vocabulary,
            draw_seed=lambda: secrets.randbelow(limits.SEED_MAX),
            count_unknown=self._metrics.unknown_fields,
            check_constraint=check_constraint if model.path is not None else _refuse_constraint,
        )
        self._health = ReadinessHealth(self._state)
        self._quiet = asyncio.Event()  # set when nothing is in flight any more; cleared by who waits for it
        self._http: dict[HttpServer, asyncio.Task[None]] = {}

    def _on_output(self, output: Any) -> None:
        self._edge.on_output(output)
        if self._core.in_flight == 0:
            self._quiet.set()

    # -- start ---------------------------------------------------------------------------------------------------------
    async def start(self, listening: _Listening) -> None:
        self._host.start()
        public = http.public_app(
            edge=self._edge,
            validator=self._validator,
            state=self._state,
            metrics=self._metrics,
            wall_s=time.time,
            config=http.Config(version=importlib.metadata.version("triptych")),
        )
        admin = http.admin_app(state=self._state, metrics=self._metrics, reset_cache=self._edge.reset_cache)
        for app, port in ((public, listening.public), (admin, listening.admin)):
            server = HttpServer(app, port)
            self._http[server] = asyncio.create_task(server.serve())
            self._http[server].add_done_callback(self._on_server_end)
        await self._serve_grpc(addresses.authority_of(listening.grpc))
        self._refreshing = asyncio.create_task(self._refresh_health())
        ports = map(addresses.port_of, (listening.public, listening.admin, listening.grpc))
        log.info("router listens http=%d admin=%d grpc=%d", *ports)

    async def _serve_grpc(self, address: str) -> None:
        self._grpc = grpc.aio.server(options=GRPC_OPTIONS, maximum_concurrent_rpcs=CALLS_MAX)
        add_services(self._grpc, InferenceService(self._edge, self._validator), self._health)
        self._grpc.add_insecure_port(address)
        await self._grpc.start()

    def _on_server_end(self, serving: asyncio.Task[None]) -> None:
        error = None if serving.cancelled() else serving.exception()
        if isinstance(error, Exception):
            log.critical("a server ended", exc_info=error)
            self._shutdown.crash(error)

    async def _refresh_health(self) -> None:
        while True:
            await self._health.watched()
            self._health.refresh()
            await asyncio.sleep(REFRESH_S)

    # -- end -----------------------------------------------------------------------------------------------------------
    async def stop(self) -> None:
        """Stop admitting and let accepted requests end. After that every client is told, whoever still waits; only
        one who does not read is cut off."""
        if self._host.running:  # not after a crash: a machine that is stepped no more ends nothing
            await self._drain()
        await self._host.close("shutdown")
        self._edge.end_all(Unavailable("shutting down", retry_after_ms=limits.RETRY_AFTER_MS))
        await asyncio.gather(self._stop_http(), self._grpc.stop(FLUSH_S))
        self._refreshing.cancel()
        self._validator.close()
        await self._transport.close()

    async def _drain(self) -> None:
        self._host.deliver(core.StopAdmitting())
        self._quiet.clear()
        if not self._core.in_flight:
            return
        try:
            async with asyncio.timeout(self._drain_timeout_s):
                await self._quiet.wait()
        except TimeoutError:
            log.warning("drain timed out after_s=%.1f in_flight=%d", self._drain_timeout_s, self._core.in_flight)

    async def _stop_http(self) -> None:
        for server in self._http:
            server.stop()
        await asyncio.wait(self._http.values(), timeout=FLUSH_S)
        for server in self._http:
            server.stop(force=True)
        await asyncio.gather(*self._http.values(), return_exceptions=True)


def _export_tasks(metrics: RouterMetrics) -> None:
    tasks = Gauge("triptych_asyncio_tasks", "Tasks of the router's event loop.", registry=metrics.registry)
    tasks.set_function(lambda: len(asyncio.all_tasks()))


def _refuse_constraint(constraint: Constraint) -> None:
    raise InvalidArgument("constraint: this model's tokens have no text that could be constrained", field="constraint")


def _vocabulary(model: ModelChoice) -> Vocabulary:
    if model.path is None:
        return OracleVocabulary(model.vocab_size)
    return TokenizerVocabulary.from_model_dir(model.path, model.vocab_size)
