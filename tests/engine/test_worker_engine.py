"""Two kinds of steps on one engine, in virtual time: they take turns, and nobody waits for two of the others' steps."""

import threading
from itertools import pairwise
from queue import SimpleQueue

import pytest

from engine.base.failpoints import InjectedFault
from engine.base.virtual_host import VirtualWorld
from engine.commands import (
    AddEncode,
    AddPrefill,
    EmbeddingArrived,
    EmbeddingsReserved,
    EmbeddingWish,
    Encoded,
    EncodeOutput,
    EncodePixels,
    EncodePlan,
    EngineCommand,
    EngineEvent,
    EngineLoad,
    PixelsNeeded,
    Prefilled,
    Release,
    ReserveEmbeddings,
    ResetCache,
    StepFailed,
    StepPlan,
    TokensSampled,
)
from engine.core import EngineCore, assert_quiet
from engine.encode_core import EncodeCore
from engine.executors.joint import JointExecutor
from engine.executors.oracle import OracleExecutor
from engine.images import Picture
from engine.kv.arena import Arena
from engine.scheduler import Scheduler
from engine.thread import EngineThread
from engine.types import SamplingParams
from engine.virtual import VirtualEngine
from engine.worker_engine import WorkerEngine

ORACLE = OracleExecutor.Config()
PICTURE = Picture(1, 1, b"RGB")
ENCODE_US, STEP_US = 300, 10
BLOCK = 4


class Blind:
    """An encoder that does nothing, or raises at a picture of one colour."""

    def encode(self, plan: EncodePlan) -> EncodeOutput:
        if any(item.picture.pixels == b"BAD" for item in plan.items):
            raise InjectedFault("poison picture")
        return EncodeOutput(plan.step_id)


def language_core() -> tuple[EngineCore, OracleExecutor]:
    arena = Arena(ORACLE.schema, columns=64, block_size=BLOCK)
    core = EngineCore(Scheduler.Config(block_size=BLOCK, step_tokens=8), ORACLE.schema, arena)
    return core, OracleExecutor(arena, ORACLE)


def encode_core(**config: int) -> EncodeCore:
    arena = Arena(ORACLE.embedding_schema, columns=64, block_size=BLOCK)
    return EncodeCore(EncodeCore.Config(**config), ORACLE.embedding_schema, arena)


class Rig:
    def __init__(self, **config: int) -> None:
        self.world = VirtualWorld()
        core, executor = language_core()
        self.core = WorkerEngine(core, encode_core(**config))
        self.heard: list[tuple[int, EngineEvent]] = []
        self.steps: list[tuple[int, str]] = []
        self.engine = VirtualEngine(self.world, self.hear, self.core, JointExecutor(executor, Blind()), self.cost)

    def cost(self, plan: StepPlan | EncodePlan) -> int:
        kind, cost_us = ("encode", ENCODE_US) if isinstance(plan, EncodePlan) else ("tokens", STEP_US)
        self.steps.append((self.world.now_us, kind))
        return cost_us

    def hear(self, events: tuple[EngineEvent, ...]) -> None:
        for event in events:
            self.heard.append((self.world.now_us, event))
            if isinstance(event, PixelsNeeded):
                self.post(EncodePixels(seq_id=event.seq_id, picture=PICTURE))

    def post(self, *commands: EngineCommand) -> None:
        for command in commands:
            self.engine.post(command)

    def prompt(self, seq_id: int, tokens: int = 4, count: int = 8) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=count)
        ids = tuple(range(100 * seq_id, 100 * seq_id + tokens))
        command = AddPrefill(seq_id=seq_id, token_ids=ids, prompt_tokens=tokens, sampling=sampling, decode_here=True)
        self.post(command)

    def images(self, *seq_ids: int) -> None:
        self.post(*(AddEncode(seq_id=seq_id, key=bytes([seq_id]), features=8) for seq_id in seq_ids))

    def times(self, kind: type) -> list[int]:
        return [now_us for now_us, event in self.heard if isinstance(event, kind)]

    def close(self, *seq_ids: int) -> None:
        self.post(*(Release(seq_id=seq_id) for seq_id in seq_ids))
        self.world.run()
        assert_quiet(self.core)


def test_while_both_have_work_they_take_turns() -> None:
    rig = Rig(batch_images=1)
    rig.prompt(1, count=6)
    rig.images(11, 12, 13, 14)
    rig.world.run()
    assert [kind for _, kind in rig.steps] == ["tokens", "encode"] * 4 + ["tokens"] * 2
    rig.close(1, 11, 12, 13, 14)


def test_a_stream_of_images_delays_a_token_by_one_step_of_theirs() -> None:
    rig = Rig(batch_images=1)
    rig.images(*range(11, 31))
    rig.prompt(1, count=10)
    rig.world.run()
    token_times = rig.times(TokensSampled)
    gaps = {later - earlier for earlier, later in pairwise(token_times)}
    assert gaps == {ENCODE_US + STEP_US}
    rig.close(1, *range(11, 31))


