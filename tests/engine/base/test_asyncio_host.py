"""AsyncioHost: one event at a time, timers, jobs, engine events from another thread, and failing closed."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from engine.base.asyncio_host import AsyncioHost, JobPool
from engine.base.keepalive import LinkKeeper
from engine.base.link import Link, LinkHandler
from engine.base.machine import (
    Close,
    Command,
    Dial,
    EngineEvents,
    JobDone,
    LinkLost,
    LinkUp,
    Received,
    Run,
    Send,
    Started,
    Tick,
)


@dataclass
class ScriptedMachine:
    """Records events; answers each with what `reply` says."""

    reply: Callable[[Any], Sequence[Any]] = lambda event: ()
    events: list[Any] = field(default_factory=list)
    next_deadline_us: int | None = None
    depth: int = 0

    def step(self, event: Any, now_us: int) -> Sequence[Any]:
        assert self.depth == 0, "entered twice"
        self.depth += 1
        self.events.append(event)
        actions = self.reply(event)
        self.depth -= 1
        return actions

    def of_type(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@dataclass
class StubLink:
    handler: LinkHandler | None = None
    sent: list[bytes] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    def send(self, message: bytes) -> None:
        self.sent.append(message)

    def close(self, reason: str) -> None:
        self.closed.append(reason)


class StubTransport:
    def __init__(self) -> None:
        self.dials: list[tuple[str, bytes, LinkHandler, Callable[[], None]]] = []
        self.links: list[StubLink] = []

    def dial(self, address: str, hello: bytes, handler: LinkHandler, on_open: Callable[[], None]) -> Link:
        self.dials.append((address, hello, handler, on_open))
        self.links.append(StubLink(handler))
        return self.links[-1]

    def listen(self, address: str, accept: Any) -> None: ...


class StubEngine:
    def __init__(self) -> None:
        self.posted: list[Any] = []

    def post(self, command: Any) -> None:
        self.posted.append(command)


async def wait_for(condition: Callable[[], bool]) -> None:
    """Let the loop turn until it holds; fail if it never does."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 (the machine under test knows no asyncio.Event)
            await asyncio.sleep(0.0005)


async def test_started_comes_first_whatever_arrived_before() -> None:
    machine = ScriptedMachine()
    host = AsyncioHost(machine, StubTransport())
    host.deliver("early")
    host.accept(StubLink(), b"hello")
    host.deliver_engine_events(["engine"])
    assert machine.events == []
    host.start()
    assert machine.events == [Started(), "early", LinkUp("in/1", b"hello"), EngineEvents(("engine",))]
    await host.close()


async def test_an_event_caused_by_an_action_waits_behind_the_step() -> None:
    replies = {"a": ["output a1", "output a2"], "b": ["output b"]}
    machine = ScriptedMachine(lambda event: replies.get(event, []))
    outputs: list[str] = []

    def feed_back(action: str) -> None:
        outputs.append(action)
        if action == "output a1":
            host.deliver("b")

    host = AsyncioHost(machine, StubTransport(), outputs=feed_back)
    host.start()
    host.deliver("a")
    assert outputs == ["output a1", "output a2", "output b"]
    assert machine.events == [Started(), "a", "b"]
    await host.close()


async def test_links_by_name_from_dial_to_loss() -> None:
    replies: dict[Any, list[Any]] = {
        "go": [Dial("peer", "10.0.0.1:5", b"hello")],
        LinkUp("peer"): [Send("peer", b"hi")],
        Received("peer", b"bye"): [Close("peer", "done")],
        LinkLost("peer", "done"): [Send("peer", b"into the void"), Dial("peer", "10.0.0.1:5", b"again")],
    }
    machine, transport = ScriptedMachine(lambda event: replies.get(event, [])), StubTransport()
    host = AsyncioHost(machine, transport)
    host.start()
    host.deliver("go")
    address, hello, handler, on_open = transport.dials[0]
    assert (address, hello) == ("10.0.0.1:5", b"hello")
    on_open()
    handler.on_message(b"bye")
    assert (transport.links[0].sent, transport.links[0].closed) == ([b"hi"], ["done"])
    handler.on_lost("done")
    assert [hello for _, hello, _, _ in transport.dials] == [b"hello", b"again"]
    assert host.link_names == ("peer",)
    await host.close("over")
    assert transport.links[1].closed == ["over"]


