"""EncodeCore: embeddings as `EngineCore` does KV. Which images go through the tower next, and who holds what came out.

    AddEncode --(granted)--> PixelsNeeded -> EncodePixels -> in line -> a step -> Encoded, held until Release
        |- whole already --------------------------------------------> Encoded(cached)
        `- the same image is on its way -> waits for it -------------> Encoded(cached), or asks for its own pixels
    ReserveEmbeddings --(granted, all or nothing, in order)--> EmbeddingsReserved -> EmbeddingArrived*

Pure, as the other core is: no clock, no tensor, no thread; commands never arrive inside a step. It does not compute
(encoders) or move embeddings (roles).

No deadlock: encodes never wait for memory. Reservations do, and are granted in order; but one that asks for an image
that was encoded here goes first as soon as it fits, because what is held for it may be what the others wait for.
"""

from collections import deque
from dataclasses import dataclass
from enum import Enum, auto
from operator import attrgetter
from typing import Final

from engine.base import limits
from engine.commands import (
    EMBEDDINGS_FULL,
    AddEncode,
    EmbeddingArrived,
    EmbeddingsReserved,
    Encoded,
    EncodeItem,
    EncodeOutput,
    EncodePixels,
    EncodePlan,
    EngineCommand,
    EngineEvent,
    EngineLoad,
    PixelsNeeded,
    Release,
    ReserveEmbeddings,
    ResetCache,
    StepFailed,
)
from engine.embeddings import EmbeddingMemory
from engine.images import Picture
from engine.kv.allocator import ColumnAllocator
from engine.kv.arena import Arena
from engine.kv.schema import CacheSchema

STEP_RAISED: Final = "step_raised"


class Phase(Enum):
    """WANTING -> READY -> WHOLE | FAILED          FOLLOWING -> WHOLE | WANTING | FAILED"""

    WANTING = auto()  # has memory, and no pixels yet
    READY = auto()  # has pixels: in line for the tower, or in it
    FOLLOWING = auto()  # the same embedding is on its way, for somebody else; no memory of its own
    WHOLE = auto()
    FAILED = auto()  # has no memory any more


@dataclass(slots=True, eq=False)
class Encoding:
    """One `AddEncode`."""

    seq_id: int
    key: bytes
    features: int
    urgency: tuple[int, int]  # priority, arrival; lower goes first
    phase: Phase = Phase.WANTING
    picture: Picture | None = None

    @property
    def under_way(self) -> bool:
        return self.phase in (Phase.WANTING, Phase.READY)

    def is_same_image(self, other: "Encoding") -> bool:
        return (self.key, self.features) == (other.key, other.features)


