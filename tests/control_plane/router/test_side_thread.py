"""Nobody who left costs anything, nobody who floods shuts others out, and what the thread is at is always counted."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from control_plane.router.side_thread import SideThread
from engine.base.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable


class Text:
    """Something of a client's that work holds."""


class Bench:
    """A side thread whose work ends when it is told to."""

    def __init__(self, waiting_max: int = 64, tenants: int = 1) -> None:
        self.side = SideThread("test", waiting_max=waiting_max, what="long prompts", tenants=tenants)
        self.done: list[str] = []
        self._gate = threading.Event()
        self._tasks: list[asyncio.Task[str]] = []

    async def send(self, name: str, tenant: str = "") -> "asyncio.Task[str]":
        """Has found its place, or none, when this returns."""
        task = asyncio.create_task(self.side.run(partial(self._work, name), wait_ms=60_000, tenant=tenant))
        self._tasks.append(task)
        await asyncio.sleep(0)
        return task

    async def finish(self) -> None:
        self._gate.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def end(self) -> None:
        self._gate.set()
        self.side.close()

    def _work(self, name: str) -> str:
        self._gate.wait(timeout=10)
        self.done.append(name)
        return name


@pytest.fixture
def make_bench() -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def make(**arguments: int) -> Bench:
        benches.append(Bench(**arguments))
        return benches[-1]

    yield make
    for bench in benches:
        bench.end()


MakeBench = Callable[..., Bench]


async def leave(task: "asyncio.Task[str]") -> None:
    task.cancel()
    await asyncio.wait([task])


async def test_work_comes_back_with_its_value_or_its_error(make_bench: MakeBench) -> None:
    side = make_bench().side

    def refuse() -> None:
        raise InvalidArgument("too long", field="prompt")

    assert await side.run(lambda: threading.current_thread().name, wait_ms=60_000) == "test_0"
    with pytest.raises(InvalidArgument, match="too long"):
        await side.run(refuse, wait_ms=60_000)
    assert await side.run(lambda: 2, wait_ms=60_000) == 2


async def test_who_left_the_queue_takes_his_text_along_and_is_not_served(make_bench: MakeBench) -> None:
    bench = make_bench()
    await bench.send("long")
    text = Text()
    gone = weakref.ref(text)
    task = asyncio.create_task(bench.side.run(partial(id, text), wait_ms=60_000))
    await asyncio.sleep(0)
    del text
    assert gone() is not None
    await leave(task)
    del task
    gc.collect()
    assert gone() is None
    await bench.finish()
    assert bench.done == ["long"]


async def test_a_thousand_who_come_and_leave_find_room_and_leave_nothing(make_bench: MakeBench) -> None:
    bench = make_bench(waiting_max=2)
    await bench.send("long")
    texts = weakref.WeakSet[Text]()
    for _ in range(1_000):
        texts.add(text := Text())
        task = asyncio.create_task(bench.side.run(partial(id, text), wait_ms=60_000))
        del text
        await asyncio.sleep(0)
        await leave(task)
    del task
    gc.collect()
    assert len(texts) == 0
    assert await bench.send("next")
    await bench.finish()
    assert bench.done == ["long", "next"]


async def test_a_place_is_held_until_the_thread_is_done_also_by_who_left(make_bench: MakeBench) -> None:
    bench = make_bench(waiting_max=2)
    await leave(await bench.send("long"))
    await bench.send("next")
    with pytest.raises(ResourceExhausted, match="too many long prompts at once"):
        await (await bench.send("one too many"))
    await bench.finish()
    assert await bench.send("later")
    await bench.finish()
    assert bench.done == ["long", "next", "later"]


async def test_an_error_that_nobody_waits_for_is_no_news(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    side, gate = make_bench().side, threading.Event()

    def fail() -> None:
        gate.wait(timeout=10)
        raise InvalidArgument("too long", field="prompt")

    task = asyncio.create_task(side.run(fail, wait_ms=60_000))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    gate.set()
    assert await side.run(lambda: 1, wait_ms=60_000) == 1
    gc.collect()
    assert not caplog.records


async def test_nobody_waits_for_longer_than_he_may(make_bench: MakeBench) -> None:
    bench = make_bench(waiting_max=2)
    await bench.send("long")
    with pytest.raises(DeadlineExceeded, match="the request's time ran out in the queue of long prompts"):
        await bench.side.run(partial(bench.done.append, "late"), wait_ms=1)
    await bench.send("next")
    await bench.finish()
    assert bench.done == ["long", "next"]


# -- tenants -----------------------------------------------------------------------------------------------------------
async def test_a_flood_does_not_shut_another_tenant_out_and_does_not_go_before_it(make_bench: MakeBench) -> None:
    bench = make_bench(waiting_max=64, tenants=2)
    flood = [await bench.send(f"red {index}", "red") for index in range(64)]
    assert sum(task.done() for task in flood) == 64 - 52  # 4/5 of all places, rounded up
    blue = await bench.send("blue", "blue")
    await bench.finish()
    assert await blue == "blue"
    assert bench.done.index("blue") == 2  # behind what the thread was at, and one turn of the other tenant
    with pytest.raises(ResourceExhausted, match="no more are left for this tenant"):
        await flood[-1]


async def test_tenants_come_in_turn_and_each_ones_work_in_its_order(make_bench: MakeBench) -> None:
    bench = make_bench(tenants=3)
    for name in ("red 1", "red 2", "red 3", "blue 1", "blue 2", "green 1"):
        await bench.send(name, name.split()[0])
    await bench.finish()
    assert bench.done == ["red 1", "red 2", "blue 1", "green 1", "red 3", "blue 2"]


async def test_places_come_back(make_bench: MakeBench) -> None:
    bench = make_bench(waiting_max=10, tenants=2)
    red = [await bench.send(f"red {index}", "red") for index in range(8)]
    for task in red[1::2]:
        await leave(task)
    blue = [await bench.send(f"blue {index}", "blue") for index in range(3)]
    assert [task.done() for task in (*red, *blue)] == [False, True] * 4 + [False] * 3
    await bench.finish()
    assert sorted(bench.done) == sorted(task.result() for task in (*red[::2], *blue))
    assert not bench.side._places.total


# -- the end -----------------------------------------------------------------------------------------------------------
async def test_who_still_waits_at_the_end_is_told(make_bench: MakeBench) -> None:
    bench = make_bench()
    await bench.send("long")
    waiting = await bench.send("next")
    bench.side.close()
    with pytest.raises(Unavailable):
        await waiting
    await bench.finish()
    assert bench.done == ["long"]


async def test_several_threads_work_at_once() -> None:
    side = SideThread("test", waiting_max=4, what="pictures", threads=2)
    both = threading.Barrier(2)  # broken, if one has to wait for the other
    meetings = (side.run(partial(both.wait, 10), wait_ms=60_000) for _ in range(4))
    assert sorted(await asyncio.gather(*meetings)) == [0, 0, 1, 1]
    side.close()
