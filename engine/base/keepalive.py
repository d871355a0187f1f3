"""LinkKeeper: which idle links to ping, and which silent ones to give up.

Pure bookkeeping, used identically by both hosts. It knows names and times; it sends nothing and closes nothing.

A keep-alive proves that the peer's *event loop* runs (DESIGN 2.4): a long step on the engine thread is not a death.
The same holds for ourselves. A host that was stopped and woken (SIGSTOP, a suspended machine) finds every peer
"silent", while their messages wait unread in its own sockets. So a poll that comes late accuses nobody: each link gets
one more interval, in which the host reads what it already has (reliability A16).

    last received        + silence            poll came late: + interval
    |--------- alive ----|--------- lost      |-- reading --|--------- lost
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from engine.base import limits
from engine.base.machine import LinkName

KEEPALIVE = b""  # the empty message: never delivered, see engine.base.link


@runtime_checkable
class KeepAliveListener(Protocol):
    """What a `LinkHandler` also implements to hear of keep-alives, which `on_message` never delivers."""

    def on_keepalive(self) -> None: ...


@dataclass(slots=True)
class _Timing:
    """One open link. `patience_until_us` is the one extension since the peer was last heard."""

    sent_us: int
    received_us: int
    patience_until_us: int | None = None


class LinkKeeper:
    """Keep-alive and silence detection for all links of one host."""

    @dataclass(frozen=True, slots=True)
    class Config:
        interval_ms: int = limits.KEEPALIVE_INTERVAL_MS
        silence_ms: int = limits.LINK_SILENCE_MS

        def __post_init__(self) -> None:
            # With less than three intervals a host that overslept could not tell its own sleep from a peer's death:
            # the peer's last message and our own next poll may each lie almost a whole interval away.
            if self.interval_ms <= 0 or self.silence_ms < 3 * self.interval_ms:
                raise ValueError(f"need interval_ms > 0 and silence_ms >= 3 * interval_ms, got {self}")

    def __init__(self, config: Config) -> None:
        self._interval_us = config.interval_ms * 1000
        self._silence_us = config.silence_ms * 1000
        # Polls lie at least this far apart, so that a thousand links with a thousand phases cost four scans a second.
        self._slack_us = self._interval_us // 4
        self._links: dict[LinkName, _Timing] = {}
        self._next_poll_us: int | None = None

    @property
    def next_deadline_us(self) -> int | None:
        return self._next_poll_us

    def opened(self, link: LinkName, now_us: int) -> None:
        self._links[link] = _Timing(sent_us=now_us, received_us=now_us)
        due_us = now_us + self._interval_us
        self._next_poll_us = due_us if self._next_poll_us is None else min(self._next_poll_us, due_us)

    def lost(self, link: LinkName) -> None:
        self._links.pop(link, None)
        if not self._links:
            self._next_poll_us = None

    def note_sent(self, link: LinkName, now_us: int) -> None:
        if timing := self._links.get(link):
            timing.sent_us = now_us

    def note_received(self, link: LinkName, now_us: int) -> None:
        if timing := self._links.get(link):
            timing.received_us = now_us
            timing.patience_until_us = None

    def poll(self, now_us: int) -> tuple[list[LinkName], list[LinkName]]:
        """(links to ping, links to declare lost). The caller pings and closes; both lists are in opening order."""
        if self._next_poll_us is None or now_us < self._next_poll_us:
            return [], []
        if self._overslept(now_us):
            self._extend_patience(now_us)
        lost = [link for link, timing in self._links.items() if now_us >= self._silent_at_us(timing)]
        for link in lost:
            del self._links[link]
        pings = [link for link, timing in self._links.items() if now_us >= timing.sent_us + self._interval_us]
        for link in pings:
            self._links[link].sent_us = now_us
        self._next_poll_us = self._next_due_us(now_us)
        return pings, lost

    def _overslept(self, now_us: int) -> bool:
        # Half an interval, not a whole one: the peer's pings may be 1.25 intervals apart (its polls coalesce) and our
        # own next poll one interval away, which leaves 0.75 of the three to notice our own sleep by.
        return self._next_poll_us is not None and now_us - self._next_poll_us > self._interval_us // 2

    def _extend_patience(self, now_us: int) -> None:
        # Once per silence: a loop that is late at every poll must still find its dead peers.
        for timing in self._links.values():
            if timing.patience_until_us is None:
                timing.patience_until_us = now_us + self._interval_us

    def _silent_at_us(self, timing: _Timing) -> int:
        return max(timing.received_us + self._silence_us, timing.patience_until_us or 0)

    def _next_due_us(self, now_us: int) -> int | None:
        if not self._links:
            return None
        due_us = min(min(t.sent_us + self._interval_us, self._silent_at_us(t)) for t in self._links.values())
        return max(due_us, now_us + self._slack_us)


DEFAULT_KEEPALIVE = LinkKeeper.Config()
