"""Scenario files for the encoder's core: commands, a line `----`, the events that they cause (see test_scenarios.py).

Blocks hold 4 rows, and a key is one letter. TRIPTYCH_REWRITE=1 writes what happened. Below them, a core that is sent
everything at random.
"""

import os
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.commands import (
    AddEncode,
    EmbeddingArrived,
    EmbeddingsReserved,
    EmbeddingWish,
    Encoded,
    EncodeOutput,
    EncodePixels,
    EngineCommand,
    EngineEvent,
    PixelsNeeded,
    Release,
    ReserveEmbeddings,
    ResetCache,
    StepFailed,
)
from engine.core import assert_quiet
from engine.encode_core import EncodeCore
from engine.executors.oracle import oracle_embedding_schema
from engine.images import Picture
from engine.kv.arena import Arena

SCENARIOS = sorted(Path(__file__).with_name("encode_scenarios").glob("*.txt"))
SCHEMA = oracle_embedding_schema()
PICTURE = Picture(1, 1, b"RGB")
STEP_US = 1_000


def make_core(columns: int, **config: int) -> EncodeCore:
    return EncodeCore(EncodeCore.Config(**config), SCHEMA, Arena(SCHEMA, columns=columns, block_size=4))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    comment, *blocks = path.read_text().strip().split("\n\n")
    script = Script()
    happened = [comment]
    for block in blocks:
        commands = block.split("\n----")[0].splitlines()
        events = [line for command in commands for line in script.run(command)]
        happened.append("\n".join([*commands, "----", *events]))
    script.close()
    text = "\n\n".join(happened) + "\n"
    if os.environ.get("TRIPTYCH_REWRITE"):
        path.write_text(text)
    assert text == path.read_text()


class Script:
    """Interprets one file. The books are checked after every line."""

    core: EncodeCore

    def __init__(self) -> None:
        self.now_us = 0
        self.seen: set[int] = set()

    def run(self, line: str) -> list[str]:
        """`name [word...] [key=value...]`"""
        name, *words = line.split()
        options = dict(word.split("=") for word in words if "=" in word)
        lines: list[str] = getattr(self, f"do_{name}")(*(word for word in words if "=" not in word), **options)
        self.core.check_integrity()
        return lines

    def close(self) -> None:
        self.do_release(*map(str, self.seen))
        assert_quiet(self.core)

    def do_core(self, columns: str, **config: str) -> list[str]:
        self.core = make_core(int(columns), **{key: int(value) for key, value in config.items()})
        return []

    def do_encode(self, *images: str, priority: str = "0") -> list[str]:
        """`1:a:8` is sequence 1, key a, 8 rows."""
        wishes = map(self._wish, images)
        commands = [AddEncode(seq_id=i, key=k, features=f, priority=int(priority)) for i, k, f in wishes]
        return self._handle(*commands)

    def do_pixels(self, *seq_ids: str) -> list[str]:
        return self._handle(*(EncodePixels(seq_id=int(seq_id), picture=PICTURE) for seq_id in seq_ids))

    def do_reserve(self, *images: str) -> list[str]:
        return self._handle(ReserveEmbeddings(wishes=tuple(map(self._wish, images))))

    def do_arrived(self, *seq_ids: str) -> list[str]:
        return self._handle(*(EmbeddingArrived(seq_id=int(seq_id)) for seq_id in seq_ids))

    def do_release(self, *seq_ids: str) -> list[str]:
        return self._handle(*(Release(seq_id=int(seq_id)) for seq_id in seq_ids))

    def do_reset(self) -> list[str]:
        return self._handle(ResetCache())

    def do_step(self, raises: str = "0", fails: str = "0") -> list[str]:
        """With `raises` the encoder dies of any step that has this sequence in it."""
        plan = self.core.begin_step(self.now_us)
        if plan is None:
            return ["nothing to run"]
        self.now_us += STEP_US
        seq_ids = [item.seq_id for item in plan.items]
        if int(raises) in seq_ids:
            events = self.core.fail_step(self.now_us)
        else:
            failed = {seq_id: "bad_picture" for seq_id in seq_ids if seq_id == int(fails)}
            events = self.core.finish_step(EncodeOutput(plan.step_id, failed), self.now_us)
        return ["run " + " ".join(map(str, seq_ids)), *map(show, events)]

    def do_load(self) -> list[str]:
        load = self.core.load()
        columns = f"free={load.free_embedding_columns} of={load.embedding_columns} idle={load.idle}"
        counts = f"hits={load.embedding_hits} forwards={load.vision_forwards} encode_us={load.encode_us}"
        return [f"encoding={load.encoding} {columns} {counts} loaded={load.tower_loaded}"]

    def _wish(self, text: str) -> EmbeddingWish:
        seq_id, key, features = text.split(":")
        self.seen.add(int(seq_id))
        return EmbeddingWish(int(seq_id), key.encode(), int(features))

    def _handle(self, *commands: EngineCommand) -> list[str]:
        return [show(event) for command in commands for event in self.core.handle(command, self.now_us)]


