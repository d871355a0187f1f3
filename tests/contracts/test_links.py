"""The contract of `engine.base.link`, for every transport: memory in virtual time, grpc over real loopback sockets.

Nothing here sleeps: `until` lets virtual time pass, or waits for the next callback of a real link.
"""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from engine.base import limits
from engine.base.link import Link, LinkHandler, Transport
from engine.base.virtual_host import VirtualWorld
from kv_transfer.transports import SLOW_READER, UNSENT_BYTES_MAX
from kv_transfer.transports.grpc import GrpcTransport
from kv_transfer.transports.memory import MemoryNetwork, MemoryTransport

HELLO = b"hello from the dialler"
GIVE_UP_S = 10


class End:
    """Records what one end of a link hears, and checks what must hold at every moment."""

    link: Link

    def __init__(self, changed: Callable[[], None], violations: list[str]) -> None:
        self.messages: list[bytes] = []
        self.losses: list[str] = []
        self.hello: bytes | None = None
        self.opened = False
        self.calling_out = False
        self.on_each: Callable[[bytes], None] | None = None
        self._changed = changed
        self._violations = violations

    def check(self, holds: bool, what: str) -> None:
        """Noted, not raised: a transport may well survive a handler that raises."""
        if not holds:
            self._violations.append(what)

    def on_open(self) -> None:
        self.check(not self.opened and not self.losses, "opened twice, or after on_lost")
        self.opened = True
        self._changed()

    def on_message(self, message: bytes) -> None:
        self.check(not self.losses, "delivered after on_lost")
        self.check(message != b"", "a keep-alive was delivered")
        self.check(not self.calling_out, "delivered from inside send or close")
        self.messages.append(bytes(message))
        if self.on_each:
            self.on_each(message)
        self._changed()

    def on_lost(self, reason: str) -> None:
        self.check(not self.calling_out, "lost from inside send or close")
        self.check(not self.losses, "lost twice")
        self.losses.append(reason)
        self._changed()

    def send(self, *messages: bytes) -> None:
        self.calling_out = True
        for message in messages:
            self.link.send(message)
        self.calling_out = False

    def close(self, reason: str = "done") -> None:
        self.calling_out = True
        self.link.close(reason)
        self.calling_out = False


