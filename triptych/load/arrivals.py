"""When to send, as a pure function of a seed."""

import math
from collections.abc import Iterator
from itertools import repeat
from random import Random


def arrival_times_s(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Endlessly, from 0: gaps of mean 1 / rate, gamma-distributed with shape `burstiness`, as vLLM draws them.

    Shape 1 is the exponential distribution, hence a Poisson process. An infinite rate is everything at once.
    """
    if math.isinf(rate):
        return repeat(0.0)
    return _gamma_process_s(rate, burstiness, Random(seed))


def _gamma_process_s(rate: float, burstiness: float, draw: Random) -> Iterator[float]:
    at_s = 0.0
    while True:
        yield at_s
        at_s += draw.gammavariate(burstiness, 1 / (rate * burstiness))
