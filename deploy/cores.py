"""Which cores each worker's engine computes on. A pure function: reads no machine and pins no thread.

Measured (DESIGN 3): prefill and decode with two threads each on the same two cores made decode three times slower, so
engines get cores of their own and exactly as many threads as cores. What is left over is not handed out: event loops,
codec threads, router and controller live there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.options import WorkerSpec


@dataclass(frozen=True, slots=True)
class CoreShare:
    """One worker's part of the machine: `threads` compute threads, bound to `engine_cores`."""

    engine_cores: tuple[int, ...]
    threads: int


def share_cores(cores: Sequence[int], workers: Sequence[WorkerSpec]) -> list[CoreShare]:
    """One share per worker, in the workers' order.

    5 cores, 2 workers:   | 0 1 | 2 3 | 4        disjoint, equal, the rest left to the event loops
    2 cores, 3 workers:   | 0 | 1 | 0            one thread each, cores dealt in turn
    """
    if not cores:
        raise ValueError("no cores to share")
    if len(workers) > len(cores):
        return [CoreShare((cores[i % len(cores)],), 1) for i in range(len(workers))]
    threads = len(cores) // max(len(workers), 1)
    return [CoreShare(tuple(cores[i * threads : (i + 1) * threads]), threads) for i in range(len(workers))]
