"""Lines: where requests wait in the router: those with images for an encoder, then all of them for a prefill worker.

Each line is fair by itself, in the unit of what it waits for, and has its own measure of how fast it moves: text does
not wait behind images.

Not here: who is placed, and where (`encoding`, `prefilling`), whether one more may join (`admission`).
"""

from typing import NamedTuple

from control_plane.router.dispatch.drain_rate import DrainRate
from control_plane.router.dispatch.live_request import LiveRequest, Stage
from control_plane.router.dispatch.request_queue import RequestQueue
from control_plane.router.shares import Shares


class Line(NamedTuple):
    queue: RequestQueue
    drain_rate: DrainRate

    @classmethod
    def of_tokens(cls, tokens_max: int, *, tenants: int) -> "Line":
        return cls(RequestQueue(Shares(tokens_max, tenants=tenants)), DrainRate())


class Lines(NamedTuple):
    encode: Line
    prefill: Line

    @classmethod
    def of_tokens(cls, tokens_max: int, *, tenants: int) -> "Lines":
        return cls(*(Line.of_tokens(tokens_max, tenants=tenants) for _ in range(2)))

    def join(self, request: LiveRequest) -> None:
        """The line of its stage."""
        self._of(request).queue.put(request)

    def leave(self, request: LiveRequest) -> None:
        """Also of one that is in no line."""
        if request.in_line:
            self._of(request).queue.remove(request)

    def ahead_of(self, request: LiveRequest) -> "tuple[Line, ...]":
        """Those that it has to wait in."""
        return (self.encode, self.prefill) if request.needs_encoding else (self.prefill,)

    def _of(self, request: LiveRequest) -> Line:
        return self.encode if request.stage is Stage.ENCODING else self.prefill
