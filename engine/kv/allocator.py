"""ColumnAllocator: who owns which part of KV memory. Ids only: no bytes, no tensors, no clock, no policy.

Memory has three grains (DESIGN section 4), each the next one's parts, so that ids are plain arithmetic:

    column c   one block of tokens, all layers, all heads    ids [0, columns)
    unit   u   one layer of a column                         u = c * layers + layer
    page   p   K and V of one head of a unit                 p = u * heads + head

A uniform sequence owns columns: `table(owner)[t // block_size]` holds token t. Retention methods that keep different
tokens per layer or per head split their columns into units and their units into pages. A piece of a split column is
generic memory of its owner: it may hold any layer's (any head's) tokens, so the pieces that survive can be packed
into few columns and the rest rejoined.

    free --allocate--> owned <--lend / unlend--> lent to a transfer
     ^ ^                 | split_column
     | |               units <--split_unit--> pages
     | +-- release, or the last piece of a split column is given back (the column is whole again)
     |
     +--evict-- cached <-- release, if the column has a name (`register`); allocate(shared=...) --> owned, lent

A column is free, cached, owned or lent, never two of them (I3): free + cached + owned + lent == total. A shared column
counts once, and as lent while any of its holders is. Columns are granted from the free ones first, longest rested
first, and then from the cached ones, least recently used first: together they are `available_columns`.

`None` always means "not enough available columns", and then nothing has changed. Misuse (an unknown owner, a piece
that is not the owner's) raises `KeyError` or `ValueError`, also before anything has changed. One thread owns an
allocator.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from engine.kv.block_hash import BlockName
from engine.kv.prefix_cache import BlockChain, PrefixCache


class IntegrityError(Exception):
    """The allocator's books contradict each other: memory may be leaked or shared by mistake (I3)."""


@dataclass(slots=True)
class _Split:
    """What is still held of one split column. Empty means whole again: such a split must not exist."""

    units: set[int] = field(default_factory=set)
    pages: dict[int, set[int]] = field(default_factory=dict)  # split unit -> its pages still held

    @property
    def empty(self) -> bool:
        return not self.units and not self.pages


@dataclass(slots=True)
class _Holding:
    """Everything one owner has. `table` and `splits` never name the same column."""

    table: list[int] = field(default_factory=list)
    splits: dict[int, _Split] = field(default_factory=dict)  # column -> its pieces
    lent: bool = False

    @property
    def columns(self) -> Iterator[int]:
        yield from self.table
        yield from self.splits


