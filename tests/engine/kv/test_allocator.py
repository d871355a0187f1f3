"""ColumnAllocator: conservation under any order of operations (I3), and an integrity check that notices corruption."""

from collections.abc import Callable, Sequence
from itertools import takewhile

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.kv.allocator import ColumnAllocator, IntegrityError
from engine.kv.block_hash import BlockName
from engine.kv.prefix_cache import BlockChain

COLUMNS, LAYERS, HEADS = 8, 3, 2


def chain(*token_ids: int) -> BlockChain:
    """Blocks of one token."""
    made = BlockChain(b"root", b"root", block_size=1)
    made.extend(token_ids)
    return made


CHAINS = [chain(1, 2, 3, 4), chain(1, 2, 7, 8)]  # two blocks in common


@pytest.fixture
def allocator() -> ColumnAllocator:
    return ColumnAllocator(COLUMNS, layers=LAYERS, heads=HEADS)


# -- whole columns -----------------------------------------------------------------------------------------------------
def test_allocate_is_whole_or_nothing(allocator: ColumnAllocator) -> None:
    assert allocator.allocate(1, 5) == (0, 1, 2, 3, 4)
    assert allocator.allocate(2, 4) is None
    assert allocator.owners == (1,)
    assert (allocator.free_columns, allocator.owned_columns) == (3, 5)
    assert allocator.can_allocate(3) and not allocator.can_allocate(4)


def test_allocate_appends_in_token_order_and_reuses_the_longest_rested_column(allocator: ColumnAllocator) -> None:
    allocator.allocate(1, 2)
    allocator.allocate(2, 2)
    assert allocator.release(1) == 2
    assert allocator.allocate(2, 5) == (4, 5, 6, 7, 0)
    assert allocator.table(2) == (2, 3, 4, 5, 6, 7, 0)


def test_allocating_nothing_still_makes_an_owner(allocator: ColumnAllocator) -> None:
    assert allocator.allocate(1, 0) == ()
    assert allocator.table(1) == ()
    with pytest.raises(ValueError, match="count"):
        allocator.allocate(1, -1)


def test_release_is_idempotent_and_ignores_strangers(allocator: ColumnAllocator) -> None:
    allocator.allocate(1, 3)
    assert [allocator.release(1), allocator.release(1), allocator.release(99)] == [3, 0, 0]
    assert allocator.free_columns == COLUMNS


def test_shared_columns_are_free_after_their_last_holder(allocator: ColumnAllocator) -> None:
    allocator.allocate(1, 3)
    assert allocator.share(1, 2, 3) == allocator.table(1)
    assert allocator.owned_columns == 3
    assert allocator.release(1) == 0
    assert allocator.release(2) == 3


def test_share_puts_columns_in_front_of_the_childs_own(allocator: ColumnAllocator) -> None:
    allocator.allocate(1, 3)
    allocator.allocate(2, 2, lent=True)
    assert allocator.share(1, 2, 2) == (0, 1, 3, 4)
    assert (allocator.owned_columns, allocator.lent_columns) == (1, 4), "lent while any of its holders is"
    allocator.check_integrity()
    assert allocator.release(1) == 1
    assert allocator.release(2) == 4


def test_copy_on_write_gives_a_private_column_once(allocator: ColumnAllocator) -> None:
    allocator.allocate(1, 2)
    allocator.share(1, 2, 2)
    assert allocator.copy_on_write(2, 1) == (1, 2)
    assert allocator.table(1) == (0, 1) and allocator.table(2) == (0, 2)
    assert allocator.copy_on_write(2, 1) == (2, 2), "already private: nothing to copy"
    assert allocator.copy_on_write(1, 1) == (1, 1), "the other holder left: private as well"


def test_copy_on_write_without_memory_changes_nothing(allocator: ColumnAllocator) -> None:
    allocator.allocate(1, COLUMNS)
    allocator.share(1, 2, COLUMNS)
    assert allocator.copy_on_write(2, 0) is None
    assert allocator.table(2) == allocator.table(1)
    allocator.check_integrity()


