"""ControllerCore: who is alive and what they are, as a pure machine (DESIGN 7).

Workers register and renew leases; routers are sent the whole table when it changes and once per heartbeat. Soft state
only: after a restart everything is learnt again from the workers.

    fresh      nobody who registers has ever obeyed a term: nothing can be contradicted, publish at once
    restarted  somebody has: listen for one lease period, then publish under a term above all heard

A lost link makes a worker SUSPECT, not dead: the lease decides. Routers find dead workers sooner, by their own links;
the controller's word is for placement of roles, which can wait.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from control_plane.wire import session_pb2 as pb
from control_plane.wire.session import Session, parse_hello_untrusted
from control_plane.wire.translate import offers_from_wire_untrusted
from engine.base import limits
from engine.base.errors import FrameError
from engine.base.machine import Close, LinkLost, LinkName, LinkUp, Received, Send, Started, Tick


class Phase(Enum):
    LISTENING = "listening"
    PUBLISHING = "publishing"


@dataclass(frozen=True, kw_only=True)
class Config:
    lease_ms: int = limits.LEASE_MS
    publish_every_ms: int = limits.HEARTBEAT_MS


@dataclass(slots=True)
class _Registration:
    info: pb.WorkerInfo
    link: LinkName | None  # None: SUSPECT
    expires_us: int


@dataclass(slots=True)
class _Peer:
    """An inbound link that has said who it is."""

    kind: pb.Hello.Kind
    sender: str
    registered: bool = False  # a router that has said which term it obeys may be told of ours
    session: Session = field(default_factory=Session)


class ControllerCore:
    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()
        self.term = 1
        self.phase = Phase.PUBLISHING
        self._started_us = 0
        self._next_publish_us: int | None = None
        self._peers: dict[LinkName, _Peer] = {}
        self._workers: dict[str, _Registration] = {}

    # -- the machine ---------------------------------------------------------------------------------------------------
    def step(self, event: object, now_us: int) -> Sequence[object]:
        match event:
            case Received(link, message):
                return self._on_message(link, message, now_us)
            case LinkUp(link, introduction):
                return self._on_link_up(link, introduction)
            case LinkLost(link):
                return self._on_link_lost(link)
            case Tick():
                return self._on_tick(now_us)
            case Started():
                self._started_us = now_us
                self._next_publish_us = now_us + self.config.publish_every_ms * 1_000
                return []
        raise TypeError(f"not an event of a controller: {event!r}")

    @property
    def next_deadline_us(self) -> int | None:
        leases = [registration.expires_us for registration in self._workers.values()]
        deadlines = [*leases, self._next_publish_us]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    @property
    def workers(self) -> dict[str, str]:
        """Worker id -> state, SUSPECT included: the controller's view."""
        return {
            worker_id: registration.info.state if registration.link else "SUSPECT"
            for worker_id, registration in sorted(self._workers.items())
        }

    def _on_tick(self, now_us: int) -> list[object]:
        dead = [worker_id for worker_id, r in self._workers.items() if r.expires_us <= now_us]
        for worker_id in dead:
            del self._workers[worker_id]
        if self.phase is Phase.LISTENING and now_us - self._started_us >= self.config.lease_ms * 1_000:
            self.phase = Phase.PUBLISHING
            return self._welcome_all() + self._publish(now_us)
        due = self._next_publish_us is not None and self._next_publish_us <= now_us
        return self._publish(now_us) if dead or due else []

    # -- links ---------------------------------------------------------------------------------------------------------
    def _on_link_up(self, link: LinkName, introduction: bytes) -> list[object]:
        try:
            peer = parse_hello_untrusted(introduction)
        except FrameError as error:
            return [Close(link, error.reason)]
        if peer.kind not in (pb.Hello.WORKER_TO_CONTROLLER, pb.Hello.ROUTER_TO_CONTROLLER):
            return [Close(link, "kind")]
        self._peers[link] = _Peer(peer.kind, peer.sender)
        return []

    def _on_link_lost(self, link: LinkName) -> list[object]:
        self._peers.pop(link, None)
        for registration in self._workers.values():
            if registration.link == link:
                registration.link = None
        return []

    def _on_message(self, link: LinkName, message: bytes, now_us: int) -> list[object]:
        peer = self._peers.get(link)
        if peer is None:
            return []
        try:
            if peer.kind == pb.Hello.ROUTER_TO_CONTROLLER:
                register = peer.session.open_untrusted(pb.RouterToController, message).register
                return self._on_router(link, register, now_us)
            envelope = peer.session.open_untrusted(pb.WorkerToController, message)
            return self._on_worker(link, peer, envelope, now_us)
        except FrameError as error:
            return [Close(link, error.reason)]

    # -- what peers say ------------------------------------------------------------------------------------------------
    def _on_router(self, link: LinkName, register: pb.RegisterRouter, now_us: int) -> list[object]:
        self._peers[link].registered = True
        self._learn_term(register.highest_term, now_us)
        return [self._table_for(link)] if self.phase is Phase.PUBLISHING else []

    def _on_worker(self, link: LinkName, peer: _Peer, envelope: pb.WorkerToController, now_us: int) -> list[object]:
        registers = envelope.WhichOneof("body") == "register"
        info = envelope.register.info if registers else envelope.heartbeat.info
        if info.worker != peer.sender:
            raise FrameError("identity")  # a worker speaks for itself only
        offers_from_wire_untrusted(info.offers)  # before they are in everybody's table
        if info.worker not in self._workers and len(self._workers) >= limits.WORKERS_MAX:
            raise FrameError("workers_max")
        changed = self._renew(link, info, now_us)
        if registers:
            self._learn_term(envelope.register.highest_term, now_us)
        if self.phase is Phase.LISTENING:
            return []
        welcome = [self._welcome(link)] if registers else []
        return welcome + (self._publish(now_us) if changed else [])

    def _renew(self, link: LinkName, info: pb.WorkerInfo, now_us: int) -> bool:
        """True when routers should hear of it now."""
        expires_us = now_us + self.config.lease_ms * 1_000
        known = self._workers.get(info.worker)
        self._workers[info.worker] = _Registration(info, link, expires_us)
        return known is None or known.info != info

    def _learn_term(self, heard: int, now_us: int) -> None:
        """Somebody obeyed a controller before this process: rise above it, and listen before speaking."""
        if heard < self.term:
            return
        self.term = heard + 1
        if now_us - self._started_us < self.config.lease_ms * 1_000:
            self.phase = Phase.LISTENING

    # -- what we say ---------------------------------------------------------------------------------------------------
    def _welcome_all(self) -> list[object]:
        return [self._welcome(link) for link, peer in self._peers.items() if peer.kind == pb.Hello.WORKER_TO_CONTROLLER]

    def _welcome(self, link: LinkName) -> Send:
        welcome = pb.Welcome(term=self.term, lease_ms=self.config.lease_ms)
        return Send(link, self._peers[link].session.seal(pb.ControllerToWorker(welcome=welcome)))

    def _publish(self, now_us: int) -> list[object]:
        self._next_publish_us = now_us + self.config.publish_every_ms * 1_000
        if self.phase is Phase.LISTENING:
            return []
        return [self._table_for(link) for link, peer in self._peers.items() if peer.registered]

    def _table_for(self, link: LinkName) -> Send:
        infos = [registration.info for _, registration in sorted(self._workers.items())]
        table = pb.WorkerTable(term=self.term, workers=infos)
        return Send(link, self._peers[link].session.seal(pb.ControllerToRouter(table=table)))
