"""LiveImage: one image of a live request, as encode workers know it: a request of its own, under an id of its own.

    nowhere -> placed -> encoded, held there -> bound to the prefill worker -> nowhere
       ^          |                |
       +----------+----------------+   any loss: all images of the request start over together

Two equal images of one request are two of these: their prefill worker has memory for both, and asks for both. Their
encode worker computes one.
"""

from dataclasses import dataclass

from control_plane.router.dispatch.live_request import LiveRequest, Placement
from control_plane.router.requests import SubmittedImage
from engine.images import Picture, PromptImage


@dataclass(slots=True, eq=False)
class LiveImage:
    id: int  # that encode workers know it by
    index: int  # among those of its prompt
    owner: LiveRequest
    place: Placement | None = None  # who encodes it, or holds its embedding
    encoded: bool = False  # there
    pixels_sent_bytes: int = 0
    bound: bool = False  # on its way from there to the prefill worker
    failed_at: str = ""  # the worker that gave it up last
    attempts: int = 0  # attempt numbers used; never reused

    @property
    def submitted(self) -> SubmittedImage:
        return self.owner.submit.images[self.index]

    @property
    def image(self) -> PromptImage:
        return self.submitted.image

    @property
    def picture(self) -> Picture:
        return self.submitted.picture

    def is_at(self, worker_id: str) -> bool:
        return self.place is not None and self.place.worker == worker_id

    def put(self, worker_id: str) -> None:
        """An attempt at this worker begins."""
        self.attempts += 1
        self.place = Placement(worker_id, self.attempts)

    def take(self) -> None:
        """It is nowhere."""
        self.place = None
        self.encoded = self.bound = False
        self.pixels_sent_bytes = 0