def test_share_needs_columns_that_the_child_has_not_and_a_uniform_parent(allocator: ColumnAllocator) -> None:
    allocator.allocate(1, 2)
    allocator.allocate(2, 1)
    allocator.share(1, 2, 1)
    with pytest.raises(ValueError, match="already"):
        allocator.share(1, 2, 2)
    for count in (-1, 3):
        with pytest.raises(ValueError, match="count"):
            allocator.share(1, 3, count)
    with pytest.raises(KeyError):
        allocator.share(9, 3, 0)
    allocator.split_column(1, 1)
    with pytest.raises(ValueError, match="split"):
        allocator.share(1, 3, 1)
    allocator.check_integrity()


# -- lending -----------------------------------------------------------------------------------------------------------
def test_lent_columns_are_not_owned_until_they_come_back(allocator: ColumnAllocator) -> None:
    allocator.allocate(1, 2)
    allocator.allocate(2, 3, lent=True)
    assert (allocator.owned_columns, allocator.lent_columns) == (2, 3)
    allocator.lend(2)
    allocator.allocate(2, 1)
    assert allocator.lent_columns == 4, "an owner's growth is lent with the rest"
    allocator.unlend(2)
    allocator.unlend(2)
    assert (allocator.owned_columns, allocator.lent_columns) == (6, 0)


def test_a_shared_column_is_lent_while_any_holder_lends_it(allocator: ColumnAllocator) -> None:
    allocator.allocate(1, 2, lent=True)
    allocator.share(1, 2, 2)
    assert (allocator.owned_columns, allocator.lent_columns) == (0, 2)
    allocator.lend(2)
    allocator.unlend(1)
    assert (allocator.owned_columns, allocator.lent_columns) == (0, 2)
    assert allocator.release(2) == 0
    assert (allocator.owned_columns, allocator.lent_columns) == (2, 0)


def test_copying_a_lent_column_lends_the_copy(allocator: ColumnAllocator) -> None:
    allocator.allocate(1, 1)
    allocator.share(1, 2, 1)
    allocator.lend(2)
    assert allocator.copy_on_write(2, 0) == (0, 1)
    assert (allocator.owned_columns, allocator.lent_columns) == (1, 1)
    allocator.check_integrity()


# -- pieces ------------------------------------------------------------------------------------------------------------
def test_ids_of_pieces_are_arithmetic(allocator: ColumnAllocator) -> None:
    allocator.allocate(1, 3)
    assert allocator.split_column(1, 1) == (3, 4, 5)
    assert allocator.table(1) == (0, 2)
    assert allocator.split_unit(1, 4) == (8, 9)
    assert allocator.units(1) == (3, 5)
    assert allocator.pages(1) == (8, 9)


def test_a_column_is_whole_and_free_again_with_its_last_piece(allocator: ColumnAllocator) -> None:
    allocator.allocate(1, 1)
    first, middle, last = allocator.split_column(1, 0)
    page, other_page = allocator.split_unit(1, middle)
    freed = [allocator.release_unit(1, last), allocator.release_page(1, page), allocator.release_unit(1, first)]
    assert freed == [0, 0, 0]
    assert allocator.free_columns == COLUMNS - 1
    assert allocator.release_page(1, other_page) == 1
    assert allocator.free_columns == COLUMNS
    allocator.check_integrity()


def test_release_takes_pieces_too(allocator: ColumnAllocator) -> None:
    allocator.allocate(1, 3, lent=True)
    units = allocator.split_column(1, 0)
    allocator.split_unit(1, units[0])
    allocator.release_unit(1, units[1])
    assert allocator.lent_columns == 3
    assert allocator.release(1) == 3
    allocator.check_integrity()


