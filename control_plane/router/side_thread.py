"""One thread for work that would hold the event loop up: few at a time, each no longer than its request may wait."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from engine.base import limits
from engine.base.errors import DeadlineExceeded, ResourceExhausted

Result = TypeVar("Result")


class SideThread:
    """Who finds the queue full is refused at once; who stops waiting leaves the queue."""

    def __init__(self, name: str, *, waiting_max: int, what: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._waiting_max = waiting_max
        self._what = what  # for the client: "long prompts"
        self._waiting = 0

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def run(self, work: Callable[[], Result], *, wait_ms: int) -> Result:
        if self._waiting >= self._waiting_max:
            raise ResourceExhausted(f"too many {self._what} at once", retry_after_ms=limits.RETRY_AFTER_MS)
        self._waiting += 1
        try:
            async with asyncio.timeout(wait_ms / 1000):
                return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        except TimeoutError:
            raise DeadlineExceeded(f"the request's time ran out in the queue of {self._what}") from None
        finally:
            self._waiting -= 1
