"""AsyncioHost: a machine driven by a real clock, real links and a real thread pool.

It owns the loop's timer, the links by name and the codec pool. It does not own the transport or the engine thread:
whoever made them closes them. Everything runs on the loop's thread except `deliver_engine_events` and the jobs.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from engine.base import limits
from engine.base.host import Host, Outputs, ignore_output
from engine.base.keepalive import DEFAULT_KEEPALIVE, LinkKeeper
from engine.base.link import Transport
from engine.base.machine import EnginePort, JobDone, Machine, Run

logger = logging.getLogger(__name__)

_WAITING_JOBS_PER_SLOT = 64  # windows keep the number of jobs far below this; beyond it some machine forgot its window
_CLOSE_TIMEOUT_S = 10.0  # jobs are bounded to milliseconds; a job that takes longer than this is stuck


Done = Callable[[JobDone], None]


class JobPool:
    """Codec threads. At most `bound` jobs are in the threads' hands; the others wait here, first come first served.

    The caller's `done` runs on the loop's thread, once per job, whatever happens to the job. Jobs that end between two
    turns of the loop wake it once: a frame's way through here costs less than a `concurrent.futures.Future` alone.
    """

    def __init__(
        self, threads: int = limits.CODEC_THREADS, bound: int = limits.CODEC_JOBS_MAX, memory: Any = None
    ) -> None:
        self._threads = [
            threading.Thread(target=self._work_off, name=f"codec-{n}", daemon=True) for n in range(threads)
        ]
        self._bound = bound
        self._waiting_max = bound * _WAITING_JOBS_PER_SLOT
        self._memory = memory
        self._loop: asyncio.AbstractEventLoop | None = None  # since the first job
        self._waiting: deque[tuple[Run, Done]] = deque()
        self._handed_over: queue.SimpleQueue[tuple[Run, Done] | None] = queue.SimpleQueue()  # None ends one thread
        self._ended: deque[tuple[JobDone, Done]] = deque()
        self._loop_will_look = False
        self._in_threads = 0
        self._closed = False

    @property
    def outstanding(self) -> int:
        """Jobs submitted and not yet done."""
        return self._in_threads + len(self._waiting)

    def submit(self, run: Run, done: Done) -> None:
        """Run it soon; `done` is called later, never from here."""
        if self._closed:
            self._refuse(run, done, "job pool closed")
        elif self._in_threads < self._bound:
            self._hand_over(run, done)
        elif len(self._waiting) < self._waiting_max:
            self._waiting.append((run, done))
        else:
            self._refuse(run, done, f"over {self._waiting_max} jobs waiting")

    async def close(self) -> None:
        """Refuse what waits, let running jobs end (each may be writing into memory), join the threads."""
        self._closed = True
        while self._waiting:
            self._refuse(*self._waiting.popleft(), "job pool closed")
        for _ in self._threads:
            self._handed_over.put(None)
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await asyncio.to_thread(self._join)
        except TimeoutError:  # the thread cannot be stopped; what remains to be closed must be, all the same
            logger.error("a codec job is stuck; going on without its thread")

    # -- on the loop ---------------------------------------------------------------------------------------------------
    def _hand_over(self, run: Run, done: Done) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            for thread in self._threads:
                thread.start()
        self._in_threads += 1
        self._handed_over.put((run, done))

    def _settle(self) -> None:
        self._loop_will_look = False  # before the look: whoever ends after it wakes the loop again
        while self._ended:
            ended, done = self._ended.popleft()
            self._in_threads -= 1
            if self._waiting:
                self._hand_over(*self._waiting.popleft())
            done(ended)

    @staticmethod
    def _refuse(run: Run, done: Done, reason: str) -> None:
        asyncio.get_running_loop().call_soon(done, JobDone(run.key, error=RuntimeError(reason)))

    # -- on a codec thread ---------------------------------------------------------------------------------------------
    def _work_off(self) -> None:
        assert self._loop is not None
        while (job := self._handed_over.get()) is not None:
            run, done = job
            self._ended.append((_job_done(run, self._memory), done))
            if not self._loop_will_look:
                self._loop_will_look = True
                with contextlib.suppress(RuntimeError):  # the loop is gone, and with it all who might want to know
                    self._loop.call_soon_threadsafe(self._settle)

    def _join(self) -> None:
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(_CLOSE_TIMEOUT_S)


def _job_done(run: Run, memory: Any) -> JobDone:
    try:
        return JobDone(run.key, result=run.job.run(memory))
    except BaseException as error:  # whatever it is, the thread goes on and the job is answered
        return JobDone(run.key, error=error if isinstance(error, Exception) else RuntimeError(repr(error)))


class AsyncioHost(Host):
    """A machine in production."""

    def __init__(
        self,
        machine: Machine,
        transport: Transport,
        *,
        outputs: Outputs = ignore_output,
        engine: EnginePort | None = None,
        jobs: JobPool | None = None,
        keepalive: LinkKeeper.Config = DEFAULT_KEEPALIVE,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        on_crash: Callable[[Exception], None] | None = None,
    ) -> None:
        super().__init__(machine, transport, outputs=outputs, engine=engine, keepalive=keepalive)
        self._jobs = jobs
        self._clock_ns = clock_ns
        self._on_crash = on_crash
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_us = 0
        self._engine_lock = threading.Lock()
        self._engine_events: list[Any] = []  # bounded by the engine: it reports on work that it admitted

    @property
    def now_us(self) -> int:
        return self._clock_ns() // 1000

    @property
    def running(self) -> bool:
        """Between `start` and the end, whichever end: closed or crashed."""
        return self._running

    def start(self) -> None:
        """Call on the loop's thread. Links may be accepted before; their events wait for `Started`."""
        with self._engine_lock:
            self._loop = asyncio.get_running_loop()
            early = bool(self._engine_events)
        super().start()
        if early:
            self._drain_engine_events()

    async def close(self, reason: str = "closed") -> None:
        """Stop stepping, end every link, join the pool. Idempotent."""
        self._stop(reason)
        if self._jobs is not None:
            await self._jobs.close()

    def deliver_engine_events(self, events: Iterable[Any]) -> None:
        """From any thread, usually the engine's. Posts between two turns of the loop become one `EngineEvents`."""
        with self._engine_lock:
            wake = not self._engine_events and self._loop is not None
            self._engine_events.extend(events)
        if wake and self._loop is not None:
            # The engine thread may finish a last step after the loop has ended; nobody listens to it any more.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._drain_engine_events)

    def _drain_engine_events(self) -> None:
        with self._engine_lock:
            events, self._engine_events = self._engine_events, []
        self._take_engine_events(events)

    def _start_job(self, run: Run) -> None:
        if self._jobs is None:
            raise RuntimeError("the machine runs jobs, but its host has no pool")
        self._jobs.submit(run, self.deliver)

    def _arm(self, deadline_us: int | None) -> None:
        """A timer that would fire too early is left alone: it re-arms itself, which is cheaper than to cancel it for
        every message."""
        if deadline_us is None:
            self._disarm()
            return
        if self._timer is not None and self._timer_due_us <= deadline_us:
            return
        self._disarm()
        delay_s = max(0, deadline_us - self.now_us) / 1e6
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._fire)
        self._timer_due_us = deadline_us

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self) -> None:
        self._timer = None
        self._on_timer()

    def _crashed(self, error: Exception) -> None:
        logger.critical("host stopped: %s raised", type(self._machine).__name__, exc_info=error)
        if self._on_crash is not None:
            self._on_crash(error)