def test_pieces_belong_to_one_owner(allocator: ColumnAllocator) -> None:
    allocator.allocate(1, 1)
    allocator.allocate(2, 1)
    allocator.split_column(2, 0)
    (unit, *_) = allocator.split_column(1, 0)
    (page, *_) = allocator.split_unit(1, unit)
    stolen: list[Callable[[], object]] = [
        lambda: allocator.release_unit(2, unit + 1),
        lambda: allocator.split_unit(2, unit + 1),
        lambda: allocator.release_page(2, page),
        lambda: allocator.release_unit(1, unit),  # it is pages now
        lambda: allocator.split_unit(1, unit),
        lambda: allocator.release_page(1, page + HEADS),  # its unit is whole
    ]
    for steal in stolen:
        with pytest.raises(ValueError, match="does not hold"):
            steal()
    allocator.check_integrity()


def test_a_shared_column_cannot_be_split(allocator: ColumnAllocator) -> None:
    allocator.allocate(1, 1)
    allocator.share(1, 2, 1)
    with pytest.raises(ValueError, match="shared"):
        allocator.split_column(1, 0)
    allocator.check_integrity()


@pytest.mark.parametrize("index", [-1, 1])
def test_indexes_are_checked(allocator: ColumnAllocator, index: int) -> None:
    allocator.allocate(1, 1)
    with pytest.raises(ValueError, match="index"):
        allocator.split_column(1, index)
    with pytest.raises(ValueError, match="index"):
        allocator.copy_on_write(1, index)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_every_size_is_at_least_one(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=">= 1"):
        ColumnAllocator(sizes[0], layers=sizes[1], heads=sizes[2])


# -- the integrity check must fail when it should ----------------------------------------------------------------------
CORRUPTIONS: dict[str, tuple[Callable[[ColumnAllocator], object], str]] = {
    "a free column is forgotten": (lambda a: a._free.pop(), "lost"),
    "a free column is listed twice": (lambda a: a._free.append(a._free[0]), "free twice"),
    "a foreign column is free": (lambda a: a._free.append(COLUMNS), "foreign"),
    "a held column is free": (lambda a: a._free.append(a.table(1)[0]), "free and held"),
    "a reference too many": (lambda a: a._references.update([0]), "references"),
    "a reference too few": (lambda a: a._references.subtract([0]), "references"),
    "a reference count of zero": (lambda a: a._references.update({a._free[0]: 0}), "references"),
    "a table lost an entry": (lambda a: a._holdings[1].table.pop(), "references"),
    "a table names a column twice": (lambda a: a._holdings[1].table.append(0), "twice"),
    "an owner vanished": (lambda a: a._holdings.pop(2), "references"),
    "a lent column is forgotten": (lambda a: a._lent.pop(a.table(2)[0]), "lent"),
    "a column is lent by nobody": (lambda a: a._lent.update([0]), "lent"),
    "an owner's mark is lost": (lambda a: setattr(a._holdings[2], "lent", False), "lent"),
    "a split column is also whole": (lambda a: a._holdings[3].table.append(SPLIT), "twice"),
    "a split column is shared": (lambda a: _share(a, SPLIT), "shared"),
    "a split has no pieces": (lambda a: _clear(a), "without pieces"),
    "a split unit has no pages": (lambda a: a._holdings[3].splits[SPLIT].pages[UNIT].clear(), "without pieces"),
    "a unit is of another column": (lambda a: a._holdings[3].splits[SPLIT].units.add(0), "foreign unit"),
    "a page is of another unit": (lambda a: a._holdings[3].splits[SPLIT].pages[UNIT].add(0), "foreign page"),
    "a cached column is forgotten": (lambda a: a._cache._idle.clear(), "lost"),
    "a cached column is held": (lambda a: a._cache.rest([NAMED]), "cached and held"),
    "a cached column has no name": (lambda a: a._cache._names.pop(CACHED), "disagree"),
    "a name has another column": (lambda a: a._cache._columns.update({b"held": 0}), "disagree"),
    "a nameless column is cached": (lambda a: _name(a, CACHED, None), "no name"),
    "a free column has a name": (lambda a: _name(a, a._free[0], b"free"), "have names"),
    "a unit is whole and split": (lambda a: a._holdings[3].splits[SPLIT].units.add(UNIT), "both"),
}
SPLIT = 4  # owner 3's column, and the unit of it that is split into pages
UNIT = SPLIT * LAYERS
NAMED = 1  # of owner 1
CACHED = 5  # was owner 4's


