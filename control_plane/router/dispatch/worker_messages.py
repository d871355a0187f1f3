"""What the router tells workers, written from what it knows of a request. Translation only: nothing is decided here."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, Final

from control_plane.router.dispatch.live_image import LiveImage
from control_plane.router.dispatch.live_request import LiveRequest
from control_plane.router.dispatch.workers import Worker
from control_plane.wire import session_pb2 as pb
from control_plane.wire.translate import images_to_wire, sampling_to_wire
from engine.base import limits
from engine.base.errors import InvalidArgument
from engine.base.machine import Send
from kv_transfer.codecs import RAW


def send(worker: Worker, **body: object) -> Send:
    """One message, in the next envelope of its session."""
    assert worker.session is not None
    return Send(worker.link, worker.session.seal(pb.RouterToWorker(**body)))  # type: ignore[arg-type]


def prefill(request: LiveRequest, *, deadline_ms: int) -> pb.Prefill:
    assert request.source is not None
    return pb.Prefill(
        request=request.id,
        attempt=request.source.attempt,
        token_ids=request.token_ids,
        prompt_tokens=len(request.submit.token_ids),
        sampling=sampling_to_wire(request.submission.sampling),
        deadline_ms=deadline_ms,
        tenant=request.submit.cache_scope,
        choices=request.choices,
        priority=request.priority,
        images=_images(request),
    )


def reserve(request: LiveRequest, worker: Worker, *, deadline_ms: int) -> pb.Reserve:
    assert request.target is not None
    return pb.Reserve(
        request=request.id,
        attempt=request.target.attempt,
        epoch=worker.info.epoch,
        schema_digest=worker.info.schema_digest,
        token_ids=request.token_ids[: request.context_tokens],
        prompt_tokens=len(request.submit.token_ids),
        sampling=sampling_to_wire(request.submission.sampling),
        deadline_ms=deadline_ms,
        tenant=request.submit.cache_scope,
        choices=_choices(request),
        **_encoding(request),
        priority=request.priority,
        images=_images(request),
    )


def bind(request: LiveRequest, worker: Worker, reserved: pb.Reserved) -> pb.Bind:
    assert request.source is not None and request.target is not None
    return pb.Bind(
        request=request.id,
        attempt=request.source.attempt,
        target_attempt=request.target.attempt,
        target=worker.id,
        target_address=worker.info.address,
        transfer_id=reserved.transfer_id,
        target_epoch=reserved.epoch,
        skip_tokens=reserved.skip_tokens,
        **_encoding(request),
    )


def bind_local(request: LiveRequest) -> pb.Bind:
    assert request.source is not None and request.target is not None
    return pb.Bind(
        request=request.id,
        attempt=request.source.attempt,
        target_attempt=request.target.attempt,
        target=request.target.worker,
        choices=_children(request),
    )


def encode(live: LiveImage, worker: Worker, *, deadline_ms: int, priority: int) -> pb.Encode:
    assert live.place is not None
    return pb.Encode(
        request=live.id,
        attempt=live.place.attempt,
        schema_digest=worker.info.embedding_digest,
        key=live.image.key,
        features=live.image.features,
        width=live.picture.width,
        height=live.picture.height,
        deadline_ms=deadline_ms,
        priority=priority,
    )


def pixels(live: LiveImage, start: int, end: int) -> Iterator[pb.Pixels]:
    """Bytes [start, end) of them, as far as there are any, in pieces."""
    assert live.place is not None
    data, size = live.picture.pixels, limits.PIXELS_PIECE_BYTES_MAX
    for offset in range(start, min(end, len(data)), size):
        piece = data[offset : min(offset + size, end)]
        yield pb.Pixels(request=live.id, attempt=live.place.attempt, offset=offset, data=piece)


def bind_image(live: LiveImage, worker: Worker, wanted: pb.ImagesWanted, transfer_id: bytes) -> pb.Bind:
    """From its holder to the worker that computes its prompt, raw."""
    assert live.place is not None
    return pb.Bind(
        request=live.id,
        attempt=live.place.attempt,
        target_attempt=wanted.attempt,
        target=worker.id,
        target_address=worker.info.address,
        transfer_id=transfer_id,
        target_epoch=wanted.epoch,
        codec=RAW,
    )


def abort(request_id: int, attempt: int) -> pb.Abort:
    return pb.Abort(request=request_id, attempt=attempt)


def _images(request: LiveRequest) -> list[pb.PromptImage]:
    return images_to_wire([each.image for each in request.submit.images])


def _encoding(request: LiveRequest) -> dict[str, Any]:
    """The fields of a Reserve or Bind that say what the KV goes through."""
    return {} if request.encoding is None else asdict(request.encoding)


def _choices(request: LiveRequest) -> list[pb.ChoiceAttempt]:
    """A group's children. A single only says which choice it is, unless it is the first."""
    if request.is_group:
        return _children(request)
    return [pb.ChoiceAttempt(request=request.id, choice=request.choice)] if request.choice else []


def _children(request: LiveRequest) -> list[pb.ChoiceAttempt]:
    return [pb.ChoiceAttempt(request=child, choice=choice) for choice, child in request.children.items()]


# -- what workers say of a request -------------------------------------------------------------------------------------
_FAULTS: Final[Mapping[str, tuple[str | None, str]]] = {
    # reason -> (field, text); no field where it takes several to go wrong
    "constraint": ("constraint", "no output within the constraint was found at a bearable cost"),
    "nothing_allowed": (None, "allowed_token_ids, bad_words, logit_bias and the constraint together allow no token"),
}


def refused_by_worker(reason: str) -> InvalidArgument:
    """The error of a request that no worker can serve. `reason` comes from a worker: unknown ones are only named."""
    field, text = _FAULTS.get(reason, (None, f"refused by a worker: {reason}"))
    return InvalidArgument(text if field is None else f"{field}: {text}", field=field)
