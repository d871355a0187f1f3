"""The one place of the load generator that knows the time. Tests have another clock."""

import asyncio
import datetime
import time
from typing import Protocol


class Clock(Protocol):
    def now_s(self) -> float: ...

    async def sleep_until(self, at_s: float) -> None:
        """Others run in between, even if it is that late already."""


class WallClock:
    def now_s(self) -> float:
        return time.perf_counter()

    async def sleep_until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - time.perf_counter()))


def cpu_s() -> float:
    """Of this process."""
    return time.process_time()


def utc_now() -> datetime.datetime:
    """For the date of a report."""
    return datetime.datetime.now(datetime.UTC)
