"""Lease: a worker's side of its registration at the controller. A pure machine.

    no link --dial--> REGISTERING --Welcome(term >= highest)--> LEASED --heartbeats--> ...
       ^                  |   link lost | older term                  |
       +-- after REDIAL_DELAY ----------------------------------------+

The worker keeps serving while the controller is away (promise: a control-plane outage is not a data-plane outage).
It obeys the highest term it has heard and reports it, so that a restarted controller can adopt a higher one.
"""

from collections.abc import Callable

from control_plane.wire import session_pb2 as pb
from control_plane.wire.session import Session, hello
from engine.base import limits
from engine.base.errors import FrameError
from engine.base.machine import Close, Dial, LinkName, Send

CONTROLLER: LinkName = "controller"


class Lease:
    def __init__(self, *, worker: str, address: str, describe: Callable[[], pb.WorkerInfo]) -> None:
        self._worker = worker
        self._address = address
        self._describe = describe
        self._session: Session | None = None
        self._next_us: int | None = None  # next heartbeat, or next attempt to dial
        self.highest_term = 0

    def dial(self) -> list[object]:
        self._next_us = None
        return [Dial(CONTROLLER, self._address, hello(pb.Hello.WORKER_TO_CONTROLLER, self._worker))]

    def on_up(self, now_us: int) -> list[object]:
        self._session = Session()
        self._next_us = now_us + limits.HEARTBEAT_MS * 1_000
        register = pb.Register(info=self._describe(), highest_term=self.highest_term)
        return [self._send(pb.WorkerToController(register=register))]

    def on_lost(self, now_us: int) -> list[object]:
        self._session = None
        self._next_us = now_us + limits.REDIAL_DELAY_MS * 1_000
        return []

    def on_message(self, message: bytes) -> list[object]:
        if self._session is None:
            return []
        try:
            envelope = self._session.open_untrusted(pb.ControllerToWorker, message)
        except FrameError as error:
            return [Close(CONTROLLER, error.reason)]
        if envelope.welcome.term < self.highest_term:
            return [Close(CONTROLLER, "stale_term")]
        self.highest_term = envelope.welcome.term
        return []

    def announce(self) -> list[object]:
        """Say what we are now, without waiting for the next heartbeat."""
        if self._session is None:
            return []
        return [self._send(pb.WorkerToController(heartbeat=pb.Heartbeat(info=self._describe())))]

    def on_tick(self, now_us: int) -> list[object]:
        if self._next_us is None or self._next_us > now_us:
            return []
        if self._session is None:
            return self.dial()
        self._next_us = now_us + limits.HEARTBEAT_MS * 1_000
        return self.announce()

    @property
    def next_deadline_us(self) -> int | None:
        return self._next_us

    def _send(self, envelope: pb.WorkerToController) -> Send:
        assert self._session is not None
        return Send(CONTROLLER, self._session.seal(envelope))
