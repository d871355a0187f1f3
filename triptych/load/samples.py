"""What is kept of requests: everything of one while it runs, a few numbers of all of them afterwards."""

from array import array
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random
from typing import Final

from triptych.load.options import Slo

VALUES_MAX: Final = 1 << 20  # 8 MiB of each figure
TEXTS_MAX: Final = 8  # kinds of trouble of which one message is kept, to show
REFUSALS: Final = (429, 503)  # "not now": an overloaded server does well to say so


class Outcome(StrEnum):
    COMPLETED = "completed"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(slots=True, kw_only=True)
class Sample:
    """One request. All times are of one clock."""

    due_s: float  # when it was meant to be sent; latencies count from here
    sent_s: float
    end_s: float = 0.0
    status: int = 0  # of HTTP; 0: none came
    failure: str = ""  # in a few fixed words; "": the answer came whole
    text: str = ""  # of the server's error
    retry_after: bool = False
    chunks_s: "array[float]" = field(default_factory=lambda: array("d"))  # when those with choices came
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    @property
    def outcome(self) -> Outcome:
        if self.status in REFUSALS:
            return Outcome.REFUSED
        return Outcome.FAILED if self.failure else Outcome.COMPLETED

    @property
    def ttft_ms(self) -> float:
        return (self.chunks_s[0] - self.due_s) * 1e3

    @property
    def e2el_ms(self) -> float:
        return (self.chunks_s[-1] - self.due_s) * 1e3

    @property
    def tpot_ms(self) -> float:
        """Time per token after the first; 0 where there is none."""
        return (self.chunks_s[-1] - self.chunks_s[0]) * 1e3 / max(1, self.output_tokens - 1)


class Distribution:
    """Values one by one. Exact up to `values_max` of them; beyond, a uniform sample (Vitter's algorithm R)."""

    def __init__(self, draw: Random, values_max: int = VALUES_MAX) -> None:
        self._draw = draw
        self._values_max = values_max
        self.values = array("d")
        self.count = 0
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.sum += value
        if len(self.values) < self._values_max:
            self.values.append(value)
        elif (place := self._draw.randrange(self.count)) < self._values_max:
            self.values[place] = value


class Samples:
    """Of one run. Its memory does not grow with it."""

    def __init__(self, slo: Slo, seed: int = 0) -> None:
        self._slo = slo
        draw = Random(seed)
        self.ttft_ms, self.second_ms, self.itl_ms = (Distribution(draw) for _ in range(3))
        self.tpot_ms, self.e2el_ms, self.lag_ms = (Distribution(draw) for _ in range(3))
        self.refusal_ms = Distribution(draw)
        self.outcomes: Counter[Outcome] = Counter()
        self.refusals: Counter[int] = Counter()  # by status
        self.refusals_with_retry_after = 0
        self.failures: Counter[str] = Counter()  # by reason
        self.texts: dict[str, str] = {}  # what the server said, by status or reason, once
        self.good = 0
        self.prompt_tokens = self.cached_tokens = self.output_tokens = self.chunks = 0
        self.first_due_s: float | None = None
        self.last_end_s = 0.0

    def add(self, sample: Sample) -> None:
        outcome = sample.outcome
        self.outcomes[outcome] += 1
        self.first_due_s = sample.due_s if self.first_due_s is None else min(self.first_due_s, sample.due_s)
        self.last_end_s = max(self.last_end_s, sample.end_s)
        self.lag_ms.add((sample.sent_s - sample.due_s) * 1e3)
        self.chunks += len(sample.chunks_s)
        match outcome:
            case Outcome.COMPLETED:
                self._add_completed(sample)
            case Outcome.REFUSED:
                self.refusals[sample.status] += 1
                self.refusal_ms.add((sample.end_s - sample.due_s) * 1e3)
                self.refusals_with_retry_after += sample.retry_after
                self._keep_text(str(sample.status), sample.text)
            case Outcome.FAILED:
                self.failures[sample.failure] += 1
                self._keep_text(sample.failure, sample.text)

    def _add_completed(self, sample: Sample) -> None:
        self.prompt_tokens += sample.prompt_tokens
        self.cached_tokens += sample.cached_tokens
        self.output_tokens += sample.output_tokens
        self.ttft_ms.add(sample.ttft_ms)
        self.e2el_ms.add(sample.e2el_ms)
        chunks_s = sample.chunks_s
        if sample.output_tokens > 1:
            self.tpot_ms.add(sample.tpot_ms)
        if len(chunks_s) > 1:
            self.second_ms.add((chunks_s[1] - chunks_s[0]) * 1e3)
        for index in range(1, len(chunks_s)):
            self.itl_ms.add((chunks_s[index] - chunks_s[index - 1]) * 1e3)
        self.good += self._slo.holds(ttft_ms=sample.ttft_ms, tpot_ms=sample.tpot_ms, e2el_ms=sample.e2el_ms)

    def _keep_text(self, kind: str, text: str) -> None:
        if text and len(self.texts) < TEXTS_MAX:
            self.texts.setdefault(kind, text)

    @property
    def duration_s(self) -> float:
        return 0.0 if self.first_due_s is None else self.last_end_s - self.first_due_s
