"""RouterCore: the owner of every request, as a pure machine (DESIGN 1).

The router owns a request's position, its attempts and its one ending. Workers report the outcome of an *attempt*; the
router forwards position n once, only from the attempt that it has bound. So doubt (an ack lost, a worker frozen and
woken) costs work, never a wrong or doubled token.

    reception    Submit -> admission -> fair queue
    encoding            -> Encode at E for each image -> Encoded -> the line for P      (only with images)
    prefilling          -> Prefill at P
    encoding            -> ImagesWanted -> Bind at E                                    (likewise)
    binding             -> NEAR_TURN -> Reserve at D -> RESERVED -> Bind at P -> Committed
    forwarding          -> TOKEN 0 from P (or again from D, whichever is first) -> TOKENS from D
    endings             -> Ended
    losses       a worker is lost, fails, is silent, or gives a request away: `binding` again, or `prefilling`

A client's request is a *submission*; what workers know are *requests*, one for all of its choices until they fork
(`groups`). All of them are in the `register`; what they hold at workers is in `holders`.

Every wait ends: in the queue (`queue_timeout_ms`), for a worker of a role (`worker_wait_ms`), for a sign of life
(`no_progress_ms`), in all (`deadline_ms`).

Here: the parts, and which of them an event is for. Each of them knows those above it in `__init__`, and none knows this
class. Not here: HTTP, gRPC, text (the edge), what a worker does with a message, who is alive (links and the controller
say).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from control_plane.router.dispatch.absences import Absences
from control_plane.router.dispatch.admission import Admission
from control_plane.router.dispatch.admission import Config as AdmissionConfig
from control_plane.router.dispatch.binding import Binding
from control_plane.router.dispatch.codec_choice import Wish
from control_plane.router.dispatch.deadlines import Patience
from control_plane.router.dispatch.embedding_index import EmbeddingIndex
from control_plane.router.dispatch.encode_placement import EncodePlacer
from control_plane.router.dispatch.encoding import ImageEncoding
from control_plane.router.dispatch.endings import Endings
from control_plane.router.dispatch.forwarding import Forwarding
from control_plane.router.dispatch.groups import Groups
from control_plane.router.dispatch.holders import Holders
from control_plane.router.dispatch.lines import Lines
from control_plane.router.dispatch.links import CONTROLLER, Links
from control_plane.router.dispatch.losses import Losses
from control_plane.router.dispatch.placement import Placer
from control_plane.router.dispatch.prefilling import Prefilling
from control_plane.router.dispatch.reception import Reception
from control_plane.router.dispatch.register import Register
from control_plane.router.dispatch.worker_messages import send
from control_plane.router.dispatch.workers import LINK_PREFIX, Worker, WorkerPool
from control_plane.router.requests import Cancel, EndAll, ResetCache, Stop, Submit, SubmitAll, WorkerView
from control_plane.wire import session_pb2 as pb
from engine.base import limits
from engine.base.errors import FrameError
from engine.base.machine import Close, LinkLost, LinkName, LinkUp, Received, Started, Tick
from kv_transfer.codecs import RAW


@dataclass(frozen=True, slots=True)
class StopAdmitting:
    """Input: refuse new requests from now on; those accepted go on (SIGTERM)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    router_id: str
    controller_address: str
    codec: str = RAW  # of requests that name none
    kl_budget: float | None = None  # likewise
    requests_max: int = limits.ROUTER_REQUESTS_MAX
    queued_tokens_max: int = limits.ROUTER_QUEUED_TOKENS_MAX
    tenants: int = 1  # that there are keys for; with one, nothing is shared out
    deadline_ms: int = limits.REQUEST_DEADLINE_MS
    queue_timeout_ms: int = limits.QUEUE_TIMEOUT_MS
    no_progress_ms: int = limits.NO_PROGRESS_MS
    worker_wait_ms: int = limits.WORKER_WAIT_MS
    attempts_max: int = limits.ATTEMPTS_MAX
    prefill_ahead_tokens: int = limits.PREFILL_AHEAD_TOKENS

    @property
    def admission(self) -> AdmissionConfig:
        return AdmissionConfig(
            requests_max=self.requests_max,
            deadline_ms=self.deadline_ms,
            queue_timeout_ms=self.queue_timeout_ms,
            tenants=self.tenants,
        )


