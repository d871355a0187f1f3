"""Trace: what a worker's engine and machine did, and when, as JSON lines in a file. For benches; off unless asked for.

    TRIPTYCH_TRACE=/some/folder triptych serve      one file per worker, named after it

The clock is the machine's monotonic one, which all processes of a computer share: a bench lays the files of a prefill
and a decode worker side by side, and what a request's client saw beside both.

    engine thread   computed {seq, layers, tokens}    prefilled {seq}    tokens {seqs}     at the end of each step
                    encoded {seq, cached}
    machine         placed {seq, bytes}               activated {seq}    pixels {seq}      as the loop learns of it

While a worker runs, an event costs it one append; lines are made once per heartbeat. Nothing here is a metric.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from engine.base.machine import Command, JobDone, Machine, Run, Tick
from engine.commands import Activate, Encoded, EncodePixels, EngineEvent, KVComputed, Prefilled, TokensSampled
from kv_transfer.jobs import DecodeJob


class Trace:
    """The lines of one worker. Events may come from any thread; `flush` and `close` from the loop only."""

    def __init__(self, path: Path, clock_us: Callable[[], int]) -> None:
        self._file = path.open("w")
        self._clock_us = clock_us
        self._unwritten: deque[tuple[int, dict[str, object]]] = deque()  # bounded by a heartbeat's worth of events

    def note(self, event: str, **values: object) -> None:
        self._unwritten.append((self._clock_us(), {"event": event, **values}))

    def note_engine(self, events: Iterable[EngineEvent]) -> None:
        for event in events:
            match event:
                case KVComputed():
                    layers, tokens = (event.layer_start, event.layer_end), (event.token_start, event.token_end)
                    self.note("computed", seq=event.seq_id, layers=layers, tokens=tokens)
                case Prefilled():
                    self.note("prefilled", seq=event.seq_id)
                case Encoded():
                    self.note("encoded", seq=event.seq_id, cached=event.cached)
                case TokensSampled():
                    self.note("tokens", seqs=[token.seq_id for token in event.tokens])

    def flush(self) -> None:
        while self._unwritten:
            at_us, values = self._unwritten.popleft()
            self._file.write(json.dumps({"us": at_us, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self.flush()
        self._file.close()


class TracedMachine:
    """A machine whose host does not know that somebody takes notes."""

    def __init__(self, machine: Machine, trace: Trace) -> None:
        self._machine = machine
        self._trace = trace
        self._decoding: dict[int, DecodeJob] = {}

    def step(self, event: object, now_us: int) -> Sequence[object]:
        actions = self._machine.step(event, now_us)
        if isinstance(event, JobDone) and event.key in self._decoding:
            header = self._decoding.pop(event.key).header
            self._trace.note("placed", bytes=header.raw_bytes if event.error is None else 0)
        for action in actions:
            match action:
                case Run(key, DecodeJob() as job):
                    self._decoding[key] = job
                case Command(Activate(branches=branches)):
                    for branch in branches:
                        self._trace.note("activated", seq=branch.seq_id)
                case Command(EncodePixels(seq_id=seq_id)):
                    self._trace.note("pixels", seq=seq_id)
        if isinstance(event, Tick):
            self._trace.flush()
        return actions

    @property
    def next_deadline_us(self) -> int | None:
        return self._machine.next_deadline_us