def _share(allocator: ColumnAllocator, column: int) -> None:
    """Books that agree with each other and are still wrong."""
    allocator._holdings[1].table.append(column)
    allocator._references[column] += 1


def _name(allocator: ColumnAllocator, column: int, name: bytes | None) -> None:
    """Books of names that agree with each other."""
    cache = allocator._cache
    if (old := cache._names.pop(column, None)) is not None:
        del cache._columns[old]
    if name is not None:
        cache._names[column], cache._columns[name] = name, column


def _clear(allocator: ColumnAllocator) -> None:
    split = allocator._holdings[3].splits[SPLIT]
    split.units.clear()
    split.pages.clear()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_integrity_check_notices(allocator: ColumnAllocator, name: str) -> None:
    allocator.allocate(1, 2)
    allocator.allocate(2, 2, lent=True)
    allocator.allocate(3, 1)
    allocator.split_column(3, 0)
    allocator.split_unit(3, UNIT)
    allocator.register(1, 1, b"held")
    allocator.allocate(4, 1)
    allocator.register(4, 0, b"cached")
    allocator.release(4)
    allocator.check_integrity()
    corrupt, message = CORRUPTIONS[name]
    corrupt(allocator)
    with pytest.raises(IntegrityError, match=message):
        allocator.check_integrity()


# -- any order of operations -------------------------------------------------------------------------------------------
Piece = tuple[str, int]  # ("column" | "unit" | "page", id)


def _column_of(piece: Piece) -> int:
    kind, number = piece
    return number // {"column": 1, "unit": LAYERS, "page": LAYERS * HEADS}[kind]


