"""RouterCore: the owner of every request, as a pure machine (DESIGN 1).

The router owns a request's position, its attempts and its one ending. Workers report the outcome of an *attempt*; the
router forwards position n once, only from the attempt it has bound. So doubt (an ack lost, a worker frozen and woken)
costs work, never a wrong or doubled token.

    Submit -> admission -> queue -> Prefill at P -> NEAR_TURN -> Reserve at D -> RESERVED -> Bind at P
           -> TOKEN 0 from P (or again from D, whichever is first) -> Committed -> TOKENS from D -> Ended

Not here: HTTP, gRPC, text (the edge), what a worker does with a message, who is alive (links and the controller say).
"""

import heapq
from bisect import bisect
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from control_plane.router.live_request import LiveRequest, Placement, Stage
from control_plane.router.placement import choose_decode, choose_prefill
from control_plane.router.requests import Cancel, Ended, Submit, TokensReady, WorkerView
from control_plane.router.workers import LINK_PREFIX, Worker, WorkerPool
from control_plane.wire import session_pb2 as pb
from control_plane.wire.session import Session, hello
from control_plane.wire.translate import FINISH_REASONS, finish_from_wire_untrusted, sampling_to_wire
from engine.base import limits
from engine.base.errors import (
    Cancelled,
    DeadlineExceeded,
    FrameError,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    TriptychError,
    Unavailable,
)
from engine.base.machine import Close, Dial, LinkLost, LinkName, LinkUp, Received, Send, Started, Tick
from engine.types import FinishReason, Role

CONTROLLER: LinkName = "controller"


