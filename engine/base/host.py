"""Host: the part of a host that is the same for real and in virtual time.

It steps one machine, carries out what the machine asks for, names links and keeps them alive. What differs (the clock,
the timer, where jobs run, what a crash does) is left to `AsyncioHost` and `VirtualHost`, so that a virtual run is
evidence about the production code (DESIGN 3). It holds no policy: which peer to dial again is the machine's business.

Every event goes through `deliver`, one at a time. An event caused by carrying out an action waits behind the step that
caused it; a machine is never entered twice.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from engine.base.keepalive import KEEPALIVE, LinkKeeper
from engine.base.link import Link, LinkHandler, Transport
from engine.base.machine import (
    Close,
    Command,
    Dial,
    EngineEvents,
    EnginePort,
    LinkLost,
    LinkName,
    LinkUp,
    Machine,
    Received,
    Run,
    Send,
    Started,
    Tick,
)

Outputs = Callable[[Any], None]
"""Where a machine's own output types go: the host's owner."""


def ignore_output(action: Any) -> None:
    """For machines that speak only through links, jobs and the engine."""


class _HostLink:
    """One link end under the name that the machine knows it by."""

    __slots__ = ("_host", "_name", "link")

    def __init__(self, host: "Host", name: LinkName) -> None:
        self._host = host
        self._name = name
        self.link: Link | None = None

    def on_open(self) -> None:
        self._host._on_open(self._name, b"")

    def on_message(self, message: bytes) -> None:
        self._host._on_message(self._name, message)

    def on_keepalive(self) -> None:
        self._host._on_keepalive(self._name)

    def on_lost(self, reason: str) -> None:
        self._host._on_lost(self._name, reason)


class Host(ABC):
    """Drives one machine. Everything here runs on one thread (or at one virtual instant)."""

    def __init__(
        self,
        machine: Machine,
        transport: Transport,
        *,
        outputs: Outputs,
        engine: EnginePort | None,
        keepalive: LinkKeeper.Config,
    ) -> None:
        self._machine = machine
        self._transport = transport
        self._outputs = outputs
        self._engine = engine
        self._keeper = LinkKeeper(keepalive)
        self._links: dict[LinkName, _HostLink] = {}
        self._inbound = 0
        self._events: deque[Any] = deque()
        self._running = False  # between `start` and the end; events before it wait, events after it are dropped
        self._stopped = False
        self._stepping = False
        self.crashes = 0

    # -- what the owner calls ------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Deliver `Started`, then whatever arrived before it."""
        self._running = True
        self._events.appendleft(Started())
        self._drain()

    def deliver(self, event: Any) -> None:
        """Step the machine with this event, after those already waiting."""
        if not self._stopped:
            self._events.append(event)
            self._drain()

    def accept(self, link: Link, hello: bytes) -> LinkHandler:
        """The `Accept` to listen with: names the link "in/<n>" and tells the machine."""
        self._inbound += 1
        name = f"in/{self._inbound}"
        end = self._links[name] = _HostLink(self, name)
        end.link = link
        if self._stopped:
            link.close("host_stopped")
        self._on_open(name, hello)
        return end

    @property
    def link_names(self) -> Sequence[LinkName]:
        """Links that are open or being dialled; empty when idle and closed (reliability I7)."""
        return tuple(self._links)

    # -- what differs between hosts ------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def now_us(self) -> int: ...

    @abstractmethod
    def _arm(self, deadline_us: int | None) -> None:
        """Call `_on_timer` at this time, or a little later."""

    @abstractmethod
    def _start_job(self, run: Run) -> None:
        """Run it elsewhere; `deliver(JobDone)` follows."""

    @abstractmethod
    def _crashed(self, error: Exception) -> None:
        """The machine (or its owner's output) raised. Nothing will be stepped any more."""

    # -- stepping ------------------------------------------------------------------------------------------------------
    def _drain(self) -> None:
        if self._stepping or not self._running:
            return
        self._stepping = True
        try:
            while self._events and self._running:
                self._step(self._events.popleft())
        except Exception as error:  # a bug in the machine: fail closed rather than go on with a broken state
            self._stop("crashed")
            self.crashes += 1
            self._crashed(error)
        finally:
            self._stepping = False
        self._arm(self._next_deadline_us())

    def _step(self, event: Any) -> None:
        for action in self._machine.step(event, self.now_us):
            self._carry_out(action)

    def _carry_out(self, action: Any) -> None:
        match action:
            case Send(link=name, message=message):
                self._send(name, message)
            case Run():
                self._start_job(action)
            case Command(command=command):
                self._require_engine().post(command)
            case Dial():
                self._dial(action)
            case Close(link=name, reason=reason):
                self._close_link(name, reason)
            case _:
                self._outputs(action)

    def _require_engine(self) -> EnginePort:
        if self._engine is None:
            raise RuntimeError("the machine commands an engine, but its host has none")
        return self._engine

    def _stop(self, reason: str) -> None:
        """Step no more; end every link, so that no peer waits for a machine that is gone. Idempotent."""
        self._running = False
        self._stopped = True
        self._events.clear()
        self._arm(None)
        for name in self.link_names:
            self._close_link(name, reason)

    # -- links ---------------------------------------------------------------------------------------------------------
    def _dial(self, action: Dial) -> None:
        if action.link in self._links:
            raise RuntimeError(f"link name dialled while in use: {action.link}")
        end = self._links[action.link] = _HostLink(self, action.link)
        end.link = self._transport.dial(action.address, action.hello, end, end.on_open)

    def _send(self, name: LinkName, message: bytes) -> None:
        # An unknown name is a link whose loss waits in `_events`: the machine learns of it next.
        if (end := self._links.get(name)) and end.link:
            self._keeper.note_sent(name, self.now_us)
            end.link.send(message)

    def _close_link(self, name: LinkName, reason: str) -> None:
        if (end := self._links.get(name)) and end.link:
            end.link.close(reason)

    def _on_open(self, name: LinkName, hello: bytes) -> None:
        self._keeper.opened(name, self.now_us)
        self.deliver(LinkUp(name, hello))

    def _on_message(self, name: LinkName, message: bytes) -> None:
        self._keeper.note_received(name, self.now_us)
        self.deliver(Received(name, message))

    def _on_keepalive(self, name: LinkName) -> None:
        self._keeper.note_received(name, self.now_us)

    def _on_lost(self, name: LinkName, reason: str) -> None:
        self._keeper.lost(name)
        del self._links[name]
        self.deliver(LinkLost(name, reason))

    # -- time ----------------------------------------------------------------------------------------------------------
    def _next_deadline_us(self) -> int | None:
        if not self._running:
            return None
        deadlines = (self._machine.next_deadline_us, self._keeper.next_deadline_us)
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _on_timer(self) -> None:
        now_us = self.now_us
        self._keep_links(now_us)
        deadline_us = self._machine.next_deadline_us
        if self._running and deadline_us is not None and now_us >= deadline_us:
            self.deliver(Tick())
        else:
            self._arm(self._next_deadline_us())

    def _keep_links(self, now_us: int) -> None:
        pings, silent = self._keeper.poll(now_us)
        for name in pings:
            self._send(name, KEEPALIVE)
        for name in silent:
            self._close_link(name, "silent")

    def _take_engine_events(self, events: Sequence[Any]) -> None:
        if events:
            self.deliver(EngineEvents(tuple(events)))
