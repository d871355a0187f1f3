"""EmbeddingIndex: which embeddings this router has had made where, or sent there: an image goes to a worker that has
encoded it, and a prompt to one that has its images.

Approximate on purpose, as `prefix_index` is: a wrong estimate costs time, never correctness. Keys are the images' own
(`PromptImage.key`), and two tenants have none in common.
"""

from control_plane.router.dispatch.prefix_index import PrefixIndex
from control_plane.router.dispatch.workers import Worker
from engine.images import PromptImage


class EmbeddingIndex:
    def __init__(self) -> None:
        self._index = PrefixIndex()

    def holds(self, worker: Worker, image: PromptImage) -> bool:
        return bool(self._index.held_blocks(worker.id, [image.key]))

    def note(self, worker: Worker, image: PromptImage) -> None:
        """At once, not when it is there: the next request of a burst shall follow, and will find it.

        As many are remembered as the worker could hold of this size.
        """
        images = worker.info.embedding_columns // max(1, worker.columns_for(image.features))
        self._index.note(worker.id, [image.key], columns=max(1, images))

    def forget(self, worker: Worker) -> None:
        self._index.forget(worker.id)

    def clear(self) -> None:
        self._index.clear()
