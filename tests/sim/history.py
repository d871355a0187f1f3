"""History: what clients asked for and were given, with virtual times; and the promises checked against it.

I1  one ending for each accepted request, nothing after it, and an ending that fits what was done to the request
I2  tokens of each choice are a prefix of the one right sequence, with the right log-probabilities; all of it where it
    says "finished". Scores of the prompt are right, and complete before the first token
I4  the same prompt of two tenants has different tokens (the oracle mixes the tenant in), so a block that was
    reused across tenants shows up under I2. An image's embedding is cached for the tenant that has shown it
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from control_plane.router.requests import Ended, PromptScored, Submit, TokensReady
from engine.base.errors import Status
from engine.commands import Sampled
from engine.executors.oracle import OracleExecutor, SeenImage, reference_output, reference_prompt_logprobs
from engine.images import Picture
from engine.types import FinishReason, SamplingParams, TokenLogprobs

LATE_US = 10_000_000  # how much later than its deadline a request may end: a router that is frozen is late


class Violation(AssertionError):
    """A promise was broken."""


@dataclass(slots=True)
class Output:
    """What the client has of one choice."""

    picks: list[Sampled] = field(default_factory=list)
    finish: FinishReason | None = None
    stop_after: int = 0  # tokens; 0: never
    stopped: bool = False  # by the client, as one that found a stop string


@dataclass(slots=True)
class Call:
    """One request, as its client sees it."""

    submit: Submit
    invoked_us: int
    cancelled_us: int | None = None
    lost_us: int | None = None  # the router died: the connection broke
    choices: list["Output"] = field(default_factory=list)
    scores: list[TokenLogprobs] = field(default_factory=list)
    ended: Ended | None = None
    ended_us: int = 0

    @property
    def received(self) -> int:
        return sum(len(output.picks) for output in self.choices)

    @property
    def open(self) -> bool:
        return self.ended is None and self.lost_us is None

    def describe(self) -> str:
        submit = self.submit
        asked = f"{len(submit.token_ids)} -> {submit.choices} x {submit.sampling.max_tokens} tokens"
        return (
            f"request {submit.key} ({asked}, tenant {submit.tenant!r}, at {self.invoked_us}, {self.received} received)"
        )


class History:
    """Filled by the simulation; `check` at the end."""

    def __init__(
        self,
        now_us: Callable[[], int],
        oracle: OracleExecutor.Config,
        stop: Callable[[int, int], None] = lambda key, choice: None,
    ) -> None:
        self._now_us = now_us
        self._oracle = oracle
        self._stop = stop
        self.calls: dict[int, Call] = {}

    # -- what happens --------------------------------------------------------------------------------------------------
    def invoke(self, submit: Submit, stops: Sequence[int] = ()) -> None:
        outputs = [Output(stop_after=after) for after in stops or (0,) * submit.choices]
        self.calls[submit.key] = Call(submit, self._now_us(), choices=outputs)

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
            case TokensReady():
                self._on_tokens(call, output)
            case PromptScored():
                if (output.start, call.received) != (1 + len(call.scores), 0):
                    raise Violation(f"I2: scores from {output.start} on, out of order, for {call.describe()}")
                call.scores.extend(output.logprobs)
            case Ended():
                call.ended, call.ended_us = output, self._now_us()

    def _on_tokens(self, call: Call, ready: TokensReady) -> None:
        output = call.choices[ready.choice]
        if output.finish is not None:
            raise Violation(f"I1: tokens after the end of choice {ready.choice} of {call.describe()}")
        logprobs = ready.logprobs or (None,) * len(ready.token_ids)
        output.picks.extend(map(Sampled, ready.token_ids, logprobs))
        output.finish = ready.finish
        if 0 < output.stop_after <= len(output.picks) and not output.stopped and ready.finish is None:
            output.stopped = True
            self._stop(call.submit.key, ready.choice)

    @property
    def open_calls(self) -> list[Call]:
        return [call for call in self.calls.values() if call.open]

    # -- what must hold ------------------------------------------------------------------------------------------------
    def check(self) -> None:
        for call in self.calls.values():
            self._check_scores(call)
            for choice in range(call.submit.choices):
                self._check_tokens(call, choice)
            if call.ended is not None:
                self._check_ending(call, call.ended)
        self._check_tenants()
        self._check_pictures()

    def _check_scores(self, call: Call) -> None:
        top = call.submit.sampling.prompt_logprobs
        if top is None:
            right: tuple[TokenLogprobs, ...] = ()
        else:
            right = reference_prompt_logprobs(
                call.submit.token_ids, call.submit.tenant, top, self._oracle, _seen(call.submit)
            )
        scores = tuple(call.scores)
        if scores != right[: len(scores)]:
            raise Violation(f"I2: wrong scores for {call.describe()}: {scores}, not {right}")
        finished = call.ended is not None and call.ended.finish is not None
        if (finished or call.received) and len(scores) != len(right):
            raise Violation(f"I2: {len(scores)} scores of {len(right)} for {call.describe()}")

    def _check_tokens(self, call: Call, choice: int) -> None:
        output = call.choices[choice]
        right, reason = expected_output(call.submit, self._oracle, choice)
        if tuple(output.picks) != right[: len(output.picks)]:
            raise Violation(
                f"I2: wrong tokens of choice {choice} for {call.describe()}: {output.picks}, not {list(right)}"
            )
        finish = output.finish or (call.ended.finish if call.ended is not None else None)
        if finish is None or output.stopped:
            return
        if (len(output.picks), finish) != (len(right), reason):
            raise Violation(
                f"I2: choice {choice} of {call.describe()} finished by {finish.value} after {len(output.picks)};"
                f" {len(right)} by {reason.value} are right"
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
            key = (call.submit.token_ids, call.submit.sampling, tuple(each.picture for each in call.submit.images))
            by_prompt.setdefault(key, {})[call.submit.tenant] = expected(call.submit, self._oracle)[0]
        for outputs in by_prompt.values():
            if min(map(len, outputs.values())) >= 3 and len(set(outputs.values())) < len(outputs):
                raise Violation("I4: two tenants' outputs are equal: the oracle does not see the tenant")

    def _check_pictures(self) -> None:
        """A hit is of a picture that the same tenant has shown: in another request before this one's end, or twice."""
        for call in self.calls.values():
            if call.ended is None or not call.ended.stats.image_hits:
                continue
            others = (each for each in self.calls.values() if each is not call and each.invoked_us <= call.ended_us)
            shown = {sight for other in others for sight in _sights(other.submit)}
            own = _sights(call.submit)
            known = sum(sight in shown or sight in own[:index] for index, sight in enumerate(own))
            if (hits := call.ended.stats.image_hits) > known:
                raise Violation(f"I4: {hits} images were cached for {call.describe()}, of which {known} were shown")

    # -- figures -------------------------------------------------------------------------------------------------------
    def figures(self) -> Counter[str]:
        figures = Counter(requests=len(self.calls), tokens=sum(call.received for call in self.calls.values()))
        for call in self.calls.values():
            figures["requests of several choices"] += call.submit.choices > 1
            figures["choices stopped"] += sum(output.stopped for output in call.choices)
            figures["prompt tokens scored"] += len(call.scores)
            figures["prompt tokens cached"] += call.ended.stats.cached_tokens if call.ended is not None else 0
            figures["prompt tokens skipped"] += call.ended.stats.skipped_tokens if call.ended is not None else 0
            figures[f"ended {_outcome(call.ended)}"] += 1
            figures["images"] += len(call.submit.images)
            figures["images cached"] += call.ended.stats.image_hits if call.ended is not None else 0
            figures["placements lost"] += max(0, call.ended.stats.attempts - 1) if call.ended is not None else 0
        return figures


