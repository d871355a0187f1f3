"""EngineCore under random commands, with the oracle behind it: right tokens, conserved columns, no livelock.

`Owner` does what the roles do, but at random: it adds, binds, pauses, moves (copies KV into a reservation) and
releases. Freed columns are poisoned, so that a block used after its release changes a token.
"""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.base.failpoints import InjectedFault
from engine.commands import (
    Activate,
    AddPrefill,
    Admitted,
    BlockTable,
    DecodeHere,
    EngineCommand,
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
    TokensSampled,
)
from engine.core import EngineCore, assert_quiet
from engine.executors.oracle import OracleExecutor, reference_tokens
from engine.kv.arena import Arena
from engine.scheduler import Scheduler
from engine.types import FinishReason, SamplingParams

COLUMNS, BLOCK, POISON = 10, 4, 999
ORACLE = OracleExecutor.Config(poison_token=POISON, layers_per_group=3)
LAYERS = ORACLE.schema.kv.layers
CONFIG = Scheduler.Config(
    block_size=BLOCK, step_tokens=7, step_sequences=3, growth_reserve_tokens=3, near_turn_tokens=14, passes_max=1
)


@dataclass
class Request:
    """What the router would know."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    tenant: str
    right: tuple[int, ...]
    emitted: list[int] = field(default_factory=list)

    @property
    def context(self) -> tuple[int, ...]:
        return (*self.prompt, *self.emitted)


@dataclass
class Held:
    """One sequence of the engine and what its owner heard about it."""

    request: Request
    streamed: bool
    table: BlockTable = ()
    state: str = "waiting"  # running: may emit; held: KV of context[:-1] is in `table`; over: awaits its release
    announced_LT: np.ndarray | None = None


class Owner:
    """A core, an oracle and everybody who ever commands them."""

    def __init__(self, config: Scheduler.Config = CONFIG) -> None:
        self.arena = Arena(ORACLE.schema, columns=COLUMNS, block_size=BLOCK)
        self.core = EngineCore(config, ORACLE.schema, self.arena)
        self.executor = OracleExecutor(self.arena, ORACLE)
        self.sequences: dict[int, Held] = {}
        self.granted: BlockTable | None = None
        self.now_us = 0
        self.minted = 0

    # -- commands ------------------------------------------------------------------------------------------------------
    def add(self, request: Request, *, here: bool) -> int:
        seq_id = self.mint()
        self.sequences[seq_id] = Held(request, streamed=not here)
        self.send(
            AddPrefill(
                seq_id=seq_id,
                token_ids=request.context,
                prompt_tokens=len(request.prompt),
                sampling=request.sampling,
                decode_here=here,
                tenant=request.tenant,
            )
        )
        return seq_id

    def decode_here(self, seq_id: int) -> None:
        held = self.sequences[seq_id]
        held.streamed = False
        if held.state == "held" and held.announced_LT is not None:  # prefilled; a paused one stays paused
            held.state = "running"
        self.send(DecodeHere(seq_id=seq_id))

    def move(self, seq_id: int) -> bool:
        """Reserve, copy the KV, activate, release: what a transfer does, in no time."""
        source, new_id = self.sequences[seq_id], self.mint()
        context = source.request.context
        self.send(Reserve(seq_id=new_id, context_tokens=len(context) - 1, growth_tokens=2))
        if self.granted is None:
            return False
        layers, tokens = (0, LAYERS), (0, len(context) - 1)
        self.arena.write(self.granted, layers, tokens, None, self.arena.read(source.table, layers, tokens))
        self.sequences[new_id] = Held(source.request, streamed=False, table=self.granted, state="running")
        self.send(
            Activate(
                seq_id=new_id,
                token_ids=context,
                prompt_tokens=len(source.request.prompt),
                sampling=source.request.sampling,
                tenant=source.request.tenant,
            )
        )
        self.release(seq_id)
        return True

    def release(self, seq_id: int) -> None:
        before = {owner: set(held.table) for owner, held in self.sequences.items()}
        self.send(Release(seq_id=seq_id))
        del self.sequences[seq_id]
        others = set().union(*(columns for owner, columns in before.items() if owner != seq_id))
        self.arena.poison(sorted(before[seq_id] - others))

    def send(self, command: EngineCommand) -> None:
        self.hear(self.core.handle(command, self.now_us))

    def mint(self) -> int:
        self.minted += 1
        return self.minted

    # -- steps ---------------------------------------------------------------------------------------------------------
    def step(self, *, hiccup: bool = False) -> bool:
        """With `hiccup` a step of several sequences dies after its first layers, and nobody is to blame."""
        self.now_us += 1_000
        plan = self.core.begin_step(self.now_us)
        self.hear(self.core.take_events())
        if plan is None:
            return False
        assert plan.num_tokens <= CONFIG.step_tokens and len(plan.slices) <= CONFIG.step_sequences
        for piece in plan.slices:
            self.sequences[piece.seq_id].table = piece.block_table

        def on_layers(start: int, end: int) -> None:
            self.hear(self.core.layers_computed(start, end))
            if hiccup and len(plan.slices) > 1:
                raise InjectedFault("hiccup")

        try:
            output = self.executor.execute(plan, on_layers)
        except InjectedFault:
            self.hear(self.core.fail_step(self.now_us))
        else:
            self.hear(self.core.finish_step(output, self.now_us))
        return True

    def hear(self, events: list[EngineEvent]) -> None:
        for event in events:
            match event:
                case Admitted():
                    held = self.sequences[event.seq_id]
                    held.table = event.block_table
                    held.announced_LT = np.zeros((LAYERS, event.context_tokens), int)
                case KVComputed():
                    layers = slice(event.layer_start, event.layer_end)
                    self.sequences[event.seq_id].announced_LT[layers, event.token_start : event.token_end] += 1
                case Prefilled():
                    self.heard_prefilled(event)
                case TokensSampled():
                    for token in event.tokens:
                        held = self.sequences[token.seq_id]
                        assert token.position == len(held.request.emitted)
                        self.emit(held, token.token_id, token.finish)
                case Paused():
                    held = self.sequences[event.seq_id]
                    assert held.state in ("running", "held")
                    assert event.token_ids == held.request.context
                    held.table, held.state, held.announced_LT = event.block_table, "held", None
                case Reserved():
                    self.granted = event.block_table
                case StepFailed():
                    (seq_id,) = event.seq_ids
                    self.sequences[seq_id].state = "over"
                    self.expect_failure(self.sequences[seq_id].request, event.reason)

    def heard_prefilled(self, event: Prefilled) -> None:
        held = self.sequences[event.seq_id]
        if held.streamed:
            assert (held.announced_LT == 1).all(), "each layer of each token exactly once"
        self.emit(held, event.token_id, event.finish)
        if held.state != "over":
            held.state = "held" if held.streamed else "running"

    def emit(self, held: Held, token_id: int, finish: FinishReason | None) -> None:
        held.request.emitted.append(token_id)
        emitted = held.request.emitted
        assert token_id == held.request.right[len(emitted) - 1], "a wrong token"
        last = len(emitted) >= held.request.sampling.max_tokens
        assert finish == (FinishReason.LENGTH if last else None)
        if last:
            held.state = "over"

    def expect_failure(self, request: Request, reason: str) -> None:
        assert reason == "step_raised"
        assert POISON in request.prompt, "only the culprit fails"

    # -- the end -------------------------------------------------------------------------------------------------------
    def finish_everything(self) -> None:
        """Be a fair owner: whoever is over is released, whoever is held moves or, if it cannot, is prefilled again."""
        for _ in range(400):
            if not self.sequences:
                break
            self.step()
            for seq_id, held in list(self.sequences.items()):
                if held.state == "over":
                    self.release(seq_id)
                elif held.state == "held" and not self.move(seq_id):
                    self.release(seq_id)
                    self.add(held.request, here=True)
        assert not self.sequences, f"livelock: {self.core.load()}"
        assert_quiet(self.core)


def request(prompt: tuple[int, ...], max_tokens: int = 6, *, seed: int | None = None, tenant: str = "") -> Request:
    sampling = SamplingParams(temperature=0.0 if seed is None else 1.0, seed=seed or 0, max_tokens=max_tokens)
    right = reference_tokens(prompt, tenant, sampling, max(1, max_tokens), ORACLE)
    return Request(prompt, sampling, tenant, right)


prompts = st.lists(st.integers(0, 5), min_size=1, max_size=18).map(tuple)


class RandomOwner(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.owner = Owner()

    def pick(self, data: st.DataObject, *states: str) -> int | None:
        seq_ids = [seq_id for seq_id, held in self.owner.sequences.items() if not states or held.state in states]
        return data.draw(st.sampled_from(seq_ids)) if seq_ids else None

    @precondition(lambda self: len(self.owner.sequences) < 12)
    @rule(
        prompt=prompts,
        here=st.booleans(),
        max_tokens=st.integers(0, 12),
        seed=st.none() | st.integers(0, 3),
        tenant=st.sampled_from(["", "acme"]),
    )
    def add(self, prompt: tuple[int, ...], here: bool, max_tokens: int, seed: int | None, tenant: str) -> None:
        self.owner.add(request(prompt, max_tokens, seed=seed, tenant=tenant), here=here)

    @rule(at=st.integers(0, 5), here=st.booleans())
    def add_poison(self, at: int, here: bool) -> None:
        self.owner.add(request((*range(at), POISON, 1)), here=here)

    @rule(data=st.data())
    def decode_here(self, data: st.DataObject) -> None:
        if seq_id := self.pick(data, "waiting", "held"):
            self.owner.decode_here(seq_id)

    @rule(data=st.data())
    def mark_bound(self, data: st.DataObject) -> None:
        if seq_id := self.pick(data):
            self.owner.send(MarkBound(seq_id=seq_id))

    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        if seq_id := self.pick(data):
            self.owner.send(Pause(seq_id=seq_id))

    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        if seq_id := self.pick(data, "held"):
            self.owner.move(seq_id)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if seq_id := self.pick(data):
            self.owner.release(seq_id)

    @rule(times=st.integers(1, 4), hiccup=st.booleans())
    def step(self, times: int, hiccup: bool) -> None:
        for _ in range(times):
            self.owner.step(hiccup=hiccup)

    @invariant()
    def books_agree(self) -> None:
        self.owner.core.check_integrity()

    def teardown(self) -> None:
        self.owner.finish_everything()


TestRandomOwner = RandomOwner.TestCase
TestRandomOwner.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("seed", range(8))
def test_long_crowded_runs(seed: int) -> None:
    """What hypothesis's short runs seldom reach: full memory for a long time, with everything else going on."""
    chance, owner = random.Random(seed), Owner()
    for _ in range(250):
        if len(owner.sequences) < 8:
            prompt = tuple(chance.choices(range(5), k=chance.randint(1, 14)))
            owner.add(request(prompt, chance.randint(0, 20)), here=chance.random() < 0.5)
        owner.step(hiccup=chance.random() < 0.1)
        seq_id, held = chance.choice(list(owner.sequences.items()))
        if held.state == "over" or chance.random() < 0.02:
            owner.release(seq_id)
        elif held.state == "held":
            owner.send(MarkBound(seq_id=seq_id))
            owner.move(seq_id)
        elif chance.random() < 0.05:
            owner.send(Pause(seq_id=seq_id))
        owner.core.check_integrity()
    owner.finish_everything()


