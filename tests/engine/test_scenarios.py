"""Scenario files: scripts for the engine core with the events that must follow (after etcd raft's testdata).

A file is a comment that says which rule it guards, then blocks: commands, a line `----`, the events that they cause.
Tokens are 1, 2, 3... in prompts and 100 + output position when sampled. TRIPTYCH_REWRITE=1 writes what happened.
"""

import os
from functools import partial
from pathlib import Path

import pytest

from engine.commands import (
    Activate,
    AddPrefill,
    Admitted,
    DecodeHere,
    EngineEvent,
    KVComputed,
    MarkBound,
    Pause,
    Paused,
    Prefilled,
    Release,
    Reserve,
    Reserved,
    StepFailed,
    StepOutput,
    StepPlan,
    TokensSampled,
)
from engine.core import EngineCore, assert_quiet
from engine.executors.oracle import oracle_schema
from engine.kv.arena import Arena
from engine.scheduler import Scheduler
from engine.types import SamplingParams

SCENARIOS = sorted(Path(__file__).with_name("scenarios").glob("*.txt"))
LAYERS = 4


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

    core: EngineCore

    def __init__(self) -> None:
        self.now_us = 0
        self.seen: set[int] = set()

    def run(self, line: str) -> list[str]:
        """`name [seq id...] [key=value...]`"""
        name, *words = line.split()
        options = {key: value for key, _, value in (word.partition("=") for word in words) if not key.isdecimal()}
        seq_ids = [int(word) for word in words if word.isdecimal()]
        self.seen.update(seq_ids)
        lines: list[str] = getattr(self, f"do_{name}")(*seq_ids, **options)
        self.core.check_integrity()
        return lines

    def close(self) -> None:
        self.do_release(*self.seen)
        assert_quiet(self.core)

    def do_engine(self, columns: str, eos: str = "", **sizes: str) -> list[str]:
        eos_token_ids = frozenset(map(int, eos.split(","))) if eos else frozenset()
        config = Scheduler.Config(
            **{"block_size": 4} | {k: int(v) for k, v in sizes.items()}, eos_token_ids=eos_token_ids
        )
        schema = oracle_schema(layers=LAYERS)
        self.core = EngineCore(config, schema, Arena(schema, columns=int(columns), block_size=config.block_size))
        return []

    def do_add(self, seq_id: int, tokens: str, here: str | None = None, **options: str) -> list[str]:
        context = tuple(range(1, int(tokens) + 1))
        prompt_tokens, sampling = self._prompt(len(context), **options)
        return self._handle(
            AddPrefill(
                seq_id=seq_id,
                token_ids=context,
                prompt_tokens=prompt_tokens,
                sampling=sampling,
                decode_here=here is not None,
            )
        )

    def do_reserve(self, seq_id: int, context: str, growth: str = "0") -> list[str]:
        return self._handle(Reserve(seq_id=seq_id, context_tokens=int(context), growth_tokens=int(growth)))

    def do_activate(self, seq_id: int, tokens: str, **options: str) -> list[str]:
        context = tuple(range(1, int(tokens) + 1))
        prompt_tokens, sampling = self._prompt(len(context), **options)
        return self._handle(Activate(seq_id=seq_id, token_ids=context, prompt_tokens=prompt_tokens, sampling=sampling))

    def do_here(self, seq_id: int) -> list[str]:
        return self._handle(DecodeHere(seq_id=seq_id))

    def do_bound(self, seq_id: int) -> list[str]:
        return self._handle(MarkBound(seq_id=seq_id))

    def do_pause(self, seq_id: int) -> list[str]:
        return self._handle(Pause(seq_id=seq_id))

    def do_release(self, *seq_ids: int) -> list[str]:
        return [line for seq_id in seq_ids for line in self._handle(Release(seq_id=seq_id))]

    def do_step(self, times: int = 1, **trouble: str) -> list[str]:
        return [line for _ in range(times) for line in self._step(**trouble)]

    def do_load(self) -> list[str]:
        load = self.core.load()
        words = ("waiting", "prefilling", "running", "waiting_tokens", "held_sequences")
        columns = f"free={load.free_columns} lent={load.lent_columns} of={load.total_columns} idle={load.idle}"
        return [" ".join([f"{word}={getattr(load, word)}" for word in words] + [columns])]

    def _step(self, raises: str = "0", fails: str = "0") -> list[str]:
        """With `raises` the executor dies after half the layers of any step that has this sequence in it."""
        self.now_us += 1_000
        plan = self.core.begin_step(self.now_us)
        lines = show(self.core.take_events())
        if plan is None:
            return [*lines, "nothing to run"]
        lines.append("run " + " | ".join(map(show_slice, plan.slices)))
        if any(piece.seq_id == int(raises) for piece in plan.slices):
            return [*lines, *show([*self.core.layers_computed(0, LAYERS // 2), *self.core.fail_step(self.now_us)])]
        events = [
            *self.core.layers_computed(0, LAYERS),
            *self.core.finish_step(self._output(plan, int(fails)), self.now_us),
        ]
        return [*lines, *show(events)]

    def _output(self, plan: StepPlan, fails: int) -> StepOutput:
        asked = [piece for piece in plan.slices if piece.sample_position is not None and piece.seq_id != fails]
        tokens = {piece.seq_id: 100 + (piece.sample_position or 0) for piece in asked}
        failed = {piece.seq_id: "out_of_memory" for piece in plan.slices if piece.seq_id == fails}
        return StepOutput(plan.step_id, tokens, failed)

    def _prompt(
        self, tokens: int, prompt: str | None = None, max: str = "16", stop: str = "", ignore_eos: str | None = None
    ) -> tuple[int, SamplingParams]:
        stop_token_ids = tuple(map(int, stop.split(","))) if stop else ()
        sampling = SamplingParams(max_tokens=int(max), stop_token_ids=stop_token_ids, ignore_eos=ignore_eos is not None)
        return tokens if prompt is None else int(prompt), sampling

    def _handle(self, command: object) -> list[str]:
        return show(self.core.handle(command, self.now_us))  # type: ignore[arg-type]


def show(events: list[EngineEvent]) -> list[str]:
    return [show_event(event) for event in events]


def show_event(event: EngineEvent) -> str:
    match event:
        case Admitted():
            return f"admitted {event.seq_id} columns={columns(event.block_table)} context={event.context_tokens}"
        case KVComputed():
            layers = f"[{event.layer_start},{event.layer_end})"
            return f"computed {event.seq_id} layers={layers} tokens=[{event.token_start},{event.token_end})"
        case Prefilled():
            return f"prefilled {event.seq_id} token={event.token_id}{finish(event.finish)}"
        case Reserved():
            return f"reserved {event.seq_id} " + (columns(event.block_table) if event.block_table else "FULL")
        case TokensSampled():
            tokens = (
                f"{token.seq_id}@{token.position}={token.token_id}{finish(token.finish)}" for token in event.tokens
            )
            return "tokens " + " ".join(tokens)
        case Paused():
            why = "preempted" if event.preempted else "asked"
            return f"paused {event.seq_id} tokens={len(event.token_ids)} columns={columns(event.block_table)} {why}"
        case StepFailed():
            return f"failed {','.join(map(str, event.seq_ids))} {event.reason}"
    raise AssertionError(f"no words for {event}")


def show_slice(piece) -> str:  # type: ignore[no-untyped-def]
    kind = "prefill" if piece.is_prefill else "decode"
    sample = "" if piece.sample_position is None else f"->{piece.sample_position}"
    return f"{kind} {piece.seq_id}[{piece.start},{piece.start + len(piece.token_ids)}){sample}"


def finish(reason: object) -> str:
    return f"/{reason}" if reason else ""


columns = partial(lambda table: ",".join(map(str, table)))
