"""ImageEncoding: a request's images, from the line for encoders to the prefill worker that wants them.

    in line -> Encode for each image, all at once -> PixelsWanted -> Pixels* -> Encoded ... all -> Prefill's line
    Prefill -> ImagesWanted at P -> Bind at the holder of each, or Abort where P has it already -> NEAR_TURN

All images of one request are placed at once, where there is memory for all of them: two requests that each held half
of what they need would wait for each other. What nobody needs yet waits here, where others can come first.

Not here: whose turn it is (`lines`), which worker is best (`encode_placement`), what a lost image means (`losses`).
"""

from collections import Counter
from collections.abc import Sequence
from itertools import islice

from control_plane.router.dispatch import worker_messages
from control_plane.router.dispatch.embedding_index import EmbeddingIndex
from control_plane.router.dispatch.encode_placement import EncodeChoice, EncodePlacer
from control_plane.router.dispatch.holders import Holders
from control_plane.router.dispatch.lines import Lines
from control_plane.router.dispatch.live_image import LiveImage
from control_plane.router.dispatch.live_request import LiveRequest, Stage
from control_plane.router.dispatch.prefilling import Prefilling
from control_plane.router.dispatch.register import Register
from control_plane.router.dispatch.workers import Worker
from control_plane.wire import session_pb2 as pb
from engine.base import limits
from engine.base.errors import FrameError
from kv_transfer.frame import TRANSFER_ID_BYTES


