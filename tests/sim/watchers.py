"""Watchers: they look, inside a running cluster, for what no client could see. They change nothing that happens.

WatchedEngine   freed columns are poisoned, and must be so still when they are granted again: nobody reads a block
                that is gone without wrong tokens, nobody writes one without being caught here (I3)
WatchedJob      every frame that is placed was sealed by a source, and is none that the weather damaged (I5)
WatchedHost     every damaged frame that arrives is counted as refused, or fails in its job (I5)
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from engine.base.machine import Job, LinkName, Run
from engine.base.virtual_host import VirtualHost
from engine.commands import EngineCommand, EngineEvent, StepPlan
from engine.core import EngineCore
from engine.kv.arena import POISON, Arena
from engine.kv.schema import CacheSchema
from engine.scheduler import Scheduler
from kv_transfer.jobs import DecodeJob
from tests.sim.history import Violation
from tests.sim.weather import Weather


class WatchedEngine(EngineCore):
    """An EngineCore over an arena whose free columns hold nothing but poison."""

    def __init__(self, config: Scheduler.Config, schema: CacheSchema, arena: Arena) -> None:
        super().__init__(config, schema, arena)
        self._arena = arena
        self._held: set[int] = set()
        arena.poison(range(arena.columns))

    def handle(self, command: EngineCommand, now_us: int) -> list[EngineEvent]:
        events = super().handle(command, now_us)
        self._look()
        return events

    def begin_step(self, now_us: int) -> StepPlan | None:
        plan = super().begin_step(now_us)
        self._look()
        return plan

    def _look(self) -> None:
        """Compare who holds columns now with who did."""
        held = {column for owner in self._allocator.owners for column in self._allocator.table(owner)}
        granted, freed = sorted(held - self._held), sorted(self._held - held)
        if granted and not np.all(self._arena.array[granted] == POISON):
            raise Violation(f"I3: somebody wrote to one of columns {granted} while it was free")
        if freed:
            self._arena.poison(freed)
        self._held = held


class WatchedJob:
    """A codec job that tells how it went."""

    def __init__(self, job: Job, on_placed: Callable[[bytes], None]) -> None:
        self._job = job
        self._on_placed = on_placed

    def run(self, memory: Any) -> Any:
        result = self._job.run(memory)
        if isinstance(self._job, DecodeJob):
            self._on_placed(self._job.frame)
        return result


class WatchedHost(VirtualHost):
    """A host that knows which frames the weather damaged. `counters` are its machine's, if that takes frames."""

    def __init__(self, *args: Any, weather: Weather, counters: Counter[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._weather = weather
        self._counters = counters
        self._decoding: list[bytes] = []
        self.damaged_arrivals = 0
        self.frames_placed = 0

    def _on_message(self, name: LinkName, message: bytes) -> None:
        if message not in self._weather.damaged:
            super()._on_message(name, message)
            return
        refused = self._refused()
        self.damaged_arrivals += 1
        super()._on_message(name, message)
        if self._refused() == refused and message not in self._decoding:
            raise Violation("I5: a damaged frame was neither counted as refused nor given to a job that checks it")

    def _refused(self) -> int:
        return sum(n for name, n in self._counters.items() if name.startswith(("frames_rejected", "frames_duplicate")))

    def _start_job(self, run: Run) -> None:
        if isinstance(run.job, DecodeJob):
            self._decoding.append(run.job.frame)
        super()._start_job(Run(run.key, WatchedJob(run.job, self._on_placed)))

    def _on_placed(self, frame: bytes) -> None:
        self.frames_placed += 1
        if frame in self._weather.damaged or frame not in self._weather.sealed:
            raise Violation("I5: a frame was placed that no source has sealed")
