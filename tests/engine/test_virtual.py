"""VirtualEngine: the core in virtual time. When things happen, not what (test_core.py)."""

import pytest

from engine.base.virtual_host import VirtualProcess, VirtualWorld
from engine.commands import (
    AddPrefill,
    Admitted,
    EngineEvent,
    EngineLoad,
    KVComputed,
    Prefilled,
    Release,
    StepFailed,
    TokensSampled,
)
from engine.core import EngineCore, assert_quiet
from engine.executors.oracle import OracleExecutor, oracle_schema, reference_tokens
from engine.kv.arena import Arena
from engine.scheduler import Scheduler
from engine.types import SamplingParams
from engine.virtual import VirtualEngine

ORACLE = OracleExecutor.Config(schema=oracle_schema(layers=4), layers_per_group=2, poison_token=999)
PROMPT = (1, 2, 3, 4, 5)
STEP_US = 1_000


class Rig:
    def __init__(self) -> None:
        self.world = VirtualWorld()
        arena = Arena(ORACLE.schema, columns=16, block_size=4)
        self.core = EngineCore(Scheduler.Config(block_size=4), ORACLE.schema, arena)
        self.heard: list[tuple[int, EngineEvent]] = []
        self.process = VirtualProcess(self.world)
        self.engine = VirtualEngine(
            self.world, self.hear, self.core, OracleExecutor(arena, ORACLE), lambda plan: STEP_US, process=self.process
        )

    def hear(self, events: tuple[EngineEvent, ...]) -> None:
        self.heard.extend((self.world.now_us, event) for event in events)

    def add(self, seq_id: int, prompt: tuple[int, ...] = PROMPT, *, here: bool = False) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=3)
        self.engine.post(
            AddPrefill(seq_id=seq_id, token_ids=prompt, prompt_tokens=len(prompt), sampling=sampling, decode_here=here)
        )

    def times(self, kind: type) -> list[int]:
        return [now_us for now_us, event in self.heard if isinstance(event, kind)]


def test_layers_spread_over_the_step_and_tokens_come_at_its_end() -> None:
    rig = Rig()
    rig.add(1)
    rig.world.run()
    assert rig.times(Admitted) == [0]
    assert rig.times(KVComputed) == [STEP_US // 2, STEP_US]
    assert rig.times(Prefilled) == [STEP_US]


def test_steps_follow_each_other_and_tokens_are_right() -> None:
    rig = Rig()
    rig.add(1, here=True)
    rig.world.run()
    assert rig.times(TokensSampled) == [2 * STEP_US, 3 * STEP_US]
    tokens = [event.tokens[0].token_id for _, event in rig.heard if isinstance(event, TokensSampled)]
    assert tuple(tokens) == reference_tokens(PROMPT, "", SamplingParams(temperature=0.0), 3, ORACLE)[1:]
    rig.engine.post(Release(seq_id=1))
    rig.world.run()
    assert_quiet(rig.core)
    assert isinstance(rig.heard[-1][1], EngineLoad) and rig.heard[-1][1].idle


def test_commands_wait_for_the_end_of_the_step() -> None:
    rig = Rig()
    rig.add(1)
    rig.world.schedule(STEP_US // 4, lambda: rig.engine.post(Release(seq_id=1)))
    rig.world.schedule(STEP_US // 4, lambda: rig.add(2))
    rig.world.run()
    assert rig.times(Admitted) == [0, STEP_US]
    assert rig.times(Prefilled) == [STEP_US, 2 * STEP_US]


def test_a_killed_engine_reports_nothing_more() -> None:
    rig = Rig()
    rig.add(1)
    rig.world.schedule(STEP_US * 3 // 4, rig.engine.kill)
    rig.world.run()
    rig.add(2)
    rig.world.run()
    assert rig.times(KVComputed) == [STEP_US // 2]
    assert rig.times(Prefilled) == []


def test_a_frozen_engine_goes_on_when_it_wakes() -> None:
    rig = Rig()
    rig.add(1)
    rig.world.schedule(STEP_US * 3 // 4, rig.process.freeze)
    rig.world.schedule(5 * STEP_US, rig.engine.thaw)
    rig.world.run()
    assert rig.times(KVComputed) == [STEP_US // 2, 5 * STEP_US]
    assert rig.times(Prefilled) == [5 * STEP_US]


def test_an_injected_fault_fails_its_sequence() -> None:
    rig = Rig()
    rig.add(1, (1, 999))
    rig.world.run()
    assert rig.times(StepFailed) == [STEP_US]


def test_a_bug_in_the_executor_is_not_survived() -> None:
    rig = Rig()
    rig.add(1, (-1,))  # no token id: the oracle cannot pack it
    with pytest.raises(Exception, match="argument"):
        rig.world.run()


def test_a_listener_may_post_at_once() -> None:
    rig = Rig()

    def hear(events: tuple[EngineEvent, ...]) -> None:
        rig.hear(events)
        for event in events:
            if isinstance(event, Prefilled):
                rig.engine.post(Release(seq_id=event.seq_id))

    rig.engine._on_events = hear
    rig.add(1)
    rig.world.run()
    assert_quiet(rig.core)