class EncodeCore:
    """Sole owner of one embedding arena's columns. Every method is called by one thread (or at one virtual instant)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        batch_images: int = limits.ENCODE_BATCH_IMAGES
        batch_tokens: int = limits.ENCODE_BATCH_TOKENS
        lazy_tower: bool = False  # the encoder loads its tower with the first image, not before

        def __post_init__(self) -> None:
            if min(self.batch_images, self.batch_tokens) < 1:
                raise ValueError(f"batches must be >= 1: {self}")

    def __init__(self, config: Config, schema: CacheSchema, arena: Arena) -> None:
        self._config = config
        self._allocator = ColumnAllocator(arena.columns, layers=schema.kv.layers, heads=schema.kv.heads)
        self._memory = EmbeddingMemory(self._allocator, block_size=arena.block_size)
        self._encodings: dict[int, Encoding] = {}
        self._reserved: set[int] = set()  # sequences of granted reservations
        self._reservations: list[ReserveEmbeddings] = []  # that wait for memory, in order
        self._retries: deque[EncodeItem] = deque()  # images of a step that raised, to be run one by one
        self._events: list[EngineEvent] = []
        self._plan: EncodePlan | None = None
        self._planned_us = 0
        self._arrivals = 0
        self._steps = 0
        self._forwards = 0
        self._step_us = 0
        self._encode_us = 0

    # -- between steps -------------------------------------------------------------------------------------------------
    def handle(self, command: EngineCommand, now_us: int) -> list[EngineEvent]:
        """Carry out one command. A command for a sequence that is gone does nothing: its `Release` overtook it."""
        if self._plan is not None:
            raise RuntimeError(f"{type(command).__name__} during step {self._plan.step_id}")
        match command:
            case AddEncode():
                self._add(command)
            case EncodePixels():
                self._take_pixels(command)
            case ReserveEmbeddings():
                self._reserve(command)
            case EmbeddingArrived(seq_id=seq_id):
                self._memory.complete(seq_id)
            case Release(seq_id=seq_id):
                self._release(seq_id)
            case ResetCache():
                self._memory.reset_cache()
        self._grant_reservations()
        return self.take_events()

    def load(self) -> EngineLoad:
        """A snapshot; what is not about embeddings is left at its default."""
        return EngineLoad(
            steps=self._steps,
            step_ms=self._step_us / 1_000,
            idle=not self._seq_ids,
            encoding=len(self._in_phase(Phase.READY)),
            free_embedding_columns=self._allocator.available_columns,
            embedding_columns=self._allocator.total_columns,
            embedding_hits=self._memory.hits,
            vision_forwards=self._forwards,
            encode_us=self._encode_us,
            tower_loaded=bool(self._forwards) or not self._config.lazy_tower,
        )

    def take_events(self) -> list[EngineEvent]:
        """Events since the last call, in order."""
        events, self._events = self._events, []
        return events

    # -- a step --------------------------------------------------------------------------------------------------------
    def begin_step(self, now_us: int) -> EncodePlan | None:
        """The next images, or None: only a command can change that."""
        if self._plan is not None:
            raise RuntimeError(f"step {self._plan.step_id} is still under way")
        items = self._next_retry() or self._next_batch()
        if not items:
            return None
        self._steps += 1
        self._planned_us = now_us
        self._plan = EncodePlan(self._steps, items)
        return self._plan

    def layers_computed(self, layer_start: int, layer_end: int) -> list[EngineEvent]:
        """An embedding is final as a whole: there is nothing to stream."""
        return []

    def finish_step(self, output: EncodeOutput, now_us: int) -> list[EngineEvent]:
        plan = self._end_step(now_us)
        if output.step_id != plan.step_id:
            raise ValueError(f"output of step {output.step_id} during step {plan.step_id}")
        self._forwards += len(plan.items)
        self._encode_us = self._step_us // len(plan.items)
        for item in plan.items:
            encoding = self._encodings[item.seq_id]
            if reason := output.failed.get(item.seq_id):
                self._fail(encoding, reason)
            else:
                self._complete(encoding)
        self._grant_reservations()
        return self.take_events()

    def fail_step(self, now_us: int) -> list[EngineEvent]:
        """The encoder raised. Its images run one by one, so that only the culprit fails (reliability A19, I11)."""
        plan = self._end_step(now_us)
        if len(plan.items) > 1:
            self._retries.extend(plan.items)
        else:
            self._fail(self._encodings[plan.items[0].seq_id], STEP_RAISED)
        self._grant_reservations()
        return self.take_events()

    # -- self-check ----------------------------------------------------------------------------------------------------
    def check_integrity(self) -> None:
        """Raise if the books disagree (I3). Without sequences every column must be free or cached."""
        self._memory.check_integrity()
        with_memory = self._reserved | {
            seq_id for seq_id, e in self._encodings.items() if e.under_way or e.phase is Phase.WHOLE
        }
        if wrong := with_memory ^ set(self._allocator.owners):
            raise RuntimeError(f"sequences {sorted(wrong)}: who has columns is not who should")
        if any((e.picture is not None) != (e.phase is Phase.READY) for e in self._encodings.values()):
            raise RuntimeError("pixels are held for nothing, or are missing")
        leaders = [(e.key, e.features) for e in self._encodings.values() if e.under_way]
        followers = [(e.key, e.features) for e in self._in_phase(Phase.FOLLOWING)]
        if not set(followers) <= set(leaders):
            raise RuntimeError("somebody waits for an embedding that nobody computes")

    # -- encodes -------------------------------------------------------------------------------------------------------
    def _add(self, command: AddEncode) -> None:
        self._require_new(command.seq_id)
        if command.features < 1:
            raise ValueError("an embedding has at least one row")
        self._arrivals += 1
        urgency = (command.priority, self._arrivals)
        encoding = Encoding(command.seq_id, command.key, command.features, urgency)
        on_its_way = self._is_on_its_way(encoding)
        self._encodings[command.seq_id] = encoding
        if on_its_way:
            encoding.phase = Phase.FOLLOWING
        else:
            self._grant(encoding)

    def _grant(self, encoding: Encoding) -> None:
        grant = self._memory.grant(encoding.seq_id, encoding.key, encoding.features)
        if grant is None:
            self._fail(encoding, EMBEDDINGS_FULL)
        elif grant.cached:
            self._report_whole(encoding, cached=True)
        else:
            encoding.phase = Phase.WANTING
            self._events.append(PixelsNeeded(seq_id=encoding.seq_id))

    def _take_pixels(self, command: EncodePixels) -> None:
        encoding = self._encodings.get(command.seq_id)
        if encoding is not None and encoding.phase is Phase.WANTING:
            encoding.picture = command.picture
            encoding.phase = Phase.READY

    def _complete(self, encoding: Encoding) -> None:
        self._memory.complete(encoding.seq_id)
        self._report_whole(encoding, cached=False)
        for follower in self._followers(encoding):
            self._memory.share(encoding.seq_id, follower.seq_id)
            self._report_whole(follower, cached=True)

    def _report_whole(self, encoding: Encoding, *, cached: bool) -> None:
        encoding.phase = Phase.WHOLE
        encoding.picture = None
        table = self._memory.table(encoding.seq_id)
        self._events.append(Encoded(seq_id=encoding.seq_id, block_table=table, cached=cached))

    def _fail(self, encoding: Encoding, reason: str) -> None:
        """Its memory is free at once: nobody but the tower has touched it."""
        encoding.phase = Phase.FAILED
        encoding.picture = None
        self._memory.release(encoding.seq_id)
        self._events.append(StepFailed(seq_ids=(encoding.seq_id,), reason=reason))
        self._promote(encoding)

    def _promote(self, gone: Encoding) -> None:
        """Who waited for an embedding that will not come: the first asks for its own pixels, the others wait for it. Or
        each gets what has arrived from elsewhere since."""
        for follower in self._followers(gone):
            if follower.phase is Phase.FOLLOWING and not self._is_on_its_way(gone):
                self._grant(follower)

    def _is_on_its_way(self, encoding: Encoding) -> bool:
        return any(other.under_way and other.is_same_image(encoding) for other in self._encodings.values())

    def _followers(self, leader: Encoding) -> list[Encoding]:
        return [e for e in self._in_phase(Phase.FOLLOWING) if e.is_same_image(leader)]

    # -- reservations --------------------------------------------------------------------------------------------------
    def _reserve(self, command: ReserveEmbeddings) -> None:
        self._require_new(*(wish.seq_id for wish in command.wishes))
        if self._memory.could_hold(command.wishes):
            self._reservations.append(command)
            return
        seq_ids = tuple(wish.seq_id for wish in command.wishes)
        self._events.append(StepFailed(seq_ids=seq_ids, reason=EMBEDDINGS_FULL))

    def _grant_reservations(self) -> None:
        """In order. Behind one that has to wait, only those go that an encode holds memory for."""
        waiting: list[ReserveEmbeddings] = []
        for reservation in self._reservations:
            if (waiting and not self._encoded_here(reservation)) or not self._grant_reservation(reservation):
                waiting.append(reservation)
        self._reservations = waiting

    def _grant_reservation(self, reservation: ReserveEmbeddings) -> bool:
        grants = self._memory.grant_all(reservation.wishes)
        if grants is None:
            return False
        self._reserved.update(grant.seq_id for grant in grants)
        self._events.append(EmbeddingsReserved(grants=grants))
        return True

    def _encoded_here(self, reservation: ReserveEmbeddings) -> bool:
        whole = {encoding.key for encoding in self._in_phase(Phase.WHOLE)}
        return any(wish.key in whole for wish in reservation.wishes)

    # -- ends ----------------------------------------------------------------------------------------------------------
    def _release(self, seq_id: int) -> None:
        self._reservations = [r for r in self._reservations if all(wish.seq_id != seq_id for wish in r.wishes)]
        self._reserved.discard(seq_id)
        self._memory.release(seq_id)
        encoding = self._encodings.pop(seq_id, None)
        if encoding is not None and encoding.under_way:
            self._promote(encoding)

    # -- batches -------------------------------------------------------------------------------------------------------
    def _next_retry(self) -> tuple[EncodeItem, ...]:
        """The next image of a failed step, alone, unless it was released meanwhile."""
        while self._retries:
            item = self._retries.popleft()
            if item.seq_id in self._encodings:
                return (item,)
        return ()

    def _next_batch(self) -> tuple[EncodeItem, ...]:
        """The most urgent images, up to the first that is too many; one at least."""
        items: list[EncodeItem] = []
        tokens = 0
        for encoding in sorted(self._in_phase(Phase.READY), key=attrgetter("urgency"))[: self._config.batch_images]:
            tokens += encoding.features
            if items and tokens > self._config.batch_tokens:
                break
            items.append(self._item(encoding))
        return tuple(items)

    def _item(self, encoding: Encoding) -> EncodeItem:
        assert encoding.picture is not None
        table = self._memory.table(encoding.seq_id)
        return EncodeItem(encoding.seq_id, encoding.picture, encoding.features, table, encoding.key)

    def _end_step(self, now_us: int) -> EncodePlan:
        if self._plan is None:
            raise RuntimeError("no step is under way")
        plan, self._plan = self._plan, None
        self._step_us = now_us - self._planned_us
        return plan

    # -- who there is --------------------------------------------------------------------------------------------------
    def _in_phase(self, phase: Phase) -> list[Encoding]:
        """In order of arrival."""
        return [encoding for encoding in self._encodings.values() if encoding.phase is phase]

    @property
    def _seq_ids(self) -> set[int]:
        waiting = (wish.seq_id for reservation in self._reservations for wish in reservation.wishes)
        return {*self._encodings, *self._reserved, *waiting}

    def _require_new(self, *seq_ids: int) -> None:
        known = self._seq_ids
        for seq_id in seq_ids:
            if seq_id in known or seq_ids.count(seq_id) > 1:
                raise ValueError(f"sequence id {seq_id} is in use; ids are never reused")
