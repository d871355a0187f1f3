"""The prefix cache in the allocator: what is found, what makes room first. At random: test_allocator.py."""

import pytest

from engine.kv.allocator import ColumnAllocator
from engine.kv.prefix_cache import BlockChain, PrefixCache

COLUMNS = 6


@pytest.fixture
def allocator() -> ColumnAllocator:
    return ColumnAllocator(COLUMNS, layers=1, heads=1)


def chain(*token_ids: int, identity: str = "") -> BlockChain:
    """Blocks of one token."""
    made = BlockChain(b"exact", identity.encode() or b"exact", block_size=1)
    made.extend(token_ids)
    return made


def fill(allocator: ColumnAllocator, owner: int, blocks: BlockChain) -> tuple[int, ...]:
    """An owner that has computed (or received) all of the chain's blocks."""
    columns = allocator.allocate(owner, len(blocks.own))
    assert columns is not None
    for index, name in enumerate(blocks.own):
        allocator.register(owner, index, name)
    return columns


def test_named_columns_are_shared_while_held_and_cached_afterwards(allocator: ColumnAllocator) -> None:
    columns = fill(allocator, 1, chain(1, 2, 3))
    assert allocator.match(chain(1, 2, 9), 3) == columns[:2]
    allocator.release(1)
    assert (allocator.free_columns, allocator.cached_columns, allocator.available_columns) == (3, 3, 6)
    shared = allocator.match(chain(1, 2, 9), 3)
    assert allocator.allocate(2, 1, shared=shared) == (3,)
    assert allocator.table(2) == (*columns[:2], 3)
    assert (allocator.cached_columns, allocator.owned_columns) == (1, 3)
    allocator.check_integrity()


def test_a_match_is_no_longer_than_asked_for_and_has_no_gap(allocator: ColumnAllocator) -> None:
    columns = fill(allocator, 1, chain(1, 2, 3))
    assert allocator.match(chain(1, 2, 3), 2) == columns[:2]
    allocator.disown(1, 1)
    allocator.register(1, 2, chain(1, 2, 3).own[2])
    assert allocator.match(chain(1, 2, 3), 3) == columns[:1]


def test_exact_kv_serves_everybody_and_lossy_kv_its_own_kind(allocator: ColumnAllocator) -> None:
    exact = fill(allocator, 1, chain(1))
    lossy = fill(allocator, 2, chain(1, 2, 3, identity="int8"))
    assert allocator.match(chain(1, 2, 3), 3) == exact
    assert allocator.match(chain(1, 2, 3, identity="int4"), 3) == exact
    assert allocator.match(chain(1, 2, 3, identity="int8"), 3) == (*exact, *lossy[1:]), "block by block"


def test_free_columns_are_granted_before_cached_ones(allocator: ColumnAllocator) -> None:
    fill(allocator, 1, chain(1, 2, 3))
    allocator.release(1)
    assert allocator.allocate(2, 3) == (3, 4, 5)
    assert allocator.cached_column_ids == (2, 1, 0), "later blocks are of no use without the earlier ones"
    assert allocator.allocate(3, 2) == (2, 1)
    assert allocator.match(chain(1, 2, 3), 3) == (0,)


def test_least_recently_used_goes_first_and_a_hit_is_a_use(allocator: ColumnAllocator) -> None:
    fill(allocator, 1, chain(1, 2))
    fill(allocator, 2, chain(5, 6))
    allocator.release(1)
    allocator.release(2)
    allocator.allocate(3, 0, shared=allocator.match(chain(1), 1))
    allocator.release(3)
    assert allocator.cached_column_ids == (1, 3, 2, 0)


def test_what_a_grant_shares_is_not_evicted_for_its_rest(allocator: ColumnAllocator) -> None:
    fill(allocator, 1, chain(1, 2, 3, 4))
    allocator.release(1)
    shared = allocator.match(chain(1, 2, 3, 4), 4)
    assert not allocator.can_allocate(3, shared=shared)
    assert allocator.allocate(2, 3, shared=shared) is None
    assert (allocator.cached_columns, allocator.owners) == (4, ()), "nothing has changed"
    assert allocator.allocate(2, 2, shared=shared) == (4, 5)


def test_a_block_computed_twice_keeps_its_first_column(allocator: ColumnAllocator) -> None:
    first = fill(allocator, 1, chain(1, 2))
    fill(allocator, 2, chain(1, 2))
    assert allocator.match(chain(1, 2), 2) == first
    allocator.release(2)
    assert allocator.cached_columns == 0
    allocator.check_integrity()


def test_disowned_blocks_are_found_by_nobody_and_stay_with_who_has_them(allocator: ColumnAllocator) -> None:
    fill(allocator, 1, chain(1, 2, 3))
    allocator.allocate(2, 0, shared=allocator.match(chain(1, 2, 3), 3))
    allocator.disown(1, 1)
    assert allocator.match(chain(1, 2, 3), 3) == (0,)
    assert allocator.table(2) == (0, 1, 2)
    allocator.release(1)
    allocator.release(2)
    assert (allocator.cached_column_ids, allocator.free_columns) == ((0,), 5)


def test_reset_frees_what_is_cached_and_forgets_the_names_of_the_rest(allocator: ColumnAllocator) -> None:
    fill(allocator, 1, chain(1, 2))
    fill(allocator, 2, chain(5))
    allocator.release(1)
    allocator.reset_cache()
    assert (allocator.cached_columns, allocator.free_columns) == (0, 5)
    assert allocator.match(chain(5), 1) == ()
    allocator.release(2)
    assert allocator.free_columns == COLUMNS
    allocator.check_integrity()


def test_columns_that_are_written_again_lose_their_names(allocator: ColumnAllocator) -> None:
    fill(allocator, 1, chain(1, 2))
    assert allocator.copy_on_write(1, 0) == (0, 0)
    assert allocator.match(chain(1, 2), 2) == ()
    allocator.split_column(1, 1)
    allocator.release(1)
    assert allocator.cached_columns == 0


def test_a_table_begins_with_what_it_shares(allocator: ColumnAllocator) -> None:
    fill(allocator, 1, chain(1))
    allocator.allocate(2, 1)
    with pytest.raises(ValueError, match="already"):
        allocator.allocate(2, 1, shared=(0,))


# -- chains ------------------------------------------------------------------------------------------------------------
def test_a_chain_is_extended_as_blocks_fill() -> None:
    grown, whole = BlockChain(b"r", b"r", 2), BlockChain(b"r", b"r", 2)
    for count in range(8):
        grown.extend(list(range(count)))
    whole.extend(range(7))
    assert grown.own == whole.own and len(whole.own) == 3
    assert whole.own is whole.exact, "one list, hashed once"


def test_a_fork_goes_its_own_way() -> None:
    parent = chain(1, 2, identity="int8")
    child = parent.fork()
    child.extend((1, 2, 3))
    assert (len(parent.own), len(child.own), len(child.exact)) == (2, 3, 3)
    assert (child.own, child.exact) == (chain(1, 2, 3, identity="int8").own, chain(1, 2, 3).own)


def test_a_name_belongs_to_one_column_and_a_column_to_one_name() -> None:
    cache = PrefixCache()
    cache.register(b"a", 0)
    cache.register(b"a", 1)
    cache.register(b"b", 0)
    assert cache.named == {0} and cache.disagreement() is None
