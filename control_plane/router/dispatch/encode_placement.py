"""EncodePlacement: which worker encodes an image.

Load and reuse are weighed in microseconds, because what is ahead may be images, prompts, or both:

    done = image tokens ahead there * time of one + prompt tokens ahead there * time of one + its own image

Tokens are what this router itself has sent and not yet seen finished; times are the worker's own, as its status has
them. An image that the worker has encoded before costs nothing (a guess, as in `prefix_index`). Encode workers come
first; where there is none, prefill workers encode.

`choose_encode` is a pure function of candidates, and `EncodePlacer` finds them. Every choice names its reason, which
becomes a metric.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from control_plane.router.dispatch.embedding_index import EmbeddingIndex
from control_plane.router.dispatch.live_request import LiveRequest
from control_plane.router.dispatch.workers import Worker, WorkerPool
from engine.base import limits
from engine.images import PromptImage
from engine.types import Role


@dataclass(frozen=True, slots=True)
class EncodeCandidate:
    """A worker that could encode an image. `own_us` is 0 where the embedding is; without `room` it must wait."""

    worker: Worker
    ahead_us: int
    own_us: int
    room: bool = True

    @property
    def done_us(self) -> int:
        return self.ahead_us + self.own_us


@dataclass(frozen=True, slots=True)
class EncodeChoice:
    worker: Worker
    reason: str  # "only" | "cached": by load it were another | "least_work" | "prefill_idle" | "no_encoder"
    missing_tokens: int = 0


# -- the rule ----------------------------------------------------------------------------------------------------------
def choose_encode(
    candidates: Sequence[EncodeCandidate], *, avoid: str = ""
) -> tuple[EncodeCandidate, str] | tuple[None, str]:
    """Where the image is done first, and why there; None: not now. `avoid` has just failed: the last resort.

    A prefill worker that has its tower loaded takes one from the encode workers only if it is done in a fraction of
    their time: text waits there.
    """
    encoders = [c for c in candidates if c.worker.has(Role.ENCODE)]
    others = [c for c in candidates if not c.worker.has(Role.ENCODE)]
    if not encoders:
        return _if_room(_first_done(others, avoid), "no_encoder")
    best = _first_done(encoders, avoid)
    assert best is not None
    idle = _first_done([c for c in others if c.room and c.worker.status.tower_loaded], avoid)
    if idle is not None and idle.done_us < limits.ENCODE_AT_PREFILL_FRACTION * best.done_us:
        return idle, "prefill_idle"
    return _if_room(best, _reason(best, encoders, avoid))


def _first_done(candidates: Sequence[EncodeCandidate], avoid: str) -> EncodeCandidate | None:
    """Of those with room, if there are any."""

    def cost(candidate: EncodeCandidate) -> tuple[bool, bool, int, str]:
        worker_id = candidate.worker.id
        return not candidate.room, worker_id == avoid, candidate.done_us, worker_id

    return min(candidates, key=cost, default=None)


def _reason(chosen: EncodeCandidate, candidates: Sequence[EncodeCandidate], avoid: str) -> str:
    if len(candidates) == 1:
        return "only"
    own_us = max(c.own_us for c in candidates)
    by_load = _first_done([EncodeCandidate(c.worker, c.ahead_us, own_us, c.room) for c in candidates], avoid)
    return "least_work" if by_load is not None and by_load.worker is chosen.worker else "cached"


def _if_room(candidate: EncodeCandidate | None, reason: str) -> tuple[EncodeCandidate, str] | tuple[None, str]:
    return (None, "") if candidate is None or not candidate.room else (candidate, reason)


# -- what a worker would have to do ------------------------------------------------------------------------------------
@dataclass(slots=True)
class _Draft:
    """A worker, and what a request that is being placed has put there so far."""

    worker: Worker
    tokens: int = 0
    columns: int = 0
    keys: set[bytes] = field(default_factory=set)

    def add(self, image: PromptImage, missing_tokens: int) -> None:
        self.tokens += missing_tokens
        self.columns += self.worker.columns_for(image.features)
        self.keys.add(image.key)

    def candidate(self, image: PromptImage, *, held: bool) -> EncodeCandidate:
        held = held or image.key in self.keys
        own_us = 0 if held else round(image.features * _token_us(self.worker))
        return EncodeCandidate(self.worker, self._ahead_us, own_us, self._has_room(image))

    @property
    def _ahead_us(self) -> int:
        tokens = self.worker.images.ahead_tokens + self.tokens
        return round(tokens * _token_us(self.worker)) + _prompts_us(self.worker) + _tower_us(self.worker)

    def _has_room(self, image: PromptImage) -> bool:
        """Memory for this one too, and few enough tokens before the request: at a worker nobody can overtake them."""
        load = self.worker.images
        columns = load.held_columns + self.columns + self.worker.columns_for(image.features)
        soon = load.ahead_tokens < limits.ENCODE_AHEAD_TOKENS and not load.full
        return soon and columns <= self.worker.encode_columns


def _token_us(worker: Worker) -> float:
    """As long as the worker has not measured, all are alike."""
    if not worker.status.encode_us:
        return limits.ENCODE_IMAGE_US / limits.ENCODE_IMAGE_TOKENS
    return worker.status.encode_us / worker.images.mean_tokens


def _prompts_us(worker: Worker) -> int:
    steps = -(-worker.prefill_tokens // limits.STEP_TOKENS_MAX)
    return steps * (worker.status.step_us or limits.ENCODE_STEP_US)


def _tower_us(worker: Worker) -> int:
    """A worker that is there to encode has loaded its tower before it serves."""
    return 0 if worker.has(Role.ENCODE) or worker.status.tower_loaded else limits.TOWER_LOAD_US


# -- the router's ------------------------------------------------------------------------------------------------------
class EncodePlacer:
    """Finds workers for all images of a request, or for none."""

    def __init__(self, pool: WorkerPool, index: EmbeddingIndex) -> None:
        self._pool = pool
        self._index = index

    def choices(self, request: LiveRequest) -> list[EncodeChoice] | None:
        """One for each image, in order. None: they must wait."""
        drafts = {worker.id: _Draft(worker) for worker in self._able(request)}
        choices: list[EncodeChoice] = []
        for live in request.images:
            image = live.image
            candidates = [
                draft.candidate(image, held=self._index.holds(draft.worker, image)) for draft in drafts.values()
            ]
            chosen, reason = choose_encode(candidates, avoid=live.failed_at)
            if chosen is None:
                return None
            missing_tokens = image.features if chosen.own_us else 0
            drafts[chosen.worker.id].add(image, missing_tokens)
            choices.append(EncodeChoice(chosen.worker, reason, missing_tokens))
        return choices

    def could_hold(self, request: LiveRequest) -> bool:
        """If nobody else had any of the memory."""
        return self._pool.fits_images([live.image.features for live in request.images])

    @property
    def has_room_anywhere(self) -> bool:
        return any(worker.images.ahead_tokens < limits.ENCODE_AHEAD_TOKENS for worker in self._pool.encoders)

    @property
    def has_workers(self) -> bool:
        return bool(self._pool.encoders)

    def _able(self, request: LiveRequest) -> Iterable[Worker]:
        """Encoders whose embeddings some prefill worker reads that has memory for all of the request's."""
        features = [live.image.features for live in request.images]
        digests = {w.info.embedding_digest for w in self._pool.holding(Role.PREFILL) if w.fits_prompt(features)}
        able = [worker for worker in self._pool.encoders if worker.info.embedding_digest in digests]
        return [worker for worker in able if worker.info.embedding_digest == able[0].info.embedding_digest]