class Net:
    """Two processes, "near" dialling and "far" listening."""

    near: Transport
    far: Transport
    far_address: str
    nobody: str

    def __init__(self) -> None:
        self.accepted: list[End] = []
        self.violations: list[str] = []
        self.on_accept: Callable[[End], None] = lambda end: None

    def changed(self) -> None:
        """Some end heard something."""

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let things happen until it holds; fail if it never does."""
        raise NotImplementedError

    async def settle(self) -> None:
        """Let everything under way happen. The last act of a test."""
        raise NotImplementedError

    def cut(self) -> None:
        """Break the connection under the link."""
        raise NotImplementedError

    def accept(self, link: Link, hello: bytes) -> LinkHandler:
        end = End(self.changed, self.violations)
        end.link, end.hello = link, hello
        self.accepted.append(end)
        self.on_accept(end)
        self.changed()
        return end

    def dial(self, address: str | None = None) -> End:
        end = End(self.changed, self.violations)
        end.link = self.near.dial(address or self.far_address, HELLO, end, end.on_open)
        return end

    async def open(self) -> tuple[End, End]:
        near = self.dial()
        await self.until(lambda: near.opened and bool(self.accepted))
        return near, self.accepted[-1]


class MemoryNet(Net):
    far_address, nobody = "far", "nobody"

    def __init__(self) -> None:
        super().__init__()
        self.world = VirtualWorld()
        self.network = MemoryNetwork(self.world, MemoryNetwork.Config(latency_us=150, bytes_per_second=1 << 30))
        self.near, self.far = MemoryTransport(self.network, "near"), MemoryTransport(self.network, "far")
        self.far.listen("far", self.accept)

    async def until(self, condition: Callable[[], bool]) -> None:
        assert self.world.run(until=condition, until_us=self.world.now_us + GIVE_UP_S * 1_000_000)

    async def settle(self) -> None:
        self.world.run()

    def cut(self) -> None:
        self.network.reset("near", "far")

    async def close(self) -> None:
        self.near.close()
        self.far.close()
        self.world.run()
        assert self.network.open_ends == 0


class Proxy:
    """A TCP relay whose connections can be torn."""

    def __init__(self) -> None:
        self._writers: list[asyncio.StreamWriter] = []
        self._pumps: set[asyncio.Task[None]] = set()

    async def start(self, target_port: int) -> int:
        self._target_port = target_port
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    def tear(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def close(self) -> None:
        self._server.close()
        self.tear()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        self._writers += [writer, onward_writer]
        for source, sink in ((reader, onward_writer), (onward_reader, writer)):
            pump = asyncio.create_task(self._pump(source, sink))
            self._pumps.add(pump)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.transport.abort() if sink.is_closing() else sink.close()


class GrpcNet(Net):
    nobody = "127.0.0.1:1"

    def __init__(self) -> None:
        super().__init__()
        self._heard = asyncio.Event()
        self._proxy = Proxy()
        self.near, self.far = GrpcTransport(), GrpcTransport()
        self.far.listen("127.0.0.1:0", self.accept)

    async def start(self) -> None:
        await self.far.start()
        assert self.far.port is not None
        self.far_address = f"127.0.0.1:{await self._proxy.start(self.far.port)}"

    def changed(self) -> None:
        self._heard.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(GIVE_UP_S):
            while not condition():
                await self._heard.wait()
                self._heard.clear()

    async def settle(self) -> None:
        await self.close()

    def cut(self) -> None:
        self._proxy.tear()

    async def close(self) -> None:
        await self.near.close()
        await self.far.close()
        await self._proxy.close()


async def open_grpc() -> GrpcNet:
    net = GrpcNet()
    await net.start()
    return net


@pytest.fixture(params=["memory", "grpc"])
async def net(request: pytest.FixtureRequest) -> AsyncIterator[Net]:
    net: MemoryNet | GrpcNet = MemoryNet() if request.param == "memory" else await open_grpc()
    yield net
    await net.close()
    assert net.violations == []


def pause_reading(end: End) -> None:
    end.link.pause_reading()  # type: ignore[attr-defined]


def resume_reading(end: End) -> None:
    end.link.resume_reading()  # type: ignore[attr-defined]


def numbered(count: int) -> list[bytes]:
    return [f"message {index}".encode() for index in range(count)]


# -- delivery ----------------------------------------------------------------------------------------------------------
async def test_hello_is_the_first_thing_the_peer_sees(net: Net) -> None:
    near = net.dial()
    near.send(b"sent before the link was open")
    await net.until(lambda: bool(net.accepted) and bool(net.accepted[0].messages))
    assert net.accepted[0].hello == HELLO
    assert net.accepted[0].messages == [b"sent before the link was open"]


async def test_messages_arrive_whole_and_in_order_both_ways(net: Net) -> None:
    near, far = await net.open()
    near.send(*numbered(500))
    far.send(*numbered(300))
    await net.until(lambda: len(far.messages) >= 500 and len(near.messages) >= 300)
    assert (far.messages, near.messages) == (numbered(500), numbered(300))


async def test_the_accepting_end_may_speak_first(net: Net) -> None:
    net.on_accept = lambda end: end.link.send(b"welcome")
    near = net.dial()
    await net.until(lambda: bool(near.messages))
    assert near.opened and near.messages == [b"welcome"]


@pytest.mark.parametrize("size", [1, limits.FRAME_PAYLOAD_BYTES_MAX + 200, limits.MESSAGE_BYTES_MAX])
async def test_a_message_of_any_allowed_size_arrives_unchanged(net: Net, size: int) -> None:
    near, far = await net.open()
    big = bytes(range(251)) * (size // 251 + 1)
    near.send(big[:size], b"after")
    await net.until(lambda: len(far.messages) == 2)
    assert far.messages == [big[:size], b"after"]


async def test_a_larger_message_is_the_senders_bug(net: Net) -> None:
    near, far = await net.open()
    with pytest.raises(ValueError, match="at most"):
        near.link.send(bytes(limits.MESSAGE_BYTES_MAX + 1))
    near.send(b"the link lives")
    await net.until(lambda: far.messages == [b"the link lives"])


async def test_keepalives_are_never_delivered(net: Net) -> None:
    near, far = await net.open()
    near.send(b"", b"one", b"", b"", b"two")
    await net.until(lambda: len(far.messages) == 2)
    assert far.messages == [b"one", b"two"]


async def test_keepalives_are_heard_by_a_listener_that_asks(net: Net) -> None:
    class Listener(End):
        heard = 0

        def on_keepalive(self) -> None:
            self.heard += 1
            self._changed()

    _, far = await net.open()
    listener = Listener(net.changed, net.violations)
    listener.link = net.near.dial(net.far_address, HELLO, listener, listener.on_open)
    await net.until(lambda: len(net.accepted) == 2)
    far = net.accepted[1]
    far.send(b"", b"")
    await net.until(lambda: listener.heard == 2)


async def test_links_do_not_mix(net: Net) -> None:
    first, first_far = await net.open()
    second, second_far = await net.open()
    first.send(b"1")
    second.send(b"2")
    first.close()
    await net.until(lambda: bool(first_far.losses) and bool(second_far.messages))
    assert second_far.messages == [b"2"] and not second_far.losses


# -- endings -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("closer", ["near", "far"])
async def test_close_ends_both_ends_once(net: Net, closer: str) -> None:
    ends = dict(zip(("near", "far"), await net.open(), strict=True))
    ends[closer].close("done")
    ends[closer].close("again")
    await net.until(lambda: all(end.losses for end in ends.values()))
    await net.settle()
    assert ends[closer].losses == ["done"]
    assert [len(end.losses) for end in ends.values()] == [1, 1]


@pytest.mark.parametrize("closer", ["near", "far"])
async def test_what_was_sent_before_a_close_still_leaves(net: Net, closer: str) -> None:
    ends = dict(zip(("near", "far"), await net.open(), strict=True))
    other = ends["far" if closer == "near" else "near"]
    ends[closer].send(*numbered(50))
    ends[closer].close()
    await net.until(lambda: bool(other.losses))
    assert other.messages == numbered(50)


async def test_both_ends_may_close_at_once(net: Net) -> None:
    near, far = await net.open()
    near.close("near")
    far.close("far")
    await net.until(lambda: bool(near.losses and far.losses))
    await net.settle()
    assert (near.losses, far.losses) == (["near"], ["far"])


async def test_a_broken_connection_is_a_loss_for_both(net: Net) -> None:
    near, far = await net.open()
    net.cut()
    await net.until(lambda: bool(near.losses and far.losses))
    await net.settle()
    assert (len(near.losses), len(far.losses)) == (1, 1)


async def test_a_broken_connection_delivers_a_prefix(net: Net) -> None:
    near, far = await net.open()
    far.on_each = lambda message: net.cut() if message == numbered(200)[100] else None
    near.send(*numbered(200))
    await net.until(lambda: bool(near.losses and far.losses))
    await net.settle()
    assert len(far.messages) > 100 and far.messages == numbered(200)[: len(far.messages)]


@pytest.mark.parametrize("closer", ["near", "far"])
async def test_nothing_is_delivered_after_an_own_close(net: Net, closer: str) -> None:
    ends = dict(zip(("near", "far"), await net.open(), strict=True))
    other = ends["far" if closer == "near" else "near"]
    other.send(*numbered(200))
    ends[closer].on_each = lambda message: ends[closer].link.close("enough") if message == b"message 10" else None
    await net.until(lambda: bool(ends[closer].losses and other.losses))
    await net.settle()
    assert ends[closer].messages == numbered(11)


async def test_send_and_close_after_a_loss_do_nothing(net: Net) -> None:
    near, far = await net.open()
    far.close()
    await net.until(lambda: bool(near.losses))
    near.send(b"too late")
    near.close("too late")
    await net.settle()
    assert len(near.losses) == 1 and far.messages == []


async def test_an_effect_may_precede_a_loss_without_an_answer(net: Net) -> None:
    """Failed while executing: the peer did the work, the link died before the reply. The sender cannot tell."""
    near, far = await net.open()
    effects: list[bytes] = []

    def execute(message: bytes) -> None:
        effects.append(message)
        net.cut()
        far.link.send(b"done")

    far.on_each = execute
    near.send(b"do it")
    await net.until(lambda: bool(near.losses and far.losses))
    await net.settle()
    assert effects == [b"do it"] and near.messages == [] and len(near.losses) == 1


# -- opening -----------------------------------------------------------------------------------------------------------
async def test_dialling_nobody_is_a_loss(net: Net) -> None:
    near = net.dial(net.nobody)
    near.send(b"anybody?")
    await net.until(lambda: bool(near.losses))
    assert near.losses == ["unreachable"] and not near.opened


async def test_close_while_dialling_is_one_loss(net: Net) -> None:
    near = net.dial()
    near.close("changed my mind")
    await net.until(lambda: bool(near.losses))
    await net.settle()
    assert near.losses == ["changed my mind"] and not near.opened
    assert all(len(end.losses) == 1 for end in net.accepted)


async def test_a_link_closed_while_it_is_accepted_is_lost_on_both_ends(net: Net) -> None:
    def refuse(end: End) -> None:
        end.send(b"here is why")
        end.close("not welcome")

    net.on_accept = refuse
    near = net.dial()
    await net.until(lambda: bool(near.losses) and bool(net.accepted[0].losses))
    assert net.accepted[0].losses == ["not welcome"] and len(near.losses) == 1
    assert near.opened and near.messages == [b"here is why"]


# -- slow readers ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("slow", ["near", "far"])
async def test_a_reader_that_pauses_gets_everything_when_it_resumes(net: Net, slow: str) -> None:
    ends = dict(zip(("near", "far"), await net.open(), strict=True))
    other = ends["far" if slow == "near" else "near"]
    pause_reading(ends[slow])
    other.send(*[bytes([index]) * (1 << 20) for index in range(20)])
    await net.open()  # meanwhile others get through
    assert len(ends[slow].messages) <= 1, "at most the read that was under way"
    resume_reading(ends[slow])
    await net.until(lambda: len(ends[slow].messages) == 20)
    assert [message[0] for message in ends[slow].messages] == list(range(20)) and not other.losses


@pytest.mark.parametrize("slow", ["near", "far"])
async def test_a_peer_that_does_not_read_is_lost_by_bytes(net: Net, slow: str) -> None:
    ends = dict(zip(("near", "far"), await net.open(), strict=True))
    other = ends["far" if slow == "near" else "near"]
    pause_reading(ends[slow])
    other.send(*[bytes(1 << 20)] * 20)
    await net.open()  # by now the first of them is stuck on the way
    assert not other.losses
    other.send(*[bytes(1 << 20)] * (UNSENT_BYTES_MAX >> 20))
    await net.until(lambda: bool(other.losses))
    assert other.losses == [SLOW_READER]
    resume_reading(ends[slow])
    await net.until(lambda: bool(ends[slow].losses))


async def test_a_queue_over_its_bound_is_lost_by_messages(net: Net) -> None:
    near, far = await net.open()
    pause_reading(far)
    near.send(*[b"x"] * (limits.LINK_QUEUE_MESSAGES_MAX + 1))
    assert not near.losses, "never from inside send"
    await net.until(lambda: bool(near.losses))
    assert near.losses == [SLOW_READER]


async def test_what_has_been_read_counts_no_more(net: Net) -> None:
    near, far = await net.open()
    message = bytes(limits.MESSAGE_BYTES_MAX)
    for count in range(1, 2 + UNSENT_BYTES_MAX // len(message)):
        near.send(message)
        await net.until(lambda count=count: len(far.messages) == count)
    assert not near.losses


async def test_a_full_queue_within_its_bound_is_delivered(net: Net) -> None:
    near, far = await net.open()
    near.send(*[b"x"] * limits.LINK_QUEUE_MESSAGES_MAX)
    await net.until(lambda: len(far.messages) == limits.LINK_QUEUE_MESSAGES_MAX)
    assert not near.losses and not far.losses


# -- transports --------------------------------------------------------------------------------------------------------
async def test_closing_a_transport_ends_its_links_for_the_peer(net: Net) -> None:
    near, far = await net.open()
    closed = net.far.close()  # type: ignore[attr-defined]
    if closed is not None:
        await closed
    await net.until(lambda: bool(near.losses and far.losses))
    late = net.dial()
    await net.until(lambda: bool(late.losses))
    assert far.losses == ["transport_closed"] and not late.opened