async def test_inbound_links_are_numbered_and_never_reused() -> None:
    machine = ScriptedMachine()
    host = AsyncioHost(machine, StubTransport())
    host.start()
    host.accept(StubLink(), b"").on_lost("gone")
    host.accept(StubLink(), b"")
    assert [event.link for event in machine.of_type(LinkUp)] == ["in/1", "in/2"]
    await host.close()


async def test_commands_go_to_the_engine() -> None:
    engine = StubEngine()
    host = AsyncioHost(ScriptedMachine(lambda event: [Command("reserve")]), StubTransport(), engine=engine)
    host.start()
    assert engine.posted == ["reserve"]
    await host.close()


# -- time ------------------------------------------------------------------------------------------------------------
async def test_a_tick_comes_at_the_deadline_and_not_before() -> None:
    machine = ScriptedMachine()
    ticked_us: list[int] = []

    def reply(event: Any) -> Sequence[Any]:
        if isinstance(event, Tick):
            ticked_us.append(host.now_us)
            machine.next_deadline_us = None
        return ()

    machine.reply = reply
    host = AsyncioHost(machine, StubTransport())
    machine.next_deadline_us = deadline_us = host.now_us + 2000
    host.start()
    await wait_for(lambda: bool(ticked_us))
    assert ticked_us[0] >= deadline_us and len(machine.of_type(Tick)) == 1
    await host.close()


async def test_an_earlier_deadline_replaces_the_timer_and_a_later_one_keeps_it() -> None:
    def reply(event: Any) -> Sequence[Any]:
        machine.next_deadline_us = event if isinstance(event, int) else None
        return ()

    machine = ScriptedMachine(reply)
    host = AsyncioHost(machine, StubTransport())
    host.start()
    host.deliver(host.now_us + 3_600_000_000)
    host.deliver(host.now_us + 1000)
    await wait_for(lambda: bool(machine.of_type(Tick)))
    host.deliver(host.now_us + 1000)
    host.deliver(later_us := host.now_us + 5000)
    await wait_for(lambda: len(machine.of_type(Tick)) == 2)
    assert host.now_us >= later_us
    await host.close()


async def test_an_idle_link_is_pinged_and_a_silent_one_closed() -> None:
    clock_ns = 0
    transport = StubTransport()
    config = LinkKeeper.Config(interval_ms=1, silence_ms=3)
    host = AsyncioHost(ScriptedMachine(), transport, keepalive=config, clock_ns=lambda: clock_ns)
    host.start()
    link = StubLink()
    host.accept(link, b"")
    for clock_ns in range(0, 4_000_001, 250_000):  # noqa: B007 (read by the host's clock)
        host._on_timer()
    assert set(link.sent) == {b""} and link.closed == ["silent"]
    await host.close()


async def test_a_host_that_was_stopped_and_woken_reads_before_it_accuses() -> None:
    clock_ns = 0
    host = AsyncioHost(ScriptedMachine(), StubTransport(), clock_ns=lambda: clock_ns)
    host.start()
    link = StubLink()
    handler = host.accept(link, b"")
    clock_ns = 30_000_000_000
    host._on_timer()  # the first thing that runs after SIGCONT, before any socket is read
    handler.on_message(b"waited in the socket")
    clock_ns += 2_000_000_000
    host._on_timer()
    assert link.closed == []
    await host.close()


# -- engine events -----------------------------------------------------------------------------------------------------
async def test_posts_between_two_turns_of_the_loop_are_one_event_in_order() -> None:
    machine = ScriptedMachine()
    host = AsyncioHost(machine, StubTransport())
    host.start()

    def engine_thread() -> None:
        for index in range(0, 1000, 2):
            host.deliver_engine_events([index, index + 1])

    thread = threading.Thread(target=engine_thread)
    thread.start()
    thread.join()  # the loop does not turn meanwhile
    await wait_for(lambda: bool(machine.of_type(EngineEvents)))
    assert machine.of_type(EngineEvents) == [EngineEvents(tuple(range(1000)))]
    await host.close()


async def test_posts_from_a_running_engine_are_neither_lost_nor_reordered() -> None:
    machine = ScriptedMachine()
    host = AsyncioHost(machine, StubTransport())
    host.start()
    thread = threading.Thread(target=lambda: [host.deliver_engine_events([index]) for index in range(2000)])
    thread.start()
    await wait_for(lambda: sum(len(batch.events) for batch in machine.of_type(EngineEvents)) == 2000)
    thread.join()
    assert [event for batch in machine.of_type(EngineEvents) for event in batch.events] == list(range(2000))
    await host.close()


