"""ServiceTime: how long a prompt takes from its placement to its first token, as it has been lately.

A bound rather than a mean, from the mean and the mean deviation as TCP has it for round trips (RFC 6298): a prompt that
is accepted for a first token by some time must be placed so much earlier. One that is too large corrects itself, since
a prompt that finds the queue empty is placed at once.
"""

from engine.base import limits


class ServiceTime:
    def __init__(self) -> None:
        self._mean_us: float | None = None  # nothing has been served yet
        self._deviation_us = 0.0

    def note(self, duration_us: int) -> None:
        if self._mean_us is None:
            self._mean_us, self._deviation_us = float(duration_us), duration_us / 2
            return
        self._deviation_us += (abs(duration_us - self._mean_us) - self._deviation_us) / 4
        self._mean_us += (duration_us - self._mean_us) / 8

    @property
    def bound_us(self) -> int:
        """Nearly all take no longer."""
        return int((self._mean_us or 0.0) + limits.SERVICE_TIME_DEVIATIONS * self._deviation_us)