@dataclass(frozen=True, slots=True)
class StopAdmitting:
    """Input: refuse new requests from now on; those accepted go on (SIGTERM)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    router_id: str
    controller_address: str
    codec: str = "raw"
    requests_max: int = limits.ROUTER_REQUESTS_MAX
    queued_tokens_max: int = limits.ROUTER_QUEUED_TOKENS_MAX
    deadline_ms: int = limits.REQUEST_DEADLINE_MS
    worker_wait_ms: int = limits.WORKER_WAIT_MS
    attempts_max: int = limits.ATTEMPTS_MAX


class RouterCore:
    def __init__(self, config: Config) -> None:
        self.config = config
        self.pool = WorkerPool()
        self.counters: Counter[tuple[str, str]] = Counter()  # (name, label) -> count
        self.admitting = True
        self._requests: dict[int, LiveRequest] = {}
        self._by_key: dict[int, LiveRequest] = {}
        self._queue: deque[LiveRequest] = deque()
        self._queued_tokens = 0
        self._seeking: dict[int, LiveRequest] = {}  # in QUEUED or RESERVING: those that a timer may have to move
        self._absent_until_us: dict[Role, int] = {}  # roles that no worker holds now: when waiting for one ends
        self._given_up: set[Role] = set()  # absent for longer than that: a request that needs one fails at once
        self._deadlines: list[tuple[int, int]] = []  # heap of (deadline_us, request id); ended ones are skipped
        self._next_id = 1
        self._controller: Session | None = None
        self._redial_controller_us: int | None = None

    # -- what the edge may read ----------------------------------------------------------------------------------------
    @property
    def ready(self) -> bool:
        return self.admitting and self.pool.ready

    @property
    def in_flight(self) -> int:
        return len(self._requests)

    def workers(self) -> Sequence[WorkerView]:
        return self.pool.views()

    # -- the machine ---------------------------------------------------------------------------------------------------
    def step(self, event: object, now_us: int) -> Sequence[object]:
        actions = self._dispatch(event, now_us)
        return [*actions, *self._place_queued(now_us)] if self._queue else actions

    def _dispatch(self, event: object, now_us: int) -> list[object]:
        match event:
            case Received(link, message):
                return self._on_message(link, message, now_us)
            case Submit():
                return self._on_submit(event, now_us)
            case Cancel(key):
                request = self._by_key.get(key)
                return [] if request is None else self._end(request, now_us, error=Cancelled("cancelled"))
            case Tick():
                return self._on_tick(now_us)
            case LinkUp(link):
                return self._on_link_up(link)
            case LinkLost(link, reason):
                return self._on_link_lost(link, reason, now_us)
            case Started():
                self._note_absences(now_us)
                return self._dial_controller()
            case StopAdmitting():
                self.admitting = False
                return []
        raise TypeError(f"not an event of a router: {event!r}")

    @property
    def next_deadline_us(self) -> int | None:
        while self._deadlines and self._deadlines[0][1] not in self._requests:
            heapq.heappop(self._deadlines)
        deadlines = [self._redial_controller_us, self._deadlines[0][0] if self._deadlines else None]
        deadlines += [worker.redial_us for worker in self.pool if worker.session is None]
        deadlines += [request.retry_us for request in self._seeking.values()]
        deadlines += [until_us for role, until_us in self._absent_until_us.items() if role not in self._given_up]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _on_tick(self, now_us: int) -> list[object]:
        actions: list[object] = []
        if self._redial_controller_us is not None and self._redial_controller_us <= now_us:
            actions += self._dial_controller()
        actions += self._dial_workers(now_us)
        while self._deadlines and self._deadlines[0][0] <= now_us:
            request = self._requests.get(heapq.heappop(self._deadlines)[1])
            if request is not None:
                error = DeadlineExceeded(f"deadline passed while {request.stage.value}")
                actions += self._end(request, now_us, error=error)
        actions += self._give_up(now_us)
        for request in list(self._seeking.values()):
            if request.retry_us is not None and request.retry_us <= now_us:
                request.retry_us = None
                request.refused.clear()
                actions += self._choose_target(request, now_us)
        return actions

    # -- roles that nobody holds ---------------------------------------------------------------------------------------
    def _note_absences(self, now_us: int) -> None:
        """Waiting for a worker of a role is bounded from the moment the role was lost. Full workers are load, not
        absence: only a request's own deadline ends that wait."""
        for role in (Role.PREFILL, Role.DECODE):
            if self.pool.holding(role):
                self._absent_until_us.pop(role, None)
                self._given_up.discard(role)
            else:
                self._absent_until_us.setdefault(role, now_us + self.config.worker_wait_ms * 1_000)

    def _give_up(self, now_us: int) -> list[object]:
        over = {role for role, until_us in self._absent_until_us.items() if until_us <= now_us} - self._given_up
        self._given_up |= over
        requests = list(self._requests.values()) if over else []
        return [action for request in requests for action in self._end_if_stranded(request, now_us)]

    def _end_if_stranded(self, request: LiveRequest, now_us: int) -> list[object]:
        role = self._stranded_by(request)
        return [] if role is None else self._end(request, now_us, error=self._no_worker(role))

    def _stranded_by(self, request: LiveRequest) -> Role | None:
        """The role that was given up and without which the request cannot go on from where it is."""
        return next((role for role in self._lacks(request) if role in self._given_up), None)

    @staticmethod
    def _lacks(request: LiveRequest) -> Sequence[Role]:
        if request.stage is Stage.QUEUED:
            return (Role.PREFILL, Role.DECODE) if request.needs_target else (Role.PREFILL,)
        seeks = request.stage in (Stage.PREFILL, Stage.RESERVING) and request.target is None
        return (Role.DECODE,) if seeks and request.needs_target else ()

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
        self._note_absences(now_us)
        worker.redial_us = now_us + limits.REDIAL_DELAY_MS * 1_000
        holders = self._at(worker.id)
        actions = [action for request in holders for action in self._on_holder_lost(request, worker, now_us)]
        worker.prefill_tokens = worker.bound = 0
        self.pool.forget_unlisted(worker)
        return actions

    def _at(self, worker_id: str) -> list[LiveRequest]:
        """Requests that have a holder there, oldest first."""
        return [
            request
            for request in self._requests.values()
            if any(place is not None and place.worker == worker_id for place in (request.source, request.target))
        ]

    def _on_holder_lost(self, request: LiveRequest, worker: Worker, now_us: int) -> list[object]:
        """Bind again if the whole KV still has a holder; otherwise start over from prompt + emitted tokens."""
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
                self._note_absences(now_us)
                return []
            case "first_token":
                return self._on_first_token(worker, envelope.first_token, now_us)
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
        request = LiveRequest(self._next_id, submit, now_us, now_us + deadline_ms * 1_000)
        refusal = self._refusal(request)
        if refusal is not None:
            self.counters["rejections", refusal.status.value] += 1
            return [Ended(key=submit.key, error=refusal, stats=request.stats)]
        self._next_id += 1
        self._requests[request.id] = request
        self._by_key[submit.key] = request
        heapq.heappush(self._deadlines, (request.deadline_us, request.id))
        self._enqueue(request)
        return []

    def _refusal(self, request: LiveRequest) -> TriptychError | None:
        if not self.admitting:
            return Unavailable("shutting down", retry_after_ms=limits.RETRY_AFTER_MS)
        if (role := self._stranded_by(request)) is not None:
            return self._no_worker(role)
        tokens = len(request.token_ids) + request.submit.sampling.max_tokens
        tokens_max = self.pool.max_model_len
        if tokens > tokens_max:
            text = f"prompt: {tokens} tokens with max_tokens; the workers' KV memory holds {tokens_max} of one request"
            return InvalidArgument(text, field="prompt")
        if len(self._requests) >= self.config.requests_max:
            text = f"too many requests in flight (limit {self.config.requests_max})"
            return ResourceExhausted(text, retry_after_ms=limits.RETRY_AFTER_MS)
        if self._queued_tokens + len(request.token_ids) > self.config.queued_tokens_max and self._queue:
            text = f"too many prompt tokens waiting (limit {self.config.queued_tokens_max})"
            return ResourceExhausted(text, retry_after_ms=limits.RETRY_AFTER_MS)
        return None

    def _enqueue(self, request: LiveRequest) -> None:
        """In order of submission: one that comes back finds its old place in line (reliability A3)."""
        self._enter(request, Stage.QUEUED)
        self._queued_tokens += len(request.token_ids)
        self._queue.insert(bisect(self._queue, request.id, key=lambda queued: queued.id), request)

    def _dequeue(self, request: LiveRequest) -> None:
        self._queue.remove(request)
        self._queued_tokens -= len(request.token_ids)

    def _place_queued(self, now_us: int) -> list[object]:
        """Send the queue's head to prefill workers while there are any. A worker's own queue is its business."""
        actions: list[object] = []
        workers = self.pool.holding(Role.PREFILL)
        while self._queue and (choice := choose_prefill(workers, avoid=self._queue[0].failed_at)) is not None:
            request = self._queue[0]
            self._dequeue(request)
            self.counters["placements", f"prefill_{choice.reason}"] += 1
            actions.append(self._prefill_at(request, choice.worker, now_us))
        return actions

    def _prefill_at(self, request: LiveRequest, worker: Worker, now_us: int) -> Send:
        self._enter(request, Stage.PREFILL)
        request.source = Placement(worker.id, request.next_attempt())
        request.context_tokens = len(request.token_ids)
        request.stats.prefill_worker = worker.id
        request.prefill_load_tokens = request.context_tokens
        worker.prefill_tokens += request.prefill_load_tokens
        prefill = pb.Prefill(
            request=request.id,
            attempt=request.source.attempt,
            token_ids=request.token_ids,
            prompt_tokens=len(request.submit.token_ids),
            sampling=sampling_to_wire(request.submit.sampling),
            deadline_ms=self._remaining_ms(request, now_us),
            tenant=request.submit.tenant,
        )
        return self._send(worker, prefill=prefill)

    # -- late binding --------------------------------------------------------------------------------------------------
    def _on_near_turn(self, worker: Worker, message: pb.NearTurn, now_us: int) -> list[object]:
        request = self._from_source(worker, message)
        if request is None or request.stage is not Stage.PREFILL:
            return []
        request.mark("near_turn", now_us)
        if not request.needs_target:
            return []
        return self._seek_target(request, now_us)

    def _seek_target(self, request: LiveRequest, now_us: int, *, avoid: str | None = None) -> list[object]:
        """Ask decode workers in turn; `avoid` has just failed, so it is the last resort (reliability B1)."""
        self._enter(request, Stage.RESERVING)
        request.target = None
        request.refused = set() if avoid is None else {avoid}
        return self._choose_target(request, now_us)

    def _choose_target(self, request: LiveRequest, now_us: int) -> list[object]:
        assert request.source is not None
        source = self.pool.get(request.source.worker)
        assert source is not None
        refused = request.refused | {source.id} if request.moving else request.refused
        choice = choose_decode(self.pool.holding(Role.DECODE), source=source, refused=refused)
        if choice is None and request.moving:
            # A move never waits (DESIGN 1): the giver's columns are what others there wait for, and two givers that
            # waited for each other would wait for ever. Its prefix is computed again instead; nothing was lost.
            return self._start_over(request, now_us)
        if choice is None:
            request.retry_us = now_us + limits.RESERVE_RETRY_MS * 1_000
            return self._end_if_stranded(request, now_us)
        self.counters["placements", f"decode_{choice.reason}"] += 1
        request.target = Placement(choice.worker.id, request.next_attempt())
        request.stats.decode_worker = choice.worker.id
        choice.worker.bound += 1
        if choice.worker is source:
            return [self._bind_local(request, source)]
        return [self._reserve(request, choice.worker, now_us)]

    def _bind_local(self, request: LiveRequest, source: Worker) -> Send:
        """The source decodes too: one sequence under two attempt numbers, until token 0 has been heard from either."""
        assert request.source is not None and request.target is not None
        self._enter(request, Stage.DECODE)
        bind = pb.Bind(
            request=request.id,
            attempt=request.source.attempt,
            target_attempt=request.target.attempt,
            target=source.id,
        )
        return self._send(source, bind=bind)

    def _reserve(self, request: LiveRequest, worker: Worker, now_us: int) -> Send:
        assert request.target is not None
        reserve = pb.Reserve(
            request=request.id,
            attempt=request.target.attempt,
            epoch=worker.info.epoch,
            schema_digest=worker.info.schema_digest,
            token_ids=request.token_ids[: request.context_tokens],
            prompt_tokens=len(request.submit.token_ids),
            sampling=sampling_to_wire(request.submit.sampling),
            deadline_ms=self._remaining_ms(request, now_us),
            tenant=request.submit.tenant,
        )
        return self._send(worker, reserve=reserve)

    def _on_reserved(self, worker: Worker, message: pb.Reserved, now_us: int) -> list[object]:
        request = self._from_target(worker, message)
        if request is None or request.stage is not Stage.RESERVING:
            return []
        assert request.source is not None and request.target is not None
        source = self.pool.get(request.source.worker)
        assert source is not None
        self._enter(request, Stage.TRANSFER)
        bind = pb.Bind(
            request=request.id,
            attempt=request.source.attempt,
            target_attempt=request.target.attempt,
            target=worker.id,
            target_address=worker.info.address,
            transfer_id=message.transfer_id,
            target_epoch=message.epoch,
            skip_tokens=message.skip_tokens,
            codec=self._codec(request, worker),
        )
        return [self._send(source, bind=bind)]

    def _codec(self, request: LiveRequest, target: Worker) -> str:
        """What was asked for, if the target reads it: a missing codec is never an error (DESIGN 2.6)."""
        wanted = request.submit.codec or self.config.codec
        return wanted if wanted in target.info.codecs else "raw"

    def _on_refused(self, worker: Worker, message: pb.Refused, now_us: int) -> list[object]:
        request = self._from_target(worker, message)
        if request is None or request.stage is not Stage.RESERVING:
            return []
        if message.reason not in pb.Refusal.values():
            raise FrameError("refusal")
        self.counters["reservations_refused", pb.Refusal.Name(message.reason).lower()] += 1
        if message.reason == pb.INVALID:
            return self._end(request, now_us, error=Internal("a decode worker found the request invalid"))
        worker.bound = max(0, worker.bound - 1)
        request.target = None
        request.refused.add(worker.id)
        return self._choose_target(request, now_us)

    # -- tokens --------------------------------------------------------------------------------------------------------
    def _on_first_token(self, worker: Worker, message: pb.FirstToken, now_us: int) -> list[object]:
        request = self._from_source(worker, message)
        if request is None:
            return []
        finish = finish_from_wire_untrusted(message.finish)
        if request.submit.sampling.max_tokens == 0:
            return self._end(request, now_us, finish=FinishReason.LENGTH)
        return self._forward(request, message.position, [message.token_id], finish, now_us)

    def _on_tokens(self, worker: Worker, message: pb.Tokens, now_us: int) -> list[object]:
        columns = (message.requests, message.attempts, message.positions, message.token_ids, message.finishes)
        if len({len(column) for column in columns}) != 1:
            raise FrameError("length")
        if not FINISH_REASONS.keys() >= set(message.finishes):
            raise FrameError("finish")
        actions: list[object] = []
        for request_id, attempt, position, token_id, finish in zip(*columns, strict=True):
            request = self._requests.get(request_id)
            if request is None or request.target != Placement(worker.id, attempt):
                self.counters["stale_tokens", ""] += 1
                continue
            actions += self._forward(request, position, [token_id], FINISH_REASONS[finish], now_us)
        return actions

    def _forward(
        self, request: LiveRequest, position: int, token_ids: list[int], finish: FinishReason | None, now_us: int
    ) -> list[object]:
        """Position n once, in order. A repeat is welcome news twice; a gap means that something was lost."""
        self._unload_prefill(request)
        expected = len(request.emitted)
        if position < expected:
            return []
        if position > expected:
            self.counters["token_gaps", ""] += 1
            return self._restart(request, now_us)
        request.mark("token", now_us)
        request.emitted += token_ids
        ready = TokensReady(request.submit.key, tuple(token_ids))
        if finish is None:
            return [ready]
        return [ready, *self._end(request, now_us, finish=finish)]

    def _on_committed(self, worker: Worker, message: pb.Committed, now_us: int) -> list[object]:
        """The target has everything: the source's loss no longer matters."""
        request = self._from_target(worker, message)
        if request is None or request.stage is not Stage.TRANSFER:
            return []
        self._enter(request, Stage.DECODE)
        self._unload_prefill(request)
        request.source = None
        request.moving = False
        request.mark("committed", now_us)
        stats = request.stats
        stats.codec = message.codec
        stats.kv_bytes_raw += message.bytes_raw
        stats.kv_bytes_wire += message.bytes_wire
        self.counters["kv_transfers", message.codec] += 1
        return []

    # -- attempts that end without the request -------------------------------------------------------------------------
    def _on_relocate(self, worker: Worker, message: pb.Relocate, now_us: int) -> list[object]:
        """A holder of whole KV needs another target: its first one failed, or it must give the request away."""
        if message.reason not in pb.Relocate.Reason.values():
            raise FrameError("relocate")
        failed = message.reason == pb.Relocate.TRANSFER_FAILED
        request = self._from_source(worker, message) if failed else self._from_target(worker, message)
        if request is None:
            # It holds KV that nobody wants any more. One such: its target committed, and the answer was lost.
            return [self._send(worker, abort=pb.Abort(request=message.request, attempt=message.attempt))]
        if failed:
            known = request.target is None or request.target.attempt != message.target_attempt
            return [] if known else self._rebind(request, now_us)  # known: that binding was replaced already
        if request.stage is not Stage.DECODE or len(message.token_ids) != len(request.token_ids):
            return self._restart(request, now_us)
        self.counters["relocations", pb.Relocate.Reason.Name(message.reason).lower()] += 1
        worker.bound = max(0, worker.bound - 1)
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
            return self._end(request, now_us, error=InvalidArgument(f"refused by a worker: {message.reason}"))
        if message.status == "internal":
            request.engine_failures += 1
        if place == request.target and request.stage in (Stage.RESERVING, Stage.TRANSFER):
            return self._rebind(request, now_us)
        request.failed_at = worker.id
        return self._restart(request, now_us)

    def _rebind(self, request: LiveRequest, now_us: int) -> list[object]:
        """The source still holds the whole KV: only the target is sought again."""
        if self._is_spent(request):
            return self._end(request, now_us, error=self._spent(request))
        avoid = request.target.worker if request.target is not None else None
        return [*self._abort_at(request.target, request), *self._seek_target(request, now_us, avoid=avoid)]

    def _restart(self, request: LiveRequest, now_us: int) -> list[object]:
        """Nobody certainly holds the KV: prefill prompt + emitted tokens again."""
        if self._is_spent(request):
            return self._end(request, now_us, error=self._spent(request))
        return self._start_over(request, now_us)

    def _start_over(self, request: LiveRequest, now_us: int) -> list[object]:
        actions = self._abort_everywhere(request)
        request.moving = False
        request.retry_us = None
        self._enqueue(request)
        return [*actions, *self._end_if_stranded(request, now_us)]

    def _is_spent(self, request: LiveRequest) -> bool:
        request.losses += 1
        return request.losses >= self.config.attempts_max or request.engine_failures >= limits.ENGINE_FAILURES_MAX

    def _spent(self, request: LiveRequest) -> TriptychError:
        text = f"given up after {request.losses} lost placements"
        poisonous = request.engine_failures >= limits.ENGINE_FAILURES_MAX
        return Internal(text) if poisonous else Unavailable(text, retry_after_ms=limits.RETRY_AFTER_MS)

    @staticmethod
    def _no_worker(role: Role) -> TriptychError:
        return Unavailable(f"no {role.value} worker is available", retry_after_ms=limits.RETRY_AFTER_MS)

    # -- the one ending ------------------------------------------------------------------------------------------------
    def _end(
        self,
        request: LiveRequest,
        now_us: int,
        *,
        finish: FinishReason | None = None,
        error: TriptychError | None = None,
    ) -> list[object]:
        if request.stage is Stage.QUEUED:
            self._dequeue(request)
        actions = self._abort_everywhere(request)
        del self._requests[request.id]
        del self._by_key[request.submit.key]
        self._seeking.pop(request.id, None)
        request.stats.attempts = min(1 + request.losses, self.config.attempts_max)
        request.stats.phase_ms = request.phases_ms(now_us)
        return [*actions, Ended(key=request.submit.key, finish=finish, error=error, stats=request.stats)]

    def _abort_everywhere(self, request: LiveRequest) -> list[object]:
        """Whoever may hold anything for this request is told to forget it. Told once too often is harmless."""
        actions = [*self._abort_at(request.source, request), *self._abort_at(request.target, request)]
        self._unload_prefill(request)
        request.source = request.target = None
        return actions

    def _abort_at(self, place: Placement | None, request: LiveRequest) -> list[object]:
        worker = self.pool.get(place.worker) if place is not None else None
        if place is None or worker is None or worker.session is None:
            return []
        if place == request.target:
            worker.bound = max(0, worker.bound - 1)
        return [self._send(worker, abort=pb.Abort(request=request.id, attempt=place.attempt))]

    # -- helpers -------------------------------------------------------------------------------------------------------
    def _from_source(self, worker: Worker, message: pb.NearTurn | pb.FirstToken | pb.Relocate) -> LiveRequest | None:
        """The request this message speaks for, if it comes from the attempt that is its source now."""
        request = self._requests.get(message.request)
        return request if request is not None and request.source == Placement(worker.id, message.attempt) else None

    def _from_target(
        self, worker: Worker, message: pb.Reserved | pb.Refused | pb.Committed | pb.Relocate
    ) -> LiveRequest | None:
        request = self._requests.get(message.request)
        return request if request is not None and request.target == Placement(worker.id, message.attempt) else None

    def _unload_prefill(self, request: LiveRequest) -> None:
        """The prompt is computed, or will not be: it no longer stands before others at its worker. Idempotent."""
        worker = self.pool.get(request.source.worker) if request.source is not None else None
        if worker is not None:
            worker.prefill_tokens = max(0, worker.prefill_tokens - request.prefill_load_tokens)
        request.prefill_load_tokens = 0

    def _enter(self, request: LiveRequest, stage: Stage) -> None:
        request.stage = stage
        if stage in (Stage.QUEUED, Stage.RESERVING):
            self._seeking[request.id] = request
        else:
            self._seeking.pop(request.id, None)

    @staticmethod
    def _remaining_ms(request: LiveRequest, now_us: int) -> int:
        return max(1, (request.deadline_us - now_us) // 1_000)

    def _send(self, worker: Worker, **body: object) -> Send:
        assert worker.session is not None
        return Send(worker.link, worker.session.seal(pb.RouterToWorker(**body)))  # type: ignore[arg-type]
