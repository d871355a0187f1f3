"""SequenceMemory: the columns of sequences, in tokens instead of columns. Allocator and prefix cache meet records here.

It knows which blocks of a sequence are full, final and named, what two choices of one request share, and what a grant
costs. It does not know phases, steps or turns, and never touches a KV byte: copies are listed for the arena's owner.

    table of a sequence    [ found in the cache | computed or received here | growth ]
    table of a choice      [ the group's full blocks, shared | its copy of the partial one | growth ]
"""

from collections.abc import Sequence as Several
from typing import TypeAlias

from engine.commands import BlockTable, Reserve
from engine.images import PromptImage
from engine.kv.allocator import ColumnAllocator
from engine.kv.block_hash import root_hash
from engine.kv.prefix_cache import BlockChain
from engine.sequence import Sequence

Copy: TypeAlias = tuple[int, int]
"""(column whose bytes are needed, column that needs them)"""


class SequenceMemory:
    """One allocator's columns. `spare` is how many columns a grant has to leave for others.

    Without `reuse` blocks have no names: nothing is found, and nothing is cached.
    """

    def __init__(self, allocator: ColumnAllocator, *, block_size: int, model: bytes, reuse: bool = True) -> None:
        self._allocator = allocator
        self._block_size = block_size
        self._model = model
        self._reuse = reuse
        self._copies: list[Copy] = []
        self.query_tokens = 0  # looked up, and found, in the prefix cache
        self.hit_tokens = 0

    # -- sizes ---------------------------------------------------------------------------------------------------------
    def columns_for(self, tokens: int) -> int:
        return -(-tokens // self._block_size)

    def could_hold(self, tokens: int) -> bool:
        """If nobody else had any column."""
        return self.columns_for(tokens) <= self._allocator.total_columns

    def table(self, sequence: Sequence) -> BlockTable:
        return self._allocator.table(sequence.seq_id)

    # -- grants --------------------------------------------------------------------------------------------------------
    def chain(self, tenant: str, identity: str = "", images: Several[PromptImage] = ()) -> BlockChain:
        exact = root_hash(tenant, self._model)
        own = root_hash(tenant, self._model, identity) if identity else exact
        return BlockChain(exact, own, self._block_size, images)

    def admit(self, sequence: Sequence, growth_tokens: int, *, spare: int) -> bool:
        """Grant what a waiting sequence needs to be computed, whole or not at all. Growth is not a must.

        At least one token is left to compute, because somebody has to sample; and all of them if their rows are asked
        for. Less is looked up than is cached, never more.
        """
        lookup_tokens = 0 if sequence.sampling.prompt_logprobs is not None else len(sequence.token_ids) - 1
        shared = self._match(sequence, lookup_tokens)
        count = min(self.columns_for(len(sequence.token_ids) + growth_tokens), self._allocator.total_columns)
        if not self._grant(sequence.seq_id, count - len(shared), shared, spare):
            return False
        if lookup_tokens and not sequence.started:  # a preempted one finds its own: that says nothing about the cache
            self._count_lookup(len(sequence.token_ids), shared)
        sequence.cached_blocks = sequence.named_blocks = len(shared)
        sequence.computed = len(shared) * self._block_size
        sequence.nameable = True
        return True

    def reserve(self, sequence: Sequence, command: Reserve, *, spare: int) -> bool:
        """Grant a sequence whose KV is on its way, and its children, all of it or nothing.

        All KV of the context may be cached already: the pending token is no part of it.
        """
        shared = self._match(sequence, len(command.token_ids))
        own, each = self._reservation(len(command.token_ids), command.growth_tokens, len(command.children))
        own -= len(shared)
        if not self._allocator.can_allocate(own + each * len(command.children) + spare, shared=shared):
            return False
        self._allocator.allocate(sequence.seq_id, own, shared=shared, lent=True)
        for child_id in command.children:
            self._allocator.allocate(child_id, each)
        self._count_lookup(len(command.token_ids), shared)
        sequence.cached_blocks = sequence.named_blocks = len(shared)
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Make sure that the next token's slot exists."""
        return self.has_room(sequence) or bool(self._allocator.allocate(sequence.seq_id, 1))

    def has_room(self, sequence: Sequence) -> bool:
        return self.columns_for(sequence.computed + 1) <= self._allocator.column_count(sequence.seq_id)

    def fork(self, group: Sequence, child: Sequence, *, spare: int) -> bool:
        """Give a choice the KV of its group, and room for its next token if it has none yet. False: no column left.

        group  [ full | full | partial ]
        child  [ full | full | its own  ]      the partial block is written by each: copied, not shared
        """
        shared, partial_tokens = divmod(group.computed, self._block_size)
        if not self._allocator.column_count(child.seq_id) and not self._grant(child.seq_id, 1, (), spare):
            return False
        table = self._allocator.share(group.seq_id, child.seq_id, shared)
        if partial_tokens:
            self._copies.append((self.table(group)[shared], table[shared]))
        child.computed = group.computed
        child.cached_blocks, child.named_blocks = group.cached_blocks, group.named_blocks
        child.nameable = group.nameable
        return True

    def take_copies(self) -> list[Copy]:
        """Since the last call. They are made before any other command or step."""
        copies, self._copies = self._copies, []
        return copies

    # -- contents ------------------------------------------------------------------------------------------------------
    def arrived(self, sequence: Sequence) -> None:
        """The writer is done: KV of the whole context is here."""
        self._allocator.unlend(sequence.seq_id)
        self.computed(sequence, len(sequence.token_ids))

    def computed(self, sequence: Sequence, tokens: int) -> None:
        """KV of [0, tokens) is final: others may share its full blocks."""
        sequence.computed = tokens
        full_blocks = tokens // self._block_size
        if full_blocks <= sequence.named_blocks or not (sequence.nameable and self._reuse):
            return
        sequence.chain.extend(sequence.token_ids)
        for index in range(sequence.named_blocks, full_blocks):
            self._allocator.register(sequence.seq_id, index, sequence.chain.own[index])
        sequence.named_blocks = full_blocks

    def disown(self, sequence: Sequence) -> None:
        """What this sequence, or its group, has made may be wrong. What it found in the cache others vouch for."""
        if self._allocator.column_count(sequence.seq_id):
            self._allocator.disown(sequence.seq_id, sequence.cached_blocks)

    # -- ends ----------------------------------------------------------------------------------------------------------
    def drop(self, sequence: Sequence) -> None:
        """All of it is to be computed again, or found: what has a name stays as long as nobody needs the room."""
        self.release(sequence.seq_id)
        sequence.computed = 0

    def release(self, seq_id: int) -> None:
        self._allocator.release(seq_id)

    def reset_cache(self) -> None:
        self._allocator.reset_cache()

    # -- helpers -------------------------------------------------------------------------------------------------------
    def _match(self, sequence: Sequence, tokens: int) -> BlockTable:
        """Cached columns of the sequence's leading blocks, within its first `tokens`."""
        return self._allocator.match(sequence.chain, tokens // self._block_size if self._reuse else 0)

    def _grant(self, seq_id: int, count: int, shared: BlockTable, spare: int) -> bool:
        if not self._allocator.can_allocate(count + spare, shared=shared):
            return False
        self._allocator.allocate(seq_id, count, shared=shared)
        return True

    def _reservation(self, context_tokens: int, growth_tokens: int, children: int) -> tuple[int, int]:
        """Columns of a reservation and of each child. Growth that all of memory could not hold is left out.

        A child needs one column at once: the next token goes to its copy of the partial block, or to a new block.
        """
        own = self.columns_for(context_tokens)
        grown = self.columns_for(context_tokens + growth_tokens)
        if not children:
            return (grown if grown <= self._allocator.total_columns else own), 0
        each = max(grown - context_tokens // self._block_size, 1)
        return own, each if own + children * each <= self._allocator.total_columns else 1

    def _count_lookup(self, tokens: int, shared: BlockTable) -> None:
        self.query_tokens += tokens
        self.hit_tokens += len(shared) * self._block_size
