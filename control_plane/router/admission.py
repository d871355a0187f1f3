"""Admission: whether there is room for one more request. Whoever is refused is told what to change, or when to return.

Counted are choices, from submission to the one ending, since each is a decoding sequence; and prompt tokens that wait
for a prefill worker, once per prompt.
"""

from dataclasses import dataclass

from control_plane.router.absences import Absences
from control_plane.router.live_request import LiveRequest
from control_plane.router.request_queue import RequestQueue
from control_plane.router.workers import WorkerPool
from engine.base import limits
from engine.base.errors import InvalidArgument, ResourceExhausted, TriptychError, Unavailable


@dataclass(frozen=True, kw_only=True)
class Config:
    requests_max: int = limits.ROUTER_REQUESTS_MAX
    queued_tokens_max: int = limits.ROUTER_QUEUED_TOKENS_MAX


class Admission:
    def __init__(self, config: Config, pool: WorkerPool, queue: RequestQueue, absences: Absences) -> None:
        self._config = config
        self._pool = pool
        self._queue = queue
        self._absences = absences
        self.open = True
        self.choices = 0  # of accepted requests that have not ended

    def refusal(self, request: LiveRequest) -> TriptychError | None:
        if not self.open:
            return Unavailable("shutting down", retry_after_ms=limits.RETRY_AFTER_MS)
        return self._absences.error(request) or self._too_long(request) or self._too_many(request)

    def fits(self, group: LiveRequest) -> bool:
        """Whether decode workers, when empty, can grant the group at once. Else its choices must go one by one."""
        growth = min(group.submit.sampling.max_tokens, limits.GROWTH_RESERVE_TOKENS)
        return self._pool.holds_group(len(group.token_ids), len(group.choices), growth)

    def _too_long(self, request: LiveRequest) -> TriptychError | None:
        tokens = len(request.token_ids) + request.submit.sampling.max_tokens
        tokens_max = self._pool.max_model_len
        if tokens <= tokens_max:
            return None
        text = f"prompt: {tokens} tokens with max_tokens; the workers' KV memory holds {tokens_max} of one request"
        return InvalidArgument(text, field="prompt")

    def _too_many(self, request: LiveRequest) -> TriptychError | None:
        if self.choices + request.submit.choices > self._config.requests_max:
            text = f"too many requests in flight (limit {self._config.requests_max}, each choice is one)"
        elif self._queue.tokens + len(request.token_ids) > self._config.queued_tokens_max and self._queue:
            text = f"too many prompt tokens waiting (limit {self._config.queued_tokens_max})"
        else:
            return None
        return ResourceExhausted(text, retry_after_ms=limits.RETRY_AFTER_MS)