def test_a_stream_of_tokens_delays_an_image_by_one_step_of_theirs() -> None:
    rig = Rig()
    rig.prompt(1, tokens=80, count=40)
    rig.world.run(until_us=STEP_US // 2)
    rig.images(11)
    rig.world.run()
    assert rig.times(Encoded) == [2 * STEP_US + ENCODE_US], "the step under way, one of pixels' asking, its own"
    rig.close(1, 11)


def test_an_idle_half_costs_nothing() -> None:
    rig = Rig()
    rig.prompt(1, count=4)
    rig.world.run()
    assert [kind for _, kind in rig.steps] == ["tokens"] * 4
    assert rig.times(Prefilled) == [STEP_US]
    rig.close(1)


def test_release_and_reset_reach_both_and_the_rest_whom_it_is_for() -> None:
    rig = Rig()
    rig.post(ReserveEmbeddings(wishes=(EmbeddingWish(21, b"a", 4),)), EmbeddingArrived(seq_id=21))
    rig.prompt(1)
    rig.world.run()
    assert len(rig.times(EmbeddingsReserved)) == 1
    rig.post(Release(seq_id=1), Release(seq_id=21))
    rig.world.run()
    load = rig.core.load()
    assert load.cached_columns > 0
    rig.post(ResetCache(), ReserveEmbeddings(wishes=(EmbeddingWish(22, b"a", 4),)))
    rig.world.run()
    ((grant,),) = (event.grants for _, event in rig.heard[-2:] if isinstance(event, EmbeddingsReserved))
    assert not grant.cached
    assert rig.core.load().cached_columns == 0
    rig.close(22)


def test_one_load_of_both() -> None:
    rig = Rig()
    rig.prompt(1)
    rig.images(11)
    rig.world.run()
    load = rig.core.load()
    assert (load.total_columns, load.embedding_columns, load.free_embedding_columns) == (64, 64, 62)
    assert (load.held_sequences, load.vision_forwards, load.encode_us, load.tower_loaded) == (1, 1, ENCODE_US, True)
    assert not load.idle
    rig.post(Release(seq_id=1))
    rig.world.run()
    assert not rig.core.load().idle, "an embedding is held"
    rig.post(Release(seq_id=11))
    rig.world.run()
    assert rig.core.load().idle
    assert isinstance(rig.heard[-1][1], EngineLoad)


def test_a_step_of_images_that_raises_hurts_nobody_else() -> None:
    rig = Rig()
    rig.prompt(1)
    rig.post(*(AddEncode(seq_id=seq_id, key=bytes([seq_id]), features=4) for seq_id in (11, 12)))
    rig.post(EncodePixels(seq_id=11, picture=Picture(1, 1, b"BAD")), EncodePixels(seq_id=12, picture=PICTURE))
    rig.world.run()
    (failed,) = (event for _, event in rig.heard if isinstance(event, StepFailed))
    assert (failed.seq_ids, failed.reason) == ((11,), "step_raised")
    assert len(rig.times(Encoded)) == 1
    assert len(rig.times(TokensSampled)) == 7
    rig.close(1, 11, 12)


@pytest.mark.parametrize("has", ["language", "encode"])
def test_half_an_engine_refuses_what_it_has_not(has: str) -> None:
    prompt = AddPrefill(seq_id=1, token_ids=(1,), prompt_tokens=1, sampling=SamplingParams())
    image = AddEncode(seq_id=2, key=b"a", features=4)
    core, executor = language_core()
    engine = WorkerEngine(core if has == "language" else None, encode_core() if has == "encode" else None)
    mine, others = (prompt, image) if has == "language" else (image, prompt)
    engine.handle(mine, 0)
    assert engine.load() != EngineLoad()
    with pytest.raises(ValueError, match="no such engine"):
        engine.handle(others, 0)
    engine.handle(Release(seq_id=mine.seq_id), 0)
    assert_quiet(engine)
    halves = JointExecutor(executor, None) if has == "language" else JointExecutor(None, Blind())
    with pytest.raises(RuntimeError, match="this worker has no"):
        halves.execute(EncodePlan(1, ()) if has == "language" else StepPlan(1, ()), lambda start, end: None)


def test_an_engine_of_nothing_cannot_be() -> None:
    with pytest.raises(ValueError, match="nothing"):
        WorkerEngine(None, None)


def test_no_step_ends_that_did_not_begin() -> None:
    rig = Rig()
    with pytest.raises(RuntimeError, match="no step"):
        rig.core.fail_step(0)


def test_assert_quiet_sees_an_embedding_that_was_left_behind() -> None:
    core = WorkerEngine(None, encode_core())
    core.handle(AddEncode(seq_id=1, key=b"a", features=4), 0)
    with pytest.raises(AssertionError, match="left behind"):
        assert_quiet(core)


def test_the_engine_thread_drives_both() -> None:
    heard: SimpleQueue[tuple[EngineEvent, ...]] = SimpleQueue()
    core, executor = language_core()
    done = threading.Event()
    wanted = {Encoded, Prefilled}

    def on_events(events: tuple[EngineEvent, ...]) -> None:
        heard.put(events)
        wanted.difference_update(map(type, events))
        if not wanted:
            done.set()

    engine = WorkerEngine(core, encode_core())
    thread = EngineThread(engine, lambda: JointExecutor(executor, Blind()), on_events)
    thread.start()
    thread.post(AddEncode(seq_id=2, key=b"a", features=4))
    thread.post(EncodePixels(seq_id=2, picture=PICTURE))
    sampling = SamplingParams(temperature=0.0, max_tokens=1)
    thread.post(AddPrefill(seq_id=1, token_ids=(1, 2), prompt_tokens=2, sampling=sampling, decode_here=True))
    assert done.wait(10)
    thread.post(Release(seq_id=1))
    thread.post(Release(seq_id=2))
    assert thread.stop(10)
    assert_quiet(engine)
