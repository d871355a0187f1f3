"""DecodeRole: reservations in, tokens out. What only decode does; pure, and blind to wires.

    reserve -> Reserve --Reserved--> Granted report, Target open --Arrived--> Activate, Committed report --> Tokens*
    a sequence that must leave (drain, or the engine ran out of columns) pauses, is held, and becomes a Source:
    running --Paused--> Relocate report --bind--> frames --Delivered--> free

Token 0 was sampled by the source. It is reported again with the first tokens from here, so that it does not matter
which of the two workers the router hears first, or whether the source still lives.

A request of several choices arrives, or is prefilled here, as one sequence, the *group*. It never runs:

    group    waiting -> receiving -> over, silently: its KV is its children's        (adopted: running -> over)
    child    waiting ..............> running -> (pauses, moves, ends as any other, each for itself)
                                   > over, silently, if its choice ended with token 0
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from engine.base.errors import Status
from engine.base.machine import Command
from engine.commands import Activate, Branch, Pause, Paused, Prefilled, Reserve, Reserved, SampledToken, TokensSampled
from kv_transfer.custody import Custody
from kv_transfer.reports import AttemptOver, Committed, Full, Granted, Relocate, RelocateReason, Tokens, Work
from kv_transfer.source import Binding, Delivered, DeliveryFailed, Source
from kv_transfer.target import ArrivalFailed, Arrived, Target


@dataclass(slots=True)
class _Decode:
    work: Work
    stage: str = "waiting"  # waiting -> receiving -> running -> held
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
        self._begin_children(work)
        command = Reserve(
            seq_id=work.seq_id,
            token_ids=work.token_ids,
            growth_tokens=min(work.sampling.max_tokens, self._config.growth_tokens),
            tenant=work.tenant,
            identity=work.identity,
            children=work.children,
            priority=work.priority,
            images=work.images,
        )
        return [Command(command)]

    def adopt(self, work: Work, tokens: Sequence[SampledToken]) -> list[object]:
        """A prefill of this very worker continues here; `Custody` knows it already.

        `tokens` are its first ones if it has reported them: nobody says them twice, and a group has forked by then.
        """
        self._decodes[work.seq_id] = _Decode(work, stage="running")
        self._begin_children(work)
        return self._fork(work, tokens) if work.children and tokens else []

    def _begin_children(self, work: Work) -> None:
        """The engine is about to be asked for units in their names too."""
        for child in work.parts:
            self._decodes[child.seq_id] = _Decode(child)
            self._custody.begin(child.seq_id)

    def bind(self, seq_id: int, binding: Binding, now_us: int) -> list[object]:
        """A held sequence has found another target."""
        return self._source.bind(seq_id, binding, now_us) if self.owns(seq_id) else []

    def quiesce(self) -> list[object]:
        """Give every running sequence away; of a group that still prefills here, its children as soon as they run. What
        is only arriving is not ours yet, and what is held is already leaving."""
        running = [seq_id for seq_id, decode in self._decodes.items() if decode.stage == "running"]
        return [Command(Pause(seq_id=seq_id)) for seq_id in running]

    def abort(self, seq_id: int) -> list[object]:
        """Idempotent, in every stage. A group takes its children along."""
        decode = self._decodes.pop(seq_id, None)
        if decode is None:
            return []
        self._target.abort(seq_id)
        own = [*self._source.drop(seq_id), *self._custody.end(seq_id)]
        return own + [action for child in decode.work.children for action in self.abort(child)]

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
            skip_tokens=event.cached_tokens,
            context_tokens=len(decode.work.token_ids),
            epoch=epoch,
            choices=len(decode.work.choices),
            identity=decode.work.identity,
        )
        return [Granted(seq_id=event.seq_id, transfer_id=transfer_id, skip_tokens=event.cached_tokens)]

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
                over.extend(self._end(token.seq_id))
        return [Tokens(tokens=tuple(tokens)), *over] if tokens else []

    def on_prefilled(self, event: Prefilled) -> list[object]:
        """Token 0 of an adopted sequence, or of each of its children: more tokens to us."""
        decode = self._decodes.get(event.seq_id)
        if decode is None:
            return []
        images = self._custody.has_read(event.seq_id)
        if not decode.work.children:
            return [*images, *self.on_tokens(TokensSampled(tokens=event.tokens))]
        pairs = zip(event.tokens, decode.work.children, strict=True)
        tokens = tuple(replace(token, seq_id=child) for token, child in pairs)
        return [*images, *self.on_tokens(TokensSampled(tokens=tokens)), *self._fork(decode.work, event.tokens)]

    def _fork(self, work: Work, tokens: Sequence[SampledToken]) -> list[object]:
        """The engine has: children whose choice goes on run; the others and the group are over."""
        idle: list[object] = []
        for child, token in zip(work.children, tokens, strict=True):
            if token.finish is not None:
                idle.extend(self._end(child))
            elif child in self._decodes:
                self._decodes[child].stage = "running"
        return [*idle, *self._disband(work.seq_id)]

    def _end(self, seq_id: int) -> list[object]:
        return [*self.abort(seq_id), AttemptOver(seq_id=seq_id)] if self.owns(seq_id) else []

    def _disband(self, seq_id: int) -> list[object]:
        """A group's end, and not its children's."""
        del self._decodes[seq_id]
        return [*self._custody.end(seq_id), AttemptOver(seq_id=seq_id)]

    def on_paused(self, event: Paused, now_us: int) -> list[object]:
        """The engine stopped this sequence; its KV is whole up to the pending last token."""
        decode = self._decodes.get(event.seq_id)
        if decode is None:
            return []
        decode.stage = "held"
        carried = [Tokens(tokens=tuple(decode.carried))] if decode.carried else []
        decode.carried.clear()
        reason = RelocateReason.PREEMPTED if event.preempted else RelocateReason.QUIESCING
        held = self._hold(event, decode.work.identity, now_us)
        return [*carried, *held, Relocate(seq_id=event.seq_id, reason=reason, token_ids=event.token_ids)]

    def _hold(self, event: Paused, identity: str, now_us: int) -> list[object]:
        """All layers of all tokens but the last are computed:  [context ............ | pending token)"""
        self._source.hold(event.seq_id, event.block_table, final_tokens=len(event.token_ids) - 1, identity=identity)
        pending = ((event.token_ids[-1],),)
        return self._source.complete(event.seq_id, pending, now_us, rope_delta=event.rope_delta)

    # -- transfer outcomes ---------------------------------------------------------------------------------------------
    def on_arrived(self, event: Arrived) -> list[object]:
        """All KV is here: decode each choice from the source's pending token on."""
        decode = self._decodes.get(event.seq_id)
        if decode is None:
            return []
        work = decode.work
        committed = Committed(
            seq_id=event.seq_id,
            encoding=event.encoding,
            bytes_raw=event.bytes_raw,
            bytes_wire=event.bytes_wire,
            transfer_us=event.transfer_us,
        )
        branches, idle = self._branch(work, event.branches)
        group = self._disband(work.seq_id) if work.children else []
        return [*_activate(work, branches, event.rope_delta), committed, *idle, *group]

    def _branch(self, work: Work, pending: Sequence[tuple[int, ...]]) -> tuple[list[Branch], list[object]]:
        """The choices that go on, and what ends those that do not. One that was aborted meanwhile is neither."""
        branches: list[Branch] = []
        idle: list[object] = []
        for part, tokens in zip(work.parts or (work,), pending, strict=True):
            decode = self._decodes.get(part.seq_id)
            if decode is None:
                continue
            if not tokens:
                idle.extend(self._end(part.seq_id))
                continue
            (choice,) = part.choices
            decode.stage = "running"
            decode.carried = [SampledToken(part.seq_id, work.position, tokens[0], None, choice)]
            branches.append(Branch(seq_id=part.seq_id, choice=choice, token_id=tokens[0]))
        return branches, idle

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


def _activate(work: Work, branches: Sequence[Branch], delta: int) -> list[object]:
    """Nothing if every choice was aborted while its KV was under way."""
    command = Activate(
        seq_id=work.seq_id,
        token_ids=work.token_ids,
        prompt_tokens=work.prompt_tokens,
        sampling=work.sampling,
        branches=tuple(branches),
        rope_delta=delta,
    )
    return [Command(command)] if branches else []
