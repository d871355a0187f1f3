"""Sends requests when their time has come, or, in a closed loop, when another one has ended."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, Protocol

from triptych.load.clock import Clock
from triptych.load.samples import Sample

IN_FLIGHT_MAX: Final = 4_096  # each holds a connection; whoever offers more to a server that hangs measures himself


class Ask(Protocol):
    def __call__(self, body: bytes, due_s: float, /) -> Awaitable[Sample]: ...


class Sender:
    """`in_flight_max` bounds memory. Where it holds back an open loop, the requests are late, and say so: their time
    runs from when they were due. In a closed loop nothing is due before there is room for it."""

    def __init__(
        self, ask: Ask, clock: Clock, on_sample: Callable[[Sample], None], *, in_flight_max: int, closed: bool
    ) -> None:
        self._ask = ask
        self._clock = clock
        self._on_sample = on_sample
        self._room = asyncio.Semaphore(in_flight_max)
        self._closed = closed
        self._in_flight = 0
        self.in_flight_highest = 0

    async def send(self, bodies: Iterable[bytes], times_s: Iterable[float], duration_s: float = math.inf) -> None:
        """As many as the shorter of the two has, none after `duration_s`; those sent are waited for."""
        start_s = self._clock.now_s()
        async with asyncio.TaskGroup() as group:
            for body, after_s in zip(bodies, times_s, strict=False):
                await self._clock.sleep_until(start_s + min(after_s, duration_s))
                await self._room.acquire()
                if self._clock.now_s() - start_s >= duration_s:
                    break
                due_s = self._clock.now_s() if self._closed else start_s + after_s
                group.create_task(self._one(body, due_s))

    async def _one(self, body: bytes, due_s: float) -> None:
        self._in_flight += 1
        self.in_flight_highest = max(self.in_flight_highest, self._in_flight)
        try:
            self._on_sample(await self._ask(body, due_s))
        finally:
            self._in_flight -= 1
            self._room.release()
