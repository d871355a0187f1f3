"""VirtualWorld and VirtualHost: the same machines in virtual time.

A world is a heap of callbacks at integer microseconds, nothing else. A *process* is what can be frozen (SIGSTOP) or
killed (SIGKILL, power loss): everything that happens inside one asks its `VirtualProcess` for permission to run. A
`VirtualHost` is a `Host` whose clock, timer and jobs belong to a process.

One seed, one run: ties are broken by the order of scheduling, costs are functions of the job, and the log of a world
is equal, byte for byte, to the log of another world that was given the same inputs (DESIGN 3).

Not here: messages between processes (see the memory transport), and faults other than a process that stops.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import xxhash

from engine.base import limits
from engine.base.host import Host, Outputs, ignore_output
from engine.base.keepalive import DEFAULT_KEEPALIVE, LinkKeeper
from engine.base.link import Transport
from engine.base.machine import (
    Close,
    Command,
    Dial,
    EngineEvents,
    EnginePort,
    Job,
    JobDone,
    LinkLost,
    LinkUp,
    Machine,
    Received,
    Run,
    Send,
)

Callback = Callable[[], None]

_STEPS_AT_ONE_INSTANT_MAX = 50_000  # callbacks without time moving: a machine whose deadline never advances
_LOGGED_CHARACTERS_MAX = 160


class Handle:
    """A scheduled callback that may be cancelled."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callback) -> None:
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        self.callback = None

    def fire(self) -> None:
        if self.callback is not None:
            self.callback()


class VirtualWorld:
    """Virtual time, what happens in it, and a log of what happened."""

    def __init__(self, seed: int = 0, *, recording: bool = True) -> None:
        self.now_us = 0
        self.random = random.Random(seed)
        self.log: list[str] = []
        self.recording = recording
        self._heap: list[tuple[int, int, Handle]] = []
        self._scheduled = 0

    def schedule(self, delay_us: int, callback: Callback) -> Handle:
        """Call it `delay_us` from now; equal times run in the order of scheduling."""
        if delay_us < 0:
            raise ValueError(f"delay_us must be >= 0, got {delay_us}")
        handle = Handle(callback)
        self._scheduled += 1
        heapq.heappush(self._heap, (self.now_us + delay_us, self._scheduled, handle))
        return handle

    def run(self, *, until_us: int | None = None, until: Callable[[], bool] | None = None) -> bool:
        """Let time pass to `until_us`, or until the predicate holds, or until nothing is left to happen.

        Returns whether the predicate holds (without one: True). Idle hosts ping each other for ever, so a world with
        open links needs one of the two.
        """
        holds = until or (lambda: False)
        instants = 0
        while not (done := holds()) and self._due(until_us):
            instants = instants + 1 if self._heap[0][0] == self.now_us else 0
            if instants > _STEPS_AT_ONE_INSTANT_MAX:
                raise RuntimeError(f"time stands still at {self.now_us} us: some deadline is never moved")
            self._run_next()
        if until_us is not None and not done:
            self.now_us = max(self.now_us, until_us)
        return done or until is None

    def record(self, line: str) -> None:
        """Append to the log, with the time."""
        if self.recording:
            self.log.append(f"{self.now_us} {line}")

    def _due(self, until_us: int | None) -> bool:
        return bool(self._heap) and (until_us is None or self._heap[0][0] <= until_us)

    def _run_next(self) -> None:
        self.now_us, _, handle = heapq.heappop(self._heap)
        handle.fire()


class VirtualProcess:
    """One process's permission to run: running, frozen or dead."""

    def __init__(self, world: VirtualWorld) -> None:
        self._world = world
        self._backlog: deque[Callback] = deque()  # what wants to happen while frozen, in order of arrival
        self.frozen = False
        self.alive = True

    def run(self, callback: Callback) -> None:
        """Now; or, in a frozen process, when it wakes; or never, in a dead one."""
        if not self.alive:
            return
        if self.frozen:
            self._backlog.append(callback)
        else:
            callback()

    def schedule(self, delay_us: int, callback: Callback) -> Handle:
        """As `VirtualWorld.schedule`, for a callback that belongs to this process."""
        handle = Handle(callback)
        self._world.schedule(delay_us, lambda: self.run(handle.fire))
        return handle

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        """Everything that piled up happens now, in order, before anything that arrives from now on."""
        self.frozen = False
        backlog, self._backlog = self._backlog, deque()
        for callback in backlog:
            self._world.schedule(0, partial(self.run, callback))

    def kill(self) -> None:
        self.alive = False
        self._backlog.clear()


class VirtualTransport(Transport, Protocol):
    """A transport that lives in a virtual process."""

    @property
    def process(self) -> VirtualProcess: ...

    def abandon(self, detected_after_us: int | None) -> None:
        """The process is dead: its peers learn so after this time, or (None) only from its silence."""


JobCost = Callable[[Job], int]
"""How long a job takes, in microseconds. A function of the job, so that a run can be repeated."""


def constant_job_cost(job: Job) -> int:
    return 200


class _RecordedMachine:
    """A machine whose events and actions go to the world's log."""

    def __init__(self, world: VirtualWorld, name: str, machine: Machine) -> None:
        self._world = world
        self._name = name
        self._machine = machine

    def step(self, event: Any, now_us: int) -> Sequence[Any]:
        self._world.record(f"{self._name} < {describe(event)}")
        actions = self._machine.step(event, now_us)
        for action in actions:
            self._world.record(f"{self._name} > {describe(action)}")
        return actions

    @property
    def next_deadline_us(self) -> int | None:
        return self._machine.next_deadline_us


