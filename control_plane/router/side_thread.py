"""A thread, or a few, for work that would hold the event loop up: one piece at a time on each, tenants in turn, and
nobody waits for longer than his request may.

Work holds a client's text, so only the thread and who still waits may hold the work. That is why the queue is our own:
an executor's keeps what was cancelled until its turn comes.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from control_plane.router.shares import Shares
from engine.base import limits
from engine.base.errors import DeadlineExceeded, ResourceExhausted, Unavailable

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False)
class Job(Generic[Result]):
    tenant: str
    work: Callable[[], Result]
    result: "asyncio.Future[Result]"  # done early when nobody waits for it any more

    def settle(self, worked: "asyncio.Future[Result]") -> None:
        error = None if worked.cancelled() else worked.exception()  # looked at, so that asyncio does not log it
        if self.result.done():
            return
        if worked.cancelled():  # the thread was closed before it began
            self.result.set_exception(_closed())
        elif error is not None:
            self.result.set_exception(error)
        else:
            self.result.set_result(worked.result())


class Turns:
    """The jobs that wait. Tenants come in turn, whoever has sent how many; one tenant's jobs in their order."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Job[Any]]] = {}  # none is empty; the first one's tenant is next

    def __bool__(self) -> bool:
        return bool(self._queues)

    def append(self, job: Job[Any]) -> None:
        self._queues.setdefault(job.tenant, deque()).append(job)

    def pop(self) -> Job[Any]:
        tenant = next(iter(self._queues))
        queue = self._queues.pop(tenant)
        job = queue.popleft()
        if queue:
            self._queues[tenant] = queue  # behind all others
        return job

    def remove(self, job: Job[Any]) -> bool:
        """False: it does not wait any more."""
        queue = self._queues.get(job.tenant, ())
        if job not in queue:
            return False
        self._queues[job.tenant].remove(job)
        if not queue:
            del self._queues[job.tenant]
        return True


class SideThread:
    """Who finds no room is refused at once. A place is held until the thread is done with the job, even if its client
    has left in the middle: until then it costs what the places are there to bound."""

    def __init__(self, name: str, *, waiting_max: int, what: str, tenants: int = 1, threads: int = 1) -> None:
        self._executor = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=name)
        self._places = Shares(waiting_max, tenants=tenants)
        self._what = what  # for the client: "long prompts"
        self._turns = Turns()
        self._idle = threads

    def close(self) -> None:
        while self._turns:
            job = self._turns.pop()
            self._places.give(job.tenant, 1)
            job.result.set_exception(_closed())
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def run(self, work: Callable[[], Result], *, wait_ms: int, tenant: str = "") -> Result:
        self._check_room(tenant)
        job: Job[Result] = Job(tenant, work, asyncio.get_running_loop().create_future())
        self._places.take(tenant, 1)
        self._turns.append(job)
        self._start_next()
        try:
            async with asyncio.timeout(wait_ms / 1000):
                return await job.result
        except TimeoutError:
            raise DeadlineExceeded(f"the request's time ran out in the queue of {self._what}") from None
        finally:
            if self._turns.remove(job):
                self._places.give(tenant, 1)

    def _check_room(self, tenant: str) -> None:
        if not self._places.fits(1):
            raise ResourceExhausted(f"too many {self._what} at once", retry_after_ms=limits.RETRY_AFTER_MS)
        if not self._places.allows(tenant, 1):
            text = f"too many {self._what} at once: no more are left for this tenant"
            raise ResourceExhausted(text, retry_after_ms=limits.RETRY_AFTER_MS)

    def _start_next(self) -> None:
        if not (self._idle and self._turns):
            return
        job = self._turns.pop()
        worked = asyncio.get_running_loop().run_in_executor(self._executor, job.work)
        worked.add_done_callback(partial(self._end, job))
        self._idle -= 1

    def _end(self, job: Job[Any], worked: "asyncio.Future[Any]") -> None:
        self._idle += 1
        self._places.give(job.tenant, 1)
        job.settle(worked)
        self._start_next()


def _closed() -> Unavailable:
    return Unavailable("shutting down", retry_after_ms=limits.RETRY_AFTER_MS)
