"""A whole cluster on one machine: the launcher behind `triptych serve`, and what tests start real processes with.

    launcher --starts--> controller, workers (on cores of their own), router
             --watches-> a process that dies is started again, after a pause and not for ever
             --ends----> router first (it drains), then workers, then controller

Every child holds one end of a pipe; when the launcher dies, however it dies, the pipe closes and the child ends. The
launcher decides nothing about requests and is not needed for them.
"""

import asyncio
import contextlib
import logging
import os
import signal
import ssl
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx

from control_plane import addresses
from control_plane.codec_choice import choose_profile
from control_plane.lifecycle import LIFELINE_VARIABLE, STATUS_BUG, STATUS_MISTAKE, Shutdown
from control_plane.logs import configure_logging
from control_plane.model_choice import choose_model
from control_plane.options import EdgeOptions, OptionError
from control_plane.router.access.key_file import read_keys
from deploy.children import edge_arguments, edge_environment, engine_arguments, inherited
from deploy.cores import CoreShare, share_cores
from deploy.options import ServeOptions, WorkerSpec, fitted
from engine.base.errors import InvalidArgument

log = logging.getLogger("triptych.serve")

READY_TIMEOUT_S = 120.0
POLL_S = 0.05
PROBE_TIMEOUT_S = 1.0  # a router that is ready answers at once; whoever else has the port may never
LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}
RESTART_PAUSE_S = 0.5
RESTARTS_MAX = 5  # of one process within RESTART_WINDOW_S: after that it is broken, not unlucky
RESTART_WINDOW_S = 60.0
KILL_AFTER_S = 5.0  # beyond the drain time-out: a process that ignores SIGTERM


