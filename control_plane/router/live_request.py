"""LiveRequest: one accepted request as the router sees it: where it is, and what the client has been given.

stage      QUEUED -> PREFILL -> RESERVING <-> TRANSFER -> DECODE -> (ended)
holders    -         source     source        source,     target
                                              target
A loss in a stage that leaves a holder of the whole KV goes back to RESERVING; any other goes back to QUEUED, with
prompt + emitted tokens as the new prompt. `emitted` is the truth about positions: position n is forwarded once.
"""

from dataclasses import dataclass, field
from enum import Enum

from control_plane.router.requests import RequestStats, Submit


class Stage(Enum):
    QUEUED = "queued"
    PREFILL = "prefill"
    RESERVING = "reserving"
    TRANSFER = "transfer"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Placement:
    """An attempt at a worker. The attempt number fences everything that is said about it later."""

    worker: str
    attempt: int


@dataclass(slots=True)
class LiveRequest:
    id: int
    submit: Submit
    submitted_us: int
    deadline_us: int
    stage: Stage = Stage.QUEUED
    emitted: list[int] = field(default_factory=list)
    source: Placement | None = None
    target: Placement | None = None
    context_tokens: int = 0  # tokens whose KV the source holds, or will
    refused: set[str] = field(default_factory=set)  # targets that said no in this round
    attempts: int = 0  # attempt numbers used; never reused
    losses: int = 0  # placements lost; bounded by ATTEMPTS_MAX
    moving: bool = False  # its source is a decode worker that gives it away
    failed_at: str = ""  # the prefill worker that gave it up last
    engine_failures: int = 0  # workers whose engine failed on it; bounded by ENGINE_FAILURES_MAX
    prefill_load_tokens: int = 0  # what it adds to its prefill worker's queue, by our count
    retry_us: int | None = None  # when to ask full targets again
    stats: RequestStats = field(default_factory=RequestStats)
    marks_us: dict[str, int] = field(default_factory=dict)  # first time of: near_turn, token, committed

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.submit.token_ids + tuple(self.emitted)

    @property
    def needs_target(self) -> bool:
        """False when token 0 is all there will be: no reservation, no transfer."""
        return self.submit.sampling.max_tokens - len(self.emitted) > 1

    def next_attempt(self) -> int:
        self.attempts += 1
        return self.attempts

    def mark(self, name: str, now_us: int) -> None:
        self.marks_us.setdefault(name, now_us)

    def phases_ms(self, now_us: int) -> dict[str, float]:
        """Time spent in each phase, as the router saw it:

        submitted --queue--> near_turn --prefill--> token --transfer--> committed --decode--> ended
        """
        near_turn = self.marks_us.get("near_turn", now_us)
        token = self.marks_us.get("token", now_us)
        committed = max(token, self.marks_us.get("committed", token))
        return {
            "queue": (near_turn - self.submitted_us) / 1_000,
            "encode": 0.0,
            "prefill": (token - near_turn) / 1_000,
            "transfer": (committed - token) / 1_000,
            "decode": (now_us - committed) / 1_000,
        }
