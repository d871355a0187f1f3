"""The memory transport: links between virtual processes, with latency, bandwidth, and faults on request.

A link behaves as TCP would: order holds, a partition delays what it does not outlive, and only a reset, a close or
silence ends it. Whatever breaks that contract (loss, repeats, reordering, corruption *within* a live link) comes from
the `Faults` hook alone, so that a test says which promise it takes away.

    sender --send--> [ bandwidth, then latency ] --> [ arrived, held by a cut or a paused reader ] --> handler
                     '------------- unread: bounded as an unsent queue is bounded in production -------------'
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from engine.base import limits
from engine.base.keepalive import KeepAliveListener
from engine.base.link import Accept, LinkHandler
from engine.base.virtual_host import Callback, VirtualProcess, VirtualWorld
from kv_transfer.transports import PEER_CLOSED, RESET, SLOW_READER, UNREACHABLE, is_slow_reader, require_sendable

Delivery = tuple[int, bytes] | tuple[int, bytes, bool]
"""(extra_delay_us, message[, may_be_overtaken]). A delayed message holds up those behind it unless it may be
overtaken."""


class Faults(Protocol):
    """What a hostile or broken path does to one message of a live link."""

    def on_message(self, now_us: int, source: str, target: str, hello: bytes, message: bytes) -> Sequence[Delivery]:
        """What arrives instead: nothing (dropped), two (duplicated), other bytes (corrupted), later (delayed).

        `hello` is the one the link was dialled with: it tells control from bulk. Keep-alives (empty) come by too.
        """


class MemoryNetwork:
    """All links of one world, and the weather between its addresses."""

    @dataclass(frozen=True, slots=True)
    class Config:
        latency_us: int = 200
        bytes_per_second: int | None = None  # of each direction of each link; None: unlimited

        def __post_init__(self) -> None:
            if self.latency_us < 0 or (self.bytes_per_second is not None and self.bytes_per_second <= 0):
                raise ValueError(f"need latency_us >= 0 and bytes_per_second > 0, got {self}")

    def __init__(self, world: VirtualWorld, config: Config, faults: Faults | None = None) -> None:
        self.world = world
        self.config = config
        self.faults = faults
        self._listeners: dict[str, tuple[MemoryTransport, Accept]] = {}
        self._cuts: set[tuple[str, str]] = set()
        self._ends: dict[_End, None] = {}  # open ends in the order of opening; a dict, because sets have no order

    def cut(self, source: str, target: str, *, one_way: bool = False) -> None:
        """Nothing passes from now on, and nobody is told: only silence shows it."""
        self._cuts.add((source, target))
        if not one_way:
            self._cuts.add((target, source))

    def heal(self, source: str, target: str) -> None:
        """Both ways. What waited arrives, on links that outlived the cut (TCP resends)."""
        self._cuts -= {(source, target), (target, source)}
        for end in tuple(self._ends):
            end.outgoing.flush()

    def reset(self, source: str, target: str) -> None:
        """Break every link between the two; both ends hear of it at once."""
        for end in tuple(self._ends):
            if {end.address, end.peer.address} == {source, target}:
                self.world.schedule(0, partial(end.process.run, partial(end.lose, RESET)))

    def is_cut(self, source: str, target: str) -> bool:
        return (source, target) in self._cuts

    @property
    def open_ends(self) -> int:
        """Link ends not yet lost; 0 when everything was given back (reliability I7)."""
        return len(self._ends)


class MemoryTransport:
    """One virtual process's way to the network."""

    def __init__(self, network: MemoryNetwork, address: str) -> None:
        self.address = address
        self.process = VirtualProcess(network.world)
        self._network = network

    def listen(self, address: str, accept: Accept) -> None:
        if address in self._network._listeners:
            raise ValueError(f"address in use: {address}")
        self._network._listeners[address] = (self, accept)

    def dial(self, address: str, hello: bytes, handler: LinkHandler, on_open: Callable[[], None]) -> "_End":
        listener = self._network._listeners.get(address)
        target = listener[0].address if listener else address
        near = _End(self._network, self.process, self.address, hello)
        far = _End(self._network, listener[0].process if listener else self.process, target, hello)
        near.connect(far)
        near.attach(handler)
        self.process.schedule(limits.DIAL_TIMEOUT_MS * 1000, near.give_up_dialling)
        if listener is None:
            self.process.schedule(2 * self._network.config.latency_us, near.give_up_dialling)
        else:
            near.outgoing.carry(len(hello), partial(far.be_dialled, listener[1], on_open))
        return near

    def close(self) -> None:
        """Stop listening and end every link, in good order."""
        self._unlisten()
        for end in self._own_ends():
            end.close("transport_closed")

    def abandon(self, detected_after_us: int | None) -> None:
        if detected_after_us is not None:
            self._unlisten()  # a dead machine refuses nobody: dialling it takes the whole timeout
        for end in self._own_ends():
            end.vanish(detected_after_us)

    def _own_ends(self) -> list["_End"]:
        return [end for end in self._network._ends if end.process is self.process]

    def _unlisten(self) -> None:
        listeners = self._network._listeners
        for address in [address for address, (owner, _) in listeners.items() if owner is self]:
            del listeners[address]