# -- jobs --------------------------------------------------------------------------------------------------------------
@dataclass
class Append:
    """Appends to the memory; waits for a gate if given one."""

    value: int
    gate: threading.Event | None = None

    def run(self, memory: list[int]) -> int:
        assert threading.current_thread() is not threading.main_thread()
        assert self.gate is None or self.gate.wait(5)
        memory.append(self.value)
        return self.value


class Fail:
    def run(self, memory: Any) -> Any:
        raise ZeroDivisionError("codec")


async def test_jobs_run_in_order_off_the_loop_and_always_answer() -> None:
    memory: list[int] = []
    machine = ScriptedMachine(lambda event: event if isinstance(event, list) else [])
    host = AsyncioHost(machine, StubTransport(), jobs=JobPool(threads=1, bound=2, memory=memory))
    host.start()
    host.deliver([Run(key, Append(key)) for key in range(20)] + [Run(20, Fail())])
    await wait_for(lambda: len(machine.of_type(JobDone)) == 21)
    assert memory == list(range(20))
    *good, bad = machine.of_type(JobDone)
    assert good == [JobDone(key, result=key) for key in range(20)]
    assert bad.key == 20 and isinstance(bad.error, ZeroDivisionError)
    await host.close()


async def test_at_most_the_bound_is_handed_to_the_threads() -> None:
    gate, memory, done = threading.Event(), list[int](), list[JobDone]()
    pool = JobPool(threads=1, bound=2, memory=memory)
    for key in range(10):
        pool.submit(Run(key, Append(key, gate)), done.append)
    assert (pool.outstanding, pool._in_threads) == (10, 2)
    gate.set()
    await wait_for(lambda: len(done) == 10)
    assert memory == list(range(10)) and pool.outstanding == 0
    await pool.close()


async def test_too_many_waiting_jobs_are_refused_one_by_one() -> None:
    gate, done = threading.Event(), list[JobDone]()
    pool = JobPool(threads=1, bound=1, memory=[])
    for key in range(70):
        pool.submit(Run(key, Append(key, gate)), done.append)
    gate.set()
    await wait_for(lambda: len(done) == 70)
    assert sorted(job.key for job in done if job.error) == list(range(65, 70))
    await pool.close()


async def test_closing_the_pool_waits_for_writers_and_answers_the_rest() -> None:
    gate, memory, done = threading.Event(), list[int](), list[JobDone]()
    pool = JobPool(threads=1, bound=1, memory=memory)
    for key in range(3):
        pool.submit(Run(key, Append(key, gate)), done.append)
    closing = asyncio.create_task(pool.close())
    await wait_for(lambda: len(done) == 2)
    assert not closing.done() and [job.key for job in done] == [1, 2]
    gate.set()
    await closing
    pool.submit(Run(9, Append(9)), done.append)
    await wait_for(lambda: len(done) == 4)
    assert memory == [0] and [job.key for job in done if job.error] == [1, 2, 9]


# -- failing closed ----------------------------------------------------------------------------------------------------
async def test_a_machine_that_raises_stops_its_host(caplog: pytest.LogCaptureFixture) -> None:
    def reply(event: Any) -> Sequence[Any]:
        if event == "poison":
            raise KeyError("a bug")
        return ()

    machine, crashes, link = ScriptedMachine(reply), list[Exception](), StubLink()
    host = AsyncioHost(machine, StubTransport(), on_crash=crashes.append)
    host.start()
    handler = host.accept(link, b"")
    host.deliver("poison")
    assert host.crashes == 1 and isinstance(crashes[0], KeyError)
    assert "a bug" in caplog.text and "Traceback" in caplog.text
    assert link.closed == ["crashed"]
    handler.on_message(b"ignored")
    handler.on_lost("crashed")
    assert machine.events[-1] == "poison"
    await host.close()


@pytest.mark.parametrize("action", [Command("no engine"), Run(1, Fail()), Dial("peer", "twice", b"")])
async def test_actions_the_host_cannot_carry_out_are_bugs(action: Any) -> None:
    host = AsyncioHost(ScriptedMachine(lambda event: [action, action]), StubTransport())
    host.start()
    assert host.crashes == 1
    await host.close()


async def test_after_close_nothing_is_stepped_and_late_links_are_refused() -> None:
    machine, link = ScriptedMachine(), StubLink()
    host = AsyncioHost(machine, StubTransport())
    host.start()
    await host.close()
    host.deliver("late")
    host.deliver_engine_events(["late"])
    host.accept(link, b"late")
    await host.close()
    assert machine.events == [Started()] and link.closed[0] == "host_stopped"
