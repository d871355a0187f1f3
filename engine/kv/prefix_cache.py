"""PrefixCache: which column holds the KV of which block, and in what order idle ones make room. Ids only, like the
allocator that it is a part of (`ColumnAllocator` alone changes it); `block_hash` says what names are.

    a column is   held and nameless     its KV is being written, or must not be reused
                  held and named        final: others may share it at once
                  idle and named        nobody's, and kept until its room is needed: *cached*
                  free                  neither held nor named (the allocator's list)

`BlockChain` is one sequence's side of it: the names of its blocks as they fill.
"""

from collections.abc import Sequence
from itertools import islice

from engine.images import PromptImage, naming_ids
from engine.kv.block_hash import BlockName, block_hashes


class BlockChain:
    """The names of one sequence's full blocks.

    `own` are the names its KV is known by. A sequence whose KV may have come through a lossy codec has an identity of
    its own, and `exact` then are the names that the same tokens have as the model computes them: exact KV is good
    enough for everybody, lossy KV only for those who asked for it. Otherwise both are one list.

    Blocks that hold placeholders are named after `images`, too.
    """

    def __init__(
        self, exact_root: BlockName, own_root: BlockName, block_size: int, images: Sequence[PromptImage] = ()
    ) -> None:
        self.images = images
        self._block_size = block_size
        self._roots = (exact_root, own_root)
        self.exact: list[BlockName] = []
        self.own: list[BlockName] = self.exact if own_root == exact_root else []

    def extend(self, token_ids: Sequence[int]) -> None:
        """Name the blocks that are full by now. `token_ids` is the sequence from its first token on."""
        for names, root in zip((self.exact, self.own), self._roots, strict=True):
            named_tokens = len(names) * self._block_size
            if len(token_ids) - named_tokens >= self._block_size:
                ids = naming_ids(token_ids[named_tokens:], self.images, named_tokens)
                names += block_hashes(names[-1] if names else root, ids, self._block_size)

    def fork(self) -> "BlockChain":
        """The same blocks so far, to be continued by another sequence."""
        child = BlockChain(*self._roots, self._block_size, self.images)
        child.exact += self.exact
        if child.own is not child.exact:
            child.own += self.own
        return child


class PrefixCache:
    """Names of columns, and the idle ones in order of last use.

    A name has one column: whoever computes the same block a second time keeps a nameless one. Eviction takes the idle
    column that was used least recently; of columns that became idle together, the later block goes first, because a
    block is of no use without those before it.
    """

    def __init__(self) -> None:
        self._columns: dict[BlockName, int] = {}
        self._names: dict[int, BlockName] = {}
        self._idle: dict[int, None] = {}  # in the order in which they are evicted

    # -- names ---------------------------------------------------------------------------------------------------------
    def match(self, chain: BlockChain, blocks_max: int) -> tuple[int, ...]:
        """Columns of the chain's leading blocks, as many in a row as have one. Each may be exact or of its identity."""
        columns: list[int] = []
        for exact, own in islice(zip(chain.exact, chain.own, strict=True), blocks_max):
            column = self._columns.get(exact)
            if column is None:
                column = self._columns.get(own)
            if column is None:
                break
            columns.append(column)
        return tuple(columns)

    def register(self, name: BlockName, column: int) -> None:
        """The column's KV is final. The first column of a name keeps it."""
        if name not in self._columns and column not in self._names:
            self._columns[name] = column
            self._names[column] = name

    def forget(self, column: int) -> bool:
        """No new sequence finds it any more. Returns whether it was idle: then it is free now."""
        name = self._names.pop(column, None)
        if name is not None:
            del self._columns[name]
        was_idle = column in self._idle
        self._idle.pop(column, None)
        return was_idle

    def __contains__(self, column: int) -> bool:
        return column in self._names

    # -- idle columns --------------------------------------------------------------------------------------------------
    @property
    def idle(self) -> tuple[int, ...]:
        """The next to be evicted first."""
        return tuple(self._idle)

    @property
    def idle_count(self) -> int:
        return len(self._idle)

    def count_idle(self, columns: Sequence[int]) -> int:
        return sum(column in self._idle for column in columns)

    def rest(self, columns: Sequence[int]) -> None:
        """Nobody holds these named columns of one sequence, in token order, any more."""
        for column in reversed(columns):
            self._idle[column] = None

    def wake(self, column: int) -> None:
        """Somebody holds it (again)."""
        self._idle.pop(column, None)

    def evict(self) -> int:
        """Forget the idle column that was used least recently, and return it. There must be one."""
        column = next(iter(self._idle))
        self.forget(column)
        return column

    # -- the books -----------------------------------------------------------------------------------------------------
    def disagreement(self) -> str | None:
        """What is wrong with these books, or None."""
        if {column: name for name, column in self._columns.items()} != self._names:
            return "names and columns disagree"
        if not self._idle.keys() <= self._names.keys():
            return "an idle column has no name"
        return None

    @property
    def named(self) -> frozenset[int]:
        return frozenset(self._names)