def show(event: EngineEvent) -> str:
    match event:
        case PixelsNeeded():
            return f"pixels {event.seq_id}"
        case Encoded():
            return f"encoded {event.seq_id} {columns(event.block_table)}{' cached' * event.cached}"
        case EmbeddingsReserved():
            grants = (f"{g.seq_id}={columns(g.block_table)}{' cached' * g.cached}" for g in event.grants)
            return "reserved " + " | ".join(grants)
        case StepFailed():
            return f"failed {','.join(map(str, event.seq_ids))} {event.reason}"
    raise AssertionError(f"no words for {event}")


def columns(table: tuple[int, ...]) -> str:
    return ",".join(map(str, table))


# -- what must not be --------------------------------------------------------------------------------------------------
def test_commands_do_not_arrive_inside_a_step() -> None:
    core = make_core(2)
    core.handle(AddEncode(seq_id=1, key=b"a", features=4), 0)
    core.handle(EncodePixels(seq_id=1, picture=PICTURE), 0)
    assert core.begin_step(0)
    with pytest.raises(RuntimeError, match="Release during step 1"):
        core.handle(Release(seq_id=1), 0)


def test_ids_are_never_reused() -> None:
    core = make_core(2)
    core.handle(AddEncode(seq_id=1, key=b"a", features=4), 0)
    with pytest.raises(ValueError, match="1 is in use"):
        core.handle(AddEncode(seq_id=1, key=b"b", features=4), 0)
    with pytest.raises(ValueError, match="1 is in use"):
        core.handle(ReserveEmbeddings(wishes=(EmbeddingWish(1, b"b", 4),)), 0)


def test_a_lazy_tower_is_loaded_by_its_first_image() -> None:
    core = make_core(2, lazy_tower=True)
    core.handle(AddEncode(seq_id=1, key=b"a", features=4), 0)
    core.handle(EncodePixels(seq_id=1, picture=PICTURE), 0)
    assert not core.load().tower_loaded
    plan = core.begin_step(0)
    assert plan
    core.finish_step(EncodeOutput(plan.step_id), 0)
    assert core.load().tower_loaded


# -- at random ---------------------------------------------------------------------------------------------------------
KEYS = st.sampled_from([b"a", b"b", b"c"])
ROWS = {b"a": 3, b"b": 8, b"c": 13}  # 1, 2 and 4 columns of 6