class VirtualHost(Host):
    """A machine in virtual time."""

    def __init__(
        self,
        world: VirtualWorld,
        name: str,
        machine: Machine,
        transport: VirtualTransport,
        *,
        outputs: Outputs = ignore_output,
        engine: EnginePort | None = None,
        memory: Any = None,
        job_us: JobCost = constant_job_cost,
        job_threads: int = limits.CODEC_THREADS,
        keepalive: LinkKeeper.Config = DEFAULT_KEEPALIVE,
        clock_offset_us: int = 0,
    ) -> None:
        recorded = _RecordedMachine(world, name, machine) if world.recording else machine
        super().__init__(recorded, transport, outputs=outputs, engine=engine, keepalive=keepalive)
        self._world = world
        self._name = name
        self._process = transport.process
        self._abandon = transport.abandon
        self._memory = memory
        self._job_us = job_us
        self._thread_free_us = [0] * job_threads
        self._clock_offset_us = clock_offset_us
        self._timer: Handle | None = None
        self._timer_due_us = 0
        self._engine_events: list[Any] = []

    @property
    def now_us(self) -> int:
        """This host's own clock, which nobody else's needs to agree with."""
        return self._world.now_us + self._clock_offset_us

    def schedule(self, delay_us: int, callback: Callback) -> Handle:
        """For what lives in the same process, such as a virtual engine: it freezes and dies with the host."""
        return self._process.schedule(delay_us, callback)

    def deliver_engine_events(self, events: Iterable[Any]) -> None:
        """Posts at one instant become one `EngineEvents`, as on the real host."""
        if not self._engine_events:
            self.schedule(0, self._drain_engine_events)
        self._engine_events.extend(events)

    # -- faults --------------------------------------------------------------------------------------------------------
    def freeze(self, duration_us: int | None = None) -> None:
        """SIGSTOP: nothing runs, no keep-alives, messages pile up unread; until `thaw`, or for this long."""
        self._world.record(f"{self._name} ! frozen")
        self._process.freeze()
        if duration_us is not None:
            self._world.schedule(duration_us, self.thaw)

    def thaw(self) -> None:
        self._world.record(f"{self._name} ! thawed")
        self._process.thaw()

    def kill(self, *, detected_after_us: int | None = 0) -> None:
        """SIGKILL. With None no reset is sent (power loss): peers find out by keep-alive."""
        self._world.record(f"{self._name} ! killed")
        self._process.kill()
        self._abandon(detected_after_us)

    # -- what Host leaves open -----------------------------------------------------------------------------------------
    def _drain_engine_events(self) -> None:
        events, self._engine_events = self._engine_events, []
        self._take_engine_events(events)

    def _arm(self, deadline_us: int | None) -> None:
        if self._timer is not None and deadline_us is not None and self._timer_due_us <= deadline_us:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if deadline_us is not None:
            self._timer = self.schedule(max(0, deadline_us - self.now_us), self._fire)
            self._timer_due_us = deadline_us

    def _fire(self) -> None:
        self._timer = None
        self._on_timer()

    def _start_job(self, run: Run) -> None:
        """First come, first served over the codec threads. The job's effect on memory happens when it *ends*: the
        latest moment allowed, and so the one at which a block freed too early is caught."""
        thread = self._thread_free_us.index(min(self._thread_free_us))
        begins_us = max(self._world.now_us, self._thread_free_us[thread])
        ends_us = self._thread_free_us[thread] = begins_us + self._job_us(run.job)
        self.schedule(ends_us - self._world.now_us, lambda: self._end_job(run))

    def _end_job(self, run: Run) -> None:
        try:
            done = JobDone(run.key, result=run.job.run(self._memory))
        except Exception as error:
            done = JobDone(run.key, error=error)
        self.deliver(done)

    def _crashed(self, error: Exception) -> None:
        """In a test a bug must not look like a fault that the others survive."""
        self._world.record(f"{self._name} ! crashed {error!r}")
        raise error


def describe(item: Any) -> str:
    """One event or action as a line: equal items give equal lines, and large ones give short lines."""
    match item:
        case Received(link=link, message=message) | Send(link=link, message=message):
            return f"{type(item).__name__} {link} {_digest(message)}"
        case LinkUp(link=link, hello=hello) | Dial(link=link, hello=hello):
            return f"{type(item).__name__} {link} {_digest(hello)}"
        case LinkLost(link=link, reason=reason) | Close(link=link, reason=reason):
            return f"{type(item).__name__} {link} {reason}"
        case JobDone(key=key, error=error):
            return f"JobDone {key} {'ok' if error is None else repr(error)}"
        case Run(key=key, job=job):
            return f"Run {key} {type(job).__name__}"
        case Command(command=command):
            return f"Command {_abridged(command)}"
        case EngineEvents(events=events):
            return f"EngineEvents {' '.join(_abridged(event) for event in events)}"
        case _:
            return _abridged(item)


def _digest(message: bytes) -> str:
    return f"{len(message)}:{xxhash.xxh64_hexdigest(message)}"


def _abridged(item: Any) -> str:
    text = repr(item)
    if len(text) <= _LOGGED_CHARACTERS_MAX:
        return text
    return f"{text[:_LOGGED_CHARACTERS_MAX]}...#{xxhash.xxh64_hexdigest(text.encode())}"
