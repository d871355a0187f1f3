"""Machines and the events and actions between a machine and its host.

A *machine* is policy: `step(event, now_us) -> actions`. It has no clock, socket, tensor, thread or randomness of its
own (a seeded `random.Random` is passed in where ids are minted). A *host* is mechanism: it owns the clock, the links,
the jobs and the engine, and it carries actions out. `AsyncioHost` does so for real, `VirtualHost` in virtual time; the
machines cannot tell which, which is what makes a virtual run evidence about the production code.

    event  -> Started | LinkUp | Received | LinkLost | JobDone | EngineEvents | Tick, or a machine's own input type
    action -> Dial | Send | Close | Run | Command, or a machine's own output type (handed to the host's owner)

Links are named by the machine that dials ("controller", "worker/ab12") and by the host for inbound ones ("in/7").
A name is used once per opening: after `LinkLost(name)` nothing more arrives under it until it is dialled again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

LinkName = str


# -- events ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Started:
    """First event of every machine."""


@dataclass(frozen=True, slots=True)
class LinkUp:
    """A dialled link opened (`hello` is empty) or a peer dialled us (`hello` is what it sent first)."""

    link: LinkName
    hello: bytes = b""


@dataclass(frozen=True, slots=True)
class Received:
    link: LinkName
    message: bytes


@dataclass(frozen=True, slots=True)
class LinkLost:
    """Exactly once per link, also after our own `Close` and after a `Dial` that failed."""

    link: LinkName
    reason: str


@dataclass(frozen=True, slots=True)
class JobDone:
    """A `Run` finished. Exactly one of `result` and `error` is set."""

    key: int
    result: Any = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class EngineEvents:
    """What the engine reported since last time, in order (see `engine.commands`)."""

    events: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Tick:
    """`next_deadline_us` has been reached (or passed, on a late host)."""


# -- actions ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Dial:
    link: LinkName
    address: str
    hello: bytes


@dataclass(frozen=True, slots=True)
class Send:
    link: LinkName
    message: bytes


@dataclass(frozen=True, slots=True)
class Close:
    link: LinkName
    reason: str


class Job(Protocol):
    """Work off the event loop: GIL-free calls only (numpy, zstd, numba nogil), bounded time and memory."""

    def run(self, memory: Any) -> Any:
        """`memory` is the worker's arenas. Runs on a codec thread, or at its completion time on a virtual host."""


@dataclass(frozen=True, slots=True)
class Run:
    """Run `job` on the bounded codec pool; `JobDone(key, ...)` follows, always."""

    key: int
    job: Job


@dataclass(frozen=True, slots=True)
class Command:
    """A command for the engine; answered, if at all, through `EngineEvents`."""

    command: Any


class Machine(Protocol):
    """Pure policy. Same events at the same times give the same actions, byte for byte."""

    def step(self, event: Any, now_us: int) -> Sequence[Any]: ...

    @property
    def next_deadline_us(self) -> int | None:
        """When to send `Tick` if nothing else happens first."""


class EnginePort(Protocol):
    """How a host reaches its worker's engine, whichever thread or virtual time that lives in."""

    def post(self, command: Any) -> None:
        """Queue a command; never blocks. Events come back through the host as `EngineEvents`."""
