"""WorkerEngine: what one worker's driver drives. A language model's core, an encoder's core, or both in turn.

    commands   each to the core that it is for; `Release` and `ResetCache` to both
    steps      one at a time; while both cores have work they take turns, so neither waits for more than one step
    load       one snapshot of both

It decides nothing else: what a step runs is its core's business, how long it takes the batching's.
"""

from dataclasses import replace

from engine.commands import (
    AddEncode,
    EmbeddingArrived,
    EncodeOutput,
    EncodePixels,
    EncodePlan,
    EngineCommand,
    EngineEvent,
    EngineLoad,
    Release,
    ReserveEmbeddings,
    ResetCache,
    StepOutput,
    StepPlan,
)
from engine.core import Engine, EngineCore
from engine.encode_core import EncodeCore


class WorkerEngine:
    """Implements `Engine` over one core of each kind, or one alone."""

    def __init__(self, language: EngineCore | None, encode: EncodeCore | None) -> None:
        self._language = language
        self._encode = encode
        # Whoever comes first here steps next if it can.
        self._turns: list[Engine] = [core for core in (language, encode) if core is not None]
        self._stepping: Engine | None = None
        if not self._turns:
            raise ValueError("an engine of nothing")

    # -- between steps -------------------------------------------------------------------------------------------------
    def handle(self, command: EngineCommand, now_us: int) -> list[EngineEvent]:
        return [event for core in self._addressees(command) for event in core.handle(command, now_us)]

    def load(self) -> EngineLoad:
        """The language model's, with the encoder's fields in it."""
        if self._language is None or self._encode is None:
            return self._turns[0].load()
        language, encode = self._language.load(), self._encode.load()
        return replace(
            language,
            idle=language.idle and encode.idle,
            encoding=encode.encoding,
            free_embedding_columns=encode.free_embedding_columns,
            embedding_columns=encode.embedding_columns,
            embedding_hits=encode.embedding_hits,
            vision_forwards=encode.vision_forwards,
            encode_us=encode.encode_us,
            tower_loaded=encode.tower_loaded,
        )

    def take_events(self) -> list[EngineEvent]:
        return [event for core in self._turns for event in core.take_events()]

    # -- a step --------------------------------------------------------------------------------------------------------
    def begin_step(self, now_us: int) -> StepPlan | EncodePlan | None:
        for core in self._turns:
            plan = core.begin_step(now_us)
            if plan is not None:
                self._stepping = core
                self._turns.sort(key=lambda other: other is core)  # it is last in line now
                return plan
        return None

    def layers_computed(self, layer_start: int, layer_end: int) -> list[EngineEvent]:
        return self._require_step().layers_computed(layer_start, layer_end)

    def finish_step(self, output: StepOutput | EncodeOutput, now_us: int) -> list[EngineEvent]:
        return self._end_step().finish_step(output, now_us)

    def fail_step(self, now_us: int) -> list[EngineEvent]:
        return self._end_step().fail_step(now_us)

    # -- self-check ----------------------------------------------------------------------------------------------------
    def check_integrity(self) -> None:
        for core in self._turns:
            core.check_integrity()

    # -- helpers -------------------------------------------------------------------------------------------------------
    def _addressees(self, command: EngineCommand) -> list[Engine]:
        match command:
            case Release() | ResetCache():
                return list(self._turns)
            case AddEncode() | EncodePixels() | ReserveEmbeddings() | EmbeddingArrived():
                core: Engine | None = self._encode
            case _:
                core = self._language
        if core is None:
            raise ValueError(f"{type(command).__name__} at a worker that has no such engine")
        return [core]

    def _require_step(self) -> Engine:
        if self._stepping is None:
            raise RuntimeError("no step is under way")
        return self._stepping

    def _end_step(self) -> Engine:
        core, self._stepping = self._require_step(), None
        return core
