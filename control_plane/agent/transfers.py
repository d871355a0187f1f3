"""Transfers: the two ends of everything that moves between this worker and others.

What moves is KV, and embeddings of images: same code, another schema, so a Source and a Target for each. Which pair an
event is for, the event says: a frame names its schema, a job its key; a link and the clock are everybody's.
"""

from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import NamedTuple

from engine.base.machine import JobDone, LinkName
from engine.kv.schema import CacheSchema
from kv_transfer.codecs import CodecSet
from kv_transfer.custody import Custody
from kv_transfer.frame import schema_named_untrusted
from kv_transfer.source import Source
from kv_transfer.target import Target


class Ends(NamedTuple):
    source: Source
    target: Target


class Transfers:
    """All transfers of one worker. The first kind that is added is asked about frames of an unknown one: it refuses."""

    def __init__(
        self, *, custody: Custody, counters: Counter[str], mint_transfer_id: Callable[[], bytes], vocab_size: int
    ) -> None:
        self._custody = custody
        self._counters = counters
        self._mint = mint_transfer_id
        self._vocab_size = vocab_size
        self._job_keys = count(1)
        self._ends: dict[bytes, Ends] = {}

    def add(self, schema: CacheSchema, codecs: CodecSet) -> Ends:
        """Both ends of another kind of what moves."""
        custody, job_keys, counters = self._custody, self._job_keys, self._counters
        source = Source(schema, codecs=codecs, custody=custody, job_keys=job_keys, counters=counters)
        target = Target(
            schema,
            codecs=codecs,
            custody=custody,
            mint_transfer_id=self._mint,
            job_keys=job_keys,
            counters=counters,
            vocab_size=self._vocab_size,
        )
        return self._ends.setdefault(schema.digest, Ends(source, target))

    # -- events --------------------------------------------------------------------------------------------------------
    def on_frame(self, link: LinkName, data: bytes, now_us: int) -> list[object]:
        """From a peer that sends to us."""
        return self._named(data).target.on_frame(link, data, now_us)

    def on_answer(self, link: LinkName, data: bytes, now_us: int) -> list[object]:
        """From a peer that we send to."""
        return self._named(data).source.on_frame(link, data, now_us)

    def on_job(self, done: JobDone, now_us: int) -> list[object]:
        parts = (part for ends in self._ends.values() for part in ends if part.is_job(done.key))
        return next(parts).on_job(done, now_us)

    def on_tick(self, now_us: int) -> list[object]:
        return [action for ends in self._ends.values() for action in ends.source.on_tick(now_us)]

    def on_source_lost(self, link: LinkName) -> list[object]:
        return [action for ends in self._ends.values() for action in ends.target.on_link_lost(link)]

    def on_target_lost(self, link: LinkName) -> list[object]:
        return [action for ends in self._ends.values() for action in ends.source.on_link_lost(link)]

    def unbind(self, seq_id: int) -> list[object]:
        """As `Source.unbind`, of the one that holds it."""
        return [action for ends in self._ends.values() for action in ends.source.unbind(seq_id)]

    @property
    def next_deadline_us(self) -> int | None:
        deadlines = (ends.source.next_deadline_us for ends in self._ends.values())
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def __len__(self) -> int:
        return sum(len(part) for ends in self._ends.values() for part in ends)

    def _named(self, data: bytes) -> Ends:
        """Only a hint so far: whoever it is compares the whole header."""
        ends = self._ends.get(schema_named_untrusted(data))
        return next(iter(self._ends.values())) if ends is None else ends
