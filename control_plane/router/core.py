"""RouterCore: the owner of every request, as a pure machine (DESIGN 1).

The router owns a request's position, its attempts and its one ending. Workers report the outcome of an *attempt*; the
router forwards position n once, only from the attempt that it has bound. So doubt (an ack lost, a worker frozen and
woken) costs work, never a wrong or doubled token.

    Submit -> admission -> fair queue -> Prefill at P -> NEAR_TURN -> Reserve at D -> RESERVED -> Bind at P
           -> TOKEN 0 from P (or again from D, whichever is first) -> Committed -> TOKENS from D -> Ended

A client's request is a *submission*; what workers know are *requests*, one for all of its choices until they fork.

Requests wait here, not at workers: what a worker was given can no longer be overtaken. Every wait ends: in the queue
(`queue_timeout_ms`), for a worker of a role (`worker_wait_ms`), for a sign of life (`no_progress_ms`), in all
(`deadline_ms`).

Not here: HTTP, gRPC, text (the edge), what a worker does with a message, who is alive (links and the controller say),
which worker is best (`placement`), whose turn it is (`request_queue`), who may have how much (`shares`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from control_plane.router.dispatch import worker_messages
from control_plane.router.dispatch.absences import Absences
from control_plane.router.dispatch.admission import Admission, Refusal
from control_plane.router.dispatch.admission import Config as AdmissionConfig
from control_plane.router.dispatch.alarms import Alarms
from control_plane.router.dispatch.decode_memory import DecodeMemory
from control_plane.router.dispatch.drain_rate import DrainRate
from control_plane.router.dispatch.encodings import Wish
from control_plane.router.dispatch.live_request import LiveRequest, Placement, Stage
from control_plane.router.dispatch.placement import Choice, Placer
from control_plane.router.dispatch.request_queue import RequestQueue
from control_plane.router.dispatch.shares import Shares
from control_plane.router.dispatch.submissions import Submission
from control_plane.router.dispatch.workers import LINK_PREFIX, Worker, WorkerPool
from control_plane.router.requests import (
    Cancel,
    Ended,
    PromptScored,
    ResetCache,
    Stop,
    Submit,
    TokensReady,
    WorkerView,
)
from control_plane.wire import session_pb2 as pb
from control_plane.wire.session import Session, hello
from control_plane.wire.translate import (
    ReportedToken,
    first_token_from_wire_untrusted,
    scores_from_wire_untrusted,
    tokens_from_wire_untrusted,
)
from engine.base import limits
from engine.base.errors import (
    Cancelled,
    DeadlineExceeded,
    FrameError,
    Internal,
    TriptychError,
    Unavailable,
)
from engine.base.machine import Close, Dial, LinkLost, LinkName, LinkUp, Received, Send, Started, Tick
from engine.commands import SampledToken
from engine.types import FinishReason, Role
from kv_transfer.codecs import RAW

CONTROLLER: LinkName = "controller"
GROWTH_TOKENS: Final = limits.GROWTH_RESERVE_TOKENS  # output is metered, and its memory counted, so many at a time


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


class RouterCore:
    def __init__(self, config: Config) -> None:
        self.config = config
        self.pool = WorkerPool()
        self.counters: Counter[tuple[str, str]] = Counter()  # (name, label) -> count
        wish = Wish(config.codec, config.kl_budget)
        self._placer = Placer(self.pool, wish, prefill_ahead_tokens=config.prefill_ahead_tokens)
        self._absences = Absences(self.pool, config.worker_wait_ms)
        self._submissions: dict[int, Submission] = {}  # by key
        self._requests: dict[int, LiveRequest] = {}
        self._queue = RequestQueue(Shares(config.queued_tokens_max, tenants=config.tenants))
        self._decode_memory = DecodeMemory(self.pool, tenants=config.tenants)
        self._drain_rate = DrainRate()
        admission = AdmissionConfig(
            requests_max=config.requests_max, queue_timeout_ms=config.queue_timeout_ms, tenants=config.tenants
        )
        self._admission = Admission(admission, self.pool, self._queue, self._absences, self._drain_rate)
        self._fair = config.tenants > 1
        self._may_place = False  # something has changed since nobody more could be placed
        self._seeking: dict[int, LiveRequest] = {}  # in RESERVING: those that may have to ask again
        self._deadlines = Alarms(self._deadline_us)  # of submissions, by key
        self._queue_timeouts = Alarms(self._queue_timeout_us)  # likewise
        self._silences = Alarms(self._silence_us)  # of requests, by id
        self._arrivals = 0
        self._last_id = 0
        self._controller: Session | None = None
        self._redial_controller_us: int | None = None

    # -- what the edge may read ----------------------------------------------------------------------------------------
    @property
    def ready(self) -> bool:
        return self._admission.open and self.pool.ready

    @property
    def in_flight(self) -> int:
        return len(self._submissions)

    def workers(self) -> Sequence[WorkerView]:
        return self.pool.views()

    # -- the machine ---------------------------------------------------------------------------------------------------
    def step(self, event: object, now_us: int) -> Sequence[object]:
        actions = self._dispatch(event, now_us)
        return [*actions, *self._place_queued(now_us)] if self._may_place and self._queue else actions

    def _dispatch(self, event: object, now_us: int) -> list[object]:
        match event:
            case Received(link, message):
                return self._on_message(link, message, now_us)
            case Submit():
                return self._on_submit(event, now_us)
            case Stop(key, choice):
                return self._on_stop(key, choice, now_us)
            case Cancel(key):
                submission = self._submissions.get(key)
                return [] if submission is None else self._end(submission, now_us, error=Cancelled("cancelled"))
            case Tick():
                return self._on_tick(now_us)
            case LinkUp(link):
                return self._on_link_up(link)
            case LinkLost(link, reason):
                return self._on_link_lost(link, reason, now_us)
            case Started():
                self._absences.note(now_us)
                return self._dial_controller()
            case ResetCache():
                return self._on_reset_cache()
            case StopAdmitting():
                self._admission.open = False
                return []
        raise TypeError(f"not an event of a router: {event!r}")

    @property
    def next_deadline_us(self) -> int | None:
        deadlines = [self._redial_controller_us, self._absences.next_deadline_us]
        deadlines += [alarms.next_us for alarms in (self._deadlines, self._queue_timeouts, self._silences)]
        deadlines += [worker.redial_us for worker in self.pool if worker.session is None]
        deadlines += [request.retry_us for request in self._seeking.values()]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _on_tick(self, now_us: int) -> list[object]:
        actions: list[object] = []
        if self._redial_controller_us is not None and self._redial_controller_us <= now_us:
            actions += self._dial_controller()
        actions += self._dial_workers(now_us)
        for key in self._deadlines.ring(now_us):
            actions += self._on_deadline(self._submissions[key], now_us)
        for key in self._queue_timeouts.ring(now_us):
            actions += self._on_queue_timeout(self._submissions[key], now_us)
        for request_id in self._silences.ring(now_us):
            actions += self._on_silence(self._requests[request_id], now_us)
        actions += self._give_up(now_us)
        for request in list(self._seeking.values()):
            if request.retry_us is not None and request.retry_us <= now_us:
                request.retry_us = None
                request.refused.clear()
                actions += self._choose_target(request, now_us)
        return actions

    # -- deadlines -----------------------------------------------------------------------------------------------------
    def _deadline_us(self, key: int) -> int | None:
        submission = self._submissions.get(key)
        return None if submission is None else submission.deadline_us

    def _on_deadline(self, submission: Submission, now_us: int) -> list[object]:
        *_, newest = submission.requests.values()
        error = DeadlineExceeded(f"deadline passed while {newest.stage.value}")
        return self._end(submission, now_us, error=error)

    def _queue_timeout_us(self, key: int) -> int | None:
        """Not of one that some worker was given: it would cost its client what it has waited for, and others nothing
        would be saved."""
        submission = self._submissions.get(key)
        if submission is None or submission.placed:
            return None
        return submission.submitted_us + 1_000 * self._admission.wait_ms(submission.submit)

    def _on_queue_timeout(self, submission: Submission, now_us: int) -> list[object]:
        refusal = self._admission.waited_too_long(submission.submit)
        return self._end(submission, now_us, error=self._count_refusal(refusal))

    def _silence_us(self, request_id: int) -> int | None:
        """When a worker that has something to do for it should have said something."""
        request = self._requests.get(request_id)
        if request is None or not request.is_watched:
            return None
        token_ms = limits.NO_PROGRESS_TOKEN_MS * request.context_tokens
        return request.heard_us + 1_000 * (self.config.no_progress_ms + token_ms)

    def _on_silence(self, request: LiveRequest, now_us: int) -> list[object]:
        """As if the worker were lost. The KV's source is trusted with another target once its prefill is known to be
        done."""
        self.counters["no_progress", request.stage.value] += 1
        request.silent_in = request.stage
        sent = request.moving or any(request.submission.outputs[choice] for choice in request.choices)
        if request.stage is Stage.RESERVING or (request.stage is Stage.TRANSFER and sent):
            return self._rebind(request, now_us)
        if request.stage is Stage.DECODE and request.target is not None:
            request.silent_at = request.target.worker
        if request.source is not None:
            request.failed_at = request.source.worker
        return self._restart(request, now_us)

    # -- roles that nobody holds ---------------------------------------------------------------------------------------
    def _give_up(self, now_us: int) -> list[object]:
        requests = list(self._requests.values()) if self._absences.give_up(now_us) else []
        return [action for request in requests for action in self._end_if_stranded(request, now_us)]

    def _end_if_stranded(self, request: LiveRequest, now_us: int) -> list[object]:
        """A role was given up without which the request cannot go on from where it is."""
        error = self._absences.error(request) if self._knows(request) else None
        return [] if error is None else self._end(request.submission, now_us, error=error)

    def _on_reset_cache(self) -> list[object]:
        self._placer.forget_all()
        return [self._send(worker, reset_cache=pb.ResetCache()) for worker in self.pool if worker.serving]

    # -- the controller ------------------------------------------------------------------------------------------------
    def _dial_controller(self) -> list[object]:
        self._redial_controller_us = None
        introduction = hello(pb.Hello.ROUTER_TO_CONTROLLER, self.config.router_id)
        return [Dial(CONTROLLER, self.config.controller_address, introduction)]

    def _on_controller_message(self, message: bytes, now_us: int) -> list[object]:
        if self._controller is None:
            return []
        envelope = self._controller.open_untrusted(pb.ControllerToRouter, message)
        if envelope.WhichOneof("body") != "table":
            raise FrameError("body")
        if not self.pool.adopt(envelope.table):
            self.counters["stale_tables", ""] += 1
            return [Close(CONTROLLER, "stale_term")]
        return self._dial_workers(now_us)

    def _dial_workers(self, now_us: int) -> list[object]:
        actions: list[object] = []
        for worker in self.pool:
            if worker.session is None and worker.redial_us is not None and worker.redial_us <= now_us:
                worker.redial_us = None
                introduction = hello(pb.Hello.ROUTER_TO_WORKER, self.config.router_id)
                actions.append(Dial(worker.link, worker.info.address, introduction))
        return actions

    # -- links ---------------------------------------------------------------------------------------------------------
    def _on_link_up(self, link: LinkName) -> list[object]:
        if link == CONTROLLER:
            self._controller = Session()
            register = pb.RegisterRouter(router=self.config.router_id, highest_term=self.pool.term)
            return [Send(CONTROLLER, self._controller.seal(pb.RouterToController(register=register)))]
        worker = self.pool.by_link(link)
        if worker is not None:
            self.pool.on_link_up(worker)
        return []

    def _on_link_lost(self, link: LinkName, reason: str, now_us: int) -> list[object]:
        if link == CONTROLLER:
            self._controller = None
            self._redial_controller_us = now_us + limits.REDIAL_DELAY_MS * 1_000
            return []
        worker = self.pool.by_link(link)
        if worker is None:
            return []
        if worker.session is not None:
            self.counters["links_lost", reason] += 1
        worker.session = None
        self._absences.note(now_us)
        worker.redial_us = now_us + limits.REDIAL_DELAY_MS * 1_000
        holders = self._at(worker.id)
        actions = [action for request in holders for action in self._on_holder_lost(request, worker, now_us)]
        worker.backlog.clear()
        worker.urgent.clear()
        worker.bound = 0
        self._may_place = True
        self._placer.forget(worker)
        self.pool.forget_unlisted(worker)
        return actions

    def _at(self, worker_id: str) -> list[LiveRequest]:
        """Requests that have a holder there, oldest first."""
        return [request for request in self._requests.values() if request.is_at(worker_id)]

    def _on_holder_lost(self, request: LiveRequest, worker: Worker, now_us: int) -> list[object]:
        """Bind again if the whole KV still has a holder; otherwise start over from prompt + emitted tokens."""
        if not (self._knows(request) and request.is_at(worker.id)):
            return []  # the loss of a sibling, or of its group, has moved or ended it
        if request.stage is Stage.FORKED:
            return self._restart_forks(request, now_us)
        target_lost = request.target is not None and request.target.worker == worker.id
        source_lost = request.source is not None and request.source.worker == worker.id
        if target_lost and request.source is not None and not source_lost:
            return self._rebind(request, now_us)
        return self._restart(request, now_us)

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

    def _on_worker_message(self, worker: Worker, envelope: pb.WorkerToRouter, now_us: int) -> list[object]:
        match envelope.WhichOneof("body"):
            case "tokens":
                return self._on_tokens(worker, envelope.tokens, now_us)
            case "status":
                self.pool.on_status_untrusted(worker, envelope.status)
                self._absences.note(now_us)
                self._may_place = True
                return []
            case "first_token":
                return self._on_first_token(worker, envelope.first_token, now_us)
            case "prompt_scored":
                return self._on_prompt_scored(worker, envelope.prompt_scored, now_us)
            case "near_turn":
                return self._on_near_turn(worker, envelope.near_turn, now_us)
            case "reserved":
                return self._on_reserved(worker, envelope.reserved, now_us)
            case "refused":
                return self._on_refused(worker, envelope.refused, now_us)
            case "committed":
                return self._on_committed(worker, envelope.committed, now_us)
            case "relocate":
                return self._on_relocate(worker, envelope.relocate, now_us)
            case "failed":
                return self._on_failed(worker, envelope.failed, now_us)
        raise FrameError("body")

    # -- admission and the queue ---------------------------------------------------------------------------------------
    def _on_submit(self, submit: Submit, now_us: int) -> list[object]:
        deadline_ms = min(submit.deadline_ms or self.config.deadline_ms, limits.REQUEST_DEADLINE_MS_MAX)
        submission = Submission(self._arrivals + 1, submit, now_us, now_us + deadline_ms * 1_000)
        request = LiveRequest(0, submission, tuple(range(submit.choices)))
        refusal = self._admission.refusal(request)
        if refusal is not None:
            return [Ended(key=submit.key, error=self._count_refusal(refusal), stats=submission.stats)]
        self._arrivals += 1
        self._submissions[submit.key] = submission
        self._admission.choices.take(submit.tenant, submit.choices)
        self.counters["requests_by_n", str(submit.choices)] += 1
        submission.stats.attempts = 1
        submission.meter = self._queue.meter(submit.tenant)
        self._deadlines.watch(submit.key)
        self._queue_timeouts.watch(submit.key)
        whole = not request.is_group or self._admission.fits(request)
        for part in [request] if whole else self._divided(request):
            self._enqueue(self._adopt(part), now_us)
        return []

    def _count_refusal(self, refusal: Refusal) -> TriptychError:
        self.counters["rejections", refusal.reason] += 1
        return refusal.error

    def _enqueue(self, request: LiveRequest, now_us: int) -> None:
        self._enter(request, Stage.QUEUED, now_us)
        self._queue.put(request)
        self._may_place = True

    def _place_queued(self, now_us: int) -> list[object]:
        """Give prefill workers what they need to stay busy, in turn. What they do not need yet can still be overtaken
        here."""
        actions: list[object] = []
        placed_tokens = 0
        while (found := self._next_placement()) is not None:
            request, choice = found
            placed_tokens += len(request.token_ids)
            actions.append(self._prefill_at(request, choice, now_us))
        waiting = bool(self._queue) and bool(self.pool.holding(Role.PREFILL))
        self._drain_rate.note(placed_tokens, waiting=waiting, now_us=now_us)
        self._may_place = False
        return actions

    def _next_placement(self) -> tuple[LiveRequest, Choice] | None:
        """Whoever's turn it is, at its best worker. While that has no room, it waits, and others may pass.

        A tenant that came back after a while is *urgent*: it also goes before prompts that workers were given earlier.
        """
        if not self._placer.has_room_anywhere(urgent=self._fair):
            return None
        for request in islice(self._queue.in_turn(self._decode_memory.holds_back), limits.PLACEMENT_TRIES_MAX):
            urgent = self._fair and self._queue.is_behind(request)
            choice = self._placer.prefill(request)
            if choice is not None and self._placer.has_room(choice.worker, urgent=urgent):
                request.priority = -urgent if self._fair else request.submit.priority
                return request, choice
        return None

    def _prefill_at(self, request: LiveRequest, choice: Choice, now_us: int) -> Send:
        worker = choice.worker
        self._queue.place(request, choice.missing_tokens)
        self._decode_memory.take(request)
        self._enter(request, Stage.PREFILL, now_us)
        request.source = Placement(worker.id, request.next_attempt())
        request.context_tokens = len(request.token_ids)
        request.encoding = None
        request.near_turn = False
        request.silent_in = None
        self._load_prefill(request, choice)
        self._placer.prompt_sent(request, worker)
        self._note_placement(request, choice, now_us)
        prefill = worker_messages.prefill(request, deadline_ms=self._remaining_ms(request, now_us))
        return self._send(worker, prefill=prefill)

    def _note_placement(self, request: LiveRequest, choice: Choice, now_us: int) -> None:
        submission = request.submission
        submission.stats.prefill_worker = choice.worker.id
        self.counters["placements", f"prefill_{choice.reason}"] += 1
        if not submission.placed:
            submission.mark("placed", now_us)
            if waited_ms := (now_us - submission.submitted_us) // 1_000:
                self.counters["queue_wait_ms", ""] += waited_ms

    def _on_prompt_scored(self, worker: Worker, message: pb.PromptScored, now_us: int) -> list[object]:
        request = self._from_source(worker, message, now_us)
        if request is None:
            return []
        scores = scores_from_wire_untrusted(message)
        submission = request.submission
        if message.start + len(scores) > len(request.submit.token_ids):
            raise FrameError("length")
        fresh = submission.new_scores(message.start, scores)
        if fresh is None:
            self.counters["token_gaps", ""] += 1
            return self._restart(request, now_us)
        start = submission.scored_tokens - len(fresh)
        actions: list[object] = [PromptScored(request.submit.key, start, fresh)] if fresh else []
        seeks = submission.scored and request.stage is Stage.PREFILL and request.needs_target
        return [*actions, *self._seek_target(request, now_us)] if seeks else actions

    # -- late binding --------------------------------------------------------------------------------------------------
    def _on_near_turn(self, worker: Worker, message: pb.NearTurn, now_us: int) -> list[object]:
        request = self._from_source(worker, message, now_us)
        if request is None or request.stage is not Stage.PREFILL:
            return []
        request.submission.note_cached(message.cached_tokens)
        request.submission.mark("near_turn", now_us)
        request.near_turn = True
        self._silences.watch(request.id)
        if not (request.needs_target and request.submission.scored):
            # Scores come before tokens. Over another link a target's token 0 could be faster than the source's last
            # scores, so a prompt is bound once it is scored (`_on_prompt_scored`).
            return []
        return self._seek_target(request, now_us)

    def _seek_target(self, request: LiveRequest, now_us: int, *, avoid: str | None = None) -> list[object]:
        """Ask decode workers in turn; `avoid` has just failed, so it is the last resort (reliability B1)."""
        self._enter(request, Stage.RESERVING, now_us)
        request.target = None
        request.refused = {each for each in (avoid, request.silent_at) if each}
        return self._choose_target(request, now_us)

    def _choose_target(self, request: LiveRequest, now_us: int) -> list[object]:
        assert request.source is not None
        source = self.pool.get(request.source.worker)
        assert source is not None
        refused = request.refused | {source.id} if request.moving else request.refused
        choice = self._placer.decode(request, source, refused)
        if choice is None and request.moving:
            # A move never waits (DESIGN 1): the giver's columns are what others there wait for, and two givers that
            # waited for each other would wait for ever. Its prefix is computed again instead; nothing was lost.
            return self._start_over(request, now_us)
        if choice is None:
            request.retry_us = now_us + limits.RESERVE_RETRY_MS * 1_000
            return self._end_if_stranded(request, now_us)
        self.counters["placements", f"decode_{choice.reason}"] += 1
        request.target = Placement(choice.worker.id, request.next_attempt())
        request.submission.stats.decode_worker = choice.worker.id
        choice.worker.bound += 1
        if request.is_group:
            request.children = {each: self._mint_id() for each in request.choices}
        if choice.worker is source:
            return self._bind_local(request, source, now_us)
        request.heard_us = now_us
        self._silences.watch(request.id)
        request.encoding = self._placer.encoding(request, source, choice.worker)
        return [self._reserve(request, choice.worker, now_us)]

    def _bind_local(self, request: LiveRequest, source: Worker, now_us: int) -> list[object]:
        """The source decodes too: one sequence under two attempt numbers, until token 0 has been heard from either."""
        bind = self._send(source, bind=worker_messages.bind_local(request))
        if request.is_group:
            return [bind, *self._fork(request, now_us)]
        self._enter(request, Stage.DECODE, now_us)
        return [bind]

    def _reserve(self, request: LiveRequest, worker: Worker, now_us: int) -> Send:
        reserve = worker_messages.reserve(request, worker, deadline_ms=self._remaining_ms(request, now_us))
        return self._send(worker, reserve=reserve)

    def _on_reserved(self, worker: Worker, message: pb.Reserved, now_us: int) -> list[object]:
        request = self._from_target(worker, message, now_us)
        if request is None or request.stage is not Stage.RESERVING:
            return []
        if message.skip_tokens > request.context_tokens:
            raise FrameError("length")
        assert request.source is not None
        source = self.pool.get(request.source.worker)
        assert source is not None
        self._enter(request, Stage.TRANSFER, now_us)
        request.silent_in = None
        if not request.moving:
            request.submission.stats.skipped_tokens = min(message.skip_tokens, len(request.submit.token_ids))
        return [self._send(source, bind=worker_messages.bind(request, worker, message))]

    def _on_refused(self, worker: Worker, message: pb.Refused, now_us: int) -> list[object]:
        request = self._from_target(worker, message, now_us)
        if request is None or request.stage is not Stage.RESERVING:
            return []
        if message.reason not in pb.Refusal.values():
            raise FrameError("refusal")
        self.counters["reservations_refused", pb.Refusal.Name(message.reason).lower()] += 1
        if message.reason == pb.INVALID:
            return self._end(request.submission, now_us, error=Internal("a decode worker found the request invalid"))
        self._unbind(request)
        request.target = None
        request.refused.add(worker.id)
        return self._choose_target(request, now_us)

    # -- tokens --------------------------------------------------------------------------------------------------------
    def _on_first_token(self, worker: Worker, message: pb.FirstToken, now_us: int) -> list[object]:
        request = self._from_source(worker, message, now_us)
        if request is None:
            return []
        token = first_token_from_wire_untrusted(message)
        if token.choice not in request.choices:
            raise FrameError("choice")
        if request.submit.sampling.max_tokens == 0:
            return self._end(request.submission, now_us, finish=FinishReason.LENGTH)
        if request.stage is Stage.FORKED:
            child = request.forks.get(token.choice)
            return [] if child is None else self._forward(child, token.choice, token, now_us)
        return self._forward(request, token.choice, token, now_us)

    def _on_tokens(self, worker: Worker, message: pb.Tokens, now_us: int) -> list[object]:
        actions: list[object] = []
        worker_id = worker.id
        for token in tokens_from_wire_untrusted(message):
            request = self._requests.get(token.request)
            if request is None or request.is_group or request.target != (worker_id, token.attempt):
                self.counters["stale_tokens", ""] += 1
                continue
            actions += self._forward(request, request.choice, token, now_us)
        return actions

    def _forward(
        self, request: LiveRequest, choice: int, token: SampledToken | ReportedToken, now_us: int
    ) -> list[object]:
        """Position n of a choice once, in order. A repeat is welcome news twice; a gap means that something was lost
        (a token without the log-probabilities that were asked for is no better)."""
        self._unload_prefill(request.group or request)
        submission = request.submission
        output = submission.outputs[choice]
        if token.position < len(output) or choice in submission.finishes:
            return []
        asked = submission.submit.sampling.logprobs is not None
        if token.position > len(output) or (asked and token.logprobs is None):
            self.counters["token_gaps", ""] += 1
            return self._restart(request, now_us)
        if not output:
            self._note_first_token(submission, now_us)
        output.append(token.token_id)
        request.heard_us = now_us
        if not token.position % GROWTH_TOKENS and token.position:
            submission.meter.tokens += GROWTH_TOKENS * limits.OUTPUT_TOKEN_WEIGHT
            self._decode_memory.grow(request)
        logprobs = (token.logprobs,) if asked and token.logprobs is not None else ()
        ready = TokensReady(submission.submit.key, (token.token_id,), choice, token.finish, logprobs)
        if (group := self._leave_group(request)) is not None:
            self._disband(group)
        return [ready, *(self._finish(request, choice, token.finish, now_us) if token.finish else ())]

    def _note_first_token(self, submission: Submission, now_us: int) -> None:
        """Of some choice."""
        if submission.first("token", now_us):
            self._admission.service_time.note(now_us - submission.marks_us["placed"])

    def _finish(self, request: LiveRequest, choice: int, finish: FinishReason, now_us: int) -> list[object]:
        """One choice is over, and well. With the last one all is. In a group it is only noted: the others go on."""
        if not request.is_group:
            self._placer.output_ended(request)
        submission = request.submission
        submission.finishes[choice] = finish
        if submission.over:
            return self._end(submission, now_us, finish=finish)
        return [] if request.is_group else self._drop(request)

    def _on_stop(self, key: int, choice: int, now_us: int) -> list[object]:
        submission = self._submissions.get(key)
        if submission is None or choice in submission.finishes:
            return []
        speakers = (r for r in submission.requests.values() if choice in r.choices and r.stage is not Stage.FORKED)
        request = next(speakers, None)
        return [] if request is None else self._finish(request, choice, FinishReason.STOP, now_us)

    def _on_committed(self, worker: Worker, message: pb.Committed, now_us: int) -> list[object]:
        """The target has everything: the source's loss no longer matters."""
        request = self._from_target(worker, message, now_us)
        if request is None or request.stage is not Stage.TRANSFER:
            return []
        self._unload_prefill(request)
        self._placer.prompt_received(request, worker)
        self._note_transfer(request, message, now_us)
        request.moving = False
        if request.is_group:
            return self._fork(request, now_us)
        self._enter(request, Stage.DECODE, now_us)
        request.source = None
        return []

    def _note_transfer(self, request: LiveRequest, message: pb.Committed, now_us: int) -> None:
        request.submission.mark("committed", now_us)
        stats = request.submission.stats
        if not (request.moving and stats.codec):  # a move is raw, and what was lost before stays lost
            stats.codec, stats.level = message.codec, message.level
        stats.kv_bytes_raw += message.bytes_raw
        stats.kv_bytes_wire += message.bytes_wire
        self.counters["kv_transfers", message.codec] += 1

    # -- groups --------------------------------------------------------------------------------------------------------
    def _fork(self, group: LiveRequest, now_us: int) -> list[object]:
        """The group's KV is where it decodes, or will be without a further word: each choice goes on for itself.

        The group keeps its attempt numbers until it is over: a source that is its own target speaks under both.
        """
        assert group.target is not None
        worker = self.pool.get(group.target.worker)
        assert worker is not None
        actions: list[object] = []
        children: list[LiveRequest] = []
        for choice in group.choices:
            child = group.child(choice)
            worker.bound += 1
            if choice in group.submission.finishes:
                actions += self._abort_at(child.target, child)
                continue
            if not group.submission.outputs[choice]:
                child.group, group.forks[choice] = group, child
            children.append(self._adopt(child))
            self._enter(child, Stage.DECODE, now_us)
        self._decode_memory.divide(group, children)
        self._enter(group, Stage.FORKED, now_us)
        if not group.forks:
            self._disband(group)
        return actions

    def _leave_group(self, child: LiveRequest) -> LiveRequest | None:
        """The group need not speak for this child any more. Returns the group if there is no other."""
        group, child.group = child.group, None
        if group is None:
            return None
        del group.forks[child.choice]
        return None if group.forks or not self._knows(group) else group

    def _disband(self, group: LiveRequest) -> None:
        """It is over, and its workers know."""
        self._unbind(group)
        self._forget(group)

    def _restart_forks(self, group: LiveRequest, now_us: int) -> list[object]:
        """What became of these at the target only the source could have said: perhaps they ended with token 0."""
        return [
            action
            for child in list(group.forks.values())
            for action in (self._restart(child, now_us) if self._knows(child) else ())
        ]

    def _divided(self, group: LiveRequest) -> list[LiveRequest]:
        return [group.single(self._mint_id(), choice) for choice in group.open_choices]

    # -- attempts that end without the request -------------------------------------------------------------------------
    def _on_relocate(self, worker: Worker, message: pb.Relocate, now_us: int) -> list[object]:
        """A holder of whole KV needs another target: its first one failed, or it must give the request away."""
        if message.reason not in pb.Relocate.Reason.values():
            raise FrameError("relocate")
        failed = message.reason == pb.Relocate.TRANSFER_FAILED
        request = self._from_source(worker, message, now_us) if failed else self._from_target(worker, message, now_us)
        if request is None or request.stage is Stage.FORKED:
            # It holds KV that nobody wants any more. One such: its target committed, and the answer was lost.
            return [self._send(worker, abort=pb.Abort(request=message.request, attempt=message.attempt))]
        if failed:
            known = request.target is None or request.target.attempt != message.target_attempt
            return [] if known else self._rebind(request, now_us)  # known: that binding was replaced already
        if request.stage is not Stage.DECODE or len(message.token_ids) != len(request.token_ids):
            return self._restart(request, now_us)
        self.counters["relocations", pb.Relocate.Reason.Name(message.reason).lower()] += 1
        self._unbind(request)
        request.source, request.target = request.target, None
        request.moving = True
        request.context_tokens = len(request.token_ids) - 1  # the last token is pending: sampled, its KV not computed
        return self._seek_target(request, now_us)

    def _on_failed(self, worker: Worker, message: pb.AttemptFailed, now_us: int) -> list[object]:
        request = self._requests.get(message.request)
        place = Placement(worker.id, message.attempt)
        if request is None or place not in (request.source, request.target):
            return []
        self.counters["attempts_failed", message.reason] += 1
        if message.status == "invalid_argument":
            return self._end(request.submission, now_us, error=worker_messages.refused_by_worker(message.reason))
        concerned = list(request.forks.values()) if request.stage is Stage.FORKED else [request]
        engine_failed = message.status == "internal"
        return [action for each in concerned for action in self._on_attempt_lost(each, place, engine_failed, now_us)]

    def _on_attempt_lost(
        self, request: LiveRequest, place: Placement, engine_failed: bool, now_us: int
    ) -> list[object]:
        if not self._knows(request):
            return []  # ended by the loss of a sibling
        request.engine_failures += engine_failed
        if place == request.target and request.stage in (Stage.RESERVING, Stage.TRANSFER):
            return self._rebind(request, now_us)
        request.failed_at = place.worker
        return self._restart(request, now_us)

    def _rebind(self, request: LiveRequest, now_us: int) -> list[object]:
        """The source still holds the whole KV: only the target is sought again."""
        if self._is_spent(request):
            return self._end(request.submission, now_us, error=self._spent(request))
        avoid = request.target.worker if request.target is not None else None
        return [*self._abort_at(request.target, request), *self._seek_target(request, now_us, avoid=avoid)]

    def _restart(self, request: LiveRequest, now_us: int) -> list[object]:
        """Nobody certainly holds the KV: prefill prompt + emitted tokens again."""
        if self._is_spent(request):
            return self._end(request.submission, now_us, error=self._spent(request))
        return self._start_over(request, now_us)

    def _start_over(self, request: LiveRequest, now_us: int) -> list[object]:
        actions = self._abort_everywhere(request)
        self._give_back(request)
        request.moving = False
        request.retry_us = None
        parts = [request]
        if request.is_group and any(request.submission.outputs):
            self._forget(request)
            parts = [self._adopt(part) for part in self._divided(request)]
        request.choices = request.open_choices
        for part in parts:
            self._enqueue(part, now_us)
        return [*actions, *(action for part in parts for action in self._end_if_stranded(part, now_us))]

    def _is_spent(self, request: LiveRequest) -> bool:
        request.losses += 1
        spent = request.losses >= self.config.attempts_max or request.engine_failures >= limits.ENGINE_FAILURES_MAX
        request.submission.stats.attempts += not spent
        return spent

    def _spent(self, request: LiveRequest) -> TriptychError:
        text = f"given up after {request.losses} lost placements"
        if request.silent_in is not None:
            return DeadlineExceeded(f"{text}: no progress while {request.silent_in.value}")
        poisonous = request.engine_failures >= limits.ENGINE_FAILURES_MAX
        return Internal(text) if poisonous else Unavailable(text, retry_after_ms=limits.RETRY_AFTER_MS)

    # -- the one ending ------------------------------------------------------------------------------------------------
    def _end(
        self,
        submission: Submission,
        now_us: int,
        *,
        finish: FinishReason | None = None,
        error: TriptychError | None = None,
    ) -> list[object]:
        actions: list[object] = []
        while submission.requests:
            actions += self._drop(next(iter(submission.requests.values())))
        del self._submissions[submission.submit.key]
        self._admission.choices.give(submission.submit.tenant, submission.submit.choices)
        unmetered = sum(len(output) % GROWTH_TOKENS for output in submission.outputs)
        submission.meter.tokens += unmetered * limits.OUTPUT_TOKEN_WEIGHT
        submission.stats.phase_ms = submission.phases_ms(now_us)
        return [*actions, Ended(key=submission.submit.key, finish=finish, error=error, stats=submission.stats)]

    def _drop(self, request: LiveRequest) -> list[object]:
        """Nobody shall work for it any more."""
        if request.stage is Stage.QUEUED:
            self._queue.remove(request)
        actions = self._abort_everywhere(request)
        self._forget(request)
        return actions

    def _abort_everywhere(self, request: LiveRequest) -> list[object]:
        """Whoever may hold anything for this request is told to forget it. Told once too often is harmless."""
        actions = [*self._abort_at(request.source, request), *self._abort_at(request.target, request)]
        self._unload_prefill(request)
        request.source = request.target = None
        group = self._leave_group(request)
        return [*actions, *self._drop(group)] if group is not None else actions

    def _abort_at(self, place: Placement | None, request: LiveRequest) -> list[object]:
        worker = self.pool.get(place.worker) if place is not None else None
        if place is None or worker is None or worker.session is None:
            return []
        if place == request.target:
            self._unbind(request)
        return [self._send(worker, abort=worker_messages.abort(request.id, place.attempt))]

    # -- helpers -------------------------------------------------------------------------------------------------------
    def _mint_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _adopt(self, request: LiveRequest) -> LiveRequest:
        request.id = request.id or self._mint_id()
        self._requests[request.id] = request.submission.requests[request.id] = request
        return request

    def _forget(self, request: LiveRequest) -> None:
        del self._requests[request.id], request.submission.requests[request.id]
        self._seeking.pop(request.id, None)
        self._give_back(request)

    def _knows(self, request: LiveRequest) -> bool:
        return self._requests.get(request.id) is request

    def _from_source(
        self, worker: Worker, message: pb.NearTurn | pb.PromptScored | pb.FirstToken | pb.Relocate, now_us: int
    ) -> LiveRequest | None:
        """The request this message speaks for, if it comes from the attempt that is its source now."""
        request = self._requests.get(message.request)
        if request is None or request.source != Placement(worker.id, message.attempt):
            return None
        request.heard_us = now_us
        return request

    def _from_target(
        self, worker: Worker, message: pb.Reserved | pb.Refused | pb.Committed | pb.Relocate, now_us: int
    ) -> LiveRequest | None:
        request = self._requests.get(message.request)
        if request is None or request.target != Placement(worker.id, message.attempt):
            return None
        request.heard_us = now_us
        return request

    def _load_prefill(self, request: LiveRequest, choice: Choice) -> None:
        request.prefill_load_tokens = choice.missing_tokens
        choice.worker.backlog.add(request.id, choice.missing_tokens)
        if request.priority < 0 and self._fair:
            choice.worker.urgent.add(request.id, choice.missing_tokens)

    def _unload_prefill(self, request: LiveRequest) -> None:
        """The prompt is computed, or will not be: it no longer stands before others at its worker. Idempotent."""
        if not request.prefill_load_tokens:
            return
        worker = self.pool.get(request.source.worker) if request.source is not None else None
        if worker is not None:
            worker.backlog.remove(request.id)
            worker.urgent.remove(request.id)
        request.prefill_load_tokens = 0
        self._may_place = True

    def _give_back(self, request: LiveRequest) -> None:
        """What it held of its tenant's share of decode memory."""
        self._decode_memory.give(request)
        self._may_place = True

    def _unbind(self, request: LiveRequest) -> None:
        """It no longer counts as load of its target."""
        worker = self.pool.get(request.target.worker) if request.target is not None else None
        if worker is not None:
            worker.bound = max(0, worker.bound - 1)

    def _enter(self, request: LiveRequest, stage: Stage, now_us: int) -> None:
        request.stage = stage
        request.heard_us = now_us
        self._silences.watch(request.id)
        if stage is Stage.RESERVING:
            self._seeking[request.id] = request
        else:
            self._seeking.pop(request.id, None)

    @staticmethod
    def _remaining_ms(request: LiveRequest, now_us: int) -> int:
        return max(1, (request.submission.deadline_us - now_us) // 1_000)

    def _send(self, worker: Worker, **body: object) -> Send:
        assert worker.session is not None
        return Send(worker.link, worker.session.seal(pb.RouterToWorker(**body)))  # type: ignore[arg-type]