class ImageEncoding:
    def __init__(
        self,
        register: Register,
        holders: Holders,
        prefilling: Prefilling,
        *,
        lines: Lines,
        placer: EncodePlacer,
        embeddings: EmbeddingIndex,
        counters: Counter[tuple[str, str]],
    ) -> None:
        self._register = register
        self._holders = holders
        self._prefilling = prefilling
        self._queue, self._drain_rate = lines.encode
        self._placer = placer
        self._embeddings = embeddings
        self._counters = counters

    # -- out of line ---------------------------------------------------------------------------------------------------
    def place_queued(self, now_us: int) -> list[object]:
        """Give encoders what they need to stay busy, in turn."""
        actions: list[object] = []
        placed_tokens = 0
        while (found := self._next_placement()) is not None:
            request, choices = found
            placed_tokens += len(request.token_ids)
            actions += self._encode_at(request, choices, now_us)
        waiting = bool(self._queue) and self._placer.has_workers
        self._drain_rate.note(placed_tokens, waiting=waiting, now_us=now_us)
        return actions

    def _next_placement(self) -> tuple[LiveRequest, Sequence[EncodeChoice]] | None:
        """Whoever's turn it is. While there is no room for all of its images, it waits, and others may pass: a few,
        since each of them keeps the room away for which it waits."""
        if not (self._queue and self._placer.has_room_anywhere):
            return None
        passed: list[LiveRequest] = []
        for request in islice(self._queue.in_turn(lambda _: False), limits.PLACEMENT_TRIES_MAX):
            if (choices := self._placer.choices(request)) is not None:
                for each in passed:
                    each.passes += 1
                return request, choices
            if request.passes >= limits.PASSES_MAX and self._placer.could_hold(request):
                return None
            passed.append(request)
        return None

    def _encode_at(self, request: LiveRequest, choices: Sequence[EncodeChoice], now_us: int) -> list[object]:
        self._queue.place(request, sum(choice.missing_tokens for choice in choices))
        actions = [
            self._send_encode(live, choice, now_us) for live, choice in zip(request.images, choices, strict=True)
        ]
        request.embedding_digest = bytes(choices[0].worker.info.embedding_digest)
        request.ahead_tokens = max(_tokens_ahead(choice.worker) for choice in choices)
        request.submission.mark("encoding", now_us)
        request.submission.stats.encode_workers = tuple(choice.worker.id for choice in choices)
        self._register.enter(request, Stage.ENCODING, now_us)
        return actions

    def _send_encode(self, live: LiveImage, choice: EncodeChoice, now_us: int) -> object:
        worker = choice.worker
        self._holders.load_image(live, worker)
        self._embeddings.note(worker, live.image)
        self._counters["placements", f"encode_{choice.reason}"] += 1
        deadline_ms = live.owner.submission.remaining_ms(now_us)
        priority = 0 if self._holders.fair else live.owner.submit.priority
        encode = worker_messages.encode(live, worker, deadline_ms=deadline_ms, priority=priority)
        return worker_messages.send(worker, encode=encode)

    # -- what encoders say ---------------------------------------------------------------------------------------------
    def on_pixels_wanted(self, worker: Worker, message: pb.PixelsWanted, now_us: int) -> list[object]:
        live = self._register.from_image(worker, message, now_us)
        if live is None or message.offset != live.pixels_sent_bytes:  # the latter: it has asked for these before
            return []
        end = message.offset + min(message.length, limits.PIXELS_ASKED_BYTES_MAX)
        pieces = list(worker_messages.pixels(live, message.offset, end))
        live.pixels_sent_bytes += sum(len(piece.data) for piece in pieces)
        return [worker_messages.send(worker, pixels=piece) for piece in pieces]

    def on_encoded(self, worker: Worker, message: pb.Encoded, now_us: int) -> list[object]:
        live = self._register.from_image(worker, message, now_us)
        if live is None or live.encoded:
            return []
        live.encoded = True
        self._holders.note_encoded(live, worker)
        self._counters["images", "cached" if message.cached else "encoded"] += 1
        request = live.owner
        request.submission.note_image(live.index, cached=message.cached and live.attempts == 1)
        if not request.needs_encoding:
            request.submission.mark("encoded", now_us)
            self._prefilling.enqueue(request, now_us)
        return []

    # -- what the prefill worker says ----------------------------------------------------------------------------------
    def on_images_wanted(self, worker: Worker, message: pb.ImagesWanted, now_us: int) -> list[object]:
        """It has memory for all of them now. What is on its way is watched; what it has already is let go of."""
        request = self._register.from_source(worker, message, now_us)
        if request is None or request.stage is not Stage.PREFILL:
            return []
        transfer_ids = _transfers_untrusted(request, message)
        if any(live.is_at(worker.id) for live in request.images if live.index in transfer_ids):
            # It holds one for us that it cannot find: its cache was reset meanwhile. What it encodes now, it will.
            return self._prefilling.start_over(request, now_us)
        request.ahead_tokens = worker.prefill_tokens
        actions: list[object] = []
        for live in request.images:
            transfer_id = transfer_ids.get(live.index)
            if transfer_id is None:
                actions += self._holders.abort_image(live)
            else:
                actions.append(self._bind(live, worker, message, transfer_id))
        self._register.deadlines.watch_silence(request)
        return actions

    def _bind(self, live: LiveImage, worker: Worker, message: pb.ImagesWanted, transfer_id: bytes) -> object:
        holder = self._holders.worker(live.place)
        assert holder is not None  # a lost holder takes its requests along
        live.bound = True
        bind = worker_messages.bind_image(live, worker, message, transfer_id)
        return worker_messages.send(holder, bind=bind)


def _tokens_ahead(worker: Worker) -> int:
    """What may be computed there before anything is said of the newest image."""
    return worker.images.ahead_tokens + worker.prefill_tokens


def _transfers_untrusted(request: LiveRequest, message: pb.ImagesWanted) -> dict[int, bytes]:
    """By index. Only what is held, and not on its way already, can be wanted."""
    transfers = dict(zip(message.images, message.transfer_ids, strict=False))
    wellformed = len(transfers) == len(message.images) == len(message.transfer_ids)
    sendable = {live.index for live in request.images if live.place is not None and not live.bound}
    if not wellformed or not transfers.keys() <= sendable:
        raise FrameError("images")
    if any(len(transfer_id) != TRANSFER_ID_BYTES for transfer_id in transfers.values()):
        raise FrameError("length")
    return transfers
