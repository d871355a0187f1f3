"""PrefixIndex: which token blocks this router has sent where, so that a prompt goes to a worker that has computed it.

Approximate on purpose: nobody tells the router what a worker has evicted, or what other routers have sent there. A
wrong estimate costs time, never correctness: workers look into their own caches, and skip only what they find.

What a block is called is `engine.kv.block_hash`'s business: the same chained hashes as in the workers' caches, so two
tenants have no hash in common, and neither have exact KV and KV that came through a lossy codec.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from engine.base import limits
from engine.images import PromptImage, naming_ids
from engine.kv.block_hash import block_hashes, root_hash


@dataclass(frozen=True, slots=True)
class CacheKind:
    """What blocks must agree in for one to stand for the other, beside their tokens and tenant."""

    schema_digest: bytes
    block_size: int  # tokens; 0: not known, hence no blocks
    identity: str = ""  # of the loss; "": exact


class BlockHashes:
    """The hashes of one request's full blocks: computed when first asked for, once for each kind of cache.

    A placeholder is named after its image, as in the workers' caches: what it stands for is not in its id.
    """

    def __init__(self, tenant: str, token_ids: Sequence[int], images: Sequence[PromptImage] = ()) -> None:
        self._tenant = tenant
        self._token_ids = token_ids
        self._images = images
        self._known: dict[CacheKind, Sequence[bytes]] = {}

    def of(self, kind: CacheKind) -> Sequence[bytes]:
        if not 0 < kind.block_size <= len(self._token_ids):
            return ()
        if kind not in self._known:
            self._known[kind] = block_hashes(self._root(kind), self._named_ids, kind.block_size)
        return self._known[kind]

    def extended(self, kind: CacheKind, more: Sequence[int]) -> Sequence[bytes]:
        """Of these tokens and `more` behind them: the chain goes on where it ended."""
        if kind.block_size <= 0:
            return ()
        hashes = self.of(kind)
        rest = [*self._named_ids[len(hashes) * kind.block_size :], *more]
        parent = hashes[-1] if hashes else self._root(kind)
        return [*hashes, *block_hashes(parent, rest, kind.block_size)]

    @cached_property
    def _named_ids(self) -> Sequence[int]:
        return naming_ids(self._token_ids, self._images) if self._images else self._token_ids

    def _root(self, kind: CacheKind) -> bytes:
        return root_hash(self._tenant, kind.schema_digest, kind.identity)


class PrefixIndex:
    """For each worker the most recently sent blocks, as many as it could hold."""

    @dataclass(frozen=True, slots=True)
    class Config:
        blocks_max: int = limits.PREFIX_INDEX_BLOCKS_MAX

    def __init__(self, config: Config | None = None) -> None:
        self._config = config or self.Config()
        self._blocks: dict[str, OrderedDict[bytes, None]] = {}  # by worker, least recently used first

    def held_blocks(self, worker_id: str, hashes: Sequence[bytes]) -> int:
        """How many leading ones the worker should have. A block is of no use without those before it."""
        held = self._blocks.get(worker_id)
        if held is None:
            return 0
        return next((index for index, block in enumerate(hashes) if block not in held), len(hashes))

    def note(self, worker_id: str, hashes: Sequence[bytes], *, columns: int) -> None:
        """They are there now. Of a chain the end is forgotten first, as it is useless without the beginning."""
        if not hashes:
            return
        held = self._blocks.setdefault(worker_id, OrderedDict())
        for block in reversed(hashes):
            held[block] = None
            held.move_to_end(block)
        while len(held) > min(columns or self._config.blocks_max, self._config.blocks_max):
            held.popitem(last=False)

    def forget(self, worker_id: str) -> None:
        self._blocks.pop(worker_id, None)

    def clear(self) -> None:
        self._blocks.clear()
