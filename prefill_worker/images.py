"""ImageGathering: the embeddings that prompts need, gathered before a prompt is computed. Pure, and blind to wires.

    begin -> ReserveEmbeddings --EmbeddingsReserved--> a Target open for each one that is not here; ImagesWanted report
          --Arrived*--> EmbeddingArrived                       (also when nothing is wanted: whoever holds more lets go)
    take: all are here, and lent to the prompt; its engine reads them until it is computed, or released (`Custody`)

Each embedding is a sequence of its own, of the rows of one image. All of a prompt's get memory at once, or none do: two
half-gathered prompts could wait for each other for ever.

Not here: who has the embeddings (router), and when a prompt is computed (engine).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.base.machine import Command
from engine.commands import BlockTable, EmbeddingArrived, EmbeddingsReserved, EmbeddingWish, ReserveEmbeddings
from engine.images import PlacedImage, PromptImage
from kv_transfer.custody import Custody
from kv_transfer.reports import ImagesWanted
from kv_transfer.target import Arrived, Target


@dataclass(slots=True)
class _Prompt:
    seq_id: int
    images: dict[int, PromptImage]  # by the sequence of its embedding, in order
    tables: dict[int, BlockTable] = field(default_factory=dict)
    missing: set[int] = field(default_factory=set)

    @property
    def is_whole(self) -> bool:
        return bool(self.tables) and not self.missing


class ImageGathering:
    """The prompts of one worker whose images are not all here yet. `mint` gives sequence ids."""

    def __init__(self, *, target: Target, custody: Custody, mint: Callable[[], int]) -> None:
        self._target = target
        self._custody = custody
        self._mint = mint
        self._prompts: dict[int, _Prompt] = {}
        self._by_image: dict[int, _Prompt] = {}

    def gathers(self, seq_id: int) -> bool:
        return seq_id in self._prompts

    def prompt_of(self, seq_id: int) -> int | None:
        """The prompt that waits for this embedding."""
        prompt = self._by_image.get(seq_id)
        return None if prompt is None else prompt.seq_id

    def begin(self, seq_id: int, images: Sequence[PromptImage]) -> list[object]:
        prompt = _Prompt(seq_id, {self._mint(): image for image in images})
        self._prompts[seq_id] = prompt
        for image in prompt.images:
            self._by_image[image] = prompt
            self._custody.begin(image)
        wishes = tuple(EmbeddingWish(image, each.key, each.features) for image, each in prompt.images.items())
        return [Command(ReserveEmbeddings(wishes=wishes))]

    def on_reserved(self, event: EmbeddingsReserved, epoch: int) -> list[object]:
        prompt = self._by_image.get(event.grants[0].seq_id)
        if prompt is None:
            return []
        transfers = []
        for index, grant in enumerate(event.grants):
            prompt.tables[grant.seq_id] = grant.block_table
            if not grant.cached:
                prompt.missing.add(grant.seq_id)
                transfers.append((index, self._open(prompt, grant.seq_id, epoch)))
        return [ImagesWanted(seq_id=prompt.seq_id, transfers=tuple(transfers))]

    def _open(self, prompt: _Prompt, image: int, epoch: int) -> bytes:
        return self._target.open(
            image,
            table=prompt.tables[image],
            skip_tokens=0,
            context_tokens=prompt.images[image].features,
            epoch=epoch,
            choices=0,
        )

    def on_arrived(self, event: Arrived) -> list[object]:
        self._by_image[event.seq_id].missing.discard(event.seq_id)
        return [Command(EmbeddingArrived(seq_id=event.seq_id))]

    def take(self, seq_id: int) -> tuple[PlacedImage, ...] | None:
        """All images of a prompt, which reads them from now on and lets them go when it has; None if some are missing.

        To those who gather, they are over.
        """
        prompt = self._prompts.get(seq_id)
        if prompt is None or not prompt.is_whole:
            return None
        self._custody.reads(seq_id, tuple(prompt.images))
        self.drop(seq_id)
        return tuple(PlacedImage(each, prompt.tables[image]) for image, each in prompt.images.items())

    def drop(self, seq_id: int) -> list[object]:
        """Nobody waits for these images any more. Idempotent."""
        prompt = self._prompts.pop(seq_id, None)
        actions: list[object] = []
        for image in prompt.images if prompt is not None else ():
            del self._by_image[image]
            self._target.abort(image)
            actions += self._custody.end(image)
        return actions
