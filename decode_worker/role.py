"""DecodeRole: reservations in, tokens out. What only decode does; pure, and blind to wires.

    reserve -> Reserve --Reserved--> Granted report, Target open --Arrived--> Activate, Committed report --> Tokens*
    a sequence that must leave (drain, or the engine ran out of columns) pauses, is held, and becomes a Source:
    running --Paused--> Relocate report --bind--> frames --Delivered--> free

Token 0 was sampled by the source. It is reported again with the first tokens from here, so that it does not matter
which of the two workers the router hears first, or whether the source still lives.
"""

from dataclasses import dataclass, field, replace

from engine.base.errors import Status
from engine.base.machine import Command
from engine.commands import Activate, Pause, Paused, Prefilled, Reserve, Reserved, SampledToken, TokensSampled
from kv_transfer.codecs import RAW, codecs
from kv_transfer.custody import Custody
from kv_transfer.reports import AttemptOver, Committed, Full, Granted, Relocate, RelocateReason, Tokens, Work
from kv_transfer.source import Binding, Delivered, DeliveryFailed, Source
from kv_transfer.target import ArrivalFailed, Arrived, Target


@dataclass(slots=True)
class _Decode:
    work: Work
    stage: str = "reserving"  # reserving -> receiving -> running -> held
    lossy: bool = False  # its KV came through a codec that loses something
    carried: list[SampledToken] = field(default_factory=list)  # sampled by the source, reported with our first


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    growth_tokens: int