class RandomCommands(RuleBasedStateMachine):
    """Whatever happens: columns are conserved, each is written by one sequence, answers come once, and nobody who could
    go on is left waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.core = make_core(6, batch_images=2)
        self.minted = 0
        self.keys: dict[int, bytes] = {}
        self.owed: dict[int, str] = {}  # seq_id -> what will be said about it some day
        self.writing: dict[int, tuple[int, ...]] = {}  # by somebody else
        self.wanting: set[int] = set()

    def mint(self, key: bytes, owed: str) -> EmbeddingWish:
        self.minted += 1
        self.keys[self.minted], self.owed[self.minted] = key, owed
        return EmbeddingWish(self.minted, key, ROWS[key])

    def send(self, command: EngineCommand) -> None:
        self.hear(self.core.handle(command, 0))

    def hear(self, events: list[EngineEvent]) -> None:
        for event in events:
            match event:
                case PixelsNeeded():
                    assert self.owed[event.seq_id] == "encode"
                    self.wanting.add(event.seq_id)
                case Encoded():
                    self.answered(event.seq_id, "encode", event.block_table)
                case EmbeddingsReserved():
                    for grant in event.grants:
                        self.answered(grant.seq_id, "reserve", grant.block_table)
                        if not grant.cached:
                            self.writing[grant.seq_id] = grant.block_table
                case StepFailed():
                    for seq_id in event.seq_ids:
                        del self.owed[seq_id]

    def answered(self, seq_id: int, owed: str, table: tuple[int, ...]) -> None:
        assert self.owed.pop(seq_id) == owed
        assert len(table) == len(set(table)) == -(-ROWS[self.keys[seq_id]] // 4)

    @rule(key=KEYS, priority=st.integers(0, 1))
    def encode(self, key: bytes, priority: int) -> None:
        seq_id, _, features = self.mint(key, "encode")
        self.send(AddEncode(seq_id=seq_id, key=key, features=features, priority=priority))

    @rule(keys=st.lists(KEYS, min_size=1, max_size=3))
    def reserve(self, keys: list[bytes]) -> None:
        self.send(ReserveEmbeddings(wishes=tuple(self.mint(key, "reserve") for key in keys)))

    @rule(data=st.data())
    def pixels(self, data: st.DataObject) -> None:
        if wanting := sorted(self.wanting):
            seq_id = data.draw(st.sampled_from(wanting))
            self.wanting.discard(seq_id)
            self.send(EncodePixels(seq_id=seq_id, picture=PICTURE))

    @rule(data=st.data())
    def arrived(self, data: st.DataObject) -> None:
        if writing := sorted(self.writing):
            seq_id = data.draw(st.sampled_from(writing))
            del self.writing[seq_id]
            self.send(EmbeddingArrived(seq_id=seq_id))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.keys:
            self.forget(data.draw(st.sampled_from(sorted(self.keys))))

    def forget(self, seq_id: int) -> None:
        if self.owed.get(seq_id) == "reserve":  # it takes those along that wait with it: which ones, the core knows
            members = next(r.wishes for r in self.core._reservations if seq_id in [wish.seq_id for wish in r.wishes])
            for wish in members:
                self.owed.pop(wish.seq_id)
                self.keys.pop(wish.seq_id)
        for book in (self.keys, self.owed, self.writing):
            book.pop(seq_id, None)
        self.wanting.discard(seq_id)
        self.send(Release(seq_id=seq_id))

    @rule()
    def reset(self) -> None:
        self.send(ResetCache())

    @rule(raises=st.booleans(), fails=st.booleans())
    def step(self, raises: bool, fails: bool) -> None:
        plan = self.core.begin_step(0)
        if plan is None:
            return
        if raises:
            self.hear(self.core.fail_step(0))
        else:
            failed = {plan.items[0].seq_id: "bad_picture"} if fails else {}
            self.hear(self.core.finish_step(EncodeOutput(plan.step_id, failed), 0))

    @invariant()
    def books_agree(self) -> None:
        self.core.check_integrity()
        tables = [column for table in self.writing.values() for column in table]
        assert len(tables) == len(set(tables)), "two writers of one column"

    def teardown(self) -> None:
        """What all tests end with, and that nobody waits for nothing: step and release until nobody is left."""
        while self.keys:
            self.forget(min(self.keys))
        assert not self.owed
        assert_quiet(self.core)


RandomCommands.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRandomCommands = RandomCommands.TestCase
