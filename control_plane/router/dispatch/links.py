"""Links: this router's sessions with the controller and with workers: introduced, numbered, dialled again when lost.

The controller is dialled for ever; a worker for as long as it is in the pool. A session is void when its link is.

Not here: what is said over a link, what the loss of a worker means for requests (`losses`).
"""

from collections.abc import Iterator

from control_plane.router.dispatch.workers import Worker, WorkerPool
from control_plane.wire import session_pb2 as pb
from control_plane.wire.session import Session, hello
from engine.base import limits
from engine.base.errors import FrameError
from engine.base.machine import Dial, LinkName, Send

CONTROLLER: LinkName = "controller"


class Links:
    def __init__(self, pool: WorkerPool, *, router_id: str, controller_address: str) -> None:
        self._pool = pool
        self._router_id = router_id
        self._controller_address = controller_address
        self._controller: Session | None = None
        self._redial_controller_us: int | None = None

    # -- dialling ------------------------------------------------------------------------------------------------------
    def dial_controller(self) -> list[object]:
        self._redial_controller_us = None
        introduction = hello(pb.Hello.ROUTER_TO_CONTROLLER, self._router_id)
        return [Dial(CONTROLLER, self._controller_address, introduction)]

    def dial_workers(self, now_us: int) -> list[object]:
        actions: list[object] = []
        for worker in self._pool:
            if worker.session is None and worker.redial_us is not None and worker.redial_us <= now_us:
                worker.redial_us = None
                introduction = hello(pb.Hello.ROUTER_TO_WORKER, self._router_id)
                actions.append(Dial(worker.link, worker.info.address, introduction))
        return actions

    def on_tick(self, now_us: int) -> list[object]:
        due = self._redial_controller_us is not None and self._redial_controller_us <= now_us
        return [*(self.dial_controller() if due else ()), *self.dial_workers(now_us)]

    @property
    def next_deadline_us(self) -> int | None:
        return min((us for us in self._redials_us() if us is not None), default=None)

    def _redials_us(self) -> Iterator[int | None]:
        yield self._redial_controller_us
        yield from (worker.redial_us for worker in self._pool if worker.session is None)

    # -- the controller ------------------------------------------------------------------------------------------------
    def on_controller_up(self) -> list[object]:
        self._controller = Session()
        register = pb.RegisterRouter(router=self._router_id, highest_term=self._pool.term)
        return [Send(CONTROLLER, self._controller.seal(pb.RouterToController(register=register)))]

    def on_controller_lost(self, now_us: int) -> None:
        self._controller = None
        self._redial_controller_us = _redial_us(now_us)

    def table_untrusted(self, message: bytes) -> pb.WorkerTable | None:
        """What the controller publishes. None of a session that is over."""
        if self._controller is None:
            return None
        envelope = self._controller.open_untrusted(pb.ControllerToRouter, message)
        if envelope.WhichOneof("body") != "table":
            raise FrameError("body")
        return envelope.table

    # -- workers -------------------------------------------------------------------------------------------------------
    @staticmethod
    def on_worker_lost(worker: Worker, now_us: int) -> None:
        worker.session = None
        worker.redial_us = _redial_us(now_us)


def _redial_us(now_us: int) -> int:
    return now_us + limits.REDIAL_DELAY_MS * 1_000