class DecodeRole:
    """The decodes of one worker."""

    def __init__(self, config: Config, *, source: Source, target: Target, custody: Custody) -> None:
        self._config = config
        self._source = source
        self._target = target
        self._custody = custody
        self._decodes: dict[int, _Decode] = {}

    def owns(self, seq_id: int) -> bool:
        return seq_id in self._decodes

    def __len__(self) -> int:
        return len(self._decodes)

    # -- what the router asks ------------------------------------------------------------------------------------------
    def reserve(self, work: Work) -> list[object]:
        """Ask the engine for memory, whole and at once. `Granted` or `Full` follows."""
        self._decodes[work.seq_id] = _Decode(work)
        self._custody.begin(work.seq_id)
        growth = min(work.sampling.max_tokens, self._config.growth_tokens)
        command = Reserve(seq_id=work.seq_id, context_tokens=len(work.token_ids), growth_tokens=growth)
        return [Command(command)]

    def adopt(self, work: Work) -> None:
        """A prefill of this very worker continues here; `Custody` knows it already."""
        self._decodes[work.seq_id] = _Decode(work, stage="running")

    def bind(self, seq_id: int, binding: Binding, now_us: int) -> list[object]:
        """A held sequence has found another target. What was lossily decoded is not lossily encoded (DESIGN 2.7)."""
        decode = self._decodes.get(seq_id)
        if decode is None:
            return []
        return self._source.bind(seq_id, replace(binding, codec=RAW) if decode.lossy else binding, now_us)

    def quiesce(self) -> list[object]:
        """Give every running sequence away. The others end by themselves or are already leaving."""
        running = [seq_id for seq_id, decode in self._decodes.items() if decode.stage == "running"]
        return [Command(Pause(seq_id=seq_id)) for seq_id in running]

    def abort(self, seq_id: int) -> list[object]:
        """Idempotent, in every stage."""
        if self._decodes.pop(seq_id, None) is None:
            return []
        self._target.abort(seq_id)
        return [*self._source.drop(seq_id), *self._custody.end(seq_id)]

    # -- engine events -------------------------------------------------------------------------------------------------
    def on_reserved(self, event: Reserved, epoch: int) -> list[object]:
        decode = self._decodes.get(event.seq_id)
        if decode is None:
            return []
        if event.block_table is None:
            return [*self.abort(event.seq_id), Full(seq_id=event.seq_id)]
        decode.stage = "receiving"
        transfer_id = self._target.open(
            event.seq_id,
            table=event.block_table,
            skip_tokens=0,
            context_tokens=len(decode.work.token_ids),
            epoch=epoch,
        )
        return [Granted(seq_id=event.seq_id, transfer_id=transfer_id, skip_tokens=0)]

    def on_tokens(self, event: TokensSampled) -> list[object]:
        """One report for the whole step. Finished sequences are over here and free."""
        tokens: list[SampledToken] = []
        over: list[object] = []
        for token in event.tokens:
            decode = self._decodes.get(token.seq_id)
            if decode is None:
                continue
            tokens.extend([*decode.carried, token])
            decode.carried.clear()
            if token.finish is not None:
                over.extend([*self.abort(token.seq_id), AttemptOver(seq_id=token.seq_id)])
        return [Tokens(tokens=tuple(tokens)), *over] if tokens else []

    def on_prefilled(self, event: Prefilled) -> list[object]:
        """Token 0 of an adopted sequence: one more token to us."""
        decode = self._decodes.get(event.seq_id)
        if decode is None:
            return []
        token = SampledToken(event.seq_id, decode.work.position, event.token_id, event.finish)
        return self.on_tokens(TokensSampled(tokens=(token,)))

    def on_paused(self, event: Paused, now_us: int) -> list[object]:
        """The engine stopped this sequence; its KV is whole up to the pending last token."""
        decode = self._decodes.get(event.seq_id)
        if decode is None:
            return []
        decode.stage = "held"
        carried = [Tokens(tokens=tuple(decode.carried))] if decode.carried else []
        decode.carried.clear()
        reason = RelocateReason.PREEMPTED if event.preempted else RelocateReason.QUIESCING
        held = self._hold(event, now_us)
        return [*carried, *held, Relocate(seq_id=event.seq_id, reason=reason, token_ids=event.token_ids)]

    def _hold(self, event: Paused, now_us: int) -> list[object]:
        """All layers of all tokens but the last are computed:  [context ............ | pending token)"""
        layers = (0, self._target.schema.kv.layers)
        self._source.hold(event.seq_id, event.block_table)
        return [
            *self._source.computed(event.seq_id, layers, (0, len(event.token_ids) - 1), now_us),
            *self._source.complete(event.seq_id, ((event.token_ids[-1],),), now_us),
        ]

    # -- transfer outcomes ---------------------------------------------------------------------------------------------
    def on_arrived(self, event: Arrived) -> list[object]:
        """All KV is here: decode from the source's pending token on."""
        decode = self._decodes.get(event.seq_id)
        if decode is None:
            return []
        work = decode.work
        decode.stage = "running"
        decode.lossy = not codecs.get(event.codec).lossless
        pending = event.branches[0]
        decode.carried = [
            SampledToken(event.seq_id, work.position + index, token_id, None) for index, token_id in enumerate(pending)
        ]
        activate = Activate(
            seq_id=event.seq_id,
            token_ids=work.token_ids + pending,
            prompt_tokens=work.prompt_tokens,
            sampling=work.sampling,
            tenant=work.tenant,
        )
        committed = Committed(
            seq_id=event.seq_id,
            codec=event.codec,
            bytes_raw=event.bytes_raw,
            bytes_wire=event.bytes_wire,
            transfer_us=event.transfer_us,
        )
        return [Command(activate), committed]

    def on_arrival_failed(self, event: ArrivalFailed) -> list[object]:
        """The reservation is worth nothing without its KV. The source still holds it; the router binds again."""
        if not self.owns(event.seq_id):
            return []
        over = AttemptOver(seq_id=event.seq_id, status=Status.UNAVAILABLE, reason=event.reason)
        return [*self.abort(event.seq_id), over]

    def on_delivered(self, event: Delivered) -> list[object]:
        return [*self.abort(event.seq_id), AttemptOver(seq_id=event.seq_id)]

    def on_delivery_failed(self, event: DeliveryFailed) -> list[object]:
        return [
            Relocate(seq_id=event.seq_id, reason=RelocateReason.TRANSFER_FAILED, target_attempt=event.target_attempt)
        ]
