"""EmbeddingMemory: the columns of embeddings, in keys and rows. An embedding is a sequence of rows, held like KV.

It knows who holds which embedding, which ones are whole, and what they are called. It does not know pixels, towers or
transfers, and never touches a byte.

    grant --> own columns, being written --complete--> whole: others share it --release--> cached, until room is needed
        \\--> an embedding of that key that is whole already, held or cached: shared, all of it

An embedding is of use only as a whole, so a hit is all of its columns or none: where some have made room, the rest is
left to make room too, and a new one is written.
"""

from collections.abc import Sequence
from hashlib import blake2b

from engine.commands import BlockTable, EmbeddingGrant, EmbeddingWish
from engine.kv.allocator import ColumnAllocator
from engine.kv.block_hash import NAME_BYTES
from engine.kv.prefix_cache import BlockChain


class EmbeddingMemory:
    """One allocator's columns. Owners are sequence ids, one for each time that an embedding is asked for."""

    def __init__(self, allocator: ColumnAllocator, *, block_size: int) -> None:
        self._allocator = allocator
        self._block_size = block_size
        self._writing: dict[int, BlockChain] = {}  # seq_id -> what its columns will be called once they are whole
        self.hits = 0  # since the start: grants that found the embedding here

    # -- sizes ---------------------------------------------------------------------------------------------------------
    def columns_for(self, features: int) -> int:
        return -(-features // self._block_size)

    def could_hold(self, wishes: Sequence[EmbeddingWish]) -> bool:
        """If nobody else had any column."""
        return sum(self.columns_for(wish.features) for wish in wishes) <= self._allocator.total_columns

    def table(self, seq_id: int) -> BlockTable:
        return self._allocator.table(seq_id)

    # -- grants --------------------------------------------------------------------------------------------------------
    def grant(self, seq_id: int, key: bytes, features: int, *, lent: bool = False) -> EmbeddingGrant | None:
        """The embedding of this key if it is whole, or else columns to write it to: `lent`, if by somebody else.

        None if there is no room.
        """
        chain = self._chain(key, features)
        shared = self._whole(chain)
        count = len(chain.own) - len(shared)
        if self._allocator.allocate(seq_id, count, shared=shared, lent=lent and not shared) is None:
            return None
        if shared:
            self.hits += 1
        else:
            self._writing[seq_id] = chain
        return EmbeddingGrant(seq_id, self.table(seq_id), cached=bool(shared))

    def grant_all(self, wishes: Sequence[EmbeddingWish]) -> tuple[EmbeddingGrant, ...] | None:
        """All of them, for somebody else to write, or none."""
        chains = [self._chain(wish.key, wish.features) for wish in wishes]
        shared = [self._whole(chain) for chain in chains]
        count = sum(len(chain.own) for chain, found in zip(chains, shared, strict=True) if not found)
        found_columns = tuple({column: None for found in shared for column in found})
        if not self._allocator.can_allocate(count, shared=found_columns):
            return None
        # Those that are here first: once they are held, the others' columns cannot come from them.
        order = sorted(range(len(wishes)), key=lambda index: not shared[index])
        grants = {index: self.grant(*wishes[index], lent=True) for index in order}
        return tuple(grant for _, grant in sorted(grants.items()) if grant)

    def share(self, holder_id: int, seq_id: int) -> EmbeddingGrant:
        """What the holder has just completed, for somebody who waited for it."""
        self.hits += 1
        table = self._allocator.share(holder_id, seq_id, self._allocator.column_count(holder_id))
        return EmbeddingGrant(seq_id, table, cached=True)

    # -- contents and ends ---------------------------------------------------------------------------------------------
    def complete(self, seq_id: int) -> None:
        """The writer is done: the embedding is whole, and others may share it. Idempotent."""
        if not self._allocator.column_count(seq_id):
            return
        self._allocator.unlend(seq_id)
        if chain := self._writing.pop(seq_id, None):
            for index, name in enumerate(chain.own):
                self._allocator.register(seq_id, index, name)

    def release(self, seq_id: int) -> None:
        """Whole: it stays as long as nobody needs the room. Otherwise its columns are free. Idempotent."""
        self._writing.pop(seq_id, None)
        self._allocator.release(seq_id)

    def reset_cache(self) -> None:
        """Nothing of before is found again, nor what is being written now."""
        self._allocator.reset_cache()
        self._writing.clear()

    def check_integrity(self) -> None:
        """I3, from this side."""
        self._allocator.check_integrity()
        if not self._writing.keys() <= set(self._allocator.owners):
            raise RuntimeError("an embedding is being written without columns")

    # -- helpers -------------------------------------------------------------------------------------------------------
    def _chain(self, key: bytes, features: int) -> BlockChain:
        """Names of an embedding's columns, from the key and their indices. How many rows there are is in each of them:
        what is shared is as long as what was asked for."""
        root = blake2b(features.to_bytes(8, "little") + key, digest_size=NAME_BYTES).digest()
        chain = BlockChain(root, root, block_size=1)
        chain.extend(range(self.columns_for(features)))
        return chain

    def _whole(self, chain: BlockChain) -> BlockTable:
        found = self._allocator.match(chain, len(chain.own))
        return found if len(found) == len(chain.own) else ()
