"""PacedEncoder: another encoder's embeddings at a real tower's pace. Its time is slept, so many fit on few cores."""

from collections.abc import Callable

from engine.commands import EncodeOutput, EncodePlan
from engine.executors import Encoder


class PacedEncoder:
    """Implements `Encoder`. `sleep` takes seconds: `time.sleep` in production, a recorder in tests."""

    def __init__(self, inner: Encoder, image_us: int, sleep: Callable[[float], None]) -> None:
        self._inner = inner
        self._image_us = image_us
        self._sleep = sleep

    def encode(self, plan: EncodePlan) -> EncodeOutput:
        """As long as its images take one after the other: what a tower on one core does with a batch."""
        output = self._inner.encode(plan)
        self._sleep(self._image_us * len(plan.items) / 1e6)
        return output
