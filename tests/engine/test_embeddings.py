"""EmbeddingMemory: whole embeddings or none, shared by key, every column accounted for. In use: test_encode_core.py."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.commands import EmbeddingGrant, EmbeddingWish
from engine.embeddings import EmbeddingMemory
from engine.kv.allocator import ColumnAllocator

COLUMNS = 6
BLOCK = 4


class Rig:
    def __init__(self, columns: int = COLUMNS) -> None:
        self.allocator = ColumnAllocator(columns, layers=1, heads=1)
        self.memory = EmbeddingMemory(self.allocator, block_size=BLOCK)

    def cache(self, seq_id: int, key: bytes, features: int) -> tuple[int, ...]:
        """An embedding that is whole and nobody's."""
        grant = self.memory.grant(seq_id, key, features)
        assert grant is not None
        self.memory.complete(seq_id)
        self.memory.release(seq_id)
        return grant.block_table


def test_what_is_written_by_somebody_else_is_lent_until_it_is_whole() -> None:
    rig = Rig()
    assert rig.memory.grant(1, b"a", 6, lent=True) == EmbeddingGrant(1, (0, 1), cached=False)
    assert rig.allocator.lent_columns == 2
    rig.memory.complete(1)
    assert rig.allocator.lent_columns == 0
    assert rig.memory.grant(2, b"a", 6, lent=True) == EmbeddingGrant(2, (0, 1), cached=True)
    assert rig.allocator.lent_columns == 0, "nobody writes it"


def test_all_or_none_of_a_prompts_embeddings() -> None:
    rig = Rig()
    rig.memory.grant(1, b"a", 4 * BLOCK)
    wishes = (EmbeddingWish(2, b"b", BLOCK), EmbeddingWish(3, b"c", 2 * BLOCK))
    assert rig.memory.grant_all(wishes) is None
    assert rig.allocator.owners == (1,)
    rig.memory.release(1)
    assert [grant.seq_id for grant in rig.memory.grant_all(wishes) or ()] == [2, 3]


def test_a_prompts_new_embeddings_do_not_evict_its_cached_ones() -> None:
    """Columns are granted from the cache too: those that the same prompt asks for must not be among them."""
    rig = Rig(columns=3)
    first = rig.cache(1, b"a", 2 * BLOCK)  # the next to be evicted
    other = rig.cache(2, b"c", BLOCK)
    wishes = (EmbeddingWish(3, b"b", BLOCK), EmbeddingWish(4, b"a", 2 * BLOCK))
    grants = rig.memory.grant_all(wishes)
    assert grants == (EmbeddingGrant(3, other, cached=False), EmbeddingGrant(4, first, cached=True))


def test_one_prompt_may_show_an_image_twice() -> None:
    rig = Rig()
    first = rig.cache(1, b"a", 2 * BLOCK)
    grants = rig.memory.grant_all((EmbeddingWish(2, b"a", 2 * BLOCK), EmbeddingWish(3, b"a", 2 * BLOCK)))
    assert [grant.block_table for grant in grants or ()] == [first, first]
    assert rig.memory.hits == 2


def test_neither_key_nor_index_nor_length_makes_two_embeddings_one() -> None:
    rig = Rig()
    rig.cache(1, b"ab", 2 * BLOCK)
    for seq_id, (key, features) in enumerate([(b"a", 8), (b"b", 8), (b"ab", 4), (b"ab", 7)], 2):
        grant = rig.memory.grant(seq_id, key, features)
        assert grant is not None
        assert not grant.cached
        rig.memory.release(seq_id)


def test_the_least_recently_used_makes_room() -> None:
    rig = Rig()
    for seq_id, key in enumerate([b"a", b"b", b"c"], 1):
        rig.cache(seq_id, key, 2 * BLOCK)
    rig.memory.grant(4, b"a", 2 * BLOCK)
    rig.memory.release(4)  # used again: b is the oldest now
    rig.memory.grant(5, b"d", 2 * BLOCK)
    found = {key: rig.memory.grant(6 + i, key, 2 * BLOCK) for i, key in enumerate([b"a", b"c", b"b"])}
    assert {key: grant and grant.cached for key, grant in found.items()} == {b"a": True, b"c": True, b"b": None}


ROWS = {b"a": 3, b"b": 8, b"c": 13}
KEYS = st.sampled_from(sorted(ROWS))


class RandomOwners(RuleBasedStateMachine):
    """Grants, ends and resets at random: columns are conserved, and whoever shares one shares the right one."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig()
        self.minted = 0
        self.held: dict[int, bytes] = {}
        self.unfinished: set[int] = set()
        self.content: dict[int, tuple[bytes, int]] = {}  # column -> what was written to it last

    def mint(self) -> int:
        self.minted += 1
        return self.minted

    def took(self, grant: EmbeddingGrant, key: bytes) -> None:
        self.held[grant.seq_id] = key
        written = [(key, index) for index in range(-(-ROWS[key] // BLOCK))]
        if grant.cached:
            assert [self.content[column] for column in grant.block_table] == written
        else:
            self.unfinished.add(grant.seq_id)
            self.content |= zip(grant.block_table, written, strict=True)

    @rule(keys=st.lists(KEYS, min_size=1, max_size=3))
    def grant_all(self, keys: list[bytes]) -> None:
        wishes = [EmbeddingWish(self.mint(), key, ROWS[key]) for key in keys]
        for grant, key in zip(self.rig.memory.grant_all(wishes) or (), keys, strict=False):
            self.took(grant, key)

    @rule(key=KEYS)
    def grant(self, key: bytes) -> None:
        if grant := self.rig.memory.grant(self.mint(), key, ROWS[key]):
            self.took(grant, key)

    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        if self.unfinished:
            seq_id = data.draw(st.sampled_from(sorted(self.unfinished)))
            self.unfinished.discard(seq_id)
            self.rig.memory.complete(seq_id)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.held:
            seq_id = data.draw(st.sampled_from(sorted(self.held)))
            del self.held[seq_id]
            self.unfinished.discard(seq_id)
            self.rig.memory.release(seq_id)

    @rule()
    def reset(self) -> None:
        self.rig.memory.reset_cache()

    @invariant()
    def nothing_is_lost(self) -> None:
        self.rig.memory.check_integrity()
        assert set(self.rig.allocator.owners) == set(self.held)
        held = {column for seq_id in self.held for column in self.rig.memory.table(seq_id)}
        assert self.rig.allocator.available_columns == COLUMNS - len(held)


RandomOwners.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRandomOwners = RandomOwners.TestCase
