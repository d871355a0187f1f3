"""VirtualWorld and VirtualHost: virtual time, frozen and killed processes, and one seed, one run."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from engine.base import limits
from engine.base.machine import (
    Close,
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
from engine.base.virtual_host import VirtualHost, VirtualWorld, describe
from kv_transfer.transports.memory import Delivery, MemoryNetwork, MemoryTransport

SILENCE_US = limits.LINK_SILENCE_MS * 1000
INTERVAL_US = limits.KEEPALIVE_INTERVAL_MS * 1000


@dataclass
class ScriptedMachine:
    """Records (time, event); answers each with what `reply` says."""

    reply: Callable[[Any], Sequence[Any]] = lambda event: ()
    seen: list[tuple[int, Any]] = field(default_factory=list)
    next_deadline_us: int | None = None

    def step(self, event: Any, now_us: int) -> Sequence[Any]:
        self.seen.append((now_us, event))
        if isinstance(event, Tick):
            self.next_deadline_us = None
        return self.reply(event)

    def events(self, kind: type) -> list[Any]:
        return [event for _, event in self.seen if isinstance(event, kind)]


class Pair:
    """ "near" dials "far" at once; both echo nothing."""

    def __init__(self, **network: Any) -> None:
        self.world = VirtualWorld()
        self.network = MemoryNetwork(self.world, MemoryNetwork.Config(**network))
        self.near_machine = ScriptedMachine(lambda e: [Dial("far", "far", b"")] if e == Started() else [])
        self.far_machine = ScriptedMachine()
        self.far_transport = MemoryTransport(self.network, "far")
        self.near = VirtualHost(self.world, "near", self.near_machine, MemoryTransport(self.network, "near"))
        self.far = VirtualHost(self.world, "far", self.far_machine, self.far_transport)
        self.far_transport.listen("far", self.far.accept)
        self.far.start()
        self.near.start()
        self.run_for(10_000)

    def run_for(self, duration_us: int) -> None:
        self.world.run(until_us=self.world.now_us + duration_us)

    def send(self, *messages: bytes) -> None:
        for message in messages:
            self.near._carry_out(Send("far", message))

    @property
    def received(self) -> list[bytes]:
        return [event.message for event in self.far_machine.events(Received)]

    @property
    def losses(self) -> tuple[list[str], list[str]]:
        near, far = (machine.events(LinkLost) for machine in (self.near_machine, self.far_machine))
        return [loss.reason for loss in near], [loss.reason for loss in far]


# -- the world ---------------------------------------------------------------------------------------------------------
def test_time_moves_from_one_callback_to_the_next_in_order_of_scheduling() -> None:
    world, order = VirtualWorld(), list[tuple[int, str]]()
    world.schedule(20, lambda: order.append((world.now_us, "late")))
    world.schedule(10, lambda: order.append((world.now_us, "first")))
    world.schedule(10, lambda: order.append((world.now_us, "second")))
    world.schedule(15, lambda: order.append((world.now_us, "never"))).cancel()
    assert world.run()
    assert order == [(10, "first"), (10, "second"), (20, "late")]


def test_run_stops_at_its_time_or_when_its_predicate_holds() -> None:
    world, calls = VirtualWorld(), list[int]()
    for delay_us in (10, 20, 30):
        world.schedule(delay_us, lambda: calls.append(world.now_us))
    assert world.run(until=lambda: len(calls) == 1) and world.now_us == 10
    assert world.run(until_us=25) and (calls, world.now_us) == ([10, 20], 25)
    assert not world.run(until=lambda: False) and calls == [10, 20, 30]


def test_a_deadline_that_never_moves_is_found() -> None:
    world = VirtualWorld()
    machine = ScriptedMachine(lambda event: setattr(machine, "next_deadline_us", 0) or ())
    host = VirtualHost(world, "stuck", machine, MemoryTransport(MemoryNetwork(world, MemoryNetwork.Config()), "stuck"))
    host.start()
    with pytest.raises(RuntimeError, match="time stands still"):
        world.run(until_us=1)


def test_a_machine_that_raises_fails_the_run() -> None:
    pair = Pair()
    pair.far_machine.reply = lambda event: 1 / 0
    pair.send(b"poison")
    with pytest.raises(ZeroDivisionError):
        pair.run_for(1000)
    assert pair.far.crashes == 1 and "! crashed" in pair.world.log[-1]


# -- hosts -------------------------------------------------------------------------------------------------------------
def test_ticks_come_at_the_deadline_of_the_hosts_own_clock() -> None:
    world = VirtualWorld()
    machine = ScriptedMachine(next_deadline_us=5_000_700)
    transport = MemoryTransport(MemoryNetwork(world, MemoryNetwork.Config()), "a")
    VirtualHost(world, "a", machine, transport, clock_offset_us=5_000_000).start()
    world.run()
    assert machine.seen == [(5_000_000, Started()), (5_000_700, Tick())]


def test_an_idle_link_stays_up_for_ever() -> None:
    pair = Pair()
    pair.run_for(3600 * 1_000_000)
    assert pair.losses == ([], []) and pair.received == []


def test_jobs_take_effect_when_they_end_one_after_the_other() -> None:
    class Append:
        def __init__(self, value: int) -> None:
            self.value = value

        def run(self, memory: list[tuple[int, int]]) -> int:
            memory.append((world.now_us, self.value))
            return self.value

    world, memory = VirtualWorld(), list[tuple[int, int]]()
    machine = ScriptedMachine(lambda e: [Run(k, Append(k)) for k in (1, 2, 3)] if e == Started() else [])
    transport = MemoryTransport(MemoryNetwork(world, MemoryNetwork.Config()), "a")
    host = VirtualHost(world, "a", machine, transport, memory=memory, job_us=lambda job: 100 * job.value)
    host.start()
    world.run(until_us=99)
    assert memory == []
    world.run()
    assert memory == [(100, 1), (300, 2), (600, 3)]
    assert machine.events(JobDone) == [JobDone(1, 1), JobDone(2, 2), JobDone(3, 3)]


def test_engine_events_of_one_instant_are_one_event() -> None:
    pair = Pair()
    pair.far.deliver_engine_events(["a", "b"])
    pair.far.deliver_engine_events(["c"])
    pair.run_for(1)
    pair.far.deliver_engine_events(["d"])
    pair.run_for(1)
    assert pair.far_machine.events(EngineEvents) == [EngineEvents(("a", "b", "c")), EngineEvents(("d",))]


# -- frozen and killed -------------------------------------------------------------------------------------------------
def test_a_short_freeze_delays_everything_and_loses_nothing() -> None:
    pair = Pair()
    pair.far.freeze(SILENCE_US // 2)
    pair.send(b"1", b"2", b"3")
    pair.run_for(SILENCE_US // 2 - 1)
    assert pair.received == []
    pair.run_for(10 * SILENCE_US)
    assert pair.received == [b"1", b"2", b"3"] and pair.losses == ([], [])


def test_a_frozen_peer_is_lost_by_silence_and_learns_so_when_it_wakes() -> None:
    pair = Pair()
    pair.far.freeze(30 * 1_000_000)
    pair.send(b"before the loss")
    pair.run_for(SILENCE_US + 2 * INTERVAL_US)
    assert pair.losses == (["silent"], [])
    pair.run_for(30 * 1_000_000)
    assert pair.received == [b"before the loss"], "what was received is processed before the loss"
    assert pair.losses == (["silent"], ["peer_closed"])


def test_a_woken_host_does_not_accuse_peers_that_kept_talking() -> None:
    """A peer patient enough to outlast the sleep, so that only the sleeper could end the link."""
    pair = Pair()
    pair.near._keeper._silence_us = 10**12  # the peer never gives up on us
    pair.far.freeze(30 * 1_000_000)
    pair.run_for(60 * 1_000_000)
    assert pair.losses == ([], [])


def test_a_frozen_host_runs_no_job_and_no_timer_until_it_wakes() -> None:
    pair = Pair()
    frozen_at_us = pair.world.now_us
    pair.far_machine.next_deadline_us = frozen_at_us + 1000
    pair.far.deliver("arm")
    pair.far.freeze(50_000)
    pair.run_for(100_000)
    assert [at_us for at_us, event in pair.far_machine.seen if event == Tick()] == [frozen_at_us + 50_000]


def test_a_killed_peer_is_lost_at_once_by_reset() -> None:
    pair = Pair(latency_us=100)
    pair.far.kill()
    pair.run_for(100)
    assert pair.losses == (["reset"], [])
    pair.near.deliver("redial")
    assert pair.network.open_ends == 0


def test_a_killed_machine_is_lost_by_silence_only() -> None:
    pair = Pair()
    pair.far.kill(detected_after_us=None)
    pair.send(b"into the void")
    pair.run_for(SILENCE_US - 2 * INTERVAL_US)
    assert pair.losses == ([], [])
    pair.run_for(4 * INTERVAL_US)
    assert pair.losses == (["silent"], []) and pair.received == []


def test_a_restart_listens_at_the_old_address() -> None:
    pair = Pair()
    pair.far.kill()
    machine, transport = ScriptedMachine(), MemoryTransport(pair.network, "far")
    host = VirtualHost(pair.world, "far'", machine, transport)
    transport.listen("far", host.accept)
    host.start()
    pair.run_for(10_000)
    pair.near._carry_out(Dial("far", "far", b"again"))
    pair.run_for(10_000)
    assert machine.events(LinkUp) == [LinkUp("in/1", b"again")]


def test_dialling_a_frozen_host_times_out() -> None:
    pair = Pair()
    pair.far.freeze()
    pair.near._carry_out(Dial("second", "far", b""))
    pair.run_for(limits.DIAL_TIMEOUT_MS * 1000)
    assert LinkLost("second", "unreachable") in pair.near_machine.events(LinkLost)


# -- the weather -------------------------------------------------------------------------------------------------------
def test_latency_and_bandwidth_add_up_per_direction() -> None:
    pair = Pair(latency_us=500, bytes_per_second=1_000_000)
    sent_us = pair.world.now_us
    pair.send(bytes(1000), bytes(2000))
    pair.run_for(10_000)
    arrivals = [at_us - sent_us for at_us, event in pair.far_machine.seen if isinstance(event, Received)]
    assert arrivals == [1000 + 500, 1000 + 2000 + 500]


def test_a_cut_that_heals_in_time_only_delays() -> None:
    pair = Pair()
    pair.network.cut("near", "far")
    pair.send(b"1", b"2")
    pair.run_for(SILENCE_US // 2)
    assert pair.received == []
    pair.network.heal("near", "far")
    pair.run_for(10 * SILENCE_US)
    assert pair.received == [b"1", b"2"] and pair.losses == ([], [])


def test_a_partition_is_found_by_silence_on_both_sides() -> None:
    pair = Pair()
    pair.network.cut("near", "far")
    pair.run_for(SILENCE_US + 2 * INTERVAL_US)
    assert pair.losses == (["silent"], ["silent"])


def test_a_one_way_partition_is_found_by_the_deaf_end_and_told_to_the_other() -> None:
    pair = Pair()
    pair.network.cut("near", "far", one_way=True)
    pair.run_for(SILENCE_US + 2 * INTERVAL_US)
    assert pair.losses == (["peer_closed"], ["silent"])


@pytest.mark.parametrize(
    ("deliveries", "arrives"),
    [
        ([], [b"1", b"3"]),
        ([(0, b"2"), (0, b"2")], [b"1", b"2", b"2", b"3"]),
        ([(0, b"X")], [b"1", b"X", b"3"]),
        ([(9000, b"2")], [b"1", b"2", b"3"]),
        ([(9000, b"2", True)], [b"1", b"3", b"2"]),
    ],
    ids=["drop", "duplicate", "corrupt", "delay keeps order", "overtaken on request"],
)
def test_faults_happen_to_the_message_the_hook_names(deliveries: list[Delivery], arrives: list[bytes]) -> None:
    class Second:
        def on_message(self, now_us: int, source: str, target: str, hello: bytes, message: bytes) -> list[Delivery]:
            return deliveries if (source, target, message) == ("near", "far", b"2") else [(0, message)]

    pair = Pair()
    pair.network.faults = Second()
    pair.send(b"1", b"2", b"3")
    pair.run_for(20_000)
    assert pair.received == arrives


# -- one seed, one run ---------------------------------------------------------------------------------------------
class Gossip:
    """Dials, sends, closes, redials and runs jobs, all drawn from its own seeded generator."""

    class Work:
        def run(self, memory: list[int]) -> int:
            memory.append(len(memory))
            return len(memory)

    def __init__(self, seed: int, peers: Sequence[str]) -> None:
        self._random = random.Random(seed)
        self._peers = peers
        self._up: list[str] = []
        self._dialled: set[str] = set()
        self._jobs = 0
        self.next_deadline_us: int | None = None

    def step(self, event: Any, now_us: int) -> Sequence[Any]:
        match event:
            case LinkUp(link=link):
                self._up.append(link)
            case LinkLost(link=link):
                self._up = [up for up in self._up if up != link]
                self._dialled.discard(link)
            case Started() | Tick():
                self.next_deadline_us = now_us + self._random.randrange(1000, 200_000)
                return self._act()
        return []

    def _act(self) -> Sequence[Any]:
        peer = self._random.choice(self._peers)
        if peer not in self._dialled:
            self._dialled.add(peer)
            return [Dial(peer, peer, b"gossip")]
        self._jobs += 1
        actions: list[Any] = [Send(up, self._random.randbytes(50)) for up in self._up]
        actions.append(Run(self._jobs, self.Work()))
        if self._up and self._random.random() < 0.05:
            actions.append(Close(self._random.choice(self._up), "bored"))
        return actions


def gossip_log(seed: int) -> list[str]:
    world = VirtualWorld(seed)
    network = MemoryNetwork(world, MemoryNetwork.Config(bytes_per_second=1 << 20))
    names = [f"host {index}" for index in range(4)]
    hosts: list[VirtualHost] = []
    for index, name in enumerate(names):
        transport = MemoryTransport(network, name)
        machine = Gossip(seed * 10 + index, [peer for peer in names if peer != name])
        hosts.append(VirtualHost(world, name, machine, transport, memory=[], clock_offset_us=index * 12_345))
        transport.listen(name, hosts[-1].accept)
    for host in hosts:
        host.start()
    for _ in range(20):
        world.schedule(world.random.randrange(20_000_000), lambda: world.random.choice(hosts).freeze(3_500_000))
    world.schedule(10_000_000, lambda: hosts[3].kill(detected_after_us=None))
    world.run(until_us=20_000_000)
    return world.log


def test_one_seed_is_one_run() -> None:
    first = gossip_log(7)
    assert len(first) > 2000 and any("LinkLost" in line for line in first)
    assert first == gossip_log(7)
    assert first != gossip_log(8)


def test_a_log_line_is_short_whatever_it_describes() -> None:
    assert (
        describe(Received("a", bytes(1 << 20)))
        == f"Received a {1 << 20}:{describe(Received('a', bytes(1 << 20)))[-16:]}"
    )
    assert len(describe(EngineEvents((list(range(100_000)),)))) < 300
    assert describe(Send("a", b"x")) != describe(Send("a", b"y"))
