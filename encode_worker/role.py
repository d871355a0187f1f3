"""EncodeRole: pixels in, embeddings out. What only encode does; pure, and blind to wires.

    add -> AddEncode --PixelsNeeded--> (room for the pixels) PixelsWanted report --pixels*--> EncodePixels --Encoded-->
           held, in the Source; Encoded report          (an embedding that is here already is `Encoded` at once)
    pixels: asked for a stretch at a time; with its last piece, the next one is
    bind: the Source sends;  Delivered: the target has it all, ours becomes cache

Pixels are asked for only when there is room for them, in order: what this role and the engine hold of them, or have
asked for, stays within `ahead_bytes`, whoever sends how many images. One image always may.

Not here: who the embedding is for (router), what a frame is (kv_transfer), when the tower runs (engine).
"""

import io
from dataclasses import dataclass

from engine.base import limits
from engine.base.errors import Status
from engine.base.machine import Command
from engine.commands import AddEncode, EncodePixels, PixelsNeeded
from engine.commands import Encoded as EmbeddingWhole
from engine.images import Picture
from kv_transfer.custody import Custody
from kv_transfer.reports import AttemptOver, Encoded, EncodeWork, PixelsWanted, Relocate, RelocateReason
from kv_transfer.source import Binding, Delivered, DeliveryFailed, Source


class _Pixels:
    """A picture on its way in. Pieces are written where they will be read from: nothing is copied at the end.

    0 .......... here .......... asked_bytes .......... total_bytes
    | has come   | on its way    | to be asked for      |
    """

    def __init__(self, total_bytes: int) -> None:
        # Whatever a BytesIO was made from, and nobody else looks at, it hands out again as it is (as in `frame.Draft`).
        self._file = io.BytesIO(bytes(total_bytes))
        self._total_bytes = total_bytes
        self._asked_bytes = 0

    def take(self, offset: int, data: bytes) -> bool:
        """False for a piece that is not the next one, is empty, or was not asked for."""
        if offset != self._file.tell() or not 0 < len(data) <= self._asked_bytes - offset:
            return False
        self._file.write(data)
        return True

    def ask(self, seq_id: int) -> list[object]:
        """For the next stretch, if all that was asked for is here."""
        start, left_bytes = self._file.tell(), self._total_bytes - self._asked_bytes
        if start < self._asked_bytes or not left_bytes:
            return []
        length = min(left_bytes, limits.PIXELS_ASKED_BYTES_MAX)
        self._asked_bytes += length
        return [PixelsWanted(seq_id=seq_id, offset=start, length=length)]

    @property
    def whole(self) -> bytes | None:
        return self._file.getvalue() if self._file.tell() == self._total_bytes else None


@dataclass(slots=True)
class _Encode:
    work: EncodeWork
    pixels: _Pixels | None = None  # while they arrive
    held: bool = False


class EncodeRole:
    """The encodes of one worker."""

    def __init__(self, *, source: Source, custody: Custody, ahead_bytes: int) -> None:
        self._source = source
        self._custody = custody
        self._ahead_bytes = ahead_bytes
        self._encodes: dict[int, _Encode] = {}
        self._waiting: dict[int, None] = {}  # for room for their pixels; in order
        self._ahead: dict[int, int] = {}  # bytes of those that were asked for and are not through the tower

    def owns(self, seq_id: int) -> bool:
        return seq_id in self._encodes

    def __len__(self) -> int:
        return len(self._encodes)

    # -- what the router asks ------------------------------------------------------------------------------------------
    def add(self, work: EncodeWork) -> list[object]:
        self._encodes[work.seq_id] = _Encode(work)
        self._custody.begin(work.seq_id)
        command = AddEncode(seq_id=work.seq_id, key=work.key, features=work.features, priority=work.priority)
        return [Command(command)]

    def pixels(self, seq_id: int, offset: int, data: bytes) -> list[object]:
        """A piece of those that were asked for, in order. Anything else is our router's mistake: the attempt fails as
        if the engine had, so that the image may be tried elsewhere, a few times."""
        encode = self._encodes.get(seq_id)
        if encode is None or encode.held:  # held before they came: another encode of its key was faster
            return []
        if encode.pixels is None or not encode.pixels.take(offset, data):
            return [*self.abort(seq_id), AttemptOver(seq_id=seq_id, status=Status.INTERNAL, reason="pixels")]
        if (pixels := encode.pixels.whole) is None:
            return encode.pixels.ask(seq_id)
        encode.pixels = None
        return [Command(EncodePixels(seq_id=seq_id, picture=Picture(encode.work.width, encode.work.height, pixels)))]

    def bind(self, seq_id: int, binding: Binding, now_us: int) -> list[object]:
        return self._source.bind(seq_id, binding, now_us) if self.owns(seq_id) else []

    def abort(self, seq_id: int) -> list[object]:
        """Idempotent, in every stage."""
        if self._encodes.pop(seq_id, None) is None:
            return []
        released = [*self._source.drop(seq_id), *self._custody.end(seq_id)]
        return [*released, *self._make_room(seq_id)]

    # -- engine events -------------------------------------------------------------------------------------------------
    def on_pixels_needed(self, event: PixelsNeeded) -> list[object]:
        if not self.owns(event.seq_id):
            return []
        self._waiting[event.seq_id] = None
        return self._ask()

    def on_encoded(self, event: EmbeddingWhole, now_us: int) -> list[object]:
        """All rows are final, and nothing is sampled after them: a binding may send everything."""
        encode = self._encodes.get(event.seq_id)
        if encode is None:
            return []
        encode.held, encode.pixels = True, None
        self._source.hold(event.seq_id, event.block_table, final_tokens=encode.work.features)
        complete = self._source.complete(event.seq_id, (), now_us)
        return [*complete, Encoded(seq_id=event.seq_id, cached=event.cached), *self._make_room(event.seq_id)]

    def _make_room(self, seq_id: int) -> list[object]:
        """Its pixels are not needed any more, whether they were waited for, under way, or here."""
        self._waiting.pop(seq_id, None)
        self._ahead.pop(seq_id, None)
        return self._ask()

    def _ask(self) -> list[object]:
        """For the pixels of those that have waited longest, as many as there is room for."""
        asked: list[object] = []
        while self._waiting:
            seq_id = next(iter(self._waiting))
            encode = self._encodes[seq_id]
            total_bytes = encode.work.pixel_bytes
            if self._ahead and sum(self._ahead.values()) + total_bytes > self._ahead_bytes:
                break
            del self._waiting[seq_id]
            self._ahead[seq_id] = total_bytes
            encode.pixels = _Pixels(total_bytes)
            asked += encode.pixels.ask(seq_id)
        return asked

    # -- transfer outcomes ---------------------------------------------------------------------------------------------
    def on_delivered(self, event: Delivered) -> list[object]:
        return [*self.abort(event.seq_id), AttemptOver(seq_id=event.seq_id)]

    def on_delivery_failed(self, event: DeliveryFailed) -> list[object]:
        """The embedding is whole and held; only the router can find out whether somebody still wants it."""
        return [
            Relocate(seq_id=event.seq_id, reason=RelocateReason.TRANSFER_FAILED, target_attempt=event.target_attempt)
        ]