class ColumnAllocator:
    """Hands out columns whole or not at all, and takes them back once nobody holds them.

    Owners are sequence ids. Same calls, same ids.
    """

    def __init__(self, columns: int, *, layers: int, heads: int) -> None:
        if min(columns, layers, heads) < 1:
            raise ValueError(f"columns, layers and heads must be >= 1, got {columns}, {layers}, {heads}")
        self._columns = columns
        self._layers = layers
        self._heads = heads
        self._holdings: dict[int, _Holding] = {}
        # The two counts below repeat what the holdings say, so that each operation costs only what it touches.
        # A column is free or cached if and only if it has no key in `_references`.
        self._cache = PrefixCache()
        self._free: deque[int] = deque(range(columns))
        self._references: Counter[int] = Counter()  # column -> holders
        self._lent: Counter[int] = Counter()  # column -> holders that have lent it

    # -- what there is -------------------------------------------------------------------------------------------------
    @property
    def total_columns(self) -> int:
        return self._columns

    @property
    def free_columns(self) -> int:
        """Nobody's, and with nothing in them that anybody could want."""
        return len(self._free)

    @property
    def cached_columns(self) -> int:
        """Nobody's, and kept for whoever has the same prefix, until their room is needed."""
        return self._cache.idle_count

    @property
    def cached_column_ids(self) -> tuple[int, ...]:
        """The next to be evicted first."""
        return self._cache.idle

    @property
    def available_columns(self) -> int:
        """What could be granted now: free and cached ones."""
        return len(self._free) + self._cache.idle_count

    @property
    def owned_columns(self) -> int:
        """Columns held by some owner and lent by none."""
        return len(self._references) - len(self._lent)

    @property
    def lent_columns(self) -> int:
        return len(self._lent)

    @property
    def owners(self) -> tuple[int, ...]:
        return tuple(self._holdings)

    def table(self, owner: int) -> tuple[int, ...]:
        """The owner's whole columns in token order."""
        return tuple(self._holdings[owner].table)

    def column_count(self, owner: int) -> int:
        """Length of `table(owner)`; 0 of an unknown owner."""
        holding = self._holdings.get(owner)
        return 0 if holding is None else len(holding.table)

    def units(self, owner: int) -> tuple[int, ...]:
        """Whole units the owner holds of its split columns, in ascending order."""
        return tuple(sorted(unit for split in self._holdings[owner].splits.values() for unit in split.units))

    def pages(self, owner: int) -> tuple[int, ...]:
        """Pages the owner holds of its split units, in ascending order."""
        splits = self._holdings[owner].splits.values()
        return tuple(sorted(page for split in splits for pages in split.pages.values() for page in pages))

    def can_allocate(self, count: int, *, shared: Sequence[int] = ()) -> bool:
        """Enough for `count` columns beside the `shared` ones, which may themselves be cached ones."""
        return count <= self.available_columns - self._cache.count_idle(shared)

    # -- whole columns -------------------------------------------------------------------------------------------------
    def allocate(
        self, owner: int, count: int, *, shared: Sequence[int] = (), lent: bool = False
    ) -> tuple[int, ...] | None:
        """Append `shared` columns and `count` new ones to the owner's table, or change nothing and return None.

        `shared` is what `match` found for this sequence, so its owner must be new. With `lent` the owner's memory, all
        of it, is lent to a transfer from now on. Returns the new columns.
        """
        if count < 0:
            raise ValueError(f"count must be >= 0, got {count}")
        if shared and owner in self._holdings:
            raise ValueError(f"owner {owner} already has a table")
        if not self.can_allocate(count, shared=shared):
            return None
        holding = self._holdings.setdefault(owner, _Holding())
        for column in shared:  # first of all: what is held cannot be evicted for the rest
            self._hold(column, lent=holding.lent)
        columns = tuple(self._take() for _ in range(count))
        for column in columns:
            self._hold(column, lent=holding.lent)
        holding.table += (*shared, *columns)
        if lent:
            self.lend(owner)
        return columns

    def share(self, parent: int, child: int, count: int) -> tuple[int, ...]:
        """Put the parent's first `count` columns in front of the child's own (choices of one prompt), who may be new.

        parent  [ 0 .. count | .. ]        child before  [ own ]        child after  [ 0 .. count | own ]
        """
        holding = self._holdings[parent]
        if not 0 <= count <= len(holding.table):
            raise ValueError(f"count must be in [0, {len(holding.table)}], got {count}")
        if holding.splits:
            raise ValueError(f"owner {parent} has split columns; a split belongs to one request")
        heir = self._holdings.get(child) or _Holding()
        shared = holding.table[:count]
        if set(shared) & set(heir.columns):
            raise ValueError(f"owner {child} shares columns with {parent} already")
        for column in shared:
            self._hold(column, lent=heir.lent)
        heir.table[:0] = shared
        self._holdings[child] = heir
        return self.table(child)

    def copy_on_write(self, owner: int, index: int) -> tuple[int, int] | None:
        """Make `table[index]` private and nameless before the owner writes to it.

        Returns (column that it was, column that it is). The two differ if the column was shared: the caller then
        copies the bytes. None: no column is available.
        """
        holding = self._holdings[owner]
        old = _column_at(holding, index)
        if self._references[old] == 1:
            self._cache.forget(old)
            return old, old
        if not self.can_allocate(1):
            return None
        new = self._take()
        self._hold(new, lent=holding.lent)
        self._drop(old, lent=holding.lent)
        holding.table[index] = new
        return old, new

    def release(self, owner: int) -> int:
        """The end of an owner, whatever it has: whole, shared, split or lent. Returns how many nobody holds now.

        Idempotent: an unknown owner has nothing. Only the caller knows whether a codec thread still reads or writes
        these columns, so only the caller may decide that it is time (DESIGN 2.2).
        """
        holding = self._holdings.pop(owner, None)
        if holding is None:
            return 0
        left = [column for column in holding.columns if self._drop(column, lent=holding.lent)]
        self._take_back(left)
        return len(left)

    # -- the prefix cache ----------------------------------------------------------------------------------------------
    def match(self, chain: BlockChain, blocks_max: int) -> tuple[int, ...]:
        """Columns that hold the chain's leading blocks, for `allocate(shared=...)`. `blocks_max` at most."""
        return self._cache.match(chain, blocks_max)

    def register(self, owner: int, index: int, name: BlockName) -> None:
        """The KV in `table[index]` is final and is the block of this name: others may share it from now on.

        A block that has a column keeps it; the owner's is then a nameless copy.
        """
        self._cache.register(name, _column_at(self._holdings[owner], index))

    def disown(self, owner: int, start: int) -> None:
        """What is in `table[start:]` is not to be trusted: nobody else shall find it. Who shares it already does."""
        for column in self._holdings[owner].table[start:]:
            self._cache.forget(column)

    def reset_cache(self) -> None:
        """Cached columns are free, held ones nameless."""
        for column in sorted(self._cache.named):
            if self._cache.forget(column):
                self._free.append(column)

    # -- lending -------------------------------------------------------------------------------------------------------
    def lend(self, owner: int) -> None:
        """A transfer reads or writes the owner's memory from now on. Idempotent."""
        holding = self._holdings[owner]
        if not holding.lent:
            holding.lent = True
            self._lent.update(holding.columns)

    def unlend(self, owner: int) -> None:
        """The transfer is over; the owner goes on alone. Idempotent."""
        holding = self._holdings[owner]
        if holding.lent:
            holding.lent = False
            for column in holding.columns:
                _count_down(self._lent, column)

    # -- pieces of columns ---------------------------------------------------------------------------------------------
    def split_column(self, owner: int, index: int) -> tuple[int, ...]:
        """Turn `table[index]` into its units, in layer order. It leaves the table: later entries move down by one."""
        holding = self._holdings[owner]
        column = _column_at(holding, index)
        if self._references[column] > 1:
            raise ValueError(f"column {column} is shared; copy it before splitting")
        self._cache.forget(column)  # its pieces will hold other tokens
        del holding.table[index]
        units = range(column * self._layers, (column + 1) * self._layers)
        holding.splits[column] = _Split(units=set(units))
        return tuple(units)

    def split_unit(self, owner: int, unit: int) -> tuple[int, ...]:
        """Turn a unit of the owner into its pages, in head order."""
        split = self._split_with_unit(owner, unit)
        split.units.remove(unit)
        pages = range(unit * self._heads, (unit + 1) * self._heads)
        split.pages[unit] = set(pages)
        return tuple(pages)

    def release_unit(self, owner: int, unit: int) -> int:
        """Give a unit back. Returns the columns that became free: 1 with the last piece of a column, else 0."""
        self._split_with_unit(owner, unit).units.remove(unit)
        return self._rejoin(owner, unit // self._layers)

    def release_page(self, owner: int, page: int) -> int:
        """Give a page back. Returns the columns that became free: 1 with the last piece of a column, else 0."""
        unit = page // self._heads
        column = unit // self._layers
        split = self._holdings[owner].splits.get(column)
        if split is None or page not in split.pages.get(unit, ()):
            raise ValueError(f"owner {owner} does not hold page {page}")
        split.pages[unit].remove(page)
        if not split.pages[unit]:
            del split.pages[unit]
        return self._rejoin(owner, column)

    # -- the books -----------------------------------------------------------------------------------------------------
    def check_integrity(self) -> None:
        """Recompute every count from the owners' tables; raise `IntegrityError` where the books disagree (I3)."""
        for owner, holding in self._holdings.items():
            self._check_holding(owner, holding)
        every = list(self._holdings.values())
        references = Counter(column for holding in every for column in holding.columns)
        lent = Counter(column for holding in every if holding.lent for column in holding.columns)
        shared = sorted(column for holding in every for column in holding.splits if references[column] > 1)
        # As plain dicts: to a Counter a missing key and a zero are the same, to our column counts they are not.
        _require(dict(references) == dict(self._references), "references disagree with the tables")
        _require(dict(lent) == dict(self._lent), "lent columns disagree with the lent owners")
        _require(not shared, f"split columns {shared} are shared")
        self._check_conservation(held=set(references))

    def _check_conservation(self, held: set[int]) -> None:
        """free + cached + owned + lent == total, as sets: every column is in exactly one place, exactly once."""
        free, cached = set(self._free), set(self._cache.idle)
        _require(len(free) == len(self._free), "a column is free twice")
        _require(not free & held, f"columns {sorted(free & held)} are free and held")
        _require(not cached & held, f"columns {sorted(cached & held)} are cached and held")
        _require(not free & self._cache.named, f"columns {sorted(free & self._cache.named)} are free and have names")
        _require(free | cached | held == set(range(self._columns)), "columns are lost or foreign")
        disagreement = self._cache.disagreement()
        _require(disagreement is None, f"prefix cache: {disagreement}")

    def _check_holding(self, owner: int, holding: _Holding) -> None:
        """One owner's own books: no column twice, and pieces that belong to the columns they are filed under."""
        columns = list(holding.columns)
        _require(len(set(columns)) == len(columns), f"owner {owner} holds a column twice")
        for column, split in holding.splits.items():
            units = split.units | split.pages.keys()
            pages = {page for held in split.pages.values() for page in held}
            _require(not split.empty and all(split.pages.values()), f"column {column}: a split without pieces")
            _require(not split.units & split.pages.keys(), f"column {column}: a unit is both whole and split")
            _require({unit // self._layers for unit in units} <= {column}, f"column {column}: a foreign unit")
            _require({page // self._heads for page in pages} == split.pages.keys(), f"column {column}: a foreign page")

    # -- helpers -------------------------------------------------------------------------------------------------------
    def _take(self) -> int:
        """A column of nobody: a free one, or else the cached one that was used least recently."""
        return self._free.popleft() if self._free else self._cache.evict()

    def _take_back(self, columns: Sequence[int]) -> None:
        """Nobody holds these, in token order, any more."""
        self._free.extend(column for column in columns if column not in self._cache)
        self._cache.rest([column for column in columns if column in self._cache])

    def _hold(self, column: int, *, lent: bool) -> None:
        self._cache.wake(column)
        self._references[column] += 1
        if lent:
            self._lent[column] += 1

    def _drop(self, column: int, *, lent: bool) -> bool:
        """One holder less. True if it was the last one: the caller takes the column back."""
        if lent:
            _count_down(self._lent, column)
        return _count_down(self._references, column)

    def _rejoin(self, owner: int, column: int) -> int:
        """Make a split column whole, and free, once none of its pieces is held."""
        holding = self._holdings[owner]
        if not holding.splits[column].empty:
            return 0
        del holding.splits[column]
        self._drop(column, lent=holding.lent)
        self._take_back([column])
        return 1

    def _split_with_unit(self, owner: int, unit: int) -> _Split:
        split = self._holdings[owner].splits.get(unit // self._layers)
        if split is None or unit not in split.units:
            raise ValueError(f"owner {owner} does not hold unit {unit}")
        return split


def _column_at(holding: _Holding, index: int) -> int:
    if not 0 <= index < len(holding.table):
        raise ValueError(f"index must be in [0, {len(holding.table)}), got {index}")
    return holding.table[index]


def _count_down(counts: Counter[int], key: int) -> bool:
    """Take one away; True if it was the last one. No key is ever left at zero: `len` counts columns."""
    counts[key] -= 1
    if counts[key]:
        return False
    del counts[key]
    return True


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise IntegrityError(message)
