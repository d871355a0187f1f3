"""Placement: which worker takes a prefill, which one receives its KV.

Load and reuse are weighed in one unit, tokens: those that are ahead of a request at a worker, and those of its own that
the worker does not have. Load is what this router itself has sent and not yet seen finished; a status is a heartbeat
old, and a burst placed on it would all land on one worker. What a worker has is the prefix index's estimate.

`choose_*` are pure functions of candidates; `Placer` finds the candidates and tells the index what went where. Every
choice names its reason, which becomes a metric.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from control_plane.router.dispatch.codec_choice import Wish, choose_encoding
from control_plane.router.dispatch.embedding_index import EmbeddingIndex
from control_plane.router.dispatch.live_request import LiveRequest
from control_plane.router.dispatch.prefix_index import CacheKind, PrefixIndex
from control_plane.router.dispatch.workers import Worker, WorkerPool
from engine.base import limits
from engine.types import Role
from kv_transfer.codecs import EXACT, Encoding


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that could take a request, and how many of its tokens the worker would have to compute, or be sent."""

    worker: Worker
    missing_tokens: int
    image_tokens: int = 0  # of embeddings that it would have to be sent first


@dataclass(frozen=True, slots=True)
class Choice:
    worker: Worker
    reason: str  # "only" | "local" | "prefix", "images": without these it were another | "least_loaded"
    missing_tokens: int = 0


# -- the rules ---------------------------------------------------------------------------------------------------------
def choose_prefill(candidates: Sequence[Candidate], *, avoid: str = "") -> Choice | None:
    """Where the fewest tokens are to be computed, or embeddings to be sent, before its own last one; `avoid` has just
    failed: the last resort."""
    if not candidates:
        return None

    def cost(candidate: Candidate, missing_tokens: int) -> tuple[bool, int, int, str]:
        worker = candidate.worker
        return worker.id == avoid, worker.prefill_tokens + missing_tokens, worker.status.running, worker.id

    chosen = min(candidates, key=lambda c: cost(c, c.missing_tokens + c.image_tokens))
    if chosen is not min(candidates, key=lambda c: cost(c, c.missing_tokens)):
        return Choice(chosen.worker, "images", chosen.missing_tokens)
    least_loaded = min(candidates, key=lambda c: cost(c, 0))
    return _choice(chosen, least_loaded, candidates)


def choose_decode(candidates: Sequence[Candidate], *, source: Worker, refused: Collection[str]) -> Choice | None:
    """Where the KV goes. Staying costs nothing and wins whenever the source decodes too and has not refused.

    Else where KV to be sent plus sequences that run there, at DECODE_LOAD_TOKENS each, is least. A worker with half of
    another one's columns is as loaded by half of its sequences.
    """
    candidates = [c for c in candidates if c.worker.id not in refused]
    if not candidates:
        return None
    if any(c.worker.id == source.id for c in candidates):
        return Choice(source, "local")
    columns_max = max(c.worker.info.total_columns for c in candidates)

    def cost(candidate: Candidate, missing_tokens: int) -> tuple[float, int, str]:
        worker = candidate.worker
        sequences = worker.bound * columns_max / max(1, worker.info.total_columns)
        return missing_tokens + limits.DECODE_LOAD_TOKENS * sequences, worker.bound, worker.id

    chosen = min(candidates, key=lambda c: cost(c, c.missing_tokens))
    least_loaded = min(candidates, key=lambda c: cost(c, 0))
    return _choice(chosen, least_loaded, candidates)


def _choice(chosen: Candidate, least_loaded: Candidate, candidates: Sequence[Candidate]) -> Choice:
    reason = "only" if len(candidates) == 1 else "least_loaded" if chosen is least_loaded else "prefix"
    return Choice(chosen.worker, reason, chosen.missing_tokens)