@dataclass(slots=True)
class Child:
    """One process of the cluster and how to start it again."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)  # the router's holds keys
    process: asyncio.subprocess.Process | None = None
    started_s: deque[float] = field(default_factory=lambda: deque(maxlen=RESTARTS_MAX))

    @property
    def pid(self) -> int:
        assert self.process is not None, f"{self.name} has not been started"
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.returncode is None

    @property
    def broken(self) -> bool:
        """Started as often as allowed, and all of it recently."""
        full = len(self.started_s) == RESTARTS_MAX
        return full and time.monotonic() - self.started_s[0] < RESTART_WINDOW_S

    async def start(self) -> None:
        self.started_s.append(time.monotonic())
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "triptych", *self.arguments),
            stdin=asyncio.subprocess.PIPE,
            env={**inherited(os.environ), **self.environment, LIFELINE_VARIABLE: "1"},
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which ends the others in order
        )

    async def end(self, timeout_s: float) -> bool:
        """SIGTERM, and SIGKILL for one that does not listen: then false. A stopped process is woken to hear it."""
        if self.process is None or self.process.returncode is not None:
            return True
        self.process.send_signal(signal.SIGTERM)
        self.process.send_signal(signal.SIGCONT)
        try:
            async with asyncio.timeout(timeout_s):
                await self.process.wait()
            return True
        except TimeoutError:
            log.warning("killed: %s did not end in %.0f s", self.name, timeout_s)
            self.process.kill()
            await self.process.wait()
            return False


class LocalCluster:
    """The processes of one `ServeOptions`. `environments` adds variables to a child by name (tests arm failpoints).

    Holds the ports of its children from the beginning until `stop`, so that the kernel gives them to nobody else
    while a child is on its way, or on its way back. A taken port is an `OptionError` at once.
    """

    def __init__(self, options: ServeOptions, *, environments: Mapping[str, Mapping[str, str]] | None = None) -> None:
        self._held_ports = contextlib.ExitStack()
        self._controller_address = f"127.0.0.1:{self._hold('controller', '127.0.0.1', 0)}"
        self.options = replace(
            options,
            port=self._hold("port", options.host, options.port),
            admin_port=self._hold("admin-port", options.admin_host, options.admin_port),
            grpc_port=self._hold("grpc-port", options.host, options.grpc_port),
        )
        self._environments = environments or {}
        self.controller = self._child("controller", ["controller", "--listen", self._controller_address])
        shares = share_cores(sorted(os.sched_getaffinity(0)), options.workers)
        self.workers = [self._worker(spec, share) for spec, share in zip(options.workers, shares, strict=True)]
        self.router = self._child("router", self._router_arguments(), edge_environment(options.edge))
        self._watchers: list[asyncio.Task[None]] = []
        self.failed = asyncio.Event()
        self.unready = ""  # what the last probe met
        self.exit_status = 0  # what `failed` means for whoever started us

    def _hold(self, option: str, host: str, port: int) -> int:
        try:
            return addresses.port_of(self._held_ports.enter_context(addresses.hold(option, host, port)))
        except OptionError:
            self._held_ports.close()
            raise

    @property
    def children(self) -> list[Child]:
        return [self.controller, *self.workers, self.router]

    @property
    def url(self) -> str:
        return f"{self._scheme}://{addresses.authority(_dialled(self.options.host), self.options.port)}"

    @property
    def admin_url(self) -> str:
        return f"{self._scheme}://{addresses.authority(_dialled(self.options.admin_host), self.options.admin_port)}"

    @property
    def _scheme(self) -> str:
        return "https" if self.options.edge.ssl_certfile else "http"

    def child(self, name: str) -> Child:
        return next(child for child in self.children if child.name == name)

    # -- what to run ---------------------------------------------------------------------------------------------------
    def _child(self, name: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Child:
        log_flags = ["--log-level", self.options.log_level.value, "--log-format", self.options.log_format.value]
        return Child(name, [*arguments, *log_flags], {**(environment or {}), **self._environments.get(name, {})})

    def _worker(self, spec: WorkerSpec, share: CoreShare) -> Child:
        roles = [argument for role in sorted(spec.roles) for argument in ("--role", role.value)]
        arguments = [
            *("worker", "--name", spec.name, "--controller", self._controller_address, *roles),
            *("--cores", ",".join(map(str, share.engine_cores)), "--threads", str(share.threads)),
            *("--drain-timeout", str(self.options.drain_timeout_s)),
            *engine_arguments(self.options.engine),
        ]
        return self._child(spec.name, arguments)

    def _router_arguments(self) -> list[str]:
        options = self.options
        return [
            *("router", "--controller", self._controller_address, "--host", options.host),
            *("--port", str(options.port)),
            *("--admin-host", options.admin_host, "--admin-port", str(options.admin_port)),
            *("--grpc-port", str(options.grpc_port), "--drain-timeout", str(options.drain_timeout_s)),
            *engine_arguments(options.engine),
            *edge_arguments(options.edge),
        ]

    # -- lifetime ------------------------------------------------------------------------------------------------------
    async def start(self, *, restart: bool = True) -> None:
        """Start everything at once: workers, router and controller find each other in any order."""
        for child in self.children:
            await child.start()
            self._watchers.append(asyncio.create_task(self._watch(child, restart=restart)))

    async def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Until `GET /ready` says that a request would succeed. Raises TimeoutError, or RuntimeError on a failure."""
        async with asyncio.timeout(timeout_s), _probing(self.options.edge) as client:
            while not await self._is_ready(client):
                if self.failed.is_set():
                    raise RuntimeError("a process of the cluster cannot be started")
                await asyncio.sleep(POLL_S)

    async def _is_ready(self, client: httpx.AsyncClient) -> bool:
        try:
            answer = await client.get(f"{self.url}/ready")
        except httpx.TransportError as error:
            self.unready = f"{self.url}: {error}"
            return False
        self.unready = f"{self.url}/ready says {answer.status_code}"
        return answer.status_code == httpx.codes.OK and self.router.alive  # an answer on our port need not be ours

    async def _watch(self, child: Child, *, restart: bool) -> None:
        """The owner of a child's restarts."""
        while True:
            assert child.process is not None
            status = await child.process.wait()
            log.warning("ended: %s status=%d", child.name, status)
            if status == STATUS_MISTAKE:
                self._give_up(f"{child.name} cannot run like this, for the reason it has given", STATUS_MISTAKE)
                return
            if not restart:
                self._give_up(f"{child.name} is not to be started again")
                return
            if child.broken:
                self._give_up(f"{child.name} ended {RESTARTS_MAX} times within {RESTART_WINDOW_S:.0f} s")
                return
            await asyncio.sleep(RESTART_PAUSE_S)
            try:
                await child.start()
            except OSError as error:  # no more processes, no more memory, no more Python
                self._give_up(f"{child.name} cannot be started: {error}")
                return

    def _give_up(self, reason: str, exit_status: int = STATUS_BUG) -> None:
        log.error("given up: %s", reason)
        self.exit_status = exit_status
        self.failed.set()

    async def stop(self) -> bool:
        """The router drains what it has accepted; only then do the workers go. False if one had to be killed."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        ended = [await self.router.end(self.options.drain_timeout_s + KILL_AFTER_S)]
        ended += await asyncio.gather(
            *(worker.end(KILL_AFTER_S) for worker in self.workers)
        )  # nobody asks them any more
        ended += [await self.controller.end(KILL_AFTER_S)]
        self._held_ports.close()
        return all(ended)


def _dialled(host: str) -> str:
    """What one listens on everywhere is reached here, and is no address that a browser or a client takes."""
    return LOOPBACK_OF.get(host, host)


def _probing(edge: EdgeOptions) -> httpx.AsyncClient:
    """Straight to our own machine, whatever http_proxy says."""
    return httpx.AsyncClient(trust_env=False, timeout=PROBE_TIMEOUT_S, verify=_own_certificate(edge))


def _own_certificate(edge: EdgeOptions) -> ssl.SSLContext | bool:
    """For the process that we have started ourselves: its certificate is for the name that clients use, which need not
    lead here, and nothing secret is asked or believed. Where clients must show a certificate we show the same one."""
    if edge.ssl_certfile is None:
        return True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if edge.ssl_ca_certs is not None:
        context.load_cert_chain(edge.ssl_certfile, edge.ssl_keyfile)
    return context


def serve(options: ServeOptions) -> int:
    """`triptych serve`: run until told to end; the exit status. Raises `OptionError` before any process starts."""
    configure_logging("serve", options.log_level, options.log_format)
    # Converted once, with somebody watching, before every process of the cluster would do it.
    model = choose_model(options.engine, progress=lambda message: print(message, flush=True))
    options = fitted(options, sees=model.vision is not None)
    choose_profile(options.engine, model.schema)  # a mistake in it is every worker's
    _require_edge(options.edge)
    takes_chats = _takes_chats(options.edge, model.path)
    return asyncio.run(_serve(options, takes_chats=takes_chats))


def _require_edge(edge: EdgeOptions) -> None:
    """What the router would refuse, a second later and in the middle of the others' lines."""
    read_keys(edge)
    if edge.ssl_certfile is not None:
        from control_plane.router.access.tls import Tls  # and with it grpc, which a launcher does without

        Tls.of(edge)