class RouterCore:
    def __init__(self, config: Config) -> None:
        self.config = config
        self.counters = counters = Counter[tuple[str, str]]()  # (name, label) -> count
        self.pool = pool = WorkerPool()
        self._links = Links(pool, router_id=config.router_id, controller_address=config.controller_address)
        self._absences = Absences(pool, config.worker_wait_ms)
        wish = Wish(config.codec, config.kl_budget)
        self._embeddings = embeddings = EmbeddingIndex()
        ahead_tokens = config.prefill_ahead_tokens
        self._placer = placer = Placer(pool, wish, embeddings=embeddings, prefill_ahead_tokens=ahead_tokens)
        self._lines = lines = Lines.of_tokens(config.queued_tokens_max, tenants=config.tenants)
        self._admission = Admission(config.admission, pool, lines, self._absences)
        self._register = register = Register(Patience(self._admission.wait_ms, config.no_progress_ms))
        self._holders = holders = Holders(pool, tenants=config.tenants)
        groups = Groups(register, holders)
        choices = self._admission.choices
        self._endings = endings = Endings(
            register, holders, groups, lines=lines, choices=choices, placer=placer, absences=self._absences
        )
        self._prefilling = prefilling = Prefilling(
            register, holders, groups, endings, lines=lines, placer=placer, counters=counters
        )
        self._reception = Reception(
            register,
            groups,
            endings,
            prefilling,
            admission=self._admission,
            lines=lines,
            absences=self._absences,
            counters=counters,
        )
        self._encoding = ImageEncoding(
            register,
            holders,
            prefilling,
            lines=lines,
            placer=EncodePlacer(pool, embeddings),
            embeddings=embeddings,
            counters=counters,
        )
        self._binding = binding = Binding(
            register, holders, groups, endings, prefilling, placer=placer, embeddings=embeddings, counters=counters
        )
        self._losses = losses = Losses(
            register, holders, endings, prefilling, binding, counters=counters, attempts_max=config.attempts_max
        )
        service_time = self._admission.service_time
        self._forwarding = Forwarding(
            register, holders, groups, endings, binding, losses, service_time=service_time, counters=counters
        )

    # -- what the edge may read ----------------------------------------------------------------------------------------
    @property
    def ready(self) -> bool:
        return self._admission.open and self.pool.ready

    @property
    def in_flight(self) -> int:
        return len(self._register.submissions)

    @property
    def images_waiting(self) -> int:
        """Requests with images that wait for an encoder."""
        return len(self._lines.encode.queue)

    def workers(self) -> Sequence[WorkerView]:
        return self.pool.views()

    # -- the machine ---------------------------------------------------------------------------------------------------
    def step(self, event: object, now_us: int) -> Sequence[object]:
        actions = self._dispatch(event, now_us)
        return [*actions, *self._place_queued(now_us)] if self._holders.changed else actions

    def _place_queued(self, now_us: int) -> list[object]:
        """Something has changed since nobody more could be placed."""
        actions = [*self._encoding.place_queued(now_us), *self._prefilling.place_queued(now_us)]
        self._holders.changed = False
        return actions

    def _dispatch(self, event: object, now_us: int) -> list[object]:
        match event:
            case Received(link, message):
                return self._on_message(link, message, now_us)
            case Submit():
                return self._reception.on_submits([event], now_us)
            case SubmitAll(submits):
                return self._reception.on_submits(submits, now_us)
            case Stop(key, choice):
                return self._endings.on_stop(key, choice, now_us)
            case Cancel(key):
                return self._endings.on_cancel(key, now_us)
            case Tick():
                return self._on_tick(now_us)
            case LinkUp(link):
                return self._on_link_up(link)
            case LinkLost(link, reason):
                return self._on_link_lost(link, reason, now_us)
            case Started():
                self._absences.note(now_us)
                return self._links.dial_controller()
            case ResetCache():
                return self._on_reset_cache()
            case StopAdmitting():
                self._reception.close()
                return []
            case EndAll(error):
                return self._endings.end_all(error, now_us)
        raise TypeError(f"not an event of a router: {event!r}")

    def _on_reset_cache(self) -> list[object]:
        self._placer.forget_all()
        self._embeddings.clear()
        return [send(worker, reset_cache=pb.ResetCache()) for worker in self.pool if worker.serving]

    # -- time ----------------------------------------------------------------------------------------------------------
    @property
    def next_deadline_us(self) -> int | None:
        deadlines = (
            self._links.next_deadline_us,
            self._register.deadlines.next_us,
            self._absences.next_deadline_us,
            self._binding.next_deadline_us,
        )
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _on_tick(self, now_us: int) -> list[object]:
        due = self._register.deadlines
        actions = self._links.on_tick(now_us)
        for submission in due.passed(now_us):
            actions += self._endings.on_deadline(submission, now_us)
        for submission in due.queued_too_long(now_us):
            actions += self._reception.on_queue_timeout(submission, now_us)
        for request in due.silent(now_us):
            actions += self._losses.on_silence(request, now_us)
        actions += self._endings.give_up_absent(now_us)
        return [*actions, *self._binding.on_tick(now_us)]

    # -- links ---------------------------------------------------------------------------------------------------------
    def _on_link_up(self, link: LinkName) -> list[object]:
        if link == CONTROLLER:
            return self._links.on_controller_up()
        worker = self.pool.by_link(link)
        if worker is not None:
            self.pool.on_link_up(worker)
        return []

    def _on_link_lost(self, link: LinkName, reason: str, now_us: int) -> list[object]:
        if link == CONTROLLER:
            self._links.on_controller_lost(now_us)
            return []
        worker = self.pool.by_link(link)
        if worker is None:
            return []
        if worker.session is not None:
            self.counters["links_lost", reason] += 1
        self._links.on_worker_lost(worker, now_us)
        self._absences.note(now_us)
        actions = self._losses.on_worker_lost(worker, now_us)
        self._placer.forget(worker)
        self._embeddings.forget(worker)
        self.pool.forget_unlisted(worker)
        return actions

    # -- messages ------------------------------------------------------------------------------------------------------
    def _on_message(self, link: LinkName, message: bytes, now_us: int) -> list[object]:
        try:
            if link == CONTROLLER:
                return self._on_controller_message(message, now_us)
            worker = self.pool.by_link(link) if link.startswith(LINK_PREFIX) else None
            if worker is None or worker.session is None:
                return []
            envelope = worker.session.open_untrusted(pb.WorkerToRouter, message)
            return self._on_worker_message(worker, envelope, now_us)
        except FrameError as error:
            self.counters["sessions_refused", error.reason] += 1
            return [Close(link, error.reason)]

    def _on_controller_message(self, message: bytes, now_us: int) -> list[object]:
        table = self._links.table_untrusted(message)
        if table is None:
            return []
        if not self.pool.adopt(table):
            self.counters["stale_tables", ""] += 1
            return [Close(CONTROLLER, "stale_term")]
        return self._links.dial_workers(now_us)

    def _on_worker_message(self, worker: Worker, envelope: pb.WorkerToRouter, now_us: int) -> list[object]:
        match envelope.WhichOneof("body"):
            case "tokens":
                return self._forwarding.on_tokens(worker, envelope.tokens, now_us)
            case "first_token":
                return self._forwarding.on_first_token(worker, envelope.first_token, now_us)
            case "prompt_scored":
                return self._forwarding.on_prompt_scored(worker, envelope.prompt_scored, now_us)
            case "pixels_wanted":
                return self._encoding.on_pixels_wanted(worker, envelope.pixels_wanted, now_us)
            case "encoded":
                return self._encoding.on_encoded(worker, envelope.encoded, now_us)
            case "images_wanted":
                return self._encoding.on_images_wanted(worker, envelope.images_wanted, now_us)
            case "near_turn":
                return self._binding.on_near_turn(worker, envelope.near_turn, now_us)
            case "reserved":
                return self._binding.on_reserved(worker, envelope.reserved, now_us)
            case "refused":
                return self._binding.on_refused(worker, envelope.refused, now_us)
            case "committed":
                return self._binding.on_committed(worker, envelope.committed, now_us)
            case "relocate":
                return self._losses.on_relocate(worker, envelope.relocate, now_us)
            case "failed":
                return self._losses.on_failed(worker, envelope.failed, now_us)
            case "status":
                return self._on_status(worker, envelope.status, now_us)
        raise FrameError("body")

    def _on_status(self, worker: Worker, status: pb.WorkerStatus, now_us: int) -> list[object]:
        """Who was busy, or absent, may no longer be."""
        self.pool.on_status_untrusted(worker, status)
        self._absences.note(now_us)
        self._holders.changed = True
        return self._losses.on_leaving(worker, now_us)
