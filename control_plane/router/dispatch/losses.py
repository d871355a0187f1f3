"""Losses: attempts that end without their request: a worker is lost, or fails, or is silent, or gives a request away.

    somebody still holds the whole KV   a new target is sought (`rebind`)
    nobody certainly does               prompt + emitted tokens are prefilled again (`restart`)

An image is lost with whoever encodes or holds it, and its request with it, until its prefill worker has all of them:
then all are encoded again, or found where they were.

All is bounded: after `attempts_max` losses, or failures of ENGINE_FAILURES_MAX engines, the request itself is at
fault, or too unlucky.
"""

from collections import Counter

from control_plane.router.dispatch import worker_messages
from control_plane.router.dispatch.binding import Binding
from control_plane.router.dispatch.endings import Endings
from control_plane.router.dispatch.holders import Holders
from control_plane.router.dispatch.live_image import LiveImage
from control_plane.router.dispatch.live_request import LiveRequest, Placement, Stage
from control_plane.router.dispatch.prefilling import Prefilling
from control_plane.router.dispatch.register import Register
from control_plane.router.dispatch.workers import Worker
from control_plane.wire import session_pb2 as pb
from engine.base import limits
from engine.base.errors import DeadlineExceeded, FrameError, Internal, TriptychError, Unavailable
from engine.commands import EMBEDDINGS_FULL
from engine.types import Role


