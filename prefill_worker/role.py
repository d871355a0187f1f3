"""PrefillRole: prompts in, first tokens and KV out. What only prefill does; pure, and blind to wires.

    add -> AddPrefill --Admitted--> NearTurn report --KVComputed*--> regions to the Source --Prefilled--> FirstToken*
    bind: the Source may send; a binding to this very worker moves nothing: the sequence decodes here
    Delivered: the target has it all, the units are free

A prompt with images is added to the engine once their embeddings are here (`ImageGathering`); it reads them until it
is computed.

A request of several choices is one sequence here, a *group*: one prompt, one token per choice, one transfer with a
branch per choice.

Not here: which target (router), what a frame is (kv_transfer), when a step runs (engine).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.base.errors import Status
from engine.base.machine import Command
from engine.commands import (
    AddPrefill,
    Admitted,
    DecodeHere,
    EmbeddingsReserved,
    KVComputed,
    MarkBound,
    Prefilled,
    SampledToken,
)
from engine.images import PlacedImage, rope_delta
from kv_transfer.custody import Custody
from kv_transfer.reports import AttemptOver, FirstToken, NearTurn, Relocate, RelocateReason, Work
from kv_transfer.source import Binding, Delivered, DeliveryFailed, Source
from kv_transfer.target import ArrivalFailed, Arrived
from prefill_worker.images import ImageGathering


@dataclass(slots=True)
class _Prefill:
    work: Work
    tokens: tuple[SampledToken, ...] = ()  # sampled and reported, one per choice; none before `Prefilled`


class PrefillRole:
    """The prefills of one worker. Without `images` it is of a model that does not see."""

    def __init__(self, *, source: Source, custody: Custody, images: ImageGathering | None = None) -> None:
        self._source = source
        self._custody = custody
        self._images = images
        self._prefills: dict[int, _Prefill] = {}

    def owns(self, seq_id: int) -> bool:
        return seq_id in self._prefills

    def __len__(self) -> int:
        return len(self._prefills)

    def add(self, work: Work) -> list[object]:
        self._prefills[work.seq_id] = _Prefill(work)
        self._custody.begin(work.seq_id)
        if not work.images:
            return self._compute(work, ())
        assert self._images is not None, "images for a model that does not see"
        return self._images.begin(work.seq_id, work.images)

    def _compute(self, work: Work, images: tuple[PlacedImage, ...]) -> list[object]:
        command = AddPrefill(
            seq_id=work.seq_id,
            token_ids=work.token_ids,
            prompt_tokens=work.prompt_tokens,
            sampling=work.sampling,
            tenant=work.tenant,
            choices=work.choices,
            priority=work.priority,
            images=images,
        )
        return [Command(command)]

    def bind(self, seq_id: int, binding: Binding, now_us: int) -> list[object]:
        """The target is known. The sequence no longer counts against the unbound ones."""
        if seq_id not in self._prefills:
            return []
        return [Command(MarkBound(seq_id=seq_id)), *self._source.bind(seq_id, binding, now_us)]

    def give_to_decode(self, work: Work) -> tuple[list[object], tuple[SampledToken, ...]]:
        """The target is this worker: its decode role owns the sequence from now on, and no byte moves.

        `work` names the children of a group. Also returns the first tokens, if they have been reported already.
        """
        tokens = self._prefills.pop(work.seq_id).tokens
        command = DecodeHere(seq_id=work.seq_id, children=work.children)
        return [*self._source.drop(work.seq_id), Command(command)], tokens

    def abort(self, seq_id: int) -> list[object]:
        """Idempotent, in every stage."""
        if self._prefills.pop(seq_id, None) is None:
            return []
        gathered = self._images.drop(seq_id) if self._images is not None else []
        return [*self._source.drop(seq_id), *self._custody.end(seq_id), *gathered]

    # -- images --------------------------------------------------------------------------------------------------------
    def gathers(self, seq_id: int) -> bool:
        """Its images are not all here: the engine has not heard of it yet."""
        return self._images is not None and self._images.gathers(seq_id)

    def waiting_for(self, image: int) -> int | None:
        """The prefill that waits for this embedding."""
        return self._images.prompt_of(image) if self._images is not None else None

    def on_images_reserved(self, event: EmbeddingsReserved, epoch: int) -> list[object]:
        seq_id = self.waiting_for(event.grants[0].seq_id)
        if seq_id is None or self._images is None:
            return []
        return [*self._images.on_reserved(event, epoch), *self._compute_if_gathered(seq_id)]

    def on_image_arrived(self, event: Arrived) -> list[object]:
        seq_id = self.waiting_for(event.seq_id)
        if seq_id is None or self._images is None:
            return []
        return [*self._images.on_arrived(event), *self._compute_if_gathered(seq_id)]

    def _compute_if_gathered(self, seq_id: int) -> list[object]:
        images = self._images.take(seq_id) if self._images is not None else None
        return [] if images is None else self._compute(self._prefills[seq_id].work, images)

    def on_image_failed(self, event: ArrivalFailed) -> list[object]:
        """Nothing has been computed yet: the router starts over, where the images are."""
        seq_id = self.waiting_for(event.seq_id)
        if seq_id is None:
            return []
        return [*self.abort(seq_id), AttemptOver(seq_id=seq_id, status=Status.UNAVAILABLE, reason=event.reason)]

    # -- engine events -------------------------------------------------------------------------------------------------
    def on_admitted(self, event: Admitted) -> list[object]:
        """What the prefix cache had is final in every layer: a target that lacks it gets it with the first regions.

        tokens   0 ........ cached_tokens ............. context_tokens
                 | final now | computed chunk by chunk  |
        """
        if not self.owns(event.seq_id):
            return []
        self._source.hold(event.seq_id, event.block_table, final_tokens=event.cached_tokens)
        context_tokens, cached_tokens = event.context_tokens, event.cached_tokens
        return [NearTurn(seq_id=event.seq_id, context_tokens=context_tokens, cached_tokens=cached_tokens)]

    def on_computed(self, event: KVComputed, now_us: int) -> list[object]:
        layers = (event.layer_start, event.layer_end)
        return self._source.computed(event.seq_id, layers, (event.token_start, event.token_end), now_us)

    def on_prefilled(self, event: Prefilled, now_us: int) -> list[object]:
        prefill = self._prefills.get(event.seq_id)
        if prefill is None:
            return []
        prefill.tokens = event.tokens
        first = [*_first_tokens(event.tokens), *self._custody.has_read(event.seq_id)]
        if event.finished:
            return [*first, *self.abort(event.seq_id), AttemptOver(seq_id=event.seq_id)]
        branches = tuple(() if token.finish is not None else (token.token_id,) for token in event.tokens)
        delta = rope_delta(prefill.work.images)
        return [*first, *self._source.complete(event.seq_id, branches, now_us, rope_delta=delta)]

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


def _first_tokens(tokens: Sequence[SampledToken]) -> list[FirstToken]:
    return [
        FirstToken(
            seq_id=token.seq_id,
            position=token.position,
            token_id=token.token_id,
            finish=token.finish,
            choice=token.choice,
            logprobs=token.logprobs,
        )
        for token in tokens
    ]
