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

from control_plane import addresses
from control_plane.lifecycle import Shutdown
from control_plane.logs import configure_logging
from control_plane.model_choice import ModelChoice, choose_model
from control_plane.options import EdgeOptions, OptionError, RouterOptions
from control_plane.router import core
from control_plane.router.access.key_file import read_keys
from control_plane.router.access.tenants import Keys
from control_plane.router.access.tls import Tls
from control_plane.router.edge import Config as EdgeConfig
from control_plane.router.edge import Edge, Labels
from control_plane.router.grpc.server_facts import ServerFacts
from control_plane.router.grpc.services import add_services
from control_plane.router.http import app as http
from control_plane.router.http.server import HttpServer, raise_open_files_limit
from control_plane.router.media import decoding, fetch
from control_plane.router.media.decoding import Decoders
from control_plane.router.media.fetch import Fetcher
from control_plane.router.media.reader import ImageMemory, ImageReader
from control_plane.router.metrics import RouterMetrics
from control_plane.router.requests import EndAll, WorkerView
from control_plane.router.text.chat_template import ChatTemplate
from control_plane.router.text.vocabulary import ModelCard, OracleVocabulary, TokenizerVocabulary, Vocabulary
from control_plane.router.validation.image_prompt import Sight
from control_plane.router.validation.validator import Config as ValidationConfig
from control_plane.router.validation.validator import Validator
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
VERSION: Final = importlib.metadata.version("triptych")
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
    "images": "result",
    "no_progress": "stage",
    "queue_wait_ms": "",
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

    @property
    def images_waiting(self) -> int:
        return self._core.images_waiting

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
            admin=stack.enter_context(addresses.listen("admin-port", options.admin_host, options.admin_port)),
            grpc=stack.enter_context(addresses.hold("grpc-port", options.host, options.grpc_port)),
        )


def main(options: RouterOptions) -> int:
    configure_logging("router", options.log_level, options.log_format)
    raise_open_files_limit()
    with contextlib.ExitStack() as stack:
        listening = _Listening.at(options, stack)
        return asyncio.run(_serve(options, _Served.of(options), listening))


@dataclass(frozen=True)
class _Served:
    """What files say: read before the loop runs, so that a mistake in one is a line and no traceback."""

    model: ModelChoice
    vocabulary: Vocabulary
    chat: ChatTemplate | None
    keys: Keys
    tls: Tls | None

    @classmethod
    def of(cls, options: RouterOptions) -> Self:
        model, edge = choose_model(options.engine), options.edge
        return cls(model, _vocabulary(model, edge), _chat_template(model, edge), read_keys(edge), Tls.of(edge))

    def card(self, edge: EdgeOptions) -> ModelCard:
        vision = self.model.vision
        return ModelCard(
            name=edge.served_model_name or self.model.name,
            vocab_size=self.model.vocab_size,
            max_model_len=self.model.max_model_len,
            eos_token_ids=self.model.eos_token_ids,
            images_max=edge.limit_mm_per_prompt if vision is not None else 0,
            image_token_id=None if vision is None else vision.image_token_id,
        )


async def _serve(options: RouterOptions, served: _Served, listening: _Listening) -> int:
    shutdown = Shutdown()
    shutdown.install()
    router = _Router(options, served, shutdown)
    await router.start(listening)
    await shutdown.wait()
    await router.stop()
    return shutdown.exit_status


