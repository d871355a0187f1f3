"""DecodeMemory: what requests hold of the decode workers' KV memory, by estimate, and each tenant's share of it.

A request over its tenant's share waits in the router's queue. At a prefill worker it would hold memory and one of the
few places for prompts without a target, and a flood that waits for decode memory would stop everybody's prefill.

    placed        prompt + growth of each choice, as decode workers reserve it
    every growth  more: what has been decoded, and the next growth
    over          given back (of a group: each choice its part)

Not here: which decode worker (`placement`), and what is really free there, which only the worker knows and says
(`Reserved`, `Refused`).
"""

from collections.abc import Sequence

from control_plane.router.dispatch.live_request import LiveRequest
from control_plane.router.dispatch.workers import WorkerPool
from control_plane.router.shares import Shares
from engine.base import limits


class DecodeMemory:
    def __init__(self, pool: WorkerPool, *, tenants: int) -> None:
        self._pool = pool
        self._several = tenants > 1
        self.shares = Shares(0, tenants=tenants)

    def holds_back(self, request: LiveRequest) -> bool:
        """Whether it must wait for others of its tenant, or of all. Without other tenants it harms nobody by waiting
        where its prompt is computed."""
        if not self._several or not (tokens := _tokens(request)) or not (capacity := self._pool.decode_tokens):
            return False
        self.shares.capacity = capacity
        tenant = request.submit.tenant
        within = self.shares.fits(tokens) and self.shares.allows(tenant, tokens)
        return self.shares.held(tenant) > 0 and not within

    def take(self, request: LiveRequest) -> None:
        self._add(request, _tokens(request))

    def grow(self, request: LiveRequest) -> None:
        """It has decoded as much as was reserved."""
        left = request.submit.sampling.max_tokens - len(request.emitted)
        self._add(request, max(0, min(left, limits.GROWTH_RESERVE_TOKENS)))

    def divide(self, group: LiveRequest, children: Sequence[LiveRequest]) -> None:
        """Each choice goes on for itself."""
        for left, child in zip(range(len(children), 0, -1), children, strict=True):
            child.decode_tokens = group.decode_tokens // left
            group.decode_tokens -= child.decode_tokens

    def give(self, request: LiveRequest) -> None:
        """Idempotent."""
        self.shares.give(request.submit.tenant, request.decode_tokens)
        request.decode_tokens = 0

    def _add(self, request: LiveRequest, tokens: int) -> None:
        self.shares.take(request.submit.tenant, tokens)
        request.decode_tokens += tokens


def _tokens(request: LiveRequest) -> int:
    if not request.needs_target:
        return 0
    left = request.submit.sampling.max_tokens - len(request.emitted)
    return len(request.token_ids) + len(request.choices) * min(left, limits.GROWTH_RESERVE_TOKENS)
