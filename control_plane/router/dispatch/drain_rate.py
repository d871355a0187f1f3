"""DrainRate: how fast the router's queue moves, in prompt tokens a second, measured while somebody waits in it.

Whatever holds the queue back (prefill, decode memory, a slow link) is in the measure; an idle hour is not. Old news
counts less: both the tokens and the time they took decay, so that the rate is a mean over about DRAIN_RATE_MEMORY_MS.

    somebody waits ---- placed, 300 tokens ---- placed, 200 ---- nobody waits        somebody waits ---- ...
    |<------------------- measured ------------------------------>|  not measured    |<-- measured
"""

import math

from engine.base import limits


class DrainRate:
    def __init__(self) -> None:
        self._tokens = 0.0
        self._us = 0.0
        self._since_us: int | None = None  # somebody has waited from then on, and nothing was placed

    def note(self, placed_tokens: int, *, waiting: bool, now_us: int) -> None:
        """So many tokens' requests have just left the queue; does anybody wait whom a worker could serve?"""
        if self._since_us is not None:
            self._add(placed_tokens, now_us - self._since_us)
        self._since_us = now_us if waiting else None

    def _add(self, tokens: int, us: int) -> None:
        kept = math.exp(-us / (limits.DRAIN_RATE_MEMORY_MS * 1_000))
        self._tokens = self._tokens * kept + tokens
        self._us = self._us * kept + us

    def wait_us(self, tokens: int) -> int | None:
        """How long it takes until so many have left. None: not measured for long enough to say, or on too little: a
        few tokens that were held up by a lost worker are no rate, and would turn away those who come after it."""
        if self._us < limits.DRAIN_RATE_MEASURED_MS * 1_000 or self._tokens < limits.DRAIN_RATE_TOKENS_MIN:
            return None
        return round(tokens * self._us / self._tokens)