class _Router:
    """The parts of one router process and the order in which they start and end."""

    def __init__(self, options: RouterOptions, served: _Served, shutdown: Shutdown) -> None:
        self._options = options
        self._served = served
        self._shutdown = shutdown
        self._core = core.RouterCore(_core_config(options, served.keys))
        self._transport = GrpcTransport()
        self._host = AsyncioHost(self._core, self._transport, outputs=self._on_output, on_crash=shutdown.crash)
        self._state = CoreState(self._core, self._host)
        self._metrics = RouterMetrics()
        self._metrics.export(self._state)
        self._metrics.export_gauge(
            "asyncio_tasks", "Tasks of the router's event loop.", lambda: len(asyncio.all_tasks())
        )
        card = served.card(options.edge)
        self._edge = Edge(
            EdgeConfig(),
            card=card,
            vocabulary=served.vocabulary,
            deliver=self._host.deliver,
            observer=self._metrics,
            clock_us=lambda: time.monotonic_ns() // 1_000,
            mint_id=lambda: secrets.token_hex(12),
        )
        self._validator = Validator(
            ValidationConfig(codecs=_codecs(), tenants=len(served.keys.names)),
            card=card,
            vocabulary=served.vocabulary,
            draw_seed=lambda: secrets.randbelow(limits.SEED_MAX),
            count_unknown=self._metrics.unknown_fields,
            check_constraint=check_constraint if served.model.path is not None else _refuse_constraint,
            chat=served.chat,
            sight=_sight(options.edge, served, self._metrics) if card.images_max else None,
        )
        self._quiet = asyncio.Event()  # set when nothing is in flight any more; cleared by who waits for it
        self._http: dict[HttpServer, asyncio.Task[None]] = {}
        self._stopping = False

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
            wall_s=time.time,
            keys=self._served.keys,
            config=http.Config(version=VERSION),
        )
        admin = http.admin_app(
            state=self._state, metrics=self._metrics, reset_cache=self._edge.reset_cache, abort=self._edge.abort
        )
        tls = self._served.tls.context() if self._served.tls is not None else None
        for app, port in ((public, listening.public), (admin, listening.admin)):
            server = HttpServer(app, port, tls=tls)
            self._http[server] = asyncio.create_task(server.serve())
            self._http[server].add_done_callback(self._on_server_end)
        await self._serve_grpc(addresses.authority_of(listening.grpc))
        self._refreshing = asyncio.create_task(self._refresh_health())
        ports = map(addresses.port_of, (listening.public, listening.admin, listening.grpc))
        log.info("router listens", extra=dict(zip(("http", "admin", "grpc"), ports, strict=True)))

    async def _serve_grpc(self, address: str) -> None:
        self._grpc = grpc.aio.server(options=GRPC_OPTIONS, maximum_concurrent_rpcs=CALLS_MAX)
        self._health = add_services(
            self._grpc,
            edge=self._edge,
            validator=self._validator,
            state=self._state,
            wall_s=time.time,
            keys=self._served.keys,
            facts=_facts(self._options, self._served),
        )
        if self._served.tls is None:
            self._grpc.add_insecure_port(address)
        else:
            self._grpc.add_secure_port(address, self._served.tls.credentials())
        await self._grpc.start()

    def _on_server_end(self, serving: asyncio.Task[None]) -> None:
        """Unless it was told to: a router that nobody reaches is better started again, whatever the reason."""
        error = None if serving.cancelled() else serving.exception()
        if not self._stopping:
            log.critical("a server ended", exc_info=error)
            self._shutdown.crash(RuntimeError("a server ended"))

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
            self._host.deliver(EndAll(Unavailable("shutting down", retry_after_ms=limits.RETRY_AFTER_MS)))
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
            async with asyncio.timeout(self._options.drain_timeout_s):
                await self._quiet.wait()
        except TimeoutError:
            left = {"after_s": self._options.drain_timeout_s, "in_flight": self._core.in_flight}
            log.warning("drain timed out", extra=left)

    async def _stop_http(self) -> None:
        self._stopping = True
        for server in self._http:
            server.stop()
        await asyncio.wait(self._http.values(), timeout=FLUSH_S)
        for server in self._http:
            server.stop(force=True)
        await asyncio.gather(*self._http.values(), return_exceptions=True)


# -- parts -------------------------------------------------------------------------------------------------------------
def _core_config(options: RouterOptions, keys: Keys) -> core.Config:
    return core.Config(
        router_id=secrets.token_hex(8),
        controller_address=options.controller,
        codec=options.engine.codec,
        kl_budget=options.engine.kl_budget,
        tenants=len(keys.names),
        queue_timeout_ms=int(options.edge.queue_timeout_s * 1_000),
    )


def _facts(options: RouterOptions, served: _Served) -> ServerFacts:
    return ServerFacts(
        version=VERSION,
        model_dtype=served.model.dtype,
        block_size=options.engine.block_size,
        codecs=_codecs(),
        codec=options.engine.codec,
        tokenizer=served.model.path,
    )


def _codecs() -> tuple[str, ...]:
    """What a request may ask for."""
    return (*codecs.names(), AUTO)


def _sight(edge: EdgeOptions, served: _Served, metrics: RouterMetrics) -> Sight | None:
    """Nothing of it costs anything before the first image comes."""
    vision, tenants = served.model.vision, len(served.keys.names)
    if vision is None:
        return None
    memory = ImageMemory(tenants=tenants)
    metrics.export_gauge("image_bytes_held", "Pixels of requests that have not ended.", lambda: memory.held_bytes)
    reader = ImageReader(
        Decoders(decoding.Config(tenants=tenants)),
        Fetcher(fetch.Config(domains=edge.allowed_media_domains, tenants=tenants)),
        memory,
        metrics,
    )
    return Sight(vision, reader)


def _refuse_constraint(constraint: Constraint) -> None:
    raise InvalidArgument("constraint: this model's tokens have no text that could be constrained", field="constraint")


def _vocabulary(model: ModelChoice, edge: EdgeOptions) -> Vocabulary:
    if model.path is None:
        return OracleVocabulary(model.vocab_size)
    permit = edge.permit_special_tokens
    try:
        return TokenizerVocabulary.from_model_dir(model.path, model.vocab_size, permit_special_tokens=permit)
    except Exception as error:  # the library raises nothing narrower
        raise OptionError("model", f"its tokenizer.json cannot be read: {str(error)[:200]}") from None


def _chat_template(model: ModelChoice, edge: EdgeOptions) -> ChatTemplate | None:
    """None: the model takes prompts only. One that cannot be used is an error now, not at the first conversation."""
    if model.path is None:
        if edge.chat_template is not None:
            raise OptionError("chat-template", f"model '{model.name}' has no text that a template could be for")
        return None
    try:
        return ChatTemplate.from_model_dir(model.path, edge.chat_template)
    except InvalidArgument as error:
        raise OptionError("chat-template", error.message.removeprefix("chat-template: ")) from None
