"""History: what clients asked for and were given, with virtual times; and the promises checked against it.

I1  one ending for each accepted request, nothing after it, and an ending that fits what was done to the request
I2  tokens are a prefix of the one right sequence; all of it where the ending says "finished"
I4  the same prompt of two tenants has different tokens (the oracle mixes the tenant in), so a block that was
    reused across tenants shows up under I2
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from control_plane.router.requests import Ended, Submit, TokensReady
from engine.base.errors import Status
from engine.executors.oracle import OracleExecutor, reference_tokens
from engine.types import FinishReason, SamplingParams

LATE_US = 10_000_000  # how much later than its deadline a request may end: a router that is frozen is late


class Violation(AssertionError):
    """A promise was broken."""


@dataclass(slots=True)
class Call:
    """One request, as its client sees it."""

    submit: Submit
    invoked_us: int
    cancelled_us: int | None = None
    lost_us: int | None = None  # the router died: the connection broke
    tokens: list[int] = field(default_factory=list)
    ended: Ended | None = None
    ended_us: int = 0

    @property
    def open(self) -> bool:
        return self.ended is None and self.lost_us is None

    def describe(self) -> str:
        submit = self.submit
        asked = f"{len(submit.token_ids)} -> {submit.sampling.max_tokens} tokens, tenant {submit.tenant!r}"
        return f"request {submit.key} ({asked}, invoked at {self.invoked_us}, {len(self.tokens)} received)"


class History:
    """Filled by the simulation; `check` at the end."""

    def __init__(self, now_us: Callable[[], int], oracle: OracleExecutor.Config) -> None:
        self._now_us = now_us
        self._oracle = oracle
        self.calls: dict[int, Call] = {}

    # -- what happens --------------------------------------------------------------------------------------------------
    def invoke(self, submit: Submit) -> None:
        self.calls[submit.key] = Call(submit, self._now_us())

    def cancel(self, key: int) -> None:
        self.calls[key].cancelled_us = self._now_us()

    def router_died(self) -> None:
        for call in self.calls.values():
            if call.open:
                call.lost_us = self._now_us()

    def on_output(self, output: Any) -> None:
        call = self.calls[output.key]
        if not call.open:
            raise Violation(f"I1: {type(output).__name__} after the end of {call.describe()}")
        match output:
            case TokensReady(token_ids=token_ids):
                call.tokens.extend(token_ids)
            case Ended():
                call.ended, call.ended_us = output, self._now_us()

    @property
    def open_calls(self) -> list[Call]:
        return [call for call in self.calls.values() if call.open]

    # -- what must hold ------------------------------------------------------------------------------------------------
    def check(self) -> None:
        for call in self.calls.values():
            self._check_tokens(call)
            if call.ended is not None:
                self._check_ending(call, call.ended)
        self._check_tenants()

    def _check_tokens(self, call: Call) -> None:
        right, reason = expected(call.submit, self._oracle)
        if tuple(call.tokens) != right[: len(call.tokens)]:
            raise Violation(f"I2: wrong tokens for {call.describe()}: {call.tokens}, not {list(right)}")
        finish = call.ended.finish if call.ended is not None else None
        if finish is not None and (len(call.tokens), finish) != (len(right), reason):
            raise Violation(
                f"I2: {call.describe()} finished by {finish.value}; {len(right)} by {reason.value} are right"
            )

    def _check_ending(self, call: Call, ended: Ended) -> None:
        if (ended.finish is None) == (ended.error is None):
            raise Violation(f"I1: {call.describe()} ended with {ended.finish} and {ended.error}")
        deadline_us = call.invoked_us + call.submit.deadline_ms * 1_000
        if ended.error is not None:
            allowed = {
                Status.CANCELLED: call.cancelled_us is not None,
                Status.INTERNAL: self._oracle.poison_token in call.submit.token_ids,
                Status.DEADLINE_EXCEEDED: bool(call.submit.deadline_ms) and call.ended_us >= deadline_us,
            }
            if not allowed.get(ended.error.status, False):
                raise Violation(f"{call.describe()} failed without a cause: {ended.error!r}")
        if call.submit.deadline_ms and call.ended_us > deadline_us + LATE_US:
            raise Violation(f"I1: {call.describe()} ended {call.ended_us - deadline_us} us after its deadline")

    def _check_tenants(self) -> None:
        """Else the oracle would be blind to what I4 forbids."""
        by_prompt: dict[tuple[Any, ...], dict[str, tuple[int, ...]]] = {}
        for call in self.calls.values():
            key = (call.submit.token_ids, call.submit.sampling)
            by_prompt.setdefault(key, {})[call.submit.tenant] = expected(call.submit, self._oracle)[0]
        for outputs in by_prompt.values():
            if min(map(len, outputs.values())) >= 3 and len(set(outputs.values())) < len(outputs):
                raise Violation("I4: two tenants' outputs are equal: the oracle does not see the tenant")

    # -- figures -------------------------------------------------------------------------------------------------------
    def figures(self) -> Counter[str]:
        figures = Counter(requests=len(self.calls), tokens=sum(len(call.tokens) for call in self.calls.values()))
        for call in self.calls.values():
            figures[f"ended {_outcome(call.ended)}"] += 1
            figures["placements lost"] += max(0, call.ended.stats.attempts - 1) if call.ended is not None else 0
        return figures


def _outcome(ended: Ended | None) -> str:
    if ended is None:
        return "lost"  # with its router
    return ended.error.status.value if ended.error is not None else str(ended.finish)


def expected(submit: Submit, oracle: OracleExecutor.Config) -> tuple[tuple[int, ...], FinishReason]:
    """The one right output: the reference, cut behind the first stop token. Poison has none."""
    if oracle.poison_token in submit.token_ids:
        return (), FinishReason.LENGTH
    return _expected(submit.token_ids, submit.tenant, submit.sampling, oracle)


@lru_cache(maxsize=256)
def _expected(
    prompt: Sequence[int], tenant: str, sampling: SamplingParams, oracle: OracleExecutor.Config
) -> tuple[tuple[int, ...], FinishReason]:
    tokens = reference_tokens(prompt, tenant, sampling, sampling.max_tokens, oracle)
    for index, token in enumerate(tokens):
        if token in sampling.stop_token_ids:
            return tokens[: index + 1], FinishReason.STOP
    return tokens, FinishReason.LENGTH
