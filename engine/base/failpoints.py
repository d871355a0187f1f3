"""Failpoints: named places in the code where a test can make a process die, freeze or raise (etcd's gofail).

    failpoints = Failpoints("prefill.near_turn=kill@3;decode.decoding=stop@10")
    failpoints.hit("prefill.near_turn")     the third call does not return

The names are declared here, so that "every failpoint fired" can be measured. Unarmed, `hit` is one test of an empty
dictionary. An object, not a global: two workers in one process have their own. Who may arm them is the launcher's
business; there is no way to do it over the network.
"""

import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

NAMES: Final = (
    "prefill.queued",
    "prefill.near_turn",
    "prefill.computing",
    "prefill.streaming",
    "prefill.end_sent",
    "decode.reserved",
    "decode.receiving",
    "decode.committed",
    "decode.decoding",
    "encode.queued",
    "encode.receiving",
    "encode.encoded",
    "encode.end_sent",
    "prefill.gathering",
)


class InjectedFault(Exception):
    """Raised on purpose. Production code treats it like any bug; virtual hosts can tell it from a real one."""


class Action(StrEnum):
    KILL = "kill"  # SIGKILL to ourselves: no clean-up of any kind
    STOP = "stop"  # SIGSTOP: frozen until somebody sends SIGCONT
    RAISE = "raise"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Arming:
    """Do this on the `on_hit`-th hit, once."""

    action: Action
    on_hit: int = 1


def signal_self(number: int) -> None:
    os.kill(os.getpid(), number)


class Failpoints:
    """The failpoints of one process (or of one virtual worker)."""

    def __init__(self, spec: str = "", *, send_signal: Callable[[int], None] = signal_self) -> None:
        self._armed = {name: arming for name, arming in parse(spec).items() if arming.action is not Action.OFF}
        self._hits: Counter[str] = Counter()
        self._send_signal = send_signal

    def hit(self, name: str) -> None:
        if self._armed:
            self._hit(name)

    @property
    def hits(self) -> dict[str, int]:
        """How often each was reached, while any was armed."""
        return dict(self._hits)

    def _hit(self, name: str) -> None:
        if name not in NAMES:
            raise ValueError(f"failpoint {name!r} is not declared")
        self._hits[name] += 1
        arming = self._armed.get(name)
        if arming is not None and self._hits[name] == arming.on_hit:
            self._fire(name, arming.action)

    def _fire(self, name: str, action: Action) -> None:
        if action is Action.RAISE:
            raise InjectedFault(f"failpoint {name}")
        self._send_signal(signal.SIGKILL if action is Action.KILL else signal.SIGSTOP)


def parse(spec: str) -> dict[str, Arming]:
    """`name=action[@n]`, joined by semicolons. A later term replaces an earlier one of the same name."""
    terms = [term.strip() for term in spec.split(";")]
    return dict(_parse_term(term) for term in terms if term)


def _parse_term(term: str) -> tuple[str, Arming]:
    name, _, what = term.partition("=")
    action, _, count = what.partition("@")
    if name not in NAMES:
        raise ValueError(f"failpoint {name!r} is not declared; one of {', '.join(NAMES)}")
    if action not in set(Action):
        raise ValueError(f"failpoint {name}: action must be one of {', '.join(Action)}, got {action!r}")
    if count and not (count.isdecimal() and int(count) >= 1):
        raise ValueError(f"failpoint {name}: @n must be a count from 1, got {count!r}")
    return name, Arming(Action(action), int(count or 1))
