"""Target: receives the KV of sequences into memory that was reserved for them. A pure machine.

One `Target` serves all inbound transfers of a worker. It decides which frames may touch memory; it neither reserves
nor frees units (its owner does, through `Custody`), and it never reads a payload: checksum, decode and placement are
a `DecodeJob` on a codec thread.

    open() -> OPEN --DATA*--> placed --END(count, digest) all placed--> COMMITTED   -> Arrived
                |  any: abort() | link lost | ABORT frame                           -> ArrivalFailed
                v
             a frame that does not match exactly is counted and refused, never used (DESIGN 2.3, promise I5)

The target mints the transfer id; nobody can guess it, so knowing it is the permission to write. The first frame
binds the transfer to its link; frames for it on another link are refused.

Duplicates are answered again and not placed again; order does not matter; a lost or corrupted frame is sent again by
the source. END is answered COMMITTED however often it comes, also after the transfer is forgotten here, because the
source keeps its units until it has heard that answer.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.base import limits
from engine.base.errors import FrameError
from engine.base.machine import JobDone, LinkName, Run, Send
from engine.commands import BlockTable
from engine.kv.schema import CacheSchema
from kv_transfer import frame as frames
from kv_transfer.codecs import EXACT, RAW, RAW_ENCODING, CodecSet, Encoding
from kv_transfer.custody import Custody
from kv_transfer.frame import End, FrameHeader, FrameKind, TransferRefusal
from kv_transfer.jobs import DecodeJob

FROM_SOURCE = frozenset({FrameKind.DATA, FrameKind.END, FrameKind.ABORT})


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """Every frame of the transfer is in memory and END has been verified against all of them."""

    seq_id: int
    branches: tuple[tuple[int, ...], ...]  # the token the source has sampled, per choice; none for one that is over
    rope_delta: int = 0  # from a token's index to its position, after images
    encoding: Encoding  # what some of it has come through, where not all of it came raw
    bytes_raw: int
    bytes_wire: int
    transfer_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalFailed:
    seq_id: int
    reason: str


@dataclass(slots=True)
class _Incoming:
    """One open transfer.

    tokens   0 ........ skip_tokens .................... context_tokens
             | held here | arrives in frames, any order   |
    """

    seq_id: int
    transfer_id: bytes
    epoch: int
    table: BlockTable
    skip_tokens: int
    context_tokens: int
    choices: int
    identity: str  # the loss that was reserved for; exact KV always will do
    link: LinkName | None = None
    decoding: set[int] = field(default_factory=set)  # sequence numbers in codec threads
    placed: dict[int, int] = field(default_factory=dict)  # sequence number -> checksum
    missing: int = 0  # (layer, token) cells that no frame has filled yet
    digest: int = 0
    end: End | None = None
    encoding: Encoding = RAW_ENCODING
    bytes_raw: int = 0
    bytes_wire: int = 0
    first_frame_us: int | None = None
    filled_LT: NDArray[np.bool_] | None = None  # made with the first frame: a reservation alone costs no memory


class Target:
    """All inbound transfers of one worker."""

    def __init__(
        self,
        schema: CacheSchema,
        *,
        codecs: CodecSet,
        custody: Custody,
        mint_transfer_id: Callable[[], bytes],
        job_keys: Iterator[int],
        counters: Counter[str],
        vocab_size: int,
    ) -> None:
        self._vocab_size = vocab_size
        self.schema = schema
        self._codecs = codecs
        self._custody = custody
        self._mint = mint_transfer_id
        self._job_keys = job_keys
        self._counters = counters
        self._transfers: dict[bytes, _Incoming] = {}
        self._by_sequence: dict[int, _Incoming] = {}
        self._jobs: dict[int, tuple[_Incoming, FrameHeader]] = {}
        self._committed: OrderedDict[bytes, None] = OrderedDict()

    # -- the owner's side ----------------------------------------------------------------------------------------------
    def open(
        self,
        seq_id: int,
        *,
        table: BlockTable,
        skip_tokens: int,
        context_tokens: int,
        epoch: int,
        choices: int = 1,
        identity: str = EXACT,
    ) -> bytes:
        """Accept frames into `table` from now on; returns the transfer id that the source must name.

        Rows of an embedding are its tokens, and it has no `choices`: nothing is sampled after it.
        `identity` is what the KV will be known as here. With it a lossy codec may be used; no other one may.
        """
        incoming = _Incoming(seq_id, self._mint(), epoch, table, skip_tokens, context_tokens, choices, identity)
        incoming.missing = self.schema.kv.layers * (context_tokens - skip_tokens)
        self._transfers[incoming.transfer_id] = incoming
        self._by_sequence[seq_id] = incoming
        return incoming.transfer_id

    def abort(self, seq_id: int) -> None:
        """The attempt is over: refuse its frames from now on. Jobs under way are `Custody`'s business. Idempotent."""
        incoming = self._by_sequence.get(seq_id)
        if incoming is not None:
            self._forget(incoming)

    def is_job(self, key: int) -> bool:
        return key in self._jobs

    def __len__(self) -> int:
        return len(self._transfers)

    # -- frames --------------------------------------------------------------------------------------------------------
    def on_frame(self, link: LinkName, data: bytes, now_us: int) -> list[object]:
        """A DATA, END or ABORT frame from a source. Whatever is wrong with it harms nobody."""
        try:
            header = frames.parse_header_untrusted(data)
            if header.kind not in FROM_SOURCE:
                raise FrameError("kind")
            incoming = self._match_untrusted(link, header, data)
        except FrameError as error:
            self._counters[f"frames_rejected:{error.reason}"] += 1
            return []
        if incoming is None:
            return self._answer_unknown(link, header)
        incoming.link = link
        if header.kind is FrameKind.DATA:
            return self._on_data(incoming, header, data, now_us)
        if header.kind is FrameKind.END:
            return self._on_end(incoming, header, data, now_us)
        return self._fail(incoming, "source_aborted")

    def _match_untrusted(self, link: LinkName, header: FrameHeader, data: bytes) -> _Incoming | None:
        """The transfer that this frame belongs to, exactly; None when it belongs to none of ours.

        Everything but a plausible DATA frame is verified here (those are small); a DATA payload is verified on a
        codec thread, before anything is decoded. A header that names the wrong epoch, schema or region may just be
        damaged, so it is answered like damage: silence, until the source sends again.
        """
        incoming = self._transfers.get(header.transfer_id)
        if header.kind is not FrameKind.DATA or incoming is None:
            frames.verify_checksum_untrusted(data)
        if incoming is None:
            return None
        if header.epoch != incoming.epoch:
            raise FrameError("epoch")
        if header.schema_digest != self.schema.digest:
            raise FrameError("schema")
        if incoming.link not in (None, link):
            raise FrameError("link")
        if header.kind is FrameKind.DATA:
            self._check_region_untrusted(incoming, header)
        return incoming

    def _check_region_untrusted(self, incoming: _Incoming, header: FrameHeader) -> None:
        frames.check_atom_untrusted(header, self.schema.kv)
        if not incoming.skip_tokens <= header.token_start < header.token_end <= incoming.context_tokens:
            raise FrameError("range")
        if (header.head_start, header.head_end) != (0, self.schema.kv.heads):
            raise FrameError("range")  # no worker holds a part of the heads yet (DESIGN 9: no tensor parallelism)
        if not self._codecs.has(header.encoding):
            raise FrameError("codec")
        self._check_identity_untrusted(incoming, header)

    @staticmethod
    def _check_identity_untrusted(incoming: _Incoming, header: FrameHeader) -> None:
        """Lossy KV under a name that says exact would be wrong for whoever finds it in the cache (DESIGN 4)."""
        if header.encoding.identity not in (EXACT, incoming.identity):
            raise FrameError("codec")

    def _answer_unknown(self, link: LinkName, header: FrameHeader) -> list[object]:
        if header.transfer_id in self._committed:
            return [Send(link, self._reply(FrameKind.COMMITTED, header))] if header.kind is FrameKind.END else []
        self._counters["frames_rejected:transfer"] += 1
        if header.kind is FrameKind.ABORT:
            return []
        return [Send(link, self._reply(FrameKind.REFUSED, header, TransferRefusal.UNKNOWN_TRANSFER))]

    def _on_data(self, incoming: _Incoming, header: FrameHeader, data: bytes, now_us: int) -> list[object]:
        if header.sequence in incoming.placed:
            self._counters["frames_duplicate"] += 1
            return [self._ack(incoming, header)]
        if header.sequence in incoming.decoding:
            self._counters["frames_duplicate"] += 1
            return []
        if len(incoming.decoding) >= 2 * limits.FRAME_WINDOW:
            self._counters["frames_rejected:window"] += 1
            return []
        if incoming.first_frame_us is None:
            incoming.first_frame_us = now_us
        incoming.decoding.add(header.sequence)
        key = next(self._job_keys)
        self._jobs[key] = (incoming, header)
        self._custody.enter(incoming.seq_id)
        return [Run(key, DecodeJob(frame=data, header=header, table=incoming.table, codecs=self._codecs))]

    def on_job(self, done: JobDone, now_us: int) -> list[object]:
        """A decode job returned: its frame is in memory, or was damaged."""
        incoming, header = self._jobs.pop(done.key)
        incoming.decoding.discard(header.sequence)
        actions: list[object] = [*self._custody.leave(incoming.seq_id)]
        if incoming.transfer_id not in self._transfers:
            return actions  # aborted meanwhile; the units were held for this job alone
        if done.error is not None:
            return actions + self._on_damaged(incoming, header, done.error)
        self._place(incoming, header, done.result)
        return [*actions, self._ack(incoming, header), *self._commit_if_whole(incoming, now_us)]

    def _on_damaged(self, incoming: _Incoming, header: FrameHeader, error: Exception) -> list[object]:
        if not isinstance(error, FrameError):
            return self._fail(incoming, "decode_error")
        self._counters[f"frames_rejected:{error.reason}"] += 1
        assert incoming.link is not None
        return [Send(incoming.link, self._reply(FrameKind.NACK, header))]

    def _place(self, incoming: _Incoming, header: FrameHeader, checksum: int) -> None:
        incoming.placed[header.sequence] = checksum
        incoming.digest = frames.combine(incoming.digest, checksum)
        self._fill(incoming, header)
        if header.codec != RAW:
            incoming.encoding = header.encoding
        incoming.bytes_raw += header.raw_bytes
        incoming.bytes_wire += frames.HEADER_BYTES + header.payload_bytes

    def _fill(self, incoming: _Incoming, header: FrameHeader) -> None:
        """Count exactly what is filled: overlapping frames must not add up to a coverage with holes."""
        if incoming.filled_LT is None:
            incoming.filled_LT = np.zeros((self.schema.kv.layers, incoming.context_tokens), dtype=np.bool_)
        region_LT = incoming.filled_LT[header.layer_start : header.layer_end, header.token_start : header.token_end]
        incoming.missing -= region_LT.size - int(np.count_nonzero(region_LT))
        region_LT[:] = True

    def _on_end(self, incoming: _Incoming, header: FrameHeader, data: bytes, now_us: int) -> list[object]:
        try:
            end = frames.parse_end_untrusted(frames.payload_of(data))
            self._check_branches_untrusted(incoming, end)
            self._check_positions_untrusted(incoming, end)
            self._check_identity_untrusted(incoming, header)
        except FrameError as error:
            self._counters[f"frames_rejected:{error.reason}"] += 1
            return []
        incoming.end = end
        if incoming.first_frame_us is None:
            incoming.first_frame_us = now_us
        return self._commit_if_whole(incoming, now_us)

    def _check_branches_untrusted(self, incoming: _Incoming, end: End) -> None:
        """A branch for each choice; one pending token, of this model's vocabulary (it is fed to the engine as it is),
        or none for a choice that is over."""
        if len(end.branches) != incoming.choices:
            raise FrameError("payload")
        for branch in end.branches:
            if len(branch) > 1 or any(token >= self._vocab_size for token in branch):
                raise FrameError("payload")

    @staticmethod
    def _check_positions_untrusted(incoming: _Incoming, end: End) -> None:
        """Images take up fewer positions than tokens, never more, and none comes before the first."""
        if not -incoming.context_tokens <= end.rope_delta <= 0:
            raise FrameError("payload")

    def _commit_if_whole(self, incoming: _Incoming, now_us: int) -> list[object]:
        """Decode starts only on a verified END whose every frame is in memory (reliability lesson 7)."""
        end = incoming.end
        if end is None or len(incoming.placed) < end.frames or incoming.decoding:
            return []  # also not while a frame that END does not know of is being written (DESIGN 2.2)
        if len(incoming.placed) != end.frames or incoming.digest != end.digest or incoming.missing:
            return self._fail(incoming, "digest_mismatch")
        assert incoming.link is not None and incoming.first_frame_us is not None
        self._forget(incoming)
        self._remember_committed(incoming.transfer_id)
        arrived = Arrived(
            seq_id=incoming.seq_id,
            branches=end.branches,
            rope_delta=end.rope_delta,
            encoding=incoming.encoding,
            bytes_raw=incoming.bytes_raw,
            bytes_wire=incoming.bytes_wire,
            transfer_us=now_us - incoming.first_frame_us,
        )
        return [Send(incoming.link, self._reply_to(FrameKind.COMMITTED, incoming, 0)), arrived]

    # -- losses --------------------------------------------------------------------------------------------------------
    def on_link_lost(self, link: LinkName) -> list[object]:
        """The source's link is gone: its transfers cannot complete. The router binds again or starts over."""
        lost = [incoming for incoming in self._transfers.values() if incoming.link == link]
        return [action for incoming in lost for action in self._fail(incoming, "link_lost")]

    def _fail(self, incoming: _Incoming, reason: str) -> list[object]:
        self._forget(incoming)
        self._counters[f"arrivals_failed:{reason}"] += 1
        refused: list[object] = []
        if incoming.link is not None and reason not in ("link_lost", "source_aborted"):
            code = TransferRefusal.CORRUPT
            refused = [Send(incoming.link, self._reply_to(FrameKind.REFUSED, incoming, 0, code))]
        return [*refused, ArrivalFailed(seq_id=incoming.seq_id, reason=reason)]

    def _forget(self, incoming: _Incoming) -> None:
        self._transfers.pop(incoming.transfer_id, None)
        self._by_sequence.pop(incoming.seq_id, None)

    def _remember_committed(self, transfer_id: bytes) -> None:
        self._committed[transfer_id] = None
        if len(self._committed) > limits.TRANSFERS_REMEMBERED:
            self._committed.popitem(last=False)

    # -- replies -------------------------------------------------------------------------------------------------------
    def _ack(self, incoming: _Incoming, header: FrameHeader) -> Send:
        assert incoming.link is not None
        return Send(incoming.link, self._reply(FrameKind.ACK, header))

    def _reply(self, kind: FrameKind, header: FrameHeader, refusal: TransferRefusal | None = None) -> bytes:
        return frames.seal_reply(
            kind,
            transfer_id=header.transfer_id,
            epoch=header.epoch,
            sequence=header.sequence,
            schema_digest=self.schema.digest,
            refusal=refusal,
        )

    def _reply_to(
        self, kind: FrameKind, incoming: _Incoming, sequence: int, refusal: TransferRefusal | None = None
    ) -> bytes:
        return frames.seal_reply(
            kind,
            transfer_id=incoming.transfer_id,
            epoch=incoming.epoch,
            sequence=sequence,
            schema_digest=self.schema.digest,
            refusal=refusal,
        )
