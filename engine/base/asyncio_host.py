"""AsyncioHost: a machine driven by a real clock, real links and a real thread pool.

It owns the loop's timer, the links by name and the codec pool. It does not own the transport or the engine thread:
whoever made them closes them. Everything runs on the loop's thread except `deliver_engine_events` and the jobs.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from engine.base import limits
from engine.base.host import Host, Outputs, ignore_output
from engine.base.keepalive import DEFAULT_KEEPALIVE, LinkKeeper
from engine.base.link import Transport
from engine.base.machine import EnginePort, JobDone, Machine, Run

logger = logging.getLogger(__name__)

_WAITING_JOBS_PER_SLOT = 64  # windows keep the number of jobs far below this; beyond it some machine forgot its window
_CLOSE_TIMEOUT_S = 10.0  # jobs are bounded to milliseconds; a job that takes longer than this is stuck


class JobPool:
    """Codec threads. At most `bound` jobs are in the threads' hands; the others wait here, first come first served.

    The caller's `done` runs on the loop's thread, once per job, whatever happens to the job.
    """

    def __init__(
        self, threads: int = limits.CODEC_THREADS, bound: int = limits.CODEC_JOBS_MAX, memory: Any = None
    ) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="codec")
        self._bound = bound
        self._waiting_max = bound * _WAITING_JOBS_PER_SLOT
        self._memory = memory
        self._waiting: deque[tuple[Run, Callable[[JobDone], None]]] = deque()
        self._in_threads = 0
        self._closed = False

    @property
    def outstanding(self) -> int:
        """Jobs submitted and not yet done."""
        return self._in_threads + len(self._waiting)

    def submit(self, run: Run, done: Callable[[JobDone], None]) -> None:
        """Run it soon; `done` is called later, never from here."""
        loop = asyncio.get_running_loop()
        if self._closed:
            loop.call_soon(done, JobDone(run.key, error=RuntimeError("job pool closed")))
        elif self._in_threads < self._bound:
            self._hand_over(loop, run, done)
        elif len(self._waiting) < self._waiting_max:
            self._waiting.append((run, done))
        else:
            loop.call_soon(done, JobDone(run.key, error=RuntimeError(f"over {self._waiting_max} jobs waiting")))

    async def close(self) -> None:
        """Refuse what waits, let running jobs end (each may be writing into memory), join the threads."""
        self._closed = True
        loop = asyncio.get_running_loop()
        while self._waiting:
            run, done = self._waiting.popleft()
            loop.call_soon(done, JobDone(run.key, error=RuntimeError("job pool closed")))
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await asyncio.to_thread(self._executor.shutdown)
        except TimeoutError:  # the thread cannot be stopped; what remains to be closed must be, all the same
            logger.error("a codec job is stuck; going on without its thread")

    def _hand_over(self, loop: asyncio.AbstractEventLoop, run: Run, done: Callable[[JobDone], None]) -> None:
        self._in_threads += 1
        future = self._executor.submit(run.job.run, self._memory)
        future.add_done_callback(lambda ended: loop.call_soon_threadsafe(self._ended, loop, run.key, ended, done))

    def _ended(
        self, loop: asyncio.AbstractEventLoop, key: int, ended: Future[Any], done: Callable[[JobDone], None]
    ) -> None:
        self._in_threads -= 1
        if self._waiting:
            self._hand_over(loop, *self._waiting.popleft())
        done(_job_done(key, ended))


def _job_done(key: int, ended: Future[Any]) -> JobDone:
    error = ended.exception()
    if error is None:
        return JobDone(key, result=ended.result())
    return JobDone(key, error=error if isinstance(error, Exception) else RuntimeError(repr(error)))


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