def _takes_chats(edge: EdgeOptions, model_dir: Path | None) -> bool:
    """Raises `OptionError` for a chat template that the router would refuse."""
    if model_dir is None:
        return False
    from control_plane.router.text.chat_template import ChatTemplate  # and with it jinja

    try:
        return ChatTemplate.from_model_dir(model_dir, edge.chat_template) is not None
    except InvalidArgument as error:
        raise OptionError("chat-template", error.message.removeprefix("chat-template: ")) from None


async def _serve(options: ServeOptions, *, takes_chats: bool) -> int:
    shutdown = Shutdown()
    shutdown.install()
    cluster = LocalCluster(options)
    try:
        status = await _run(cluster, shutdown, takes_chats=takes_chats)
    finally:
        all_ended = await cluster.stop()
    return status if all_ended else STATUS_BUG


async def _run(cluster: LocalCluster, shutdown: Shutdown, *, takes_chats: bool) -> int:
    """From the first process until the cluster is to end; the exit status if it ends well."""
    started_s = time.monotonic()
    await cluster.start()
    failed = asyncio.create_task(cluster.failed.wait())
    asked = asyncio.create_task(shutdown.wait())
    ready = asyncio.create_task(cluster.wait_ready())
    try:
        await asyncio.wait((ready, failed, asked), return_when=asyncio.FIRST_COMPLETED)
        if ready.done() and ready.exception() is None:
            _announce(cluster, time.monotonic() - started_s, takes_chats=takes_chats)
            await asyncio.wait((failed, asked), return_when=asyncio.FIRST_COMPLETED)
        elif not asked.done():
            log.error("the cluster did not become ready: %s", cluster.unready)
        return 0 if asked.done() else cluster.exit_status or STATUS_BUG
    finally:
        for task in (failed, asked, ready):
            task.cancel()
        await asyncio.gather(failed, asked, ready, return_exceptions=True)


def _announce(cluster: LocalCluster, seconds: float, *, takes_chats: bool) -> None:
    examples = _chat_examples(cluster) if takes_chats else _completion_examples(cluster)
    print(
        f"\nTriptych is ready after {seconds:.1f} s: {cluster.url}  (admin {cluster.admin_url})\n{examples}", flush=True
    )


def _chat_examples(cluster: LocalCluster) -> str:
    return (
        f"  {_curl(cluster.options.edge)} {cluster.url}/v1/chat/completions -H 'content-type: application/json' \\\n"
        '    -d \'{"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 32}\'\n'
        f"  triptych chat --url {cluster.url}{_certificates(cluster.options.edge)}\n"
    )


def _completion_examples(cluster: LocalCluster) -> str:
    """For a model that has no words for a conversation."""
    return (
        f"  {_curl(cluster.options.edge)} {cluster.url}/v1/completions -H 'content-type: application/json' \\\n"
        '    -d \'{"prompt": "The capital of France is", "max_tokens": 32}\'\n'
    )


def _curl(edge: EdgeOptions) -> str:
    """With what this router asks of a client; a key only ever by the name of a variable."""
    key = ' -H "authorization: Bearer $TRIPTYCH_API_KEY"' if edge.api_keys or edge.api_key_file else ""
    return f"curl{_certificates(edge)}{key}"


def _certificates(edge: EdgeOptions) -> str:
    """Flags that curl and `triptych chat` call alike."""
    trust = " --cacert CA.pem" if edge.ssl_certfile else ""
    return trust + (" --cert CLIENT.pem" if edge.ssl_ca_certs else "")
