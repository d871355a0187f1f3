"""EngineCore: the engine without an executor, a thread or a clock. Allocator and scheduler behind one mailbox.

A driver (`thread.EngineThread` for real, `virtual.VirtualEngine` in virtual time) runs the same few calls:

    handle(command)*  ->  begin_step  ->  layers_computed*  ->  finish_step | fail_step  ->  handle(command)* ...

Commands never arrive inside a step: the executor is reading and writing the columns that they would move. So a
`release` cannot take memory from under a step, and needs no lock.

It does not compute (executors), decide what to run (scheduler) or know who asked (the roles). `Engine` is what drivers
need of it, and of its kin: `encode_core.EncodeCore` and `worker_engine.WorkerEngine`.
"""

from typing import Any, Protocol

from engine.batching import Batching
from engine.commands import (
    Activate,
    AddPrefill,
    DecodeHere,
    EncodePlan,
    EngineCommand,
    EngineEvent,
    EngineLoad,
    KVComputed,
    MarkBound,
    Pause,
    Release,
    Reserve,
    ResetCache,
    SequenceSlice,
    StepOutput,
    StepPlan,
)
from engine.kv.allocator import ColumnAllocator
from engine.kv.arena import Arena
from engine.kv.schema import CacheSchema
from engine.scheduler import Scheduler
from engine.sequence_memory import Copy


class Engine(Protocol):
    """What a driver needs. Plans and outputs are between an engine and its executor: a driver only carries them."""

    def handle(self, command: EngineCommand, now_us: int) -> list[EngineEvent]: ...

    def load(self) -> EngineLoad: ...

    def take_events(self) -> list[EngineEvent]: ...

    def begin_step(self, now_us: int) -> StepPlan | EncodePlan | None: ...

    def layers_computed(self, layer_start: int, layer_end: int) -> list[EngineEvent]: ...

    def finish_step(self, output: Any, now_us: int) -> list[EngineEvent]: ...

    def fail_step(self, now_us: int) -> list[EngineEvent]: ...

    def check_integrity(self) -> None: ...


class EngineCore:
    """Sole owner of one arena's columns. Every method is called by one thread (or at one virtual instant)."""

    def __init__(
        self, config: Scheduler.Config, schema: CacheSchema, arena: Arena, batching: Batching | None = None
    ) -> None:
        if config.block_size != arena.block_size:
            raise ValueError(f"block_size: the scheduler's is {config.block_size}, the arena's {arena.block_size}")
        self._allocator = ColumnAllocator(arena.columns, layers=schema.kv.layers, heads=schema.kv.heads)
        self._scheduler = Scheduler(config, self._allocator, batching, model=schema.digest)
        self._arena = arena
        self._layers = schema.kv.layers
        self._plan: StepPlan | None = None
        # Layers announced of the slice under way: seq_id -> layer. They outlive a step that raises: its retry computes
        # the same KV into the same slots, and must not announce it again, because a Source may have sent it already.
        self._announced: dict[int, int] = {}

    # -- between steps -------------------------------------------------------------------------------------------------
    def handle(self, command: EngineCommand, now_us: int) -> list[EngineEvent]:
        """Carry out one command. A command for a sequence that is gone does nothing: its `Release` overtook it."""
        if self._plan is not None:
            raise RuntimeError(f"{type(command).__name__} during step {self._plan.step_id}")
        match command:
            case AddPrefill():
                self._scheduler.add_prefill(command)
            case DecodeHere():
                self._scheduler.decode_here(command)
            case MarkBound(seq_id=seq_id):
                self._scheduler.mark_bound(seq_id)
            case Reserve():
                self._scheduler.reserve(command)
            case Activate():
                self._scheduler.activate(command)
            case Pause(seq_id=seq_id):
                self._scheduler.pause(seq_id)
            case Release(seq_id=seq_id):
                self._announced.pop(seq_id, None)
                self._scheduler.release(seq_id)
            case ResetCache():
                self._scheduler.reset_cache()
        self._copy_columns(self._scheduler.take_copies())
        return self._scheduler.take_events()

    def load(self) -> EngineLoad:
        """A snapshot; the driver sends it after each step and each batch of commands."""
        return self._scheduler.load()

    def take_events(self) -> list[EngineEvent]:
        """What planning itself reported (Admitted, Paused by preemption). A driver sends it before it executes, so
        that the router looks for a target while the step runs. Whoever forgets gets it with the next call's events."""
        return self._scheduler.take_events()

    # -- a step --------------------------------------------------------------------------------------------------------
    def begin_step(self, now_us: int) -> StepPlan | None:
        """The next step, or None: only a command can change that."""
        self._plan = self._scheduler.plan(now_us)
        return self._plan

    def layers_computed(self, layer_start: int, layer_end: int) -> list[EngineEvent]:
        """KV of these layers is final for every slice of the step under way; report those that may be streamed."""
        plan = self._require_plan()
        events = self._scheduler.take_events()
        for piece in plan.slices:
            if piece.is_prefill and self._scheduler.streams_kv(piece.seq_id):
                events.extend(self._computed(piece, layer_start, layer_end))
        return events

    def finish_step(self, output: StepOutput, now_us: int) -> list[EngineEvent]:
        for piece in self._require_plan().slices:
            self._announced.pop(piece.seq_id, None)
        self._plan = None
        events = self._scheduler.apply(output, now_us)
        self._copy_columns(self._scheduler.take_copies())
        return events

    def fail_step(self, now_us: int) -> list[EngineEvent]:
        """The executor raised instead of returning an output. The engine lives (I11)."""
        self._require_plan()
        self._plan = None
        return self._scheduler.step_raised(now_us)

    # -- self-check ----------------------------------------------------------------------------------------------------
    def check_integrity(self) -> None:
        """Raise if the books disagree (I3). Without sequences every column must be free or cached."""
        self._scheduler.check_integrity()
        available, total = self._allocator.available_columns, self._allocator.total_columns
        if not self._scheduler.seq_ids and available != total:
            raise RuntimeError(f"idle, and {available} of {total} columns are free or cached")

    def _copy_columns(self, copies: list[Copy]) -> None:
        """Before any other command or step: the source may be released by the next, and the target is read by it."""
        for source, target in copies:
            self._arena.copy_column(source, target)

    def _computed(self, piece: SequenceSlice, layer_start: int, layer_end: int) -> list[KVComputed]:
        """One event, or none if a step that raised has announced these layers already."""
        layer_start = max(layer_start, self._announced.get(piece.seq_id, 0))
        if layer_start >= layer_end:
            return []
        self._announced[piece.seq_id] = layer_end
        return [
            KVComputed(
                seq_id=piece.seq_id,
                layer_start=layer_start,
                layer_end=layer_end,
                token_start=piece.start,
                token_end=piece.start + len(piece.token_ids),
            )
        ]

    def _require_plan(self) -> StepPlan:
        if self._plan is None:
            raise RuntimeError("no step is under way")
        return self._plan


def assert_quiet(core: Engine) -> None:
    """What every test with an engine ends with: nobody has anything, and every column is free or cached (I3, I7)."""
    core.check_integrity()
    load = core.load()
    assert load.idle, f"sequences were left behind: {load}"
    assert load.free_columns == load.total_columns, f"columns were left behind: {load}"
    assert load.free_embedding_columns == load.embedding_columns, f"embeddings were left behind: {load}"
