"""Admission: whether there is room for one more request. Whoever is refused is told what to change, or when to return.

Counted are choices, from submission to the one ending, since each is a decoding sequence; and prompt tokens that wait
in one of the router's lines, once per prompt. Of both a tenant has a share (`shares`). And whoever would wait longer
than they want to is told so at once: by then they could have gone elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from control_plane.router.dispatch.absences import Absences
from control_plane.router.dispatch.lines import Line, Lines
from control_plane.router.dispatch.live_request import LiveRequest
from control_plane.router.dispatch.service_time import ServiceTime
from control_plane.router.dispatch.workers import WorkerPool
from control_plane.router.requests import Submit
from control_plane.router.shares import Shares
from engine.base import limits
from engine.base.errors import InvalidArgument, ResourceExhausted, TriptychError, Unavailable


class Refusal(NamedTuple):
    """`reason` is a label: shutting_down, no_worker, too_long, images (too large), queue_full, share, queue_wait, slo,
    queue_timeout."""

    reason: str
    error: TriptychError


@dataclass(frozen=True, kw_only=True)
class Config:
    requests_max: int = limits.ROUTER_REQUESTS_MAX
    deadline_ms: int = limits.REQUEST_DEADLINE_MS
    queue_timeout_ms: int = limits.QUEUE_TIMEOUT_MS
    tenants: int = 1


class Admission:
    def __init__(self, config: Config, pool: WorkerPool, lines: Lines, absences: Absences) -> None:
        self._config = config
        self._pool = pool
        self._lines = lines
        self._absences = absences
        self.service_time = ServiceTime()
        self.open = True
        self.choices = Shares(config.requests_max, tenants=config.tenants)  # of requests that have not ended

    def refusal(self, requests: Sequence[LiveRequest]) -> Refusal | None:
        """Of all requests of one call, or of none."""
        if not self.open:
            return Refusal("shutting_down", Unavailable("shutting down", retry_after_ms=limits.RETRY_AFTER_MS))
        if (error := self._absences.error(requests[0])) is not None:
            return Refusal("no_worker", error)
        too_large = (refusal for each in requests if (refusal := self._too_long(each) or self._too_large(each)))
        return next(too_large, None) or self._too_many(requests) or self._too_slow(requests)

    def fits(self, group: LiveRequest) -> bool:
        """Whether decode workers, when empty, can grant the group at once. Else its choices must go one by one."""
        growth = min(group.submit.sampling.max_tokens, limits.GROWTH_RESERVE_TOKENS)
        return self._pool.holds_group(len(group.token_ids), len(group.choices), growth)

    def total_ms(self, submit: Submit) -> int:
        """How long it may take in all."""
        return min(submit.deadline_ms or self._config.deadline_ms, limits.REQUEST_DEADLINE_MS_MAX)

    def wait_ms(self, submit: Submit) -> int:
        """How long it may wait in the queue. A first token that comes after its client's objective is of no use, and
        what comes after the queue takes time too: else under overload everybody would be served a little too late."""
        if submit.ttft_slo_ms is None:
            return self._config.queue_timeout_ms
        left_ms = submit.ttft_slo_ms - self.service_time.bound_us // 1_000
        return min(self._config.queue_timeout_ms, max(0, left_ms))

    def waited_too_long(self, submit: Submit) -> Refusal:
        """Its bound may have moved since it was accepted; what the client is told is the present one."""
        text = f"was not started within {self.wait_ms(submit)} ms"
        return Refusal("queue_timeout", ResourceExhausted(text, retry_after_ms=limits.RETRY_AFTER_MS))

    def _too_long(self, request: LiveRequest) -> Refusal | None:
        tokens = len(request.token_ids) + request.submit.sampling.max_tokens
        tokens_max = self._pool.max_model_len
        if tokens <= tokens_max:
            return None
        text = f"prompt: {tokens} tokens with max_tokens; the workers' KV memory holds {tokens_max} of one request"
        return Refusal("too_long", InvalidArgument(text, field="prompt"))

    def _too_large(self, request: LiveRequest) -> Refusal | None:
        """Its images: no worker's memory would ever hold all of them."""
        features = [each.image.features for each in request.submit.images]
        if not features or self._pool.fits_images(features):
            return None
        text = f"messages: {len(features)} images of {sum(features)} tokens are more than the workers' memory holds"
        return Refusal("images", InvalidArgument(text, field="messages"))

    def _too_many(self, requests: Sequence[LiveRequest]) -> Refusal | None:
        """A call longer than all that may wait is taken when nobody waits: else it could never run."""
        tenant, (queue, _) = requests[0].submit.tenant, self._first_line(requests)
        tokens = sum(len(each.token_ids) for each in requests)
        choices = sum(each.submit.choices for each in requests)
        if not self.choices.fits(choices):
            limit = f"limit {self._config.requests_max}, each choice is one"
            return _exhausted("queue_full", f"too many requests in flight ({limit})")
        if queue and not queue.shares.fits(tokens):
            return _exhausted("queue_full", f"too many prompt tokens waiting (limit {queue.shares.capacity})")
        if not self.choices.allows(tenant, choices):
            return _exhausted("share", "too many requests in flight: no more are left for this tenant")
        if not queue.shares.allows(tenant, tokens):
            return _exhausted("share", "too many prompt tokens waiting: no more are left for this tenant")
        return None

    def _first_line(self, requests: Sequence[LiveRequest]) -> Line:
        """Where they would wait: the prompts of one call have images, all of them, or none."""
        return self._lines.ahead_of(requests[0])[0]

    def _too_slow(self, requests: Sequence[LiveRequest]) -> Refusal | None:
        """The last one waits for the others too."""
        *others, request = requests
        own_tokens = sum(len(each.token_ids) for each in others)
        waits_us = [_wait_us(line, request, own_tokens) for line in self._lines.ahead_of(request)]
        wait_us = sum(filter(None, waits_us))
        bound_ms = self.wait_ms(request.submit)
        if wait_us <= bound_ms * 1_000:
            return None
        retry_after_ms = wait_us // 1_000 - bound_ms
        if bound_ms < self._config.queue_timeout_ms:
            text = f"a first token within {request.submit.ttft_slo_ms} ms is not to be expected now"
            return _exhausted("slo", text, retry_after_ms=retry_after_ms)
        return _exhausted("queue_wait", f"would wait for longer than {bound_ms} ms", retry_after_ms=retry_after_ms)


def _wait_us(line: Line, request: LiveRequest, own_tokens: int) -> int | None:
    """In this line; None: not measured."""
    return line.drain_rate.wait_us(line.queue.tokens_before(request) + own_tokens)


def _exhausted(reason: str, text: str, *, retry_after_ms: int = 0) -> Refusal:
    """Nobody is sent away for longer than the queue's own timeout: much may change until then."""
    bounded_ms = min(max(retry_after_ms, limits.RETRY_AFTER_MS), limits.QUEUE_TIMEOUT_MS)
    return Refusal(reason, ResourceExhausted(text, retry_after_ms=bounded_ms))
