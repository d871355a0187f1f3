"""Scenario files: scripts for the engine core with the events that must follow (after etcd raft's testdata).

A file is a comment that says which rule it guards, then blocks: commands, a line `----`, the events that they cause.
No two sequences have a prompt token in common, but one added `as=N` has sequence N's. Sampled tokens are 100 + output
position, and 1000 more for each choice before theirs. TRIPTYCH_REWRITE=1 writes what happened.
"""

import os
from functools import partial
from pathlib import Path

import pytest

from engine.commands import (
    Activate,
    AddPrefill,
    Admitted,
    Branch,
    DecodeHere,
    EngineEvent,
    KVComputed,
    MarkBound,
    Pause,
    Paused,
    Prefilled,
    PromptScored,
    Release,
    Reserve,
    Reserved,
    ResetCache,
    Sampled,
    SequenceSlice,
    StepFailed,
    StepOutput,
    StepPlan,
    TokensSampled,
)
from engine.core import EngineCore, assert_quiet
from engine.executors.oracle import oracle_schema
from engine.kv.arena import Arena
from engine.scheduler import Scheduler
from engine.sequence_memory import Copy
from engine.types import SamplingParams, TokenLogprobs

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


class ScriptedCore(EngineCore):
    """Tells which columns it copied."""

    copied: tuple[Copy, ...] = ()

    def _copy_columns(self, copies: list[Copy]) -> None:
        super()._copy_columns(copies)
        self.copied += tuple(copies)


class Script:
    """Interprets one file. The books are checked after every line."""

    core: ScriptedCore

    def __init__(self) -> None:
        self.now_us = 0
        self.seen: set[int] = set()
        self.reserved: dict[int, tuple[int, ...]] = {}

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
        self.core = ScriptedCore(config, schema, Arena(schema, columns=int(columns), block_size=config.block_size))
        return []

    def do_add(
        self,
        seq_id: int,
        tokens: str,
        here: str | None = None,
        tenant: str = "",
        choices: str = "1",
        priority: str = "0",
        **options: str,
    ) -> list[str]:
        context = self._tokens(seq_id, int(tokens), options)
        prompt_tokens, sampling = self._prompt(len(context), **options)
        return self._handle(
            AddPrefill(
                seq_id=seq_id,
                token_ids=context,
                prompt_tokens=prompt_tokens,
                sampling=sampling,
                decode_here=here is not None,
                tenant=tenant,
                choices=tuple(range(int(choices))),
                priority=int(priority),
            )
        )

    def do_reserve(
        self,
        seq_id: int,
        context: str,
        growth: str = "0",
        tenant: str = "",
        identity: str = "",
        children: str = "",
        **options: str,
    ) -> list[str]:
        command = Reserve(
            seq_id=seq_id,
            token_ids=self._tokens(seq_id, int(context), options),
            growth_tokens=int(growth),
            tenant=tenant,
            identity=identity,
            children=self._children(children),
        )
        self.reserved[seq_id] = command.token_ids
        return self._handle(command)

    def do_activate(self, seq_id: int, branches: str = "", **options: str) -> list[str]:
        """`branches=2:0,3:1` are choice 0 as sequence 2 and choice 1 as sequence 3."""
        context = self.reserved[seq_id]
        prompt_tokens, sampling = self._prompt(len(context), **options)
        pairs = [tuple(map(int, pair.split(":"))) for pair in (branches or f"{seq_id}:0").split(",")]
        token_id = partial(scripted_token, len(context) - prompt_tokens)
        return self._handle(
            Activate(
                seq_id=seq_id,
                token_ids=context,
                prompt_tokens=prompt_tokens,
                sampling=sampling,
                branches=tuple(Branch(seq_id=i, choice=c, token_id=token_id(c)) for i, c in pairs),
            )
        )

    def do_here(self, seq_id: int, children: str = "") -> list[str]:
        return self._handle(DecodeHere(seq_id=seq_id, children=self._children(children)))

    def do_reset(self) -> list[str]:
        return self._handle(ResetCache())

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

    def do_cache(self) -> list[str]:
        load = self.core.load()
        hits = f"hits={load.prefix_hit_tokens}/{load.prefix_query_tokens}"
        return [f"cached={load.cached_columns} {hits} preemptions={load.preemptions}"]

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
        return [*lines, *self._with_copies(show(events))]

    def _output(self, plan: StepPlan, fails: int) -> StepOutput:
        asked = [piece for piece in plan.slices if piece.sample_position is not None and piece.seq_id != fails]
        tokens = {
            piece.seq_id: tuple(Sampled(scripted_token(piece.sample_position or 0, choice)) for choice in piece.choices)
            for piece in asked
        }
        failed = {piece.seq_id: "out_of_memory" for piece in plan.slices if piece.seq_id == fails}
        scored = [piece for piece in plan.slices if piece.sampling.prompt_logprobs is not None]
        scores = {piece.seq_id: (TokenLogprobs(-1.0, 2),) * scorable(piece) for piece in scored}
        return StepOutput(plan.step_id, tokens, failed, scores)

    def _tokens(self, seq_id: int, count: int, options: dict[str, str]) -> tuple[int, ...]:
        """Prompt tokens of this sequence, or of the one named by `as`, then outputs as they would be sampled."""
        first = 10_000 * int(options.pop("as", seq_id))
        prompt_tokens = int(options.get("prompt", count))
        prompt = range(first, first + min(count, prompt_tokens))
        return (*prompt, *(scripted_token(position, 0) for position in range(count - len(prompt))))

    def _children(self, text: str) -> tuple[int, ...]:
        children = tuple(map(int, text.split(","))) if text else ()
        self.seen.update(children)
        return children

    def _prompt(
        self,
        tokens: int,
        prompt: str | None = None,
        max: str = "16",
        stop: str = "",
        ignore_eos: str | None = None,
        scores: str | None = None,
    ) -> tuple[int, SamplingParams]:
        sampling = SamplingParams(
            max_tokens=int(max),
            stop_token_ids=tuple(map(int, stop.split(","))) if stop else (),
            ignore_eos=ignore_eos is not None,
            prompt_logprobs=None if scores is None else 0,
        )
        return tokens if prompt is None else int(prompt), sampling

    def _handle(self, command: object) -> list[str]:
        return self._with_copies(show(self.core.handle(command, self.now_us)))  # type: ignore[arg-type]

    def _with_copies(self, lines: list[str]) -> list[str]:
        copied, self.core.copied = self.core.copied, ()
        return [*lines, *(f"copied {source}->{target}" for source, target in copied)]