class AllocatorMachine(RuleBasedStateMachine):
    """The model: each owner has an ordered list of whole columns and a set of pieces, each name a column; no counts.

    Names come from two chains of blocks. A column that is held is nobody's to grant; a cached one is, in their order,
    once no free one is left; what `match` finds is named, in a row, and shared by all who ask.
    """

    def __init__(self) -> None:
        super().__init__()
        self.allocator = ColumnAllocator(COLUMNS, layers=LAYERS, heads=HEADS)
        self.tables: dict[int, list[int]] = {}
        self.pieces: dict[int, set[Piece]] = {}
        self.lent: set[int] = set()
        self.names: dict[BlockName, int] = {}
        self.next_owner = 0

    # -- the model's view --
    def columns_of(self, owner: int) -> set[int]:
        return set(self.tables[owner]) | {_column_of(piece) for piece in self.pieces[owner]}

    def held(self) -> set[int]:
        return set().union(*(self.columns_of(owner) for owner in self.tables))

    def holders(self, column: int) -> int:
        return sum(column in self.columns_of(owner) for owner in self.tables)

    def cached(self) -> set[int]:
        return set(self.names.values()) - self.held()

    def forget(self, *columns: int) -> None:
        self.names = {name: column for name, column in self.names.items() if column not in columns}

    def took(self, columns: Sequence[int], cached: Sequence[int]) -> None:
        """Free columns go first; then the cached ones in order, which lose their names."""
        evicted = [column for column in columns if column in cached]
        assert evicted == list(cached[: len(evicted)])
        assert evicted == list(columns[len(columns) - len(evicted) :])
        assert not evicted or self.allocator.free_columns == 0
        self.forget(*evicted)

    def give_back(self, owner: int, piece: Piece) -> int:
        before = self.held()
        self.pieces[owner].remove(piece)
        return len(before - self.held())

    def draw_owner(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.tables)), label="owner")

    def draw_piece(self, data: st.DataObject, kind: str) -> tuple[int, Piece]:
        choices = [(o, p) for o, pieces in sorted(self.pieces.items()) for p in sorted(pieces) if p[0] == kind]
        return data.draw(st.sampled_from(choices), label=kind)

    def has(self, kind: str) -> bool:
        return any(piece[0] == kind for pieces in self.pieces.values() for piece in pieces)

    # -- rules --
    @rule(count=st.integers(0, COLUMNS), lent=st.booleans(), data=st.data())
    def allocate(self, count: int, lent: bool, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from([*sorted(self.tables), self.next_owner]), label="owner")
        held, cached = self.held(), self.allocator.cached_column_ids
        got = self.allocator.allocate(owner, count, lent=lent)
        if count > COLUMNS - len(held):
            assert got is None
            return
        assert got is not None and len(set(got)) == count and not set(got) & held
        self.took(got, cached)
        self.own(owner, got, lent)

    @rule(which=st.integers(0, 1), blocks_max=st.integers(0, 4), count=st.integers(0, COLUMNS), lent=st.booleans())
    def allocate_behind_a_match(self, which: int, blocks_max: int, count: int, lent: bool) -> None:
        shared = self.allocator.match(CHAINS[which], blocks_max)
        wanted = [self.names.get(name) for name in CHAINS[which].own[:blocks_max]]
        assert list(shared) == list(takewhile(lambda column: column is not None, wanted))
        held = self.held() | set(shared)
        cached = [column for column in self.allocator.cached_column_ids if column not in shared]
        got = self.allocator.allocate(self.next_owner, count, shared=shared, lent=lent)
        if count > COLUMNS - len(held):
            assert got is None
            return
        assert got is not None and len(set(got)) == count and not set(got) & held
        self.took(got, cached)
        self.own(self.next_owner, (*shared, *got), lent)

    def own(self, owner: int, columns: Sequence[int], lent: bool) -> None:
        self.next_owner = max(self.next_owner, owner + 1)
        self.tables.setdefault(owner, []).extend(columns)
        self.pieces.setdefault(owner, set())
        self.lent |= {owner} if lent else set()

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 1), blocks=st.integers(1, 4), data=st.data())
    def register(self, which: int, blocks: int, data: st.DataObject) -> None:
        """The owner's first columns hold the chain's first blocks."""
        owner = self.draw_owner(data)
        for index, name in enumerate(CHAINS[which].own[: min(blocks, len(self.tables[owner]))]):
            self.allocator.register(owner, index, name)
            if (column := self.tables[owner][index]) not in self.names.values():
                self.names.setdefault(name, column)

    @precondition(lambda self: self.tables)
    @rule(start=st.integers(0, 2), data=st.data())
    def disown(self, start: int, data: st.DataObject) -> None:
        owner = self.draw_owner(data)
        self.allocator.disown(owner, start)
        self.forget(*self.tables[owner][start:])

    @rule()
    def reset_cache(self) -> None:
        self.allocator.reset_cache()
        self.names.clear()

    @precondition(lambda self: self.tables)
    @rule(count=st.integers(0, COLUMNS), data=st.data())
    def share(self, count: int, data: st.DataObject) -> None:
        parent = self.draw_owner(data)
        child = data.draw(st.sampled_from([*sorted(self.tables), self.next_owner]), label="child")
        shared = self.tables[parent][:count]
        childs_own = self.columns_of(child) if child in self.tables else set()
        if self.pieces[parent] or count > len(self.tables[parent]) or set(shared) & childs_own:
            with pytest.raises(ValueError, match=r"split|count|already"):
                self.allocator.share(parent, child, count)
            return
        self.allocator.share(parent, child, count)
        self.next_owner = max(self.next_owner, child + 1)
        self.tables[child] = shared + self.tables.get(child, [])
        self.pieces.setdefault(child, set())

    @precondition(lambda self: any(self.tables.values()))
    @rule(data=st.data())
    def copy_on_write(self, data: st.DataObject) -> None:
        owner, index = self.draw_entry(data)
        old, held, cached = self.tables[owner][index], self.held(), self.allocator.cached_column_ids
        got = self.allocator.copy_on_write(owner, index)
        if self.holders(old) == 1:
            assert got == (old, old)
            self.forget(old)
        elif len(held) == COLUMNS:
            assert got is None
        else:
            assert got is not None and got[0] == old and got[1] not in held
            self.took(got[1:], cached)
            self.tables[owner][index] = got[1]

    @precondition(lambda self: any(self.tables.values()))
    @rule(data=st.data())
    def split_column(self, data: st.DataObject) -> None:
        owner, index = self.draw_entry(data)
        column = self.tables[owner][index]
        if self.holders(column) > 1:
            with pytest.raises(ValueError, match="shared"):
                self.allocator.split_column(owner, index)
            return
        units = self.allocator.split_column(owner, index)
        self.forget(column)
        self.tables[owner].remove(column)
        self.pieces[owner] |= {("unit", unit) for unit in units}

    @precondition(lambda self: self.has("unit"))
    @rule(data=st.data())
    def split_unit(self, data: st.DataObject) -> None:
        owner, unit = self.draw_piece(data, "unit")
        pages = self.allocator.split_unit(owner, unit[1])
        self.pieces[owner].remove(unit)
        self.pieces[owner] |= {("page", page) for page in pages}

    @precondition(lambda self: self.has("unit"))
    @rule(data=st.data())
    def release_unit(self, data: st.DataObject) -> None:
        owner, unit = self.draw_piece(data, "unit")
        assert self.allocator.release_unit(owner, unit[1]) == self.give_back(owner, unit)

    @precondition(lambda self: self.has("page"))
    @rule(data=st.data())
    def release_page(self, data: st.DataObject) -> None:
        owner, page = self.draw_piece(data, "page")
        assert self.allocator.release_page(owner, page[1]) == self.give_back(owner, page)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), lend=st.booleans())
    def lend_or_unlend(self, data: st.DataObject, lend: bool) -> None:
        owner = self.draw_owner(data)
        (self.allocator.lend if lend else self.allocator.unlend)(owner)
        self.lent = self.lent | {owner} if lend else self.lent - {owner}

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        owner = data.draw(st.integers(0, self.next_owner), label="owner, perhaps gone")
        before = self.held()
        self.tables.pop(owner, None)
        self.pieces.pop(owner, None)
        self.lent.discard(owner)
        assert self.allocator.release(owner) == len(before - self.held())

    def draw_entry(self, data: st.DataObject) -> tuple[int, int]:
        entries = [(owner, index) for owner in sorted(self.tables) for index in range(len(self.tables[owner]))]
        return data.draw(st.sampled_from(entries), label="owner, index")

    # -- what must hold after every rule --
    @invariant()
    def books_and_model_agree(self) -> None:
        self.allocator.check_integrity()
        lent = set().union(*(self.columns_of(owner) for owner in self.lent))
        assert self.allocator.lent_columns == len(lent)
        assert self.allocator.owned_columns == len(self.held() - lent)
        assert self.allocator.available_columns == COLUMNS - len(self.held())
        assert set(self.allocator.cached_column_ids) == self.cached()
        counts = (self.allocator.free_columns, self.allocator.cached_columns, self.allocator.owned_columns)
        assert sum(counts) + self.allocator.lent_columns == COLUMNS
        assert set(self.allocator.owners) == self.tables.keys()
        for owner, table in self.tables.items():
            assert self.allocator.table(owner) == tuple(table)
            pieces = {("unit", u) for u in self.allocator.units(owner)} | {
                ("page", p) for p in self.allocator.pages(owner)
            }
            assert pieces == self.pieces[owner]


TestAnyOrder = AllocatorMachine.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)


def test_same_calls_give_the_same_ids() -> None:
    def run() -> list[object]:
        allocator = ColumnAllocator(COLUMNS, layers=LAYERS, heads=HEADS)
        return [
            allocator.allocate(1, 3),
            allocator.share(1, 2, 3),
            allocator.copy_on_write(2, 0),
            allocator.split_column(2, 0),
            allocator.release(2),
            allocator.allocate(3, 4),
        ]

    assert run() == run()
