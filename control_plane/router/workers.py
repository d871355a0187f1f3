"""WorkerPool: what this router knows of the workers: the controller's table, its own sessions, their load.

Soft state only. The table says who exists; a session says who can be talked to; the newest status says how busy they
are. When the controller is away the table stays as it is. When a session is lost everything under it is void.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from control_plane.router.requests import WorkerView
from control_plane.wire import session_pb2 as pb
from control_plane.wire.session import Session
from engine.base import limits
from engine.base.machine import LinkName
from engine.types import Role

SERVING = "SERVING"
LINK_PREFIX = "worker/"


@dataclass(slots=True)
class Worker:
    """One worker process. `session` is None while there is no link to it."""

    info: pb.WorkerInfo
    session: Session | None = None
    redial_us: int | None = 0
    status: pb.WorkerStatus = field(default_factory=pb.WorkerStatus)
    prefill_tokens: int = 0  # sent and not yet prefilled, by our own count: the status is a heartbeat old
    bound: int = 0  # reservations and decodes of ours there

    @property
    def id(self) -> str:
        return self.info.worker

    @property
    def link(self) -> LinkName:
        return LINK_PREFIX + self.info.worker

    @property
    def serving(self) -> bool:
        return self.session is not None and self.info.state == SERVING

    def has(self, role: Role) -> bool:
        return role.value in self.info.roles


class WorkerPool:
    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}
        self.term = 0

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def get(self, worker_id: str) -> Worker | None:
        return self._workers.get(worker_id)

    def by_link(self, link: LinkName) -> Worker | None:
        return self._workers.get(link.removeprefix(LINK_PREFIX))

    def adopt(self, table: pb.WorkerTable) -> bool:
        """Take the controller's table, unless its term is older than one already obeyed. Workers that it no longer
        lists are forgotten once they have no session: the link, not the table, says whether one is alive."""
        if table.term < self.term:
            return False
        self.term = table.term
        listed = {info.worker: info for info in table.workers[: limits.WORKERS_MAX]}
        for worker_id, info in listed.items():
            known = self._workers.get(worker_id)
            if known is None:
                self._workers[worker_id] = Worker(info)
            else:
                self._refresh(known, info)
        gone = [w.id for w in self if w.id not in listed and w.session is None]
        for worker_id in gone:
            del self._workers[worker_id]
        return True

    @staticmethod
    def _refresh(worker: Worker, info: pb.WorkerInfo) -> None:
        """The worker itself is the better witness of its epoch and state while we talk to it."""
        if worker.session is None or info.epoch > worker.info.epoch:
            worker.info.CopyFrom(info)

    def on_status(self, worker: Worker, status: pb.WorkerStatus) -> None:
        worker.status = status
        worker.info.epoch = status.epoch
        worker.info.state = status.state
        del worker.info.roles[:]
        worker.info.roles.extend(status.roles)

    def holding(self, role: Role) -> list[Worker]:
        """Workers that can be asked for this role now, in a stable order."""
        return sorted((w for w in self if w.serving and w.has(role)), key=lambda w: w.id)

    @property
    def ready(self) -> bool:
        """A request would succeed: some prefill worker has a decode worker that reads its KV."""
        decoding = {bytes(w.info.schema_digest) for w in self.holding(Role.DECODE)}
        return any(bytes(w.info.schema_digest) in decoding for w in self.holding(Role.PREFILL))

    def views(self) -> list[WorkerView]:
        return [self._view(worker) for worker in sorted(self, key=lambda w: (w.info.name, w.id))]

    @staticmethod
    def _view(worker: Worker) -> WorkerView:
        return WorkerView(
            id=worker.id,
            name=worker.info.name,
            address=worker.info.address,
            roles=tuple(worker.info.roles),
            epoch=worker.info.epoch,
            state=worker.info.state,
            connected=worker.session is not None,
            free_columns=worker.status.free_columns,
            total_columns=worker.status.total_columns or worker.info.total_columns,
            running=worker.status.running,
            waiting=worker.status.waiting,
            attempts=worker.status.attempts,
            held=worker.status.held,
            lent_columns=worker.status.lent_columns,
            tasks=worker.status.tasks,
        )