def show(events: list[EngineEvent]) -> list[str]:
    return [show_event(event) for event in events]


def show_event(event: EngineEvent) -> str:
    match event:
        case Admitted():
            found = f" cached={event.cached_tokens}" if event.cached_tokens else ""
            return f"admitted {event.seq_id} columns={columns(event.block_table)} context={event.context_tokens}{found}"
        case KVComputed():
            layers = f"[{event.layer_start},{event.layer_end})"
            return f"computed {event.seq_id} layers={layers} tokens=[{event.token_start},{event.token_end})"
        case Prefilled():
            tokens = " ".join(f"{token.token_id}{finish(token.finish)}" for token in event.tokens)
            return f"prefilled {event.seq_id} token={tokens}"
        case PromptScored():
            return f"scored {event.seq_id} tokens=[{event.start},{event.start + len(event.logprobs)})"
        case Reserved():
            found = f" cached={event.cached_tokens}" if event.cached_tokens else ""
            return (
                f"reserved {event.seq_id} "
                + ("FULL" if event.block_table is None else columns(event.block_table))
                + found
            )
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


def show_slice(piece: SequenceSlice) -> str:
    kind = "prefill" if piece.is_prefill else "decode"
    times = f"x{len(piece.choices)}" if len(piece.choices) > 1 else ""
    sample = "" if piece.sample_position is None else f"->{piece.sample_position}{times}"
    return f"{kind} {piece.seq_id}[{piece.start},{piece.start + len(piece.token_ids)}){sample}"


def scripted_token(position: int, choice: int) -> int:
    return 100 + position + 1_000 * choice


def scorable(piece: SequenceSlice) -> int:
    """Prompt tokens that follow the fed ones."""
    return max(0, min(piece.start + len(piece.token_ids), piece.prompt_tokens - 1) - piece.start)


def finish(reason: object) -> str:
    return f"/{reason}" if reason else ""


columns = partial(lambda table: ",".join(map(str, table)))
