"""Placement: which worker takes a prefill, which one receives its KV. Pure functions of what the pool knows.

Least loaded, by what this router itself has sent and not yet seen finished; a status is a heartbeat old, and a burst
placed on it would all land on one worker. Every choice names its reason, which becomes a metric.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from control_plane.router.workers import Worker
from engine.types import Role


@dataclass(frozen=True, slots=True)
class Choice:
    worker: Worker
    reason: str  # "only" | "least_loaded" | "local"


def choose_prefill(workers: Sequence[Worker], *, avoid: str = "") -> Choice | None:
    """The worker with the fewest prompt tokens ahead of a new one; `avoid` has just failed: it is the last resort."""
    if not workers:
        return None
    chosen = min(workers, key=lambda w: (w.id == avoid, w.prefill_tokens, w.status.running, w.id))
    return Choice(chosen, "only" if len(workers) == 1 else "least_loaded")


def choose_decode(workers: Sequence[Worker], *, source: Worker, refused: Collection[str]) -> Choice | None:
    """Where the KV goes. Staying costs nothing and wins whenever the source decodes too and has not refused. Where
    nobody decodes, a source that drains finishes what it has begun: its drain ends no sooner by waiting for others."""
    workers = workers or ([source] if source.has(Role.DECODE) else [])
    candidates = [w for w in workers if w.id not in refused and w.info.schema_digest == source.info.schema_digest]
    if not candidates:
        return None
    if any(w.id == source.id for w in candidates):
        return Choice(source, "local")
    chosen = min(candidates, key=lambda w: (w.bound / max(1, w.info.total_columns), w.bound, w.id))
    return Choice(chosen, "only" if len(candidates) == 1 else "least_loaded")