class _Pipe:
    """One direction of one link."""

    def __init__(self, network: MemoryNetwork, source: "_End", target: "_End") -> None:
        self._network = network
        self._source = source
        self._target = target
        self._sent_until_us = 0  # the wire is busy until then
        self._last_arrival_us = 0  # nothing arrives before it, unless a fault lets it
        self._arrived: deque[tuple[int, Callback]] = deque()  # held by a cut or a paused reader
        self.unread_messages = 0
        self.unread_bytes = 0
        self.paused = False

    def carry(self, size_bytes: int, deliver: Callback, extra_us: int = 0, may_be_overtaken: bool = False) -> None:
        """Deliver it after bandwidth, latency and the extra delay, behind everything carried before."""
        world, config = self._network.world, self._network.config
        self._sent_until_us = max(world.now_us, self._sent_until_us) + _wire_time_us(size_bytes, config)
        arrival_us = max(self._sent_until_us + config.latency_us + extra_us, self._last_arrival_us)
        if not may_be_overtaken:
            self._last_arrival_us = arrival_us
        self.unread_messages += 1
        self.unread_bytes += size_bytes
        world.schedule(arrival_us - world.now_us, partial(self._arrive, size_bytes, deliver))

    def flush(self) -> None:
        while self._arrived and not self.paused and not self._is_cut():
            size_bytes, deliver = self._arrived.popleft()
            self.unread_messages -= 1
            self.unread_bytes -= size_bytes
            self._target.process.run(deliver)

    def overtake(self, delay_us: int, deliver: Callback) -> None:
        """For a reset, which does not queue behind data. It too is lost in a cut."""

        def arrive() -> None:
            if not self._is_cut():
                self._target.process.run(deliver)

        self._network.world.schedule(delay_us + self._network.config.latency_us, arrive)

    def _arrive(self, size_bytes: int, deliver: Callback) -> None:
        self._arrived.append((size_bytes, deliver))
        self.flush()

    def _is_cut(self) -> bool:
        return self._network.is_cut(self._source.address, self._target.address)


def _wire_time_us(size_bytes: int, config: MemoryNetwork.Config) -> int:
    if config.bytes_per_second is None:
        return 0
    return -(-size_bytes * 1_000_000 // config.bytes_per_second)


class _End:
    """One end of a link."""

    peer: "_End"
    outgoing: _Pipe

    def __init__(self, network: MemoryNetwork, process: VirtualProcess, address: str, hello: bytes) -> None:
        self.process = process
        self.address = address
        self._network = network
        self._hello = hello
        self._handler: LinkHandler | None = None  # None: the accepting end, before the dial has arrived
        self._listener: KeepAliveListener | None = None
        self._opened = False
        self._ended = False

    def connect(self, far: "_End") -> None:
        self.peer, far.peer = far, self
        self.outgoing = _Pipe(self._network, self, far)
        far.outgoing = _Pipe(self._network, far, self)

    def attach(self, handler: LinkHandler) -> None:
        self._handler = handler
        self._listener = handler if isinstance(handler, KeepAliveListener) else None
        self._network._ends[self] = None

    # -- opening -------------------------------------------------------------------------------------------------------
    def be_dialled(self, accept: Accept, on_open: Callable[[], None]) -> None:
        """The hello has arrived. The dialler hears `on_open` before anything that `accept` may send."""
        if self._ended or self.peer._ended:  # the dialler gave up: a closed socket resends no hello
            return
        self.outgoing.carry(0, partial(self.peer._open, on_open))
        self._opened = True
        self.attach(accept(self, self._hello))

    def _open(self, on_open: Callable[[], None]) -> None:
        if not self._ended:
            self._opened = True
            on_open()

    def give_up_dialling(self) -> None:
        if not self._opened and not self._ended:
            self.outgoing.overtake(0, partial(self.peer.lose, RESET))
            self.lose(UNREACHABLE)

    # -- Link ----------------------------------------------------------------------------------------------------------
    def send(self, message: bytes) -> None:
        require_sendable(message)
        if self._ended:
            return
        for delivery in self._through_faults(message):
            self._launch(*delivery)
        if is_slow_reader(self.outgoing.unread_messages, self.outgoing.unread_bytes):
            self._end_later(SLOW_READER)
            self.outgoing.overtake(0, partial(self.peer.lose, RESET))

    def close(self, reason: str) -> None:
        """The peer hears of it after what was sent before."""
        if not self._ended:
            self._end_later(reason)
            self.outgoing.carry(0, partial(self.peer.lose, PEER_CLOSED))

    def pause_reading(self) -> None:
        """Take nothing more from the network, as a stalled process would."""
        self.peer.outgoing.paused = True

    def resume_reading(self) -> None:
        self.peer.outgoing.paused = False
        self.peer.outgoing.flush()

    # -- endings -------------------------------------------------------------------------------------------------------
    def lose(self, reason: str) -> None:
        """End this end now. Never called from inside `send` or `close`."""
        if not self._ended:
            self._ended = True
            self._report(reason)

    def vanish(self, detected_after_us: int | None) -> None:
        """Our process died: nobody to report to here."""
        self._ended = True
        self._network._ends.pop(self, None)
        if detected_after_us is not None:
            self.outgoing.overtake(detected_after_us, partial(self.peer.lose, RESET))

    def _end_later(self, reason: str) -> None:
        self._ended = True
        self.process.schedule(0, partial(self._report, reason))

    def _report(self, reason: str) -> None:
        self._network._ends.pop(self, None)
        if self._handler is not None:
            self._handler.on_lost(reason)

    # -- messages ------------------------------------------------------------------------------------------------------
    def _through_faults(self, message: bytes) -> Sequence[Delivery]:
        if self._network.faults is None:
            return ((0, message),)
        now_us = self._network.world.now_us
        return self._network.faults.on_message(now_us, self.address, self.peer.address, self._hello, message)

    def _launch(self, extra_us: int, message: bytes, may_be_overtaken: bool = False) -> None:
        self.outgoing.carry(len(message), partial(self.peer._receive, message), extra_us, may_be_overtaken)

    def _receive(self, message: bytes) -> None:
        if self._ended or self._handler is None:
            return
        if message:
            self._handler.on_message(message)
        elif self._listener is not None:
            self._listener.on_keepalive()