class Losses:
    def __init__(
        self,
        register: Register,
        holders: Holders,
        endings: Endings,
        prefilling: Prefilling,
        binding: Binding,
        *,
        counters: Counter[tuple[str, str]],
        attempts_max: int,
    ) -> None:
        self._register = register
        self._holders = holders
        self._endings = endings
        self._prefilling = prefilling
        self._binding = binding
        self._counters = counters
        self._attempts_max = attempts_max

    # -- what was lost -------------------------------------------------------------------------------------------------
    def on_worker_lost(self, worker: Worker, now_us: int) -> list[object]:
        requests = self._register.at(worker.id)
        actions = [action for request in requests for action in self._on_holder_lost(request, worker, now_us)]
        self._holders.clear(worker)
        return actions

    def on_leaving(self, worker: Worker, now_us: int) -> list[object]:
        """It drains, which ends when nobody needs what it holds. A prompt in line may wait for this very worker, which
        then would wait for it: its images are encoded elsewhere, and that is no loss."""
        if worker.serving or not worker.has(Role.PREFILL) or not worker.images.held:
            return []
        waiting = [each for each in self._register.at(worker.id) if each.stage in (Stage.ENCODING, Stage.QUEUED)]
        known = (each for each in waiting if self._register.knows(each))  # one may end its siblings
        return [action for request in known for action in self._prefilling.start_over(request, now_us)]

    def _on_holder_lost(self, request: LiveRequest, worker: Worker, now_us: int) -> list[object]:
        """Bind again if the whole KV still has a holder; otherwise start over from prompt + emitted tokens."""
        if not (self._register.knows(request) and request.is_at(worker.id)):
            return []  # the loss of a sibling, or of its group, has moved or ended it
        if request.stage is Stage.FORKED:
            return self._restart_forks(request, now_us)
        target_lost = request.target is not None and request.target.worker == worker.id
        source_lost = request.source is not None and request.source.worker == worker.id
        if target_lost and request.source is not None and not source_lost:
            return self._rebind(request, now_us)
        return self.restart(request, now_us)

    def _restart_forks(self, group: LiveRequest, now_us: int) -> list[object]:
        """What became of these at the target only the source could have said: perhaps they ended with token 0."""
        return [
            action
            for child in list(group.forks.values())
            for action in (self.restart(child, now_us) if self._register.knows(child) else ())
        ]

    def on_silence(self, request: LiveRequest, now_us: int) -> list[object]:
        """As if the worker were lost. The KV's source is trusted with another target once its prefill is known to be
        done."""
        self._counters["no_progress", request.stage.value] += 1
        request.silent_in = request.stage
        sent = request.moving or any(request.submission.outputs[choice] for choice in request.choices)
        if request.stage is Stage.RESERVING or (request.stage is Stage.TRANSFER and sent):
            return self._rebind(request, now_us)
        if request.stage is Stage.DECODE and request.target is not None:
            request.silent_at = request.target.worker
        if request.source is not None:
            request.failed_at = request.source.worker
        for image in request.images:
            if image.place is not None and (image.bound or not image.encoded):
                image.failed_at = image.place.worker
        return self.restart(request, now_us)

    # -- what workers say ----------------------------------------------------------------------------------------------
    def on_relocate(self, worker: Worker, message: pb.Relocate, now_us: int) -> list[object]:
        """A holder of whole KV needs another target: its first one failed, or it must give the request away."""
        if message.reason not in pb.Relocate.Reason.values():
            raise FrameError("relocate")
        failed = message.reason == pb.Relocate.TRANSFER_FAILED
        if (image := self._register.from_image(worker, message, now_us)) is not None:
            return self._on_image_lost(image, now_us)
        speaks_as = self._register.from_source if failed else self._register.from_target
        request = speaks_as(worker, message, now_us)
        if request is None or request.stage is Stage.FORKED:
            # It holds KV that nobody wants any more. One such: its target committed, and the answer was lost.
            return [worker_messages.send(worker, abort=worker_messages.abort(message.request, message.attempt))]
        if failed:
            known = request.target is None or request.target.attempt != message.target_attempt
            return [] if known else self._rebind(request, now_us)  # known: that binding was replaced already
        if request.stage is not Stage.DECODE or len(message.token_ids) != len(request.token_ids):
            return self.restart(request, now_us)
        self._counters["relocations", pb.Relocate.Reason.Name(message.reason).lower()] += 1
        return self._move(request, now_us)

    def _move(self, request: LiveRequest, now_us: int) -> list[object]:
        """Its decode worker becomes the source of its KV."""
        self._holders.unbind(request)
        request.source, request.target = request.target, None
        request.moving = True
        request.context_tokens = len(request.token_ids) - 1  # the last token is pending: sampled, its KV not computed
        return self._binding.seek_target(request, now_us)

    def on_failed(self, worker: Worker, message: pb.AttemptFailed, now_us: int) -> list[object]:
        if (image := self._register.from_image(worker, message, now_us)) is not None:
            return self._on_image_failed(image, worker, message, now_us)
        request = self._register.requests.get(message.request)
        place = Placement(worker.id, message.attempt)
        if request is None or place not in (request.source, request.target):
            return []
        self._counters["attempts_failed", message.reason] += 1
        if message.status == "invalid_argument":
            error = worker_messages.refused_by_worker(message.reason)
            return self._endings.end(request.submission, now_us, error=error)
        concerned = list(request.forks.values()) if request.stage is Stage.FORKED else [request]
        engine_failed = message.status == "internal"
        return [action for each in concerned for action in self._on_attempt_lost(each, place, engine_failed, now_us)]

    def _on_attempt_lost(
        self, request: LiveRequest, place: Placement, engine_failed: bool, now_us: int
    ) -> list[object]:
        if not self._register.knows(request):
            return []  # ended by the loss of a sibling
        request.engine_failures += engine_failed
        if place == request.target and request.stage in (Stage.RESERVING, Stage.TRANSFER):
            return self._rebind(request, now_us)
        request.failed_at = place.worker
        return self.restart(request, now_us)

    def _on_image_failed(
        self, image: LiveImage, worker: Worker, message: pb.AttemptFailed, now_us: int
    ) -> list[object]:
        self._counters["attempts_failed", message.reason] += 1
        if message.status == "invalid_argument":
            error = worker_messages.refused_by_worker(message.reason)
            return self._endings.end(image.owner.submission, now_us, error=error)
        if message.reason == EMBEDDINGS_FULL:
            # Others hold what we counted on. That is load: its images wait in line again, and it is no loss.
            worker.images.full = True
            return self._prefilling.start_over(image.owner, now_us)
        image.owner.engine_failures += message.status == "internal"
        return self._on_image_lost(image, now_us)

    def _on_image_lost(self, image: LiveImage, now_us: int) -> list[object]:
        if image.place is not None:
            image.failed_at = image.place.worker
        return self.restart(image.owner, now_us)

    # -- what is done about it -----------------------------------------------------------------------------------------
    def _rebind(self, request: LiveRequest, now_us: int) -> list[object]:
        """The source still holds the whole KV: only the target is sought again."""
        if self._is_spent(request):
            return self._endings.end(request.submission, now_us, error=self._spent(request))
        avoid = request.target.worker if request.target is not None else None
        aborts = self._holders.abort_at(request.target, request)
        return [*aborts, *self._binding.seek_target(request, now_us, avoid=avoid)]

    def restart(self, request: LiveRequest, now_us: int) -> list[object]:
        """Nobody certainly holds the KV: prefill prompt + emitted tokens again."""
        if self._is_spent(request):
            return self._endings.end(request.submission, now_us, error=self._spent(request))
        return self._prefilling.start_over(request, now_us)

    def _is_spent(self, request: LiveRequest) -> bool:
        request.losses += 1
        spent = request.losses >= self._attempts_max or request.engine_failures >= limits.ENGINE_FAILURES_MAX
        request.submission.stats.attempts += not spent
        return spent

    @staticmethod
    def _spent(request: LiveRequest) -> TriptychError:
        text = f"given up after {request.losses} lost placements"
        if request.silent_in is not None:
            return DeadlineExceeded(f"{text}: no progress while {request.silent_in.value}")
        poisonous = request.engine_failures >= limits.ENGINE_FAILURES_MAX
        return Internal(text) if poisonous else Unavailable(text, retry_after_ms=limits.RETRY_AFTER_MS)
