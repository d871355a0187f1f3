"""Whether a request was served as soon as its client wanted: its times, beside what it asked for.

    ttft    to the first token; of a request without output, to its ending
    tpot    mean time per token after the first, of the choice that has the most

Times are the edge's own, from `Submit` on. Judged, never enforced: who may be refused early is `admission`'s matter.
"""

from dataclasses import dataclass
from typing import Any, Final, Self

from control_plane.router.answers.request_stream import RequestStream
from engine.base.errors import Status, TriptychError

US_PER_MS: Final = 1_000
CLIENTS_OWN: Final = (Status.CANCELLED, Status.INVALID_ARGUMENT)  # endings that say nothing about how well we served


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Of one request that has ended. None: it never came so far."""

    first_us: int | None
    second_us: int | None
    per_token_us: float | None
    total_us: int

    @classmethod
    def of(cls, stream: RequestStream) -> Self:
        def since_opened(at_us: int | None) -> int | None:
            return None if at_us is None else at_us - stream.opened_us

        longest = max(stream.tokens)  # of choices that run beside each other the time per token is each one's own
        per_token_us = None
        if stream.first_us is not None and longest > 1:
            per_token_us = (stream.last_us - stream.first_us) / (longest - 1)
        return cls(
            first_us=since_opened(stream.first_us),
            second_us=since_opened(stream.second_us),
            per_token_us=per_token_us,
            total_us=since_opened(stream.ended_us) or 0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SloVerdict:
    """None: not asked for, or ended by the client's own doing."""

    ttft_met: bool | None = None
    tpot_met: bool | None = None

    @classmethod
    def of(cls, stream: RequestStream, times: Times, error: TriptychError | None = None) -> Self:
        request = stream.request
        if error is not None and error.status in CLIENTS_OWN:
            return cls()
        if error is not None:
            return cls(
                ttft_met=None if request.ttft_slo_ms is None else False,
                tpot_met=None if request.tpot_slo_ms is None else False,
            )
        first_us = times.total_us if times.first_us is None else times.first_us
        return cls(
            ttft_met=_within(first_us, request.ttft_slo_ms), tpot_met=_within(times.per_token_us, request.tpot_slo_ms)
        )

    @property
    def met(self) -> bool | None:
        asked = [verdict for verdict in (self.ttft_met, self.tpot_met) if verdict is not None]
        return all(asked) if asked else None


UNJUDGED: Final = SloVerdict()


def told_to_client(stream: RequestStream) -> dict[str, Any]:
    """The part of `triptych` on a request's final piece that only the edge can know."""
    times = Times.of(stream)
    return {
        "ttft_ms": _ms(times.first_us),
        "tpot_ms": _ms(times.per_token_us),
        "slo_met": SloVerdict.of(stream, times).met,
    }


def _within(duration_us: float | None, limit_ms: int | None) -> bool | None:
    if limit_ms is None:
        return None
    return duration_us is None or duration_us <= limit_ms * US_PER_MS  # a token that was never due is not late


def _ms(duration_us: float | None) -> float | None:
    return None if duration_us is None else round(duration_us / US_PER_MS, 3)
