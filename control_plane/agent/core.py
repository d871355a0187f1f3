"""WorkerCore: one worker process as a pure machine. It hosts role objects over one engine.

Everything a worker hears (routers, the controller, other workers, its engine, its codec threads, the clock) enters
`step`; everything it does leaves as actions. Policy lives in the parts: `Lease` (registration), `PrefillRole` and
`DecodeRole` (what the work is), `Source` and `Target` (how KV moves), `Custody` (who may free units). This file routes
between them, translates to and from the wire, and owns what concerns the worker as a whole: its state and its end.

    routers     --Encode, Prefill, Reserve, Bind, Abort-->  attempts -> roles -> engine commands
    workers     --frames-->                                 Targets, or answers to our Sources
    engine      --events-->                                 roles -> reports -> routers

A worker is neutral: "encode", "prefill", "decode" and "mixed" differ only in the set of roles it holds.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Protocol

from control_plane.agent.attempts import Attempt, AttemptTable
from control_plane.agent.intake import Intake, Members, deadline_us
from control_plane.agent.lease import CONTROLLER, Lease
from control_plane.agent.status import Config, WorkerState, describe, status
from control_plane.agent.target_links import TargetLinks
from control_plane.agent.transfers import Transfers
from control_plane.wire import session_pb2 as pb
from control_plane.wire.session import Session, hello, parse_hello_untrusted
from control_plane.wire.translate import choice_attempts_from_wire_untrusted, report_to_wire, tokens_to_wire
from decode_worker import role as decode
from encode_worker.role import EncodeRole
from engine import commands
from engine.base import limits
from engine.base.errors import FrameError, Status
from engine.base.machine import (
    Close,
    Command,
    EngineEvents,
    JobDone,
    LinkLost,
    LinkName,
    LinkUp,
    Received,
    Send,
    Started,
    Tick,
)
from engine.kv.schema import CacheSchema
from engine.scheduler import Failure
from engine.types import Role
from kv_transfer import reports
from kv_transfer.codecs import CodecSet
from kv_transfer.custody import Custody
from kv_transfer.frame import TRANSFER_ID_BYTES
from kv_transfer.offers import offers_of
from kv_transfer.source import Binding, Delivered, DeliveryFailed
from kv_transfer.target import ArrivalFailed, Arrived
from prefill_worker.images import ImageGathering
from prefill_worker.role import PrefillRole

__all__ = ["Config", "Drain", "Drained", "WorkerCore", "WorkerState"]


@dataclass(frozen=True, slots=True)
class Drain:
    """Input: take no new work; `Drained` follows when nothing is left. Past half the time, running work moves away."""

    timeout_ms: int = limits.DRAIN_TIMEOUT_MS


@dataclass(frozen=True, slots=True)
class Drained:
    """Output: this worker holds nothing for anybody; its process may end."""


class WorkerCore:
    """See the module's text. `random` mints transfer ids; `failpoint` is called at each declared stage; `count_tasks`
    is for the status only."""

    def __init__(
        self,
        config: Config,
        *,
        random: Random,
        failpoint: Callable[[str], None] = lambda name: None,
        count_tasks: Callable[[], int] = lambda: 0,
    ) -> None:
        self.config = config
        self.state = WorkerState.STARTING
        self.epoch = 1
        self.counters: Counter[str] = Counter()
        self._failpoint = failpoint
        self._count_tasks = count_tasks
        self._load = config.empty_load
        self._attempts = AttemptTable()
        self._routers: dict[LinkName, Session] = {}
        self._sources: set[LinkName] = set()  # inbound bulk links: peers that send us frames
        self._targets = TargetLinks(hello(pb.Hello.WORKER_TO_WORKER, config.worker_id))
        self._next_status_us: int | None = None
        self._quiesce_us: int | None = None
        self._offers = offers_of(config.codecs)
        self._build_parts(random)

    def _build_parts(self, random: Random) -> None:
        config = self.config
        self.custody = Custody()
        self._intake = Intake(config, self._attempts.mint)
        self._transfers = Transfers(
            custody=self.custody,
            counters=self.counters,
            mint_transfer_id=partial(random.randbytes, TRANSFER_ID_BYTES),
            vocab_size=config.vocab_size,
        )
        kv = self._transfers.add(config.schema, config.codecs)
        self._encode, gathering = self._build_sight(config.embedding_schema)
        self._prefill = PrefillRole(source=kv.source, custody=self.custody, images=gathering)
        self._decode = decode.DecodeRole(
            decode.Config(growth_tokens=config.growth_tokens),
            source=kv.source,
            target=kv.target,
            custody=self.custody,
        )
        self._roles: list[_Role] = [role for role in (self._encode, self._prefill, self._decode) if role is not None]
        self._lease = Lease(worker=config.worker_id, address=config.controller_address, describe=self._describe)

    def _build_sight(self, schema: CacheSchema | None) -> tuple[EncodeRole | None, ImageGathering | None]:
        """What a worker of a model that sees has besides: embeddings are made here, and gathered here."""
        if schema is None:
            return None, None
        source, target = self._transfers.add(schema, CodecSet(schema.kv))
        gathering = ImageGathering(target=target, custody=self.custody, mint=self._attempts.mint)
        if not self.config.encodes:
            return None, gathering
        return EncodeRole(source=source, custody=self.custody, ahead_bytes=limits.PIXELS_AHEAD_BYTES), gathering

    # -- the machine ---------------------------------------------------------------------------------------------------
    def step(self, event: object, now_us: int) -> Sequence[object]:
        actions = self._dispatch(event, now_us)
        if self.state is WorkerState.DRAINING and not self.held:
            self.state = WorkerState.STANDBY
            self._quiesce_us = None
            actions = [*actions, *self._announce(), Drained()]
        return actions

    def _dispatch(self, event: object, now_us: int) -> list[object]:
        match event:
            case Received(link, message):
                return self._on_message(link, message, now_us)
            case EngineEvents(events):
                return [action for item in events for action in self._on_engine_event(item, now_us)]
            case JobDone():
                return self._settle(self._transfers.on_job(event, now_us))
            case Tick():
                return self._on_tick(now_us)
            case LinkUp(link, introduction):
                return self._on_link_up(link, introduction, now_us)
            case LinkLost(link):
                return self._on_link_lost(link, now_us)
            case Started():
                self.state = WorkerState.SERVING
                self._next_status_us = now_us + limits.HEARTBEAT_MS * 1_000
                return self._lease.dial()
            case Drain(timeout_ms):
                return self._on_drain(timeout_ms, now_us)
        raise TypeError(f"not an event of a worker: {event!r}")

    @property
    def next_deadline_us(self) -> int | None:
        deadlines = (
            self._lease.next_deadline_us,
            self._transfers.next_deadline_us,
            self._attempts.next_deadline_us,
            self._next_status_us,
            self._quiesce_us,
        )
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    @property
    def held(self) -> int:
        """Attempts, transfers and sequences this worker still holds anything for."""
        return len(self._attempts) + len(self._transfers) + len(self.custody)

    def _on_tick(self, now_us: int) -> list[object]:
        actions: list[object] = [*self._lease.on_tick(now_us)]
        actions += self._settle(self._transfers.on_tick(now_us))
        for attempt in self._attempts.expired(now_us):
            if self._attempts.of_sequence(attempt.seq_id) is attempt:  # not gone with its group, a moment ago
                self.counters["attempts_expired"] += 1
                actions += self._fail_attempt(attempt, Status.DEADLINE_EXCEEDED, "deadline")
        if self._quiesce_us is not None and self._quiesce_us <= now_us:
            self._quiesce_us = now_us + limits.HEARTBEAT_MS * 1_000  # again: transfers under way still arrive
            actions += self._decode.quiesce()
        if self._next_status_us is not None and self._next_status_us <= now_us:
            self._next_status_us = now_us + limits.HEARTBEAT_MS * 1_000
            actions += [self._to_router(link, status=self._status()) for link in self._routers]
        return actions

    def _on_drain(self, timeout_ms: int, now_us: int) -> list[object]:
        self.state = WorkerState.DRAINING
        self._quiesce_us = now_us + timeout_ms * 500  # half of the time to finish in place, half to move away
        return self._announce()

    def _announce(self) -> list[object]:
        return [*self._lease.announce(), *(self._to_router(link, status=self._status()) for link in self._routers)]

    # -- links ---------------------------------------------------------------------------------------------------------
    def _on_link_up(self, link: LinkName, introduction: bytes, now_us: int) -> list[object]:
        if link == CONTROLLER:
            return self._lease.on_up(now_us)
        if link in self._targets:
            waiting = self._targets.on_up(link)
            return [action for seq_id, binding in waiting for action in self._bind(seq_id, binding, now_us)]
        try:
            kind = parse_hello_untrusted(introduction).kind
        except FrameError as error:
            return self._refuse_link(link, error.reason)
        if kind == pb.Hello.ROUTER_TO_WORKER:
            self._routers[link] = Session()
            return [self._to_router(link, status=self._status())]
        if kind == pb.Hello.WORKER_TO_WORKER:
            self._sources.add(link)
            return []
        return self._refuse_link(link, "kind")

    def _refuse_link(self, link: LinkName, reason: str) -> list[object]:
        self.counters[f"links_refused:{reason}"] += 1
        return [Close(link, reason)]

    def _on_link_lost(self, link: LinkName, now_us: int) -> list[object]:
        if link == CONTROLLER:
            return self._lease.on_lost(now_us)
        if self._routers.pop(link, None) is not None:
            orphans = self._attempts.of_link(link)
            self.counters["orphans_reaped"] += len(orphans)
            for attempt in orphans:
                self._forget(attempt)  # first all of them: what one leaves room for is not another one's turn
            return [action for attempt in orphans for action in self._drop(attempt)]
        if link in self._targets:
            unbound: list[object] = [
                DeliveryFailed(seq_id=seq_id, target_attempt=binding.target_attempt, reason="link_lost")
                for seq_id, binding in self._targets.on_lost(link)
            ]
            return self._settle([*unbound, *self._transfers.on_target_lost(link)])
        self._sources.discard(link)
        return self._settle(self._transfers.on_source_lost(link))

    def _on_message(self, link: LinkName, message: bytes, now_us: int) -> list[object]:
        if link in self._sources:
            self._failpoint("decode.receiving")
            return self._settle(self._transfers.on_frame(link, message, now_us))
        if link in self._targets:
            return self._settle(self._transfers.on_answer(link, message, now_us))
        if link == CONTROLLER:
            return self._lease.on_message(message)
        session = self._routers.get(link)
        if session is None:
            return []
        try:
            envelope = session.open_untrusted(pb.RouterToWorker, message)
            return self._on_router_message(link, envelope, now_us)
        except FrameError as error:
            return self._refuse_link(link, error.reason)

    # -- what routers ask ----------------------------------------------------------------------------------------------
    def _on_router_message(self, link: LinkName, envelope: pb.RouterToWorker, now_us: int) -> list[object]:
        match envelope.WhichOneof("body"):
            case "prefill":
                return self._on_prefill(link, envelope.prefill, now_us)
            case "reserve":
                return self._on_reserve(link, envelope.reserve, now_us)
            case "encode":
                return self._on_encode(link, envelope.encode, now_us)
            case "pixels":
                return self._on_pixels(link, envelope.pixels)
            case "bind":
                return self._on_bind(link, envelope.bind, now_us)
            case "abort":
                attempt = self._attempts.find(link, envelope.abort.request, envelope.abort.attempt)
                return [] if attempt is None else self._drop(attempt)
            case "quiesce":
                return self._decode.quiesce()
            case "reset_cache":
                return [Command(commands.ResetCache())]
        raise FrameError("body")

    def _on_prefill(self, link: LinkName, message: pb.Prefill, now_us: int) -> list[object]:
        if not self._takes(Role.PREFILL):
            return [self._refuse_attempt(link, message, Status.UNAVAILABLE, "not_serving")]
        try:
            work = self._intake.prefill_untrusted(message)
        except FrameError as error:
            return [self._refuse_attempt(link, message, Status.INVALID_ARGUMENT, error.reason)]
        self._record(_attempt(link, message, work, now_us))
        self._failpoint("prefill.queued")
        return self._prefill.add(work)

    def _on_reserve(self, link: LinkName, message: pb.Reserve, now_us: int) -> list[object]:
        refusal = self._reserve_refusal(message)
        if refusal is not None:
            return [self._refuse_reserve(link, message, refusal)]
        try:
            work, members = self._intake.reserve_untrusted(message)
        except FrameError:
            return [self._refuse_reserve(link, message, pb.INVALID)]
        work = replace(work, children=self._intake.children(work))
        attempt = _attempt(link, message, work, now_us)
        self._record(attempt, *_children(attempt, work, members))
        return self._decode.reserve(work)

    def _reserve_refusal(self, message: pb.Reserve) -> pb.Refusal | None:
        if message.epoch != self.epoch:
            return pb.WRONG_EPOCH
        if message.schema_digest != self.config.schema.digest:
            return pb.WRONG_SCHEMA
        return None if self._takes(Role.DECODE) else pb.NOT_SERVING

    def _takes(self, role: Role) -> bool:
        return self._has_room and role in self.config.roles

    @property
    def _has_room(self) -> bool:
        return self.state is WorkerState.SERVING and len(self._attempts) < limits.WORKER_ATTEMPTS_MAX

    def _on_encode(self, link: LinkName, message: pb.Encode, now_us: int) -> list[object]:
        if self._encode is None or not self._has_room:
            return [self._refuse_attempt(link, message, Status.UNAVAILABLE, "not_serving")]
        if message.schema_digest != self.config.embedding_digest:
            return [self._refuse_attempt(link, message, Status.UNAVAILABLE, "schema")]
        try:
            work = self._intake.encode_untrusted(message)
        except FrameError as error:
            return [self._refuse_attempt(link, message, Status.INVALID_ARGUMENT, error.reason)]
        self._record(_attempt(link, message, work, now_us))
        self._failpoint("encode.queued")
        return self._encode.add(work)

    def _on_pixels(self, link: LinkName, message: pb.Pixels) -> list[object]:
        """Those of an attempt that has ended are still under way for a while."""
        attempt = self._attempts.find(link, message.request, message.attempt)
        if attempt is None or self._encode is None:
            return []
        self._failpoint("encode.receiving")
        return self._settle(self._encode.pixels(attempt.seq_id, message.offset, message.data))

    def _record(self, *attempts: Attempt) -> None:
        """All or none. A number that is taken already would make two sequences one."""
        keys = {attempt.key for attempt in attempts}
        if len(keys) != len(attempts) or any(self._attempts.find(*key) for key in keys):
            raise FrameError("attempt")
        for attempt in attempts:
            self._attempts.add(attempt)

    def _on_bind(self, link: LinkName, message: pb.Bind, now_us: int) -> list[object]:
        attempt = self._attempts.find(link, message.request, message.attempt)
        if attempt is None:
            # It ended while Bind was under way. A failure the router hears of; a delivery to another target it may
            # never (that target is lost, with its Committed), and would wait for ever for a transfer from nobody.
            return [self._refuse_attempt(link, message, Status.UNAVAILABLE, "unknown_attempt")]
        if message.target == self.config.worker_id:
            return self._bind_here(attempt, message, now_us)
        binding = self._intake.binding_untrusted(message, attempt.work)
        self._targets.forget(attempt.seq_id)
        if self._targets.is_up(binding.link):
            return self._bind(attempt.seq_id, binding, now_us)
        waits = self._targets.wait(attempt.seq_id, binding, message.target_address)
        return [*self._transfers.unbind(attempt.seq_id), *waits]

    def _bind(self, seq_id: int, binding: Binding, now_us: int) -> list[object]:
        return self._settle(self._owner(seq_id).bind(seq_id, binding, now_us))

    def _bind_here(self, attempt: Attempt, message: pb.Bind, now_us: int) -> list[object]:
        if not isinstance(attempt.work, reports.Work) or not self._prefill.owns(attempt.seq_id):
            return []
        if self._prefill.gathers(attempt.seq_id):
            raise FrameError("images")  # it has had no turn yet, and is not in the engine
        members = choice_attempts_from_wire_untrusted(message.choices)
        attempt.work = work = replace(attempt.work, children=self._intake.children(attempt.work))
        if work.children and tuple(choice for _, choice in members) != work.choices:
            raise FrameError("choices")
        if self._attempts.find(attempt.link, attempt.request, message.target_attempt) is not None:
            raise FrameError("attempt")
        self._attempts.rename(attempt, message.target_attempt)
        self._record(*_children(attempt, work, members))
        actions, tokens = self._prefill.give_to_decode(work)
        return [*actions, *self._settle(self._decode.adopt(work, tokens))]

    # -- what the engine says ------------------------------------------------------------------------------------------
    def _on_engine_event(self, event: object, now_us: int) -> list[object]:
        match event:
            case commands.KVComputed():
                self._failpoint("prefill.computing")
                return self._settle(self._prefill.on_computed(event, now_us))
            case commands.TokensSampled():
                self._failpoint("decode.decoding")
                return self._settle(self._decode.on_tokens(event))
            case commands.EngineLoad():
                self._load = event
                return []
            case commands.Admitted():
                return self._settle(self._prefill.on_admitted(event))
            case commands.Prefilled() if self._decode.owns(event.seq_id):
                return self._settle(self._decode.on_prefilled(event))
            case commands.Prefilled():
                return self._settle(self._prefill.on_prefilled(event, now_us))
            case commands.PromptScored():
                scored = reports.PromptScored(seq_id=event.seq_id, start=event.start, logprobs=event.logprobs)
                return self._settle([scored])
            case commands.Reserved():
                return self._settle(self._decode.on_reserved(event, self.epoch))
            case commands.Paused():
                return self._settle(self._decode.on_paused(event, now_us))
            case commands.EmbeddingsReserved():
                return self._settle(self._prefill.on_images_reserved(event, self.epoch))
            case commands.PixelsNeeded() if self._encode is not None:
                return self._settle(self._encode.on_pixels_needed(event))
            case commands.Encoded() if self._encode is not None:
                return self._settle(self._encode.on_encoded(event, now_us))
            case commands.StepFailed():
                return self._on_step_failed(event)
        raise TypeError(f"not an engine event: {event!r}")

    def _on_step_failed(self, event: commands.StepFailed) -> list[object]:
        self.counters[f"step_failures:{event.reason}"] += 1
        failure = _STATUS_OF_FAILURE.get(event.reason, Status.INTERNAL)
        actions: list[object] = []
        for seq_id in event.seq_ids:
            prompt = self._prefill.waiting_for(seq_id)  # an image's failure is its prompt's
            attempt = self._attempts.of_sequence(seq_id if prompt is None else prompt)
            if attempt is not None:
                actions += self._fail_attempt(attempt, failure, event.reason)
        return actions

    # -- outcomes ------------------------------------------------------------------------------------------------------
    def _settle(self, items: Sequence[object]) -> list[object]:
        """Turn transfer outcomes and role reports, however nested, into actions. Plain actions pass through."""
        actions: list[object] = []
        for item in items:
            match item:
                case Arrived() | ArrivalFailed():
                    actions += self._settle(self._on_arrival(item))
                case Delivered() | DeliveryFailed():
                    actions += self._settle(self._on_delivery(item))
                case reports.Tokens():
                    actions += self._report_tokens(item)
                case reports.AttemptOver():
                    actions += self._report_over(item)
                case reports.AttemptReport():
                    actions += self._report(item)
                case _:
                    actions.append(item)
        return actions

    def _on_arrival(self, outcome: Arrived | ArrivalFailed) -> list[object]:
        of_image = self._prefill.waiting_for(outcome.seq_id) is not None
        if isinstance(outcome, ArrivalFailed):
            return self._prefill.on_image_failed(outcome) if of_image else self._decode.on_arrival_failed(outcome)
        self._failpoint("prefill.gathering" if of_image else "decode.committed")
        return self._prefill.on_image_arrived(outcome) if of_image else self._decode.on_arrived(outcome)

    def _on_delivery(self, outcome: Delivered | DeliveryFailed) -> list[object]:
        role = self._owner(outcome.seq_id)
        if isinstance(outcome, DeliveryFailed):
            return role.on_delivery_failed(outcome)
        self._failpoint("encode.end_sent" if role is self._encode else "prefill.end_sent")
        return role.on_delivered(outcome)

    def _owner(self, seq_id: int) -> "_Role":
        return next((role for role in self._roles if role.owns(seq_id)), self._decode)

    def _report_tokens(self, report: reports.Tokens) -> list[object]:
        """One message per router for the whole step."""
        by_router: defaultdict[LinkName, list[tuple[int, int, commands.SampledToken]]] = defaultdict(list)
        for token in report.tokens:
            attempt = self._attempts.of_sequence(token.seq_id)
            if attempt is not None:
                by_router[attempt.link].append((attempt.request, attempt.attempt, token))
        return [self._to_router(link, tokens=tokens_to_wire(tokens)) for link, tokens in by_router.items()]

    def _report_over(self, report: reports.AttemptOver) -> list[object]:
        """Well over is a sequence alone: a group's children go on. A failure takes them along."""
        attempt = self._attempts.of_sequence(report.seq_id)
        if attempt is None:
            return []
        if report.status is None:
            self._attempts.forget(report.seq_id)
            return []
        self._forget(attempt)
        return [self._failed(attempt, report.status, report.reason)]

    def _report(self, report: reports.AttemptReport) -> list[object]:
        attempt = self._attempts.of_sequence(report.seq_id)
        if attempt is None:
            return []
        match report:
            case reports.NearTurn():
                self._failpoint("prefill.near_turn")
            case reports.FirstToken():
                self._failpoint("prefill.streaming")
            case reports.Granted():
                self._failpoint("decode.reserved")
            case reports.Encoded():
                self._failpoint("encode.encoded")
            case reports.Full():
                self._forget(attempt)
            case reports.Relocate():
                self.counters[f"relocations:{report.reason.value}"] += 1
        envelope = report_to_wire(report, request=attempt.request, attempt=attempt.attempt, epoch=self.epoch)
        return [Send(attempt.link, self._routers[attempt.link].seal(envelope))]

    def _drop(self, attempt: Attempt) -> list[object]:
        """Forget the attempt and free what it holds, in whatever stage it is. Idempotent below."""
        self._forget(attempt)
        self._targets.forget(attempt.seq_id)
        return self._settle([action for role in self._roles for action in role.abort(attempt.seq_id)])

    def _forget(self, attempt: Attempt) -> None:
        """A group's record goes with its children's. After the commit there is no group any more."""
        for seq_id in attempt.seq_ids:
            self._attempts.forget(seq_id)

    def _fail_attempt(self, attempt: Attempt, status: Status, reason: str) -> list[object]:
        return [*self._drop(attempt), self._failed(attempt, status, reason)]

    # -- messages to routers -------------------------------------------------------------------------------------------
    def _to_router(self, link: LinkName, **body: object) -> Send:
        return Send(link, self._routers[link].seal(pb.WorkerToRouter(**body)))  # type: ignore[arg-type]

    def _failed(self, attempt: Attempt, status: Status, reason: str) -> Send:
        failed = pb.AttemptFailed(request=attempt.request, attempt=attempt.attempt, status=status.value, reason=reason)
        return self._to_router(attempt.link, failed=failed)

    def _refuse_attempt(
        self, link: LinkName, message: pb.Prefill | pb.Encode | pb.Bind, status: Status, reason: str
    ) -> Send:
        self.counters[f"attempts_refused:{reason}"] += 1
        failed = pb.AttemptFailed(request=message.request, attempt=message.attempt, status=status.value, reason=reason)
        return self._to_router(link, failed=failed)

    def _refuse_reserve(self, link: LinkName, message: pb.Reserve, refusal: pb.Refusal) -> Send:
        self.counters[f"reservations_refused:{pb.Refusal.Name(refusal).lower()}"] += 1
        refused = pb.Refused(request=message.request, attempt=message.attempt, reason=refusal)
        return self._to_router(link, refused=refused)

    # -- who we are ----------------------------------------------------------------------------------------------------
    def _describe(self) -> pb.WorkerInfo:
        return describe(self.config, epoch=self.epoch, state=self.state, offers=self._offers)

    def _status(self) -> pb.WorkerStatus:
        return status(
            self.config,
            epoch=self.epoch,
            state=self.state,
            load=self._load,
            attempts=len(self._attempts),
            held=len(self.custody),
            tasks=self._count_tasks(),
            counters=self.counters,
        )


