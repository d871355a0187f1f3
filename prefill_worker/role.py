"""PrefillRole: prompts in, first tokens and KV out. What only prefill does; pure, and blind to wires.

    add -> AddPrefill --Admitted--> NearTurn report --KVComputed*--> regions to the Source --Prefilled--> FirstToken
    bind: the Source may send; a binding to this very worker moves nothing: the sequence decodes here
    Delivered: the target has it all, the units are free

Not here: which target (router), what a frame is (kv_transfer), when a step runs (engine).
"""

from engine.base.machine import Command
from engine.commands import AddPrefill, Admitted, DecodeHere, KVComputed, MarkBound, Prefilled
from kv_transfer.custody import Custody
from kv_transfer.reports import AttemptOver, FirstToken, NearTurn, Relocate, RelocateReason, Work
from kv_transfer.source import Binding, Delivered, DeliveryFailed, Source


class PrefillRole:
    """The prefills of one worker."""

    def __init__(self, *, source: Source, custody: Custody) -> None:
        self._source = source
        self._custody = custody
        self._prefills: dict[int, Work] = {}

    def owns(self, seq_id: int) -> bool:
        return seq_id in self._prefills

    def __len__(self) -> int:
        return len(self._prefills)

    def add(self, work: Work) -> list[object]:
        self._prefills[work.seq_id] = work
        self._custody.begin(work.seq_id)
        command = AddPrefill(
            seq_id=work.seq_id,
            token_ids=work.token_ids,
            prompt_tokens=work.prompt_tokens,
            sampling=work.sampling,
            tenant=work.tenant,
        )
        return [Command(command)]

    def bind(self, seq_id: int, binding: Binding, now_us: int) -> list[object]:
        """The target is known. The sequence no longer counts against the unbound ones."""
        if seq_id not in self._prefills:
            return []
        return [Command(MarkBound(seq_id=seq_id)), *self._source.bind(seq_id, binding, now_us)]

    def give_to_decode(self, seq_id: int) -> list[object]:
        """The target is this worker: its decode role owns the sequence from now on, and no byte moves."""
        del self._prefills[seq_id]
        return [*self._source.drop(seq_id), Command(DecodeHere(seq_id=seq_id))]

    def abort(self, seq_id: int) -> list[object]:
        """Idempotent, in every stage."""
        if self._prefills.pop(seq_id, None) is None:
            return []
        return [*self._source.drop(seq_id), *self._custody.end(seq_id)]

    # -- engine events -------------------------------------------------------------------------------------------------
    def on_admitted(self, event: Admitted) -> list[object]:
        if not self.owns(event.seq_id):
            return []
        self._source.hold(event.seq_id, event.block_table)
        return [NearTurn(seq_id=event.seq_id, context_tokens=event.context_tokens)]

    def on_computed(self, event: KVComputed, now_us: int) -> list[object]:
        layers = (event.layer_start, event.layer_end)
        return self._source.computed(event.seq_id, layers, (event.token_start, event.token_end), now_us)

    def on_prefilled(self, event: Prefilled, now_us: int) -> list[object]:
        work = self._prefills.get(event.seq_id)
        if work is None:
            return []
        first = FirstToken(seq_id=event.seq_id, position=work.position, token_id=event.token_id, finish=event.finish)
        if event.finish is not None:
            return [first, *self.abort(event.seq_id), AttemptOver(seq_id=event.seq_id)]
        return [first, *self._source.complete(event.seq_id, ((event.token_id,),), now_us)]

    # -- transfer outcomes ---------------------------------------------------------------------------------------------
    def on_delivered(self, event: Delivered) -> list[object]:
        return [*self.abort(event.seq_id), AttemptOver(seq_id=event.seq_id)]

    def on_delivery_failed(self, event: DeliveryFailed) -> list[object]:
        """The KV is intact and held; only the router can find another target for it."""
        return [
            Relocate(
                seq_id=event.seq_id,
                reason=RelocateReason.TRANSFER_FAILED,
                target_attempt=event.target_attempt,
            )
        ]