# -- the router's ------------------------------------------------------------------------------------------------------
class Placer:
    """Finds a request's next worker; remembers which blocks it sent to which."""

    def __init__(
        self,
        pool: WorkerPool,
        default: Wish,
        *,
        embeddings: EmbeddingIndex | None = None,
        prefill_ahead_tokens: int = limits.PREFILL_AHEAD_TOKENS,
    ) -> None:
        self._pool = pool
        self._index = PrefixIndex()
        self._embeddings = embeddings or EmbeddingIndex()
        self._default = default
        self._prefill_ahead_tokens = prefill_ahead_tokens

    def prefill(self, request: LiveRequest) -> Choice | None:
        """The best worker, with room or without: one that has most of a prompt is worth waiting for."""
        tokens = len(request.token_ids)
        workers = [worker for worker in self._pool.holding(Role.PREFILL) if _reads_images(worker, request)]
        candidates = [self._candidate(worker, request, tokens, EXACT) for worker in workers]
        if request.images:
            candidates = [replace(c, image_tokens=self._image_tokens(c.worker, request)) for c in candidates]
        return choose_prefill(candidates, avoid=request.failed_at)

    def has_room(self, worker: Worker, *, urgent: bool) -> bool:
        """Whether it is given another prompt. What it does not need yet waits here, where others can come first."""
        return worker.has_room(urgent=urgent, ahead_tokens=self._prefill_ahead_tokens)

    def has_room_anywhere(self, *, urgent: bool) -> bool:
        workers = (worker for worker in self._pool if worker.serving and worker.has(Role.PREFILL))
        return any(self.has_room(worker, urgent=urgent) for worker in workers)

    @property
    def has_prefill_workers(self) -> bool:
        return bool(self._pool.holding(Role.PREFILL))

    def decode(self, request: LiveRequest, source: Worker, refused: Collection[str]) -> Choice | None:
        """Where nobody decodes, a source that drains finishes what it has begun: its drain ends no sooner by waiting
        for others."""
        workers = self._pool.holding(Role.DECODE) or ([source] if source.has(Role.DECODE) else [])
        readers = [w for w in workers if w.info.schema_digest == source.info.schema_digest]
        candidates = [
            self._candidate(w, request, request.context_tokens, self.encoding(request, source, w).identity)
            for w in readers
        ]
        return choose_decode(candidates, source=source, refused=refused)

    def encoding(self, request: LiveRequest, source: Worker, target: Worker) -> Encoding:
        """What its KV goes through from one to the other. KV that moves on is what its first encoding has made it,
        though it travels raw (DESIGN 2.7)."""
        if request.moving and request.encoding is not None:
            return request.encoding
        wish = Wish(request.submit.codec, request.submit.kl_budget)
        return choose_encoding(wish.or_else(self._default), source.offers, target.offers)

    # -- what the index is told ----------------------------------------------------------------------------------------
    def prompt_sent(self, request: LiveRequest, worker: Worker) -> None:
        """At once, not when it is computed: the next request of a burst shall follow, and will find it there."""
        hashes = request.submission.hashes.of(_kind(worker, EXACT))
        self._index.note(worker.id, hashes, columns=worker.info.total_columns)

    def prompt_received(self, request: LiveRequest, worker: Worker) -> None:
        hashes = request.submission.hashes.of(_kind(worker, request.identity))
        self._index.note(worker.id, hashes, columns=worker.info.total_columns)

    def output_ended(self, request: LiveRequest) -> None:
        """What it decoded stays there: the next turn of a conversation begins with it. Of the last token there is no
        KV."""
        worker = self._pool.get(request.target.worker) if request.target is not None else None
        if worker is not None:
            kind = _kind(worker, request.identity)
            hashes = request.submission.hashes.extended(kind, request.emitted[:-1])
            self._index.note(worker.id, hashes, columns=worker.info.total_columns)

    def forget(self, worker: Worker) -> None:
        self._index.forget(worker.id)

    def forget_all(self) -> None:
        self._index.clear()

    # -- inside --------------------------------------------------------------------------------------------------------
    def _candidate(self, worker: Worker, request: LiveRequest, tokens: int, identity: str) -> Candidate:
        """At least one token is always computed: a whole prompt from the cache has no logits."""
        held = max(self._held_tokens(worker, request, each) for each in {EXACT, identity})
        return Candidate(worker, max(1, tokens - held))

    def _image_tokens(self, worker: Worker, request: LiveRequest) -> int:
        missing = (live.image for live in request.images if not live.is_at(worker.id))
        return sum(image.features for image in missing if not self._embeddings.holds(worker, image))

    def _held_tokens(self, worker: Worker, request: LiveRequest, identity: str) -> int:
        kind = _kind(worker, identity)
        return kind.block_size * self._index.held_blocks(worker.id, request.submission.hashes.of(kind))


def _reads_images(worker: Worker, request: LiveRequest) -> bool:
    """Text anybody computes."""
    features = [live.image.features for live in request.images]
    return not features or (worker.fits_prompt(features) and worker.info.embedding_digest == request.embedding_digest)


def _kind(worker: Worker, identity: str) -> CacheKind:
    return CacheKind(bytes(worker.info.schema_digest), worker.info.block_size_tokens, identity)
