"""Absences: roles that no worker holds now, and which of them are no longer waited for.

Waiting for a worker of a role is bounded from the moment the role was lost. Full workers are load, not absence: only a
request's own deadline ends that wait.
"""

from collections.abc import Sequence

from control_plane.router.dispatch.live_request import LiveRequest, Stage
from control_plane.router.dispatch.workers import WorkerPool
from engine.base import limits
from engine.base.errors import Unavailable
from engine.types import Role


class Absences:
    def __init__(self, pool: WorkerPool, wait_ms: int) -> None:
        self._pool = pool
        self._wait_us = wait_ms * 1_000
        self._roles = [Role.PREFILL, Role.DECODE]  # that somebody needs
        self._until_us: dict[Role, int] = {}  # when waiting for one ends
        self._given_up: set[Role] = set()  # absent for longer than that: a request that needs one fails at once

    def note(self, now_us: int) -> None:
        """Workers came or went."""
        for role in self._roles:
            if self._pool.able(role):
                self._until_us.pop(role, None)
                self._given_up.discard(role)
            else:
                self._until_us.setdefault(role, now_us + self._wait_us)

    def need(self, role: Role, now_us: int) -> None:
        """From now on. Encoders are missed only where there are images."""
        if role not in self._roles:
            self._roles.append(role)
            self.note(now_us)

    def give_up(self, now_us: int) -> bool:
        """Whether a role has just become one that is no longer waited for."""
        over = {role for role, until_us in self._until_us.items() if until_us <= now_us} - self._given_up
        self._given_up |= over
        return bool(over)

    def error(self, request: LiveRequest) -> Unavailable | None:
        """Why the request cannot go on from where it is, if it needs a role that was given up."""
        role = next((role for role in _lacked_by(request) if role in self._given_up), None)
        if role is None:
            return None
        return Unavailable(f"no {role.value} worker is available", retry_after_ms=limits.RETRY_AFTER_MS)

    @property
    def next_deadline_us(self) -> int | None:
        return min((us for role, us in self._until_us.items() if role not in self._given_up), default=None)


def _lacked_by(request: LiveRequest) -> Sequence[Role]:
    if request.stage in (Stage.ENCODING, Stage.QUEUED):
        encoder = (Role.ENCODE,) if request.needs_encoding and not request.images_placed else ()
        return (*encoder, Role.PREFILL, Role.DECODE) if request.needs_target else (*encoder, Role.PREFILL)
    seeks = request.stage in (Stage.PREFILL, Stage.RESERVING) and request.target is None
    return (Role.DECODE,) if seeks and request.needs_target else ()