def _outcome(ended: Ended | None) -> str:
    if ended is None:
        return "lost"  # with its router
    return ended.error.status.value if ended.error is not None else str(ended.finish)


def expected(submit: Submit, oracle: OracleExecutor.Config, choice: int = 0) -> tuple[tuple[int, ...], FinishReason]:
    """The one right output, and why it ends."""
    picks, reason = expected_output(submit, oracle, choice)
    return tuple(pick.token_id for pick in picks), reason


def expected_output(
    submit: Submit, oracle: OracleExecutor.Config, choice: int
) -> tuple[tuple[Sampled, ...], FinishReason]:
    """The reference, cut behind the first stop token. Poison has none."""
    if oracle.poison_token in submit.token_ids:
        return (), FinishReason.LENGTH
    return _expected(submit.token_ids, submit.tenant, submit.sampling, choice, oracle, _seen(submit))


def _sights(submit: Submit) -> list[tuple[str, Picture, int, tuple[int, int]]]:
    images = ((each.picture, each.image) for each in submit.images)
    return [(submit.cache_scope, picture, image.features, image.grid) for picture, image in images]


def _seen(submit: Submit) -> tuple[SeenImage, ...]:
    return tuple((each.image, each.picture) for each in submit.images)


@lru_cache(maxsize=1024)
def _expected(
    prompt: Sequence[int],
    tenant: str,
    sampling: SamplingParams,
    choice: int,
    oracle: OracleExecutor.Config,
    images: Sequence[SeenImage],
) -> tuple[tuple[Sampled, ...], FinishReason]:
    picks = reference_output(prompt, tenant, sampling, sampling.max_tokens, oracle, choice, images)
    for index, pick in enumerate(picks):
        if pick.token_id in sampling.stop_token_ids:
            return picks[: index + 1], FinishReason.STOP
    return picks, FinishReason.LENGTH
