"""Submission: what one client asked for and what it has been given, whoever works on it.

A client's `n` choices are one submission with one ending. Its *requests* (`live_request`) come and go: one for all
choices while they share a prefill, later one for each. What must survive them is here: the tokens of each choice, which
are over, how much of the prompt has been scored, and the figures for the client. `outputs` is the truth about
positions: position n of a choice is forwarded once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from control_plane.router.dispatch.prefix_index import BlockHashes
from control_plane.router.requests import RequestStats, Submit
from engine.base import limits
from engine.types import FinishReason, SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from control_plane.router.dispatch.live_request import LiveRequest

GROWTH_TOKENS: Final = limits.GROWTH_RESERVE_TOKENS  # output is metered, and its memory counted, so many at a time


@dataclass(slots=True)
class Meter:
    """What one tenant has been served, in prompt tokens. All of its submissions have the same one."""

    tokens: int = 0


@dataclass(slots=True)
class Submission:
    number: int  # in order of arrival
    submit: Submit
    submitted_us: int
    deadline_us: int
    stats: RequestStats = field(default_factory=RequestStats)
    requests: "dict[int, LiveRequest]" = field(default_factory=dict)  # by id: those that work for it now
    outputs: tuple[list[int], ...] = ()  # of each choice: tokens that the client has
    finishes: dict[int, FinishReason] = field(default_factory=dict)  # of the choices that are over
    meter: Meter = field(default_factory=Meter)
    scored_tokens: int = 1  # of the prompt; nothing comes before the first, so it has no score
    transfer_id: str = ""  # of its last binding; none if that needs no transfer
    image_hits: dict[int, bool] = field(default_factory=dict)  # by index: whether its embedding was cached at first
    hashes: BlockHashes = field(init=False)
    marks_us: dict[str, int] = field(default_factory=dict)  # first time of each step (`phases_ms`), and of placements

    def __post_init__(self) -> None:
        self.stats.image_tokens = sum(each.image.features for each in self.submit.images)
        self.outputs = tuple([] for _ in range(self.submit.choices))
        images = [each.image for each in self.submit.images]
        self.hashes = BlockHashes(self.submit.cache_scope, self.submit.token_ids, images)

    @property
    def over(self) -> bool:
        return len(self.finishes) == self.submit.choices

    @property
    def placed(self) -> bool:
        """Some worker was given some of it."""
        return not self.marks_us.keys().isdisjoint(("encoding", "placed"))

    @property
    def scored(self) -> bool:
        """Nothing more of the prompt needs a score."""
        asked = self.submit.sampling.prompt_logprobs is not None
        return not asked or self.scored_tokens >= len(self.submit.token_ids)

    @property
    def sampling(self) -> SamplingParams:
        """For the next prefill. Scores that were given are not asked for again: they would keep it from the cache."""
        sampling = self.submit.sampling
        given = sampling.prompt_logprobs is not None and self.scored
        return replace(sampling, prompt_logprobs=None) if given else sampling

    def new_scores(self, start: int, scores: Sequence[TokenLogprobs]) -> tuple[TokenLogprobs, ...] | None:
        """Those that the client does not have yet. None: some between them and the last ones are missing."""
        if start > self.scored_tokens:
            return None
        fresh = tuple(scores[self.scored_tokens - start :])
        self.scored_tokens += len(fresh)
        return fresh

    def remaining_ms(self, now_us: int) -> int:
        return max(1, (self.deadline_us - now_us) // 1_000)

    # -- the tenant's meter --------------------------------------------------------------------------------------------
    def meter_growth(self) -> None:
        """Some choice has put out as many tokens again."""
        self.meter.tokens += GROWTH_TOKENS * limits.OUTPUT_TOKEN_WEIGHT

    def meter_rest(self) -> None:
        """It is over: what was put out since."""
        unmetered = sum(len(output) % GROWTH_TOKENS for output in self.outputs)
        self.meter.tokens += unmetered * limits.OUTPUT_TOKEN_WEIGHT

    # -- figures -------------------------------------------------------------------------------------------------------
    def mark(self, name: str, now_us: int) -> None:
        self.marks_us.setdefault(name, now_us)

    def first(self, name: str, now_us: int) -> bool:
        """Mark it; whether this was the first time."""
        known = name in self.marks_us
        self.mark(name, now_us)
        return not known

    @property
    def queued_us(self) -> int:
        """Since when it waits for a prefill worker, or is past it."""
        return self.marks_us.get("encoded", self.submitted_us)

    def note_image(self, index: int, *, cached: bool) -> None:
        """Its embedding is there. What counts is the first attempt: later ones find what it has left behind."""
        self.image_hits.setdefault(index, cached)
        hits = [self.submit.images[each] for each, hit in self.image_hits.items() if hit]
        self.stats.image_hits = len(hits)
        self.stats.cached_image_tokens = sum(each.image.features for each in hits)

    def note_cached(self, cached_tokens: int) -> None:
        """The first prefill's: later ones find what the first has computed."""
        if "near_turn" not in self.marks_us:
            self.stats.cached_tokens = min(cached_tokens, len(self.submit.token_ids))

    def phases_ms(self, now_us: int) -> dict[str, float]:
        """Time spent in each phase, as the router saw it; of several choices, the first to get there:

        submitted --encode--> encoded --queue--> near_turn --prefill--> token --transfer--> committed --decode--> ended

        Without images the queue begins at once.
        """
        encoded = self.marks_us.get("encoded", now_us if self.submit.images else self.submitted_us)
        near_turn = self.marks_us.get("near_turn", now_us)
        token = self.marks_us.get("token", now_us)
        committed = max(token, self.marks_us.get("committed", token))
        return {
            "encode": (encoded - self.submitted_us) / 1_000,
            "queue": (near_turn - encoded) / 1_000,
            "prefill": (token - near_turn) / 1_000,
            "transfer": (committed - token) / 1_000,
            "decode": (now_us - committed) / 1_000,
        }
