"""Register: every submission and every request that is not over.

Clients know a submission by its key, workers a request by its id, and so each image of one. What a worker says counts
only if it comes from the attempt that is the request's source, or target, or the image's place, now: anything else is
late, and fenced off here.

A request is in one stage at a time. To enter one is a sign of life.
"""

from control_plane.router.dispatch.deadlines import Deadlines, Patience
from control_plane.router.dispatch.live_image import LiveImage
from control_plane.router.dispatch.live_request import LiveRequest, Placement, Stage
from control_plane.router.dispatch.submissions import Submission
from control_plane.router.dispatch.workers import Worker
from control_plane.wire import session_pb2 as pb


class Register:
    def __init__(self, patience: Patience) -> None:
        self.submissions: dict[int, Submission] = {}  # by key
        self.requests: dict[int, LiveRequest] = {}  # by id, oldest first
        self.images: dict[int, LiveImage] = {}  # by id, of those requests that were ever ENCODING
        self.seeking: dict[int, LiveRequest] = {}  # in RESERVING: those that may have to ask again
        self.deadlines = Deadlines(patience, self.submissions, self.requests)
        self._last_id = 0

    # -- requests come and go ------------------------------------------------------------------------------------------
    def mint_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def adopt(self, request: LiveRequest) -> LiveRequest:
        request.id = request.id or self.mint_id()
        self.requests[request.id] = request.submission.requests[request.id] = request
        return request

    def forget(self, request: LiveRequest) -> None:
        del self.requests[request.id], request.submission.requests[request.id]
        self.seeking.pop(request.id, None)
        for image in request.images:
            del self.images[image.id]

    def name_images(self, request: LiveRequest) -> None:
        """Under these ids they are encoded, however often."""
        if not request.images:
            indices = range(len(request.submit.images))
            request.images = tuple(LiveImage(self.mint_id(), index, request) for index in indices)
            self.images.update((image.id, image) for image in request.images)

    def knows(self, request: LiveRequest) -> bool:
        return self.requests.get(request.id) is request

    def enter(self, request: LiveRequest, stage: Stage, now_us: int) -> None:
        request.stage = stage
        request.heard_us = now_us
        self.deadlines.watch_silence(request)
        if stage is Stage.RESERVING:
            self.seeking[request.id] = request
        else:
            self.seeking.pop(request.id, None)

    # -- who is spoken of ----------------------------------------------------------------------------------------------
    def at(self, worker_id: str) -> list[LiveRequest]:
        """Requests that have a holder there, oldest first."""
        return [request for request in self.requests.values() if request.is_at(worker_id)]

    def from_source(
        self,
        worker: Worker,
        message: pb.ImagesWanted | pb.NearTurn | pb.PromptScored | pb.FirstToken | pb.Relocate,
        now_us: int,
    ) -> LiveRequest | None:
        """The request this message speaks for, if it comes from the attempt that is its source now."""
        request = self.requests.get(message.request)
        if request is None or request.source != Placement(worker.id, message.attempt):
            return None
        request.heard_us = now_us
        return request

    def from_target(
        self, worker: Worker, message: pb.Reserved | pb.Refused | pb.Committed | pb.Relocate, now_us: int
    ) -> LiveRequest | None:
        request = self.requests.get(message.request)
        if request is None or request.target != Placement(worker.id, message.attempt):
            return None
        request.heard_us = now_us
        return request

    def from_image(
        self,
        worker: Worker,
        message: pb.PixelsWanted | pb.Encoded | pb.Relocate | pb.AttemptFailed,
        now_us: int,
    ) -> LiveImage | None:
        """The image this message speaks for, if it comes from the attempt that encodes or holds it now."""
        image = self.images.get(message.request)
        if image is None or image.place != Placement(worker.id, message.attempt):
            return None
        image.owner.heard_us = now_us
        return image
