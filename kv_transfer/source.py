"""Source: sends the KV of held sequences to targets while it is still being computed. A pure machine.

One `Source` serves all outbound transfers of a worker, whether the sequence comes from a prefill that is running or
from a decode that has been paused: both are regions of computed KV in held units. Embeddings of images have a schema of
their own, so another `Source` sends them: rows for tokens, and nothing that is sampled after them.

    hold() -> HELD --bind()--> SENDING --all regions sent, tokens known--> END sent --COMMITTED--> Delivered
               ^                  |  link lost | refused | no answer                 -> DeliveryFailed
               +------------------+  (units stay held, whole; the router binds again)

    regions   computed .......................| not computed yet
    frames    acknowledged ....| in flight ...| waiting for a place in the window

The window (FRAME_WINDOW frames, encoded or in flight) bounds memory on both ends. END does not wait for the last
acknowledgements: it carries the frame count and a digest over every frame, so the target knows what it still lacks.
Frames are kept until acknowledged, so sending again needs no second encode and cannot produce other bytes.

KV that has come through a lossy codec leaves raw, whatever the binding asks for (DESIGN 2.7), and END names what it
has come through: it is no more exact for having travelled raw.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from engine.base import limits
from engine.base.errors import FrameError
from engine.base.machine import JobDone, LinkName, Run, Send
from engine.commands import BlockTable
from engine.kv.schema import CacheSchema
from kv_transfer import frame as frames
from kv_transfer.codecs import EXACT, RAW_ENCODING, CodecSet, Encoding
from kv_transfer.custody import Custody
from kv_transfer.frame import End, FrameHeader, FrameKind
from kv_transfer.jobs import EncodeJob, atoms

ANSWERS = frozenset({FrameKind.ACK, FrameKind.NACK, FrameKind.COMMITTED, FrameKind.REFUSED})

Region = tuple[tuple[int, int], tuple[int, int]]
"""((layer_start, layer_end), (token_start, token_end))"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """Where a held sequence goes, as the router said in `Bind`."""

    link: LinkName
    transfer_id: bytes
    epoch: int
    skip_tokens: int
    target_attempt: int
    encoding: Encoding = RAW_ENCODING


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """The target has committed: the units may become prefix cache or free memory."""

    seq_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryFailed:
    """This binding is over; the sequence is held, unharmed, and may be bound again."""

    seq_id: int
    target_attempt: int
    reason: str


@dataclass(slots=True)
class _Sent:
    data: bytes
    refused: int = 0


@dataclass(slots=True)
class _Delivery:
    """The progress of one binding."""

    binding: Binding
    pending: deque[Region] = field(default_factory=deque)
    next_sequence: int = 0
    encoding: int = 0
    in_flight: OrderedDict[int, _Sent] = field(default_factory=OrderedDict)
    frames: int = 0
    digest: int = 0
    end_data: bytes | None = None
    progress_us: int = 0
    silences: int = 0

    @property
    def waits_for_peer(self) -> bool:
        return bool(self.in_flight) or self.end_data is not None


@dataclass(slots=True)
class _Outgoing:
    seq_id: int
    table: BlockTable
    identity: str = EXACT  # of the KV that is held
    computed: list[Region] = field(default_factory=list)
    branches: tuple[tuple[int, ...], ...] | None = None
    rope_delta: int = 0
    delivery: _Delivery | None = None


class Source:
    """All outbound transfers of one worker."""

    def __init__(
        self,
        schema: CacheSchema,
        *,
        codecs: CodecSet,
        custody: Custody,
        job_keys: Iterator[int],
        counters: Counter[str],
    ) -> None:
        self._schema = schema
        self._codecs = codecs
        self._custody = custody
        self._job_keys = job_keys
        self._counters = counters
        self._outgoing: dict[int, _Outgoing] = {}
        self._by_transfer: dict[bytes, _Outgoing] = {}
        self._jobs: dict[int, tuple[_Outgoing, _Delivery, int]] = {}

    # -- the owner's side ----------------------------------------------------------------------------------------------
    def hold(self, seq_id: int, table: BlockTable, *, final_tokens: int = 0, identity: str = EXACT) -> None:
        """A sequence's units are held here until `drop`. KV of the first `final_tokens` is in them, in every layer."""
        outgoing = _Outgoing(seq_id, table, identity)
        if final_tokens:
            outgoing.computed.append(((0, self._schema.kv.layers), (0, final_tokens)))
        self._outgoing[seq_id] = outgoing

    def computed(self, seq_id: int, layers: tuple[int, int], tokens: tuple[int, int], now_us: int) -> list[object]:
        """KV of this region is final. Goes out at once if the sequence is bound."""
        outgoing = self._outgoing.get(seq_id)
        if outgoing is None:
            return []
        outgoing.computed.append((layers, tokens))
        if outgoing.delivery is None:
            return []
        self._queue(outgoing.delivery, (layers, tokens))
        return self._pump(outgoing, now_us)

    def complete(
        self, seq_id: int, branches: tuple[tuple[int, ...], ...], now_us: int, *, rope_delta: int = 0
    ) -> list[object]:
        """Everything is computed, and these are the tokens sampled after it (see `End`): END may go out."""
        outgoing = self._outgoing.get(seq_id)
        if outgoing is None:
            return []
        outgoing.branches = branches
        outgoing.rope_delta = rope_delta
        return self._pump(outgoing, now_us)

    def bind(self, seq_id: int, binding: Binding, now_us: int) -> list[object]:
        """Send to this target from now on. An earlier binding is over, silently for us and loudly for its target."""
        outgoing = self._outgoing.get(seq_id)
        if outgoing is None:
            return []
        actions = self._unbind(outgoing)
        if outgoing.identity != EXACT:
            binding = replace(binding, encoding=RAW_ENCODING)
        delivery = _Delivery(binding, progress_us=now_us)
        outgoing.delivery = delivery
        self._by_transfer[binding.transfer_id] = outgoing
        for region in outgoing.computed:
            self._queue(delivery, region)
        return actions + self._pump(outgoing, now_us)

    def unbind(self, seq_id: int) -> list[object]:
        """The binding is over, and its target is told; the sequence stays held. Idempotent."""
        outgoing = self._outgoing.get(seq_id)
        return [] if outgoing is None else self._unbind(outgoing)

    def drop(self, seq_id: int) -> list[object]:
        """The sequence is over here. Its units are `Custody`'s business. Idempotent."""
        outgoing = self._outgoing.pop(seq_id, None)
        return [] if outgoing is None else self._unbind(outgoing)

    def is_job(self, key: int) -> bool:
        return key in self._jobs

    def holds(self, seq_id: int) -> bool:
        return seq_id in self._outgoing

    def __len__(self) -> int:
        return len(self._outgoing)

    # -- frames out ----------------------------------------------------------------------------------------------------
    def _queue(self, delivery: _Delivery, region: Region) -> None:
        layers, (token_start, token_end) = region
        token_start = max(token_start, delivery.binding.skip_tokens)
        if token_start < token_end:
            delivery.pending.extend(atoms(self._schema.kv, layers, (token_start, token_end)))

    def _pump(self, outgoing: _Outgoing, now_us: int) -> list[object]:
        """Fill the window with encode jobs, then send END once every frame has left."""
        delivery = outgoing.delivery
        if delivery is None:
            return []
        actions: list[object] = []
        while delivery.pending and delivery.encoding + len(delivery.in_flight) < limits.FRAME_WINDOW:
            actions.append(self._encode(outgoing, delivery, delivery.pending.popleft()))
        drained = not delivery.pending and not delivery.encoding
        if drained and outgoing.branches is not None and delivery.end_data is None:
            actions.append(self._send_end(outgoing, delivery, outgoing.branches, now_us))
        return actions

    def _encode(self, outgoing: _Outgoing, delivery: _Delivery, region: Region) -> Run:
        key = next(self._job_keys)
        self._jobs[key] = (outgoing, delivery, delivery.next_sequence)
        self._custody.enter(outgoing.seq_id)
        delivery.encoding += 1
        header = self._header(delivery, FrameKind.DATA, delivery.next_sequence, region)
        delivery.next_sequence += 1
        return Run(key, EncodeJob(header=header, table=outgoing.table, codecs=self._codecs))

    def _header(
        self, delivery: _Delivery, kind: FrameKind, sequence: int, region: Region = ((0, 0), (0, 0))
    ) -> FrameHeader:
        (layer_start, layer_end), (token_start, token_end) = region
        encoding = delivery.binding.encoding
        return FrameHeader(
            kind=kind,
            transfer_id=delivery.binding.transfer_id,
            epoch=delivery.binding.epoch,
            sequence=sequence,
            schema_digest=self._schema.digest,
            codec=encoding.codec,
            level=encoding.level,
            tables=encoding.tables,
            layer_start=layer_start,
            layer_end=layer_end,
            token_start=token_start,
            token_end=token_end,
            head_start=0,
            head_end=self._schema.kv.heads if kind is FrameKind.DATA else 0,
        )

    def on_job(self, done: JobDone, now_us: int) -> list[object]:
        """An encode job returned: its frame goes out, unless the binding it was for is over."""
        outgoing, delivery, sequence = self._jobs.pop(done.key)
        actions: list[object] = [*self._custody.leave(outgoing.seq_id)]
        if outgoing.delivery is not delivery:
            return actions
        delivery.encoding -= 1
        if done.error is not None:
            return actions + self._fail(outgoing, "encode_error")
        data: bytes = done.result
        delivery.in_flight[sequence] = _Sent(data)
        delivery.frames += 1
        delivery.digest = frames.combine(delivery.digest, frames.checksum_of(data))
        if len(delivery.in_flight) == 1:
            delivery.progress_us = now_us
        return [*actions, Send(delivery.binding.link, data), *self._pump(outgoing, now_us)]

    def _send_end(
        self, outgoing: _Outgoing, delivery: _Delivery, branches: tuple[tuple[int, ...], ...], now_us: int
    ) -> Send:
        end = End(branches=branches, frames=delivery.frames, digest=delivery.digest, rope_delta=outgoing.rope_delta)
        header = self._header(delivery, FrameKind.END, delivery.next_sequence)
        if outgoing.identity != EXACT:  # the binding's encoding is `raw` then, but the KV is not exact
            lossy = Encoding.of(outgoing.identity)
            header = replace(header, codec=lossy.codec, level=lossy.level, tables=lossy.tables)
        delivery.end_data = frames.seal(header, [frames.serialize_end(end)])
        delivery.progress_us = now_us
        return Send(delivery.binding.link, delivery.end_data)

    # -- answers in ----------------------------------------------------------------------------------------------------
    def on_frame(self, link: LinkName, data: bytes, now_us: int) -> list[object]:
        """ACK, NACK, COMMITTED or REFUSED from a target. Answers to bindings that are over mean nothing any more."""
        try:
            header = frames.parse_header_untrusted(data)
            frames.verify_checksum_untrusted(data)
            self._check_answer_untrusted(header)
        except FrameError as error:
            self._counters[f"frames_rejected:{error.reason}"] += 1
            return []
        outgoing = self._by_transfer.get(header.transfer_id)
        if outgoing is None or outgoing.delivery is None or outgoing.delivery.binding.link != link:
            self._counters["answers_stale"] += 1
            return []
        return self._on_answer(outgoing, outgoing.delivery, header, now_us)

    def _check_answer_untrusted(self, header: FrameHeader) -> None:
        if header.kind not in ANSWERS:
            raise FrameError("kind")
        if header.schema_digest != self._schema.digest:
            raise FrameError("schema")
        outgoing = self._by_transfer.get(header.transfer_id)
        if outgoing is not None and outgoing.delivery is not None and header.epoch != outgoing.delivery.binding.epoch:
            raise FrameError("epoch")

    def _on_answer(self, outgoing: _Outgoing, delivery: _Delivery, header: FrameHeader, now_us: int) -> list[object]:
        delivery.progress_us = now_us
        delivery.silences = 0
        if header.kind is FrameKind.ACK:
            delivery.in_flight.pop(header.sequence, None)
            return self._pump(outgoing, now_us)
        if header.kind is FrameKind.NACK:
            return self._resend_refused(outgoing, delivery, header.sequence)
        if header.kind is FrameKind.COMMITTED:
            return self._on_committed(outgoing, delivery)
        return self._fail(outgoing, "refused")

    def _on_committed(self, outgoing: _Outgoing, delivery: _Delivery) -> list[object]:
        if delivery.end_data is None:
            self._counters["answers_stale"] += 1  # nobody may commit what was never ended
            return []
        del self._by_transfer[delivery.binding.transfer_id]
        del self._outgoing[outgoing.seq_id]
        return [Delivered(seq_id=outgoing.seq_id)]

    def _resend_refused(self, outgoing: _Outgoing, delivery: _Delivery, sequence: int) -> list[object]:
        sent = delivery.in_flight.get(sequence)
        if sent is None:
            return []
        sent.refused += 1
        if sent.refused > limits.FRAME_RESENDS_MAX:
            return self._fail(outgoing, "corrupt")
        self._counters["frames_resent"] += 1
        return [Send(delivery.binding.link, sent.data)]

    # -- losses and silence --------------------------------------------------------------------------------------------
    def on_link_lost(self, link: LinkName) -> list[object]:
        lost = [
            outgoing
            for outgoing in self._outgoing.values()
            if outgoing.delivery is not None and outgoing.delivery.binding.link == link
        ]
        return [action for outgoing in lost for action in self._fail(outgoing, "link_lost")]

    def on_tick(self, now_us: int) -> list[object]:
        """Send again what a live link has not answered: a damaged header leaves the target nothing to answer to."""
        actions: list[object] = []
        for outgoing in list(self._outgoing.values()):
            delivery = outgoing.delivery
            if delivery is not None and delivery.waits_for_peer and self._deadline_us(delivery) <= now_us:
                actions.extend(self._on_silence(outgoing, delivery, now_us))
        return actions

    def _on_silence(self, outgoing: _Outgoing, delivery: _Delivery, now_us: int) -> list[object]:
        delivery.silences += 1
        if delivery.silences > limits.FRAME_RESENDS_MAX:
            return self._fail(outgoing, "no_answer")
        delivery.progress_us = now_us
        unanswered = [sent.data for sent in delivery.in_flight.values()]
        if delivery.end_data is not None:
            unanswered.append(delivery.end_data)
        self._counters["frames_resent"] += len(unanswered)
        return [Send(delivery.binding.link, data) for data in unanswered]

    @property
    def next_deadline_us(self) -> int | None:
        waiting = [
            self._deadline_us(outgoing.delivery)
            for outgoing in self._outgoing.values()
            if outgoing.delivery is not None and outgoing.delivery.waits_for_peer
        ]
        return min(waiting, default=None)

    @staticmethod
    def _deadline_us(delivery: _Delivery) -> int:
        return delivery.progress_us + limits.FRAME_RESEND_AFTER_MS * 1_000

    def _fail(self, outgoing: _Outgoing, reason: str) -> list[object]:
        assert outgoing.delivery is not None
        self._counters[f"deliveries_failed:{reason}"] += 1
        attempt = outgoing.delivery.binding.target_attempt
        actions = self._unbind(outgoing, tell_target=reason not in ("link_lost", "refused"))
        return [*actions, DeliveryFailed(seq_id=outgoing.seq_id, target_attempt=attempt, reason=reason)]

    def _unbind(self, outgoing: _Outgoing, *, tell_target: bool = True) -> list[object]:
        """End the binding, keep the sequence. Encode jobs under way finish into nothing."""
        delivery = outgoing.delivery
        if delivery is None:
            return []
        outgoing.delivery = None
        self._by_transfer.pop(delivery.binding.transfer_id, None)
        if not tell_target:
            return []
        header = self._header(delivery, FrameKind.ABORT, delivery.next_sequence)
        return [Send(delivery.binding.link, frames.seal(header, []))]