class _Role(Protocol):
    """What all roles have: sequences that end, and leave. A sequence is one role's at a time."""

    def owns(self, seq_id: int) -> bool: ...
    def abort(self, seq_id: int) -> list[object]: ...
    def bind(self, seq_id: int, binding: Binding, now_us: int) -> list[object]: ...
    def on_delivered(self, event: Delivered) -> list[object]: ...
    def on_delivery_failed(self, event: DeliveryFailed) -> list[object]: ...


_STATUS_OF_FAILURE = {
    **dict.fromkeys(commands.REQUESTS_OWN_FAULTS, Status.INVALID_ARGUMENT),
    # Another worker may have room, or more memory: nothing is wrong with the engine.
    **dict.fromkeys((commands.EMBEDDINGS_FULL, Failure.NO_ROOM_TO_FORK), Status.UNAVAILABLE),
}


def _attempt(
    link: LinkName, message: pb.Prefill | pb.Reserve | pb.Encode, work: reports.Work | reports.EncodeWork, now_us: int
) -> Attempt:
    return Attempt(link, message.request, message.attempt, work.seq_id, deadline_us(message, now_us), work)


def _children(group: Attempt, work: reports.Work, members: Members) -> list[Attempt]:
    """A group's choices are attempts of their own from the start: an abort of one may come at any time."""
    pairs = zip(members, work.parts, strict=False)  # a single choice has a name too, and no part of its own
    return [
        Attempt(group.link, request, group.attempt, part.seq_id, group.deadline_us, part)
        for (request, _), part in pairs
    ]
