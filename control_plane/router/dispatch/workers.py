"""WorkerPool: what this router knows of the workers: the controller's table, its own sessions, their load.

Soft state only. The table says who exists; a session says who can be talked to; the newest status says how busy they
are. When the controller is away the table stays as it is. When a session is lost everything under it is void.

What workers count is added up here as it is reported, so that the sums outlive the workers and never go down.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from control_plane.router.requests import WorkerView
from control_plane.wire import session_pb2 as pb
from control_plane.wire.session import Session
from control_plane.wire.translate import offers_from_wire_untrusted
from engine.base import limits
from engine.base.errors import FrameError
from engine.base.machine import LinkName
from engine.types import Role
from kv_transfer.offers import Offers

SERVING = "SERVING"
LINK_PREFIX = "worker/"
OTHER_EVENTS = "other"


@dataclass(slots=True)
class Backlog:
    """Prompts sent to a worker and not yet computed, by our own count: a status is a heartbeat old."""

    prompts: dict[int, int] = field(default_factory=dict)  # request id -> tokens to compute, oldest first
    tokens: int = 0

    @property
    def tokens_behind_first(self) -> int:
        """How much is left for certain when the first is done. Of the first itself nobody knows how much is left."""
        return self.tokens - next(iter(self.prompts.values()), 0)

    def add(self, request_id: int, tokens: int) -> None:
        self.prompts[request_id] = tokens
        self.tokens += tokens

    def remove(self, request_id: int) -> None:
        """Also of one that is not here."""
        self.tokens -= self.prompts.pop(request_id, 0)

    def clear(self) -> None:
        self.prompts.clear()
        self.tokens = 0


@dataclass(slots=True)
class EncodeLoad:
    """Images of ours at a worker, by our own count."""

    ahead: dict[int, int] = field(default_factory=dict)  # image id -> tokens that are not encoded yet, oldest first
    held: dict[int, int] = field(default_factory=dict)  # image id -> columns of its embedding, encoded or not
    ahead_tokens: int = 0
    held_columns: int = 0
    mean_tokens: float = float(limits.ENCODE_IMAGE_TOKENS)  # of an image, lately
    full: bool = False  # it has said so since its last status

    def add(self, image_id: int, tokens: int, columns: int) -> None:
        self.ahead[image_id], self.held[image_id] = tokens, columns
        self.ahead_tokens += tokens
        self.held_columns += columns

    def encoded(self, image_id: int) -> None:
        """Its embedding is held; the tower is free for others. Also of one that is not here."""
        tokens = self.ahead.pop(image_id, 0)
        self.ahead_tokens -= tokens
        if tokens:
            self.mean_tokens += (tokens - self.mean_tokens) / 8

    def remove(self, image_id: int) -> None:
        """Likewise."""
        self.ahead_tokens -= self.ahead.pop(image_id, 0)
        self.held_columns -= self.held.pop(image_id, 0)

    def clear(self) -> None:
        self.ahead.clear()
        self.held.clear()
        self.ahead_tokens = self.held_columns = 0


@dataclass(slots=True)
class Worker:
    """One worker process. `session` is None while there is no link to it.

    The table says which process should be at an address. `status` is empty until whoever answered the dial has said
    that it is the one.
    """

    info: pb.WorkerInfo
    session: Session | None = None
    redial_us: int | None = 0  # None while a link is open or being dialled
    listed: bool = True  # in the newest table
    offers: Offers = field(default_factory=dict)  # codecs that it reads and writes
    status: pb.WorkerStatus = field(default_factory=pb.WorkerStatus)
    events: dict[str, int] = field(default_factory=dict)  # its own counts so far; they outlive a session
    prefix_cache: dict[str, int] = field(default_factory=dict)  # likewise
    backlog: Backlog = field(default_factory=Backlog)  # of all prompts
    urgent: Backlog = field(default_factory=Backlog)  # of those among them that go before the others
    bound: int = 0  # reservations and decodes of ours there
    images: EncodeLoad = field(default_factory=EncodeLoad)

    @property
    def id(self) -> str:
        return self.info.worker

    @property
    def link(self) -> LinkName:
        return LINK_PREFIX + self.info.worker

    @property
    def prefill_tokens(self) -> int:
        return self.backlog.tokens

    def has_room(self, *, urgent: bool, ahead_tokens: int) -> bool:
        """Whether it would run dry without another prompt soon; an urgent one does not see those that it passes."""
        return (self.urgent if urgent else self.backlog).tokens_behind_first < ahead_tokens

    @property
    def serving(self) -> bool:
        return self.session is not None and self.status.state == SERVING

    def has(self, role: Role) -> bool:
        return role.value in self.info.roles

    # -- images --------------------------------------------------------------------------------------------------------
    @property
    def sees(self) -> bool:
        """It has memory for embeddings."""
        return bool(self.info.embedding_digest) and self.info.embedding_columns > 0

    @property
    def encode_columns(self) -> int:
        """What may be held there for encodes. Half where prompts are computed too: embeddings held at two workers, each
        for a prompt that waits for memory at the other one, would hold each other up for ever."""
        columns = self.info.embedding_columns
        return columns // 2 if self.has(Role.PREFILL) else columns

    @property
    def prompt_columns(self) -> int:
        """What one prompt's images may hold there."""
        return self.info.embedding_columns - self.encode_columns

    def fits_prompt(self, features: Sequence[int]) -> bool:
        """It has memory for so many images of one prompt, once others have left."""
        return self.sees and sum(map(self.columns_for, features)) <= self.prompt_columns

    def columns_for(self, features: int) -> int:
        return -(-features // (self.info.block_size_tokens or limits.BLOCK_SIZE_TOKENS))


class WorkerPool:
    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}
        self._events: Counter[str] = Counter()
        self.prefix_cache: Counter[str] = Counter()  # "hits" and "queries", in tokens, of all workers so far
        self.term = 0

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def get(self, worker_id: str) -> Worker | None:
        return self._workers.get(worker_id)

    def by_link(self, link: LinkName) -> Worker | None:
        return self._workers.get(link.removeprefix(LINK_PREFIX))

    def adopt(self, table: pb.WorkerTable) -> bool:
        """Take the controller's table, unless its term is older than one already obeyed. Workers that it no longer
        lists are forgotten once they have no link and none is being dialled: the link, not the table, says whether
        one is alive."""
        if table.term < self.term:
            return False
        self.term = table.term
        listed = {info.worker: info for info in table.workers[: limits.WORKERS_MAX]}
        for worker_id, info in listed.items():
            known = self._workers.get(worker_id)
            if known is None:
                self._workers[worker_id] = Worker(info, offers=_offers_untrusted(info))
            else:
                self._refresh(known, info)
        for worker in tuple(self):
            worker.listed = worker.id in listed
            if worker.redial_us is not None:
                self.forget_unlisted(worker)
        return True

    def forget_unlisted(self, worker: Worker) -> None:
        """Without a link, and without the controller's word that it exists, a worker is nobody."""
        if not worker.listed:
            del self._workers[worker.id]

    @staticmethod
    def _refresh(worker: Worker, info: pb.WorkerInfo) -> None:
        """The worker itself is the better witness of its epoch and state while we talk to it."""
        if worker.session is None or info.epoch > worker.info.epoch:
            if info.offers != worker.info.offers:  # tables come every second, other offers never in a worker's life
                worker.offers = _offers_untrusted(info)
            worker.info.CopyFrom(info)

    def on_link_up(self, worker: Worker) -> None:
        worker.session = Session()
        worker.status = pb.WorkerStatus()

    def on_status_untrusted(self, worker: Worker, status: pb.WorkerStatus) -> None:
        """Raises FrameError: another process has that address now (reliability lesson 8: identity is the id)."""
        if status.worker != worker.id:
            raise FrameError("identity")
        worker.status = status
        worker.images.full = False
        self._count(worker, dict(status.counters))
        looked_up = {"hits": status.prefix_hit_tokens, "queries": status.prefix_query_tokens}
        for name, count in looked_up.items():
            self.prefix_cache[name] += _growth(worker.prefix_cache.get(name, 0), count)
        worker.prefix_cache = looked_up
        worker.info.epoch = status.epoch
        worker.info.state = status.state
        del worker.info.roles[:]
        worker.info.roles.extend(status.roles)

    def _count(self, worker: Worker, events: dict[str, int]) -> None:
        for event, count in events.items():
            self._events[self._event_name(event)] += _growth(worker.events.get(event, 0), count)
        worker.events = events

    def _event_name(self, event: str) -> str:
        """Names are the workers': a worker that invents new ones all the time must not fill our memory."""
        event = event[: limits.METRIC_LABEL_CHARACTERS_MAX]
        known = event in self._events or len(self._events) < limits.METRIC_LABEL_VALUES_MAX
        return event if known else OTHER_EVENTS

    @property
    def events(self) -> Mapping[str, int]:
        """What all workers that this router ever talked to have counted, by event."""
        return self._events

    def holding(self, role: Role) -> list[Worker]:
        """Workers that can be asked for this role now, in a stable order."""
        return sorted((w for w in self if w.serving and w.has(role)), key=lambda w: w.id)

    @property
    def encoders(self) -> list[Worker]:
        """Workers that can be asked to encode an image now: the encode workers, then those that could do it too."""
        able = [*self.holding(Role.ENCODE), *self.holding(Role.PREFILL)]
        return list({worker.id: worker for worker in able if worker.sees}.values())

    def able(self, role: Role) -> bool:
        """Whether anybody can be asked for this, by role or otherwise."""
        return bool(self.encoders if role is Role.ENCODE else self.holding(role))

    def fits_images(self, features: Sequence[int]) -> bool:
        """Whether some workers, when idle, have memory for all of these embeddings: one to encode them, and one to
        compute their prompt. If one can hold all, so can any number of them together. Where nobody sees, one may come
        who has."""
        encoders, readers = self.encoders, [worker for worker in self.holding(Role.PREFILL) if worker.sees]
        encode = any(sum(map(w.columns_for, features)) <= w.encode_columns for w in encoders)
        return not (encoders and readers) or (encode and any(w.fits_prompt(features) for w in readers))

    @property
    def max_model_len(self) -> int:
        """Tokens that one request may have at any worker it could be placed at. Zero in the table: not said."""
        computing = (w for w in self if w.has(Role.PREFILL) or w.has(Role.DECODE))
        told = (w.info.max_model_len for w in computing if w.serving and w.info.max_model_len)
        return min(told, default=limits.PROMPT_TOKENS_MAX)

    @property
    def decode_tokens(self) -> int:
        """KV memory of all decode workers that can be asked now. Zero: they have not said."""
        return sum(w.info.total_columns * w.info.block_size_tokens for w in self if w.serving and w.has(Role.DECODE))

    def holds_group(self, prompt_tokens: int, choices: int, growth_tokens: int) -> bool:
        """Whether every decode worker, when empty, has room for one prompt and what each choice adds to it: a copy of
        the prompt's last block, and growth."""
        return all(
            prompt_tokens + choices * (w.info.block_size_tokens + growth_tokens)
            <= w.info.total_columns * w.info.block_size_tokens
            for w in self.holding(Role.DECODE)
            if w.info.block_size_tokens
        )

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
            cached_columns=worker.status.cached_columns,
            encoding=worker.status.encoding,
            free_embedding_columns=worker.status.free_embedding_columns,
            embedding_columns=worker.status.embedding_columns,
        )


def _offers_untrusted(info: pb.WorkerInfo) -> Offers:
    """None from a worker whose offers nobody can read: its KV travels raw, and the others are not its fault."""
    try:
        return offers_from_wire_untrusted(info.offers)
    except FrameError:
        return {}


def _growth(before: int, count: int) -> int:
    """What is new in a count. One below the one before began again at zero."""
    return count - before if count >= before else count
