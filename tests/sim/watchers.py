"""Watchers: they look, inside a running cluster, for what no client could see. They change nothing that happens.

WatchedEngine   freed columns are poisoned, and must stay so until they are granted again: nobody reads a block that is
WatchedEncoder  gone without wrong tokens, nobody writes one without being caught here. Nor is a block written that
                the cache may give to others (I3)
WatchedJob      every frame that is placed was sealed by a source, and is none that the weather damaged (I5)
WatchedHost     every damaged frame that arrives is counted as refused, or fails in its job (I5)
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from engine.base.machine import Job, LinkName, Run
from engine.base.virtual_host import VirtualHost
from engine.commands import EngineCommand, EngineEvent
from engine.core import EngineCore
from engine.encode_core import EncodeCore
from engine.kv.allocator import ColumnAllocator
from engine.kv.arena import POISON, Arena
from engine.kv.schema import CacheSchema
from kv_transfer.jobs import DecodeJob
from tests.sim.history import Violation
from tests.sim.weather import Weather


class _Watched:
    """Mixed in before a core of either kind: one whose memory nobody touches but as it is meant.

        free      nothing but poison, from the moment in which a column is nobody's
        named     final: somebody may find it in the cache, held or not, and must find what was computed

    Codec jobs and steps run between two calls of this class, so it looks when one begins.
    """

    _allocator: ColumnAllocator

    def __init__(self, config: Any, schema: CacheSchema, arena: Arena) -> None:
        super().__init__(config, schema, arena)  # type: ignore[call-arg]
        self._watched = arena
        self._free: set[int] = set()
        self._cached: set[int] = set()
        self._named: dict[int, int] = {}  # column -> digest of what is in it
        self._note()

    def handle(self, command: EngineCommand, now_us: int) -> list[EngineEvent]:
        with self._watching():
            return super().handle(command, now_us)  # type: ignore[misc]

    def begin_step(self, now_us: int) -> Any:
        with self._watching():
            return super().begin_step(now_us)  # type: ignore[misc]

    def finish_step(self, output: Any, now_us: int) -> list[EngineEvent]:
        with self._watching():
            return super().finish_step(output, now_us)  # type: ignore[misc]

    def fail_step(self, now_us: int) -> list[EngineEvent]:
        with self._watching():
            return super().fail_step(now_us)  # type: ignore[misc]

    @contextmanager
    def _watching(self) -> Iterator[None]:
        self._look()
        yield
        self._note()

    def _look(self) -> None:
        free = sorted(self._free)
        if not np.all(self._watched.array[free] == POISON):
            raise Violation(f"I3: somebody wrote to one of columns {free} while it was free")
        for column, digest in self._named.items():
            if self._digest(column) != digest:
                raise Violation(f"I3: somebody wrote to column {column}, which others may find in the cache")

    def _note(self) -> None:
        """What nobody's KV is in any more is poisoned: a stale table reads nothing that could pass for KV."""
        allocator = self._allocator
        held = {column for owner in allocator.owners for column in allocator.table(owner)}
        named = allocator._cache.named
        free = set(range(self._watched.columns)) - held - named
        evicted = {c for c in self._cached & held - named if self._digest(c) == self._named[c]}  # else copied to
        self._watched.poison(sorted(free - self._free | evicted))
        self._free, self._cached = free, set(allocator.cached_column_ids)
        self._named = {c: self._named[c] if c in self._named else self._digest(c) for c in sorted(named)}

    def _digest(self, column: int) -> int:
        return xxh3_64_intdigest(self._watched.array[column].data)


class WatchedEngine(_Watched, EngineCore):
    """Of KV."""


class WatchedEncoder(_Watched, EncodeCore):
    """Of embeddings."""


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
