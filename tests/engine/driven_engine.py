"""A whole engine on the calling thread: EngineCore and the real executor, called in the order of `engine.thread`.

It plays the owner of its sequences: releases what has finished, and fails the test if one fails or is sent away. It
keeps what came out (tokens, scores) and every plan, so that a test can prove what its workload was made of. Memory
that nobody holds and nobody may find is NaN from the start to the end.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.commands import (
    Activate,
    AddPrefill,
    Admitted,
    BlockTable,
    Branch,
    DecodeHere,
    EngineCommand,
    EngineEvent,
    KVComputed,
    Prefilled,
    PromptScored,
    Release,
    Reserve,
    Reserved,
    SampledToken,
    SequenceSlice,
    StepPlan,
    TokensSampled,
)
from engine.core import EngineCore, assert_quiet
from engine.executors.torch import Config, TorchExecutor
from engine.kv.arena import Arena
from engine.models.info import describe, schema_for
from engine.scheduler import Scheduler
from engine.types import SamplingParams, TokenLogprobs


class DrivenEngine:
    """One worker's engine, which prefills and decodes; what it preempts it computes again."""

    def __init__(
        self, folder: Path, *, columns: int, block_size: int, step_tokens: int, growth_tokens: int, dtype: str
    ) -> None:
        info = describe(folder)
        schema = schema_for(info, dtype)
        config = Scheduler.Config(
            block_size=block_size,
            step_tokens=step_tokens,
            growth_reserve_tokens=growth_tokens,
            eos_token_ids=frozenset(info.eos_token_ids),
            recompute=True,
        )
        self.arena = Arena(schema, columns=columns, block_size=block_size)
        self.arena.poison(range(columns))
        self.core = EngineCore(config, schema, self.arena)
        self._executor = TorchExecutor(Config(model=folder, dtype=dtype), self.arena)
        self._free = set(range(columns))
        self._minted = 0
        self._children: dict[int, tuple[int, ...]] = {}
        self._tables: dict[int, BlockTable] = {}
        self._prompts: dict[int, tuple[int, ...]] = {}
        self._sampling: dict[int, SamplingParams] = {}
        self._cached_tokens: dict[int, int] = {}
        self._over: list[int] = []
        self.plans: list[StepPlan] = []
        self.outputs: defaultdict[int, list[SampledToken]] = defaultdict(list)
        self.scores: defaultdict[int, list[TokenLogprobs]] = defaultdict(list)

    # -- commands ------------------------------------------------------------------------------------------------------
    def add(self, prompt: Sequence[int], sampling: SamplingParams, *, here: bool = True) -> int:
        """A request of one choice. Not `here`: its KV is held after the prompt, to be handed over."""
        return self._add(prompt, sampling, here=here)

    def add_group(self, prompt: Sequence[int], sampling: SamplingParams, choices: int) -> tuple[int, ...]:
        """A request of several choices; returns the sequences that they will be."""
        group = self._add(prompt, sampling, choices=choices)
        self._children[group] = tuple(self._mint() for _ in range(choices))
        self._send(DecodeHere(seq_id=group, children=self._children[group]))
        return self._children[group]

    def reserve(self, prompt: Sequence[int], growth_tokens: int) -> int:
        """Memory for a sequence that is prefilled elsewhere; `hand_over` fills it."""
        seq_id = self._mint()
        self._send(Reserve(seq_id=seq_id, token_ids=tuple(prompt), growth_tokens=growth_tokens))
        return seq_id

    def hand_over(self, source: int, target: int) -> int:
        """What Source and Target do, without a wire: KV that the target has not yet, then the first token. Returns
        how many tokens' KV the target had."""
        prompt, cached = self._prompts[source], self._cached_tokens[target]
        layers, tokens = (0, self.arena.schema.kv.layers), (cached, len(prompt))
        kv_LHPTX = self.arena.read(self._tables[source], layers, tokens)
        self.arena.write(self._tables[target], layers, tokens, None, kv_LHPTX)
        (first,) = self.outputs[source]
        self.outputs[target].append(first)
        self._send(
            Activate(
                seq_id=target,
                token_ids=prompt,
                prompt_tokens=len(prompt),
                sampling=self._sampling[source],
                branches=(Branch(seq_id=target, choice=0, token_id=first.token_id),),
            )
        )
        self._send(Release(seq_id=source))
        return cached

    def _add(self, prompt: Sequence[int], sampling: SamplingParams, *, here: bool = False, choices: int = 1) -> int:
        seq_id = self._mint()
        self._prompts[seq_id], self._sampling[seq_id] = tuple(prompt), sampling
        command = AddPrefill(
            seq_id=seq_id,
            token_ids=tuple(prompt),
            prompt_tokens=len(prompt),
            sampling=sampling,
            decode_here=here,
            choices=tuple(range(choices)),
        )
        self._send(command)
        return seq_id

    def _mint(self) -> int:
        self._minted += 1
        return self._minted

    def _send(self, command: EngineCommand) -> None:
        self._hear(self.core.handle(command, 0))
        self._poison_what_is_free()

    # -- steps ---------------------------------------------------------------------------------------------------------
    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Step until something is so, or until there is nothing to do."""
        while not until() and self._step():
            pass

    def run_to_the_end(self) -> None:
        self.run()
        assert_quiet(self.core)

    def _step(self) -> bool:
        plan = self.core.begin_step(0)
        self._hear(self.core.take_events())
        if plan is None:
            return False
        assert all(piece.token_ids for piece in plan.slices)
        self.plans.append(plan)
        self._poison_what_is_free()
        output = self._executor.execute(plan, lambda start, end: self._hear(self.core.layers_computed(start, end)))
        self._hear(self.core.finish_step(output, 0))
        self._poison_what_is_free()
        over, self._over = self._over, []
        for seq_id in over:
            self._send(Release(seq_id=seq_id))
        return True

    def _hear(self, events: list[EngineEvent]) -> None:
        for event in events:
            match event:
                case Admitted():
                    self._tables[event.seq_id] = event.block_table
                case Reserved():
                    assert event.block_table is not None, "memory is too small for this workload"
                    self._tables[event.seq_id] = event.block_table
                    self._cached_tokens[event.seq_id] = event.cached_tokens
                case PromptScored():
                    assert event.start == 1 + len(self.scores[event.seq_id])
                    self.scores[event.seq_id] += event.logprobs
                case Prefilled():
                    self._prefilled(event)
                case TokensSampled():
                    for token in event.tokens:
                        self._sampled(token.seq_id, token)
                case KVComputed():
                    pass
                case _:
                    raise AssertionError(f"a sequence failed or was sent away: {event}")

    def _prefilled(self, event: Prefilled) -> None:
        children = self._children.get(event.seq_id, ())
        for seq_id, token in zip(children or (event.seq_id,), event.tokens, strict=True):
            self._sampled(seq_id, token)
        if children:
            self._over.append(event.seq_id)

    def _sampled(self, seq_id: int, token: SampledToken) -> None:
        assert token.position == len(self.outputs[seq_id])
        self.outputs[seq_id].append(token)
        if token.finish is not None:
            self._over.append(seq_id)

    def _poison_what_is_free(self) -> None:
        """Once per column that has become free: it stays NaN until its next owner writes."""
        allocator = self.core._allocator
        held = {column for owner in allocator.owners for column in allocator.table(owner)}
        free = set(range(self.arena.columns)) - held - set(allocator.cached_column_ids)
        self.arena.poison(sorted(free - self._free))
        self._free = free

    # -- what happened -------------------------------------------------------------------------------------------------
    def tokens(self, seq_id: int) -> list[int]:
        return [token.token_id for token in self.outputs[seq_id]]

    def slices(self, *seq_ids: int) -> list[SequenceSlice]:
        """Of these sequences, or of all, in order of time."""
        pieces = [piece for plan in self.plans for piece in plan.slices]
        return [piece for piece in pieces if piece.seq_id in seq_ids] if seq_ids else pieces

    @property
    def recomputed(self) -> list[SequenceSlice]:
        """Chunks that hold output tokens: those of preempted sequences."""
        return [s for s in self.slices() if s.is_prefill and s.start + len(s.token_ids) > s.prompt_tokens]
