"""WatchedEngine: whoever touches memory that is not theirs is caught at the engine's next call."""

import numpy as np
import pytest

from engine.commands import Activate, Branch, EngineCommand, EngineEvent, Release, Reserve, Reserved, ResetCache
from engine.executors.oracle import oracle_schema
from engine.kv.arena import POISON, Arena
from engine.scheduler import Scheduler
from engine.types import SamplingParams
from tests.sim.history import Violation
from tests.sim.watchers import WatchedEngine

TOKENS = tuple(range(8))  # two blocks


class Memory:
    """An engine with one sequence after the other, each of two full blocks."""

    def __init__(self) -> None:
        self.arena = Arena(oracle_schema(), columns=4, block_size=4)
        self._engine = WatchedEngine(Scheduler.Config(block_size=4), oracle_schema(), self.arena)

    def handle(self, command: EngineCommand) -> list[EngineEvent]:
        return self._engine.handle(command, 0)

    def arrive(self, seq_id: int) -> tuple[int, ...]:
        """Its columns, with KV in them."""
        (reserved,) = self.handle(Reserve(seq_id=seq_id, token_ids=TOKENS, growth_tokens=0))
        assert isinstance(reserved, Reserved) and reserved.block_table is not None
        for column in reserved.block_table[reserved.cached_tokens // 4 :]:
            self.arena.array[column] = column + 1
        branch = Branch(seq_id=seq_id, choice=0, token_id=9)
        sampling = SamplingParams()
        self.handle(Activate(seq_id=seq_id, token_ids=TOKENS, prompt_tokens=8, sampling=sampling, branches=(branch,)))
        return reserved.block_table

    def is_poison(self, column: int) -> bool:
        return bool(np.all(self.arena.array[column] == POISON))


def test_free_memory_is_poison_and_a_cached_column_is_not() -> None:
    memory = Memory()
    assert all(memory.is_poison(column) for column in range(4))
    table = memory.arrive(1)
    memory.handle(Release(seq_id=1))
    assert not any(memory.is_poison(column) for column in table)
    memory.handle(ResetCache())
    assert all(memory.is_poison(column) for column in range(4))


def test_a_column_that_leaves_the_cache_for_another_owner_is_poison() -> None:
    memory = Memory()
    memory.arrive(1)
    memory.handle(Release(seq_id=1))
    (reserved,) = memory.handle(Reserve(seq_id=2, token_ids=tuple(range(100, 116)), growth_tokens=0))
    assert isinstance(reserved, Reserved) and reserved.block_table is not None
    assert all(memory.is_poison(column) for column in reserved.block_table)


def test_what_is_found_in_the_cache_is_left_as_it_is() -> None:
    memory = Memory()
    first = memory.arrive(1)
    assert memory.arrive(2) == first
    assert not any(memory.is_poison(column) for column in first)


def test_whoever_writes_to_a_free_column_is_caught() -> None:
    memory = Memory()
    memory.arena.array[3, 0, 0] = 1
    with pytest.raises(Violation, match="free"):
        memory.handle(ResetCache())


@pytest.mark.parametrize("held", [True, False])
def test_whoever_writes_to_a_column_that_others_may_find_is_caught(held: bool) -> None:
    memory = Memory()
    table = memory.arrive(1)
    if not held:
        memory.handle(Release(seq_id=1))
    memory.arena.array[table[0], 0, 0] ^= 1
    with pytest.raises(Violation, match="cache"):
        memory.handle(ResetCache())