def test_many_long_outputs_in_little_memory() -> None:
    """Ten sequences that each want more than half of all columns: preempted again and again, and every token right."""
    owner = Owner()
    for index in range(10):
        owner.add(request(tuple(range(index, index + 9)), 14), here=index % 2 == 0)
    owner.finish_everything()


def test_commands_wait_for_the_end_of_a_step() -> None:
    owner = Owner()
    seq_id = owner.add(request((1, 2, 3)), here=True)
    plan = owner.core.begin_step(0)
    assert plan is not None
    with pytest.raises(RuntimeError, match="during step"):
        owner.core.handle(Release(seq_id=seq_id), 0)
    with pytest.raises(RuntimeError, match="under way"):
        owner.core.begin_step(0)
    with pytest.raises(ValueError, match="output of step"):
        owner.core.finish_step(StepOutput(plan.step_id + 1), 0)


def test_planning_events_come_before_the_layers_even_if_nobody_takes_them() -> None:
    owner = Owner()
    owner.add(request((1, 2, 3)), here=False)
    owner.core.begin_step(0)
    assert [type(event) for event in owner.core.layers_computed(0, LAYERS)] == [Admitted, KVComputed]


def test_step_ms_is_the_time_between_begin_and_end() -> None:
    owner = Owner()
    owner.add(request((1, 2, 3)), here=False)
    plan = owner.core.begin_step(1_000)
    assert plan is not None
    owner.core.finish_step(StepOutput(plan.step_id, {1: 5}), 3_500)
    assert owner.core.load().step_ms == 2.5


def test_the_arena_and_the_scheduler_must_agree_on_blocks() -> None:
    with pytest.raises(ValueError, match="block_size"):
        EngineCore(Scheduler.Config(block_size=8), ORACLE.schema, Arena(ORACLE.schema, columns=1, block_size=4))


def test_assert_quiet_sees_what_was_left_behind() -> None:
    owner = Owner()
    seq_id = owner.add(request((1, 2, 3)), here=False)
    with pytest.raises(AssertionError, match="left behind"):
        assert_quiet(owner.core)
    owner.release(seq_id)
    assert_quiet(owner.core)


def test_layers_announced_before_a_step_died_are_not_announced_again() -> None:
    owner = Owner()
    for _ in range(2):
        owner.add(request((1, 2, 3)), here=False)
    owner.step(hiccup=True)
    owner.finish_everything()
