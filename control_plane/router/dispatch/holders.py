"""Holders: what workers hold for requests, by this router's own count, and how they are told to let go of it.

    source   the prompt, from when it is sent until it is computed (`backlog`, in tokens)
    target   a reservation, then a decode (`bound`)
    either   the tenant's share of decode memory (`decode_memory`)
    image    its place in an encoder's line, and memory for its embedding (`images`)

What is given back makes room for somebody who waits. `changed` says that there is something new for whoever places
requests to look at.
"""

from control_plane.router.dispatch import worker_messages
from control_plane.router.dispatch.decode_memory import DecodeMemory
from control_plane.router.dispatch.live_image import LiveImage
from control_plane.router.dispatch.live_request import LiveRequest, Placement
from control_plane.router.dispatch.placement import Choice
from control_plane.router.dispatch.workers import Worker, WorkerPool


class Holders:
    def __init__(self, pool: WorkerPool, *, tenants: int) -> None:
        self.decode_memory = DecodeMemory(pool, tenants=tenants)
        self.changed = False  # since nobody more could be placed
        self._pool = pool
        self.fair = tenants > 1  # there are others to be fair to

    def worker(self, place: Placement | None) -> Worker | None:
        return self._pool.get(place.worker) if place is not None else None

    # -- the source ----------------------------------------------------------------------------------------------------
    def load_prefill(self, request: LiveRequest, choice: Choice) -> None:
        request.prefill_load_tokens = choice.missing_tokens
        choice.worker.backlog.add(request.id, choice.missing_tokens)
        if request.priority < 0 and self.fair:
            choice.worker.urgent.add(request.id, choice.missing_tokens)

    def unload_prefill(self, request: LiveRequest) -> None:
        """The prompt is computed, or will not be: it no longer stands before others at its worker. Idempotent."""
        if not request.prefill_load_tokens:
            return
        worker = self.worker(request.source)
        if worker is not None:
            worker.backlog.remove(request.id)
            worker.urgent.remove(request.id)
        request.prefill_load_tokens = 0
        self.changed = True

    # -- the target ----------------------------------------------------------------------------------------------------
    def bind(self, request: LiveRequest, worker: Worker) -> None:
        request.target = Placement(worker.id, request.next_attempt())
        worker.bound += 1

    def unbind(self, request: LiveRequest) -> None:
        """It no longer counts as load of its target."""
        worker = self.worker(request.target)
        if worker is not None:
            worker.bound = max(0, worker.bound - 1)

    # -- images --------------------------------------------------------------------------------------------------------
    def load_image(self, image: LiveImage, worker: Worker) -> None:
        image.put(worker.id)
        features = image.image.features
        worker.images.add(image.id, features, worker.columns_for(features))

    def note_encoded(self, image: LiveImage, worker: Worker) -> None:
        worker.images.encoded(image.id)
        self.changed = True

    def release_image(self, image: LiveImage) -> None:
        """Nobody needs it where it is, and that worker knows. Idempotent."""
        if (worker := self.worker(image.place)) is not None:
            worker.images.remove(image.id)
            self.changed = True
        image.take()

    def abort_image(self, image: LiveImage) -> list[object]:
        place, worker = image.place, self.worker(image.place)
        self.release_image(image)
        if place is None or worker is None or worker.session is None:
            return []
        return [worker_messages.send(worker, abort=worker_messages.abort(image.id, place.attempt))]

    def settle_images(self, request: LiveRequest) -> list[object]:
        """Its prefill worker has all of them. A holder that has sent one knows; others are told."""
        actions: list[object] = []
        for image in request.images:
            if image.bound:
                self.release_image(image)
            else:
                actions += self.abort_image(image)
        return actions

    # -- letting go ----------------------------------------------------------------------------------------------------
    def give_back(self, request: LiveRequest) -> None:
        """What it held of its tenant's share of decode memory."""
        self.decode_memory.give(request)
        self.changed = True

    def abort_at(self, place: Placement | None, request: LiveRequest) -> list[object]:
        worker = self.worker(place)
        if place is None or worker is None or worker.session is None:
            return []
        if place == request.target:
            self.unbind(request)
        return [worker_messages.send(worker, abort=worker_messages.abort(request.id, place.attempt))]

    def clear(self, worker: Worker) -> None:
        """It is lost, and everything there with it."""
        worker.backlog.clear()
        worker.urgent.clear()
        worker.bound = 0
        worker.images.clear()
        self.changed = True
