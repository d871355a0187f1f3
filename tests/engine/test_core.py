"""EngineCore under random commands, with the oracle behind it: right tokens, conserved columns, no livelock.

`Owner` does what the roles do, but at random: it adds, binds, pauses, forks, moves (copies KV into a reservation) and
releases. Columns that are free are poisoned, so that a block used after its release, or found in the cache when it
should not be, changes a token. Prompts share prefixes within a tenant and across; tokens may never tell.
"""

import random
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.base.failpoints import InjectedFault
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
    SampledToken,
    StepFailed,
    StepOutput,
    TokensSampled,
)
from engine.core import EngineCore, assert_quiet
from engine.executors.oracle import OracleExecutor, reference_output, reference_prompt_logprobs
from engine.kv.arena import Arena
from engine.scheduler import Scheduler
from engine.types import FinishReason, SamplingParams, TokenLogprobs

COLUMNS, BLOCK, POISON = 12, 4, 999
ORACLE = OracleExecutor.Config(poison_token=POISON, layers_per_group=3)
LAYERS = ORACLE.schema.kv.layers
CONFIG = Scheduler.Config(
    block_size=BLOCK, step_tokens=7, step_sequences=3, growth_reserve_tokens=3, near_turn_tokens=14, passes_max=1
)
RECOMPUTES = replace(CONFIG, recompute=True)


@dataclass
class Request:
    """What the router would know of one choice."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    tenant: str
    choice: int
    right: tuple[Sampled, ...]
    emitted: list[int] = field(default_factory=list)

    @property
    def context(self) -> tuple[int, ...]:
        return (*self.prompt, *self.emitted)

    @property
    def finished(self) -> bool:
        return len(self.emitted) >= max(1, self.sampling.max_tokens)

    def emit(self, token: SampledToken) -> None:
        right = self.right[len(self.emitted)]
        assert (token.position, token.choice) == (len(self.emitted), self.choice)
        assert (token.token_id, token.logprobs) == right, "a wrong token"
        self.emitted.append(token.token_id)
        assert token.finish == (FinishReason.LENGTH if self.finished else None)


@dataclass
class Held:
    """One sequence of the engine and what its owner heard about it. Several requests: a group."""

    requests: tuple[Request, ...]
    streamed: bool
    table: BlockTable = ()
    state: str = "waiting"  # running: may emit; held: all KV is in `table`; over: awaits its release
    children: tuple[int, ...] = ()
    announced_LT: np.ndarray | None = None
    scores: list[TokenLogprobs] = field(default_factory=list)

    @property
    def request(self) -> Request:
        return self.requests[0]

    @property
    def is_group(self) -> bool:
        return len(self.requests) > 1


class Owner:
    """A core, an oracle and everybody who ever commands them."""

    def __init__(self, config: Scheduler.Config = CONFIG) -> None:
        self.arena = Arena(ORACLE.schema, columns=COLUMNS, block_size=BLOCK)
        self.core = EngineCore(config, ORACLE.schema, self.arena)
        self.executor = OracleExecutor(self.arena, ORACLE)
        self.sequences: dict[int, Held] = {}
        self.reserved: Reserved | None = None
        self.free: set[int] = set()
        self.now_us = 0
        self.minted = 0

    # -- commands ------------------------------------------------------------------------------------------------------
    def add(self, *requests: Request, here: bool = False, priority: int = 0) -> int:
        """With `here`, a group's children are named at once."""
        seq_id, request = self.mint(), requests[0]
        here_at_once = here and len(requests) == 1
        self.sequences[seq_id] = Held(requests, streamed=not here_at_once)
        self.send(
            AddPrefill(
                seq_id=seq_id,
                token_ids=request.context,
                prompt_tokens=len(request.prompt),
                sampling=request.sampling,
                decode_here=here_at_once,
                tenant=request.tenant,
                choices=tuple(one.choice for one in requests),
                priority=priority,
            )
        )
        if here and not here_at_once:
            self.decode_here(seq_id)
        return seq_id

    def decode_here(self, seq_id: int) -> None:
        held = self.sequences[seq_id]
        held.streamed = False
        if held.is_group and not held.children:
            held.children = tuple(self.mint() for _ in held.requests)
            for child_id, request in zip(held.children, held.requests, strict=True):
                self.sequences[child_id] = Held((request,), streamed=False, state="expected")
        if held.state == "held" and held.announced_LT is not None:  # prefilled; a paused one stays paused
            self.continue_here(held)
        self.send(DecodeHere(seq_id=seq_id, children=held.children))

    def move(self, seq_id: int) -> bool:
        """Reserve, copy what is not there, activate, release: what a transfer does, in no time."""
        source, new_id = self.sequences[seq_id], self.mint()
        context, request = source.request.context[:-1], source.request
        children = tuple(self.mint() for _ in source.requests) if source.is_group else ()
        reserve = Reserve(
            seq_id=new_id, token_ids=context, growth_tokens=2, tenant=request.tenant, children=children, identity="x"
        )
        self.send(reserve)
        assert self.reserved is not None
        if self.reserved.block_table is None:
            return False
        layers, tokens = (0, LAYERS), (self.reserved.cached_tokens, len(context))
        self.arena.write(self.reserved.block_table, layers, tokens, None, self.arena.read(source.table, layers, tokens))
        self.sequences[new_id] = arrived = Held(source.requests, streamed=False, table=self.reserved.block_table)
        arrived.children = children
        for child_id, one in zip(children, source.requests, strict=bool(children)):
            self.sequences[child_id] = Held((one,), streamed=False, state="expected")
        self.continue_here(arrived)
        ids = children or (new_id,)
        branches = [
            Branch(seq_id=i, choice=one.choice, token_id=one.emitted[-1])
            for i, one in zip(ids, source.requests, strict=True)
            if not one.finished
        ]
        self.send(
            Activate(
                seq_id=new_id,
                token_ids=context,
                prompt_tokens=len(request.prompt),
                sampling=request.sampling,
                branches=tuple(branches),
            )
        )
        self.release(seq_id)
        return True

    def release(self, seq_id: int) -> None:
        held = self.sequences.pop(seq_id)
        for child_id in held.children:  # a group that ends before it forks
            if (child := self.sequences.get(child_id)) and child.state == "expected":
                child.state = "over"
        self.send(Release(seq_id=seq_id))

    def send(self, command: EngineCommand) -> None:
        self.hear(self.core.handle(command, self.now_us))
        self.poison_what_is_free()

    def mint(self) -> int:
        self.minted += 1
        return self.minted

    def poison_what_is_free(self) -> None:
        """What nobody holds and nobody may find."""
        allocator = self.core._allocator
        held = {column for owner in allocator.owners for column in allocator.table(owner)}
        free = set(range(COLUMNS)) - held - set(allocator.cached_column_ids)
        assert len(free) == allocator.free_columns
        self.arena.poison(sorted(free - self.free))
        self.free = free

    # -- steps ---------------------------------------------------------------------------------------------------------
    def step(self, *, hiccup: bool = False) -> bool:
        """With `hiccup` a step of several sequences dies after its first layers, and nobody is to blame."""
        self.now_us += 1_000
        plan = self.core.begin_step(self.now_us)
        self.hear(self.core.take_events())
        self.poison_what_is_free()
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
        self.poison_what_is_free()
        return True

    def hear(self, events: list[EngineEvent]) -> None:
        for event in events:
            match event:
                case Admitted():
                    held = self.sequences[event.seq_id]
                    held.table = event.block_table
                    held.announced_LT = np.zeros((LAYERS, event.context_tokens), int)
                    held.announced_LT[:, : event.cached_tokens] = 1
                case KVComputed():
                    held = self.sequences[event.seq_id]
                    assert held.streamed
                    held.announced_LT[event.layer_start : event.layer_end, event.token_start : event.token_end] += 1
                case PromptScored():
                    held = self.sequences[event.seq_id]
                    assert event.start == len(held.scores) + 1
                    held.scores.extend(event.logprobs)
                case Prefilled():
                    self.heard_prefilled(event)
                case TokensSampled():
                    for token in event.tokens:
                        held = self.sequences[token.seq_id]
                        assert held.state == "running"
                        held.request.emit(token)
                        held.state = "over" if held.request.finished else "running"
                case Paused():
                    held = self.sequences[event.seq_id]
                    assert held.state in ("running", "held") and not held.is_group
                    assert event.token_ids == held.request.context
                    held.table, held.state, held.announced_LT = event.block_table, "held", None
                case Reserved():
                    self.reserved = event
                case StepFailed():
                    self.heard_failure(event)

    def heard_prefilled(self, event: Prefilled) -> None:
        held = self.sequences[event.seq_id]
        assert held.state == "waiting"
        if held.streamed:
            assert (held.announced_LT == 1).all(), "each layer of each token exactly once"
        if (top := held.request.sampling.prompt_logprobs) is not None:
            assert tuple(held.scores) == reference_prompt_logprobs(
                held.request.prompt, held.request.tenant, top, ORACLE
            )
        for request, token in zip(held.requests, event.tokens, strict=True):
            request.emit(token)
        if event.finished or not held.streamed:
            self.continue_here(held)
        else:
            held.state = "held"

    def continue_here(self, held: Held) -> None:
        """First tokens are known, and no target but this engine."""
        for child_id in held.children:
            if child := self.sequences.get(child_id):
                child.state = "over" if child.request.finished else "running"
        held.state = "over" if held.is_group or held.request.finished else "running"

    def heard_failure(self, event: StepFailed) -> None:
        assert event.reason == "step_raised"
        assert POISON in self.sequences[event.seq_ids[0]].request.prompt, "only the culprit fails"
        for seq_id in event.seq_ids:
            self.sequences[seq_id].state = "over"

    # -- the end -------------------------------------------------------------------------------------------------------
    def finish_everything(self) -> None:
        """Be a fair owner: whoever is over is released, whoever is held moves or, if it cannot, is prefilled again."""
        for _ in range(600):
            if not self.sequences:
                break
            self.step()
            for seq_id, held in list(self.sequences.items()):
                if held.state == "over":
                    self.release(seq_id)
                elif held.state == "held" and not self.move(seq_id):
                    self.release(seq_id)
                    for request in held.requests:
                        if not request.finished:
                            self.add(request, here=True)
        assert not self.sequences, f"livelock: {self.core.load()}"
        assert_quiet(self.core)


def choices(
    count: int,
    prompt: tuple[int, ...],
    max_tokens: int = 6,
    *,
    seed: int | None = None,
    tenant: str = "",
    scores: int | None = None,
) -> list[Request]:
    sampling = SamplingParams(
        temperature=0.0 if seed is None else 1.0,
        seed=seed or 0,
        max_tokens=max_tokens,
        logprobs=seed,
        prompt_logprobs=scores,
    )
    outputs = [reference_output(prompt, tenant, sampling, max(1, max_tokens), ORACLE, n) for n in range(count)]
    return [Request(prompt, sampling, tenant, choice, right) for choice, right in enumerate(outputs)]


def request(prompt: tuple[int, ...], max_tokens: int = 6) -> Request:
    return choices(1, prompt, max_tokens)[0]


# Long prefixes in common, and differences anywhere.
prefixes = st.sampled_from([(), (1,) * 4, (1,) * 9, (1, 1, 1, 1, 2, 2, 2, 2), tuple(range(14))])
prompts = st.builds(
    lambda prefix, suffix: prefix + tuple(suffix), prefixes, st.lists(st.integers(0, 2), min_size=1, max_size=6)
)


class RandomOwner(RuleBasedStateMachine):
    @initialize(recompute=st.booleans())
    def engine(self, recompute: bool) -> None:
        self.owner = Owner(RECOMPUTES if recompute else CONFIG)

    def pick(self, data: st.DataObject, *states: str) -> int | None:
        seq_ids = [seq_id for seq_id, held in self.owner.sequences.items() if not states or held.state in states]
        return data.draw(st.sampled_from(seq_ids)) if seq_ids else None

    @precondition(lambda self: len(self.owner.sequences) < 12)
    @rule(
        count=st.sampled_from([1, 1, 1, 2, 3]),
        prompt=prompts,
        here=st.booleans(),
        max_tokens=st.integers(0, 12),
        seed=st.none() | st.integers(0, 3),
        tenant=st.sampled_from(["", "acme"]),
        scores=st.none() | st.none() | st.integers(0, 2),
        priority=st.integers(0, 1),
    )
    def add(
        self,
        count: int,
        prompt: tuple[int, ...],
        here: bool,
        max_tokens: int,
        seed: int | None,
        tenant: str,
        scores: int | None,
        priority: int,
    ) -> None:
        requests = choices(count, prompt, max_tokens, seed=seed, tenant=tenant, scores=scores)
        self.owner.add(*requests, here=here, priority=priority)

    @rule(at=st.integers(0, 5), count=st.integers(1, 2), here=st.booleans())
    def add_poison(self, at: int, count: int, here: bool) -> None:
        self.owner.add(*choices(count, (*(1,) * at, POISON, 1)), here=here)

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

    @rule()
    def reset_cache(self) -> None:
        self.owner.send(ResetCache())

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


def crowd(owner: Owner, chance: random.Random, rounds: int) -> None:
    """Full memory for a long time, with everything else going on."""
    stems = [tuple(chance.choices(range(3), k=12)) for _ in range(3)]
    for _ in range(rounds):
        if len(owner.sequences) < 8:
            prompt = chance.choice(stems)[: chance.randint(0, 12)] + tuple(chance.choices(range(5), k=2))
            count, tenant = chance.choice([1, 1, 1, 2, 3]), chance.choice(["", "acme"])
            seed = chance.choice([None, 1])
            requests = choices(count, prompt, chance.randint(0, 20), seed=seed, tenant=tenant)
            owner.add(*requests, here=chance.random() < 0.5, priority=chance.randint(0, 1))
        owner.step(hiccup=chance.random() < 0.1)
        if owner.sequences:
            bother(owner, chance)
        owner.core.check_integrity()


def bother(owner: Owner, chance: random.Random) -> None:
    seq_id, held = chance.choice(list(owner.sequences.items()))
    if held.state == "over" or chance.random() < 0.02:
        owner.release(seq_id)
    elif held.state == "held":
        owner.send(MarkBound(seq_id=seq_id))
        owner.move(seq_id)
    elif chance.random() < 0.05:
        owner.send(Pause(seq_id=seq_id))


@pytest.mark.parametrize("config", [CONFIG, RECOMPUTES], ids=["moves", "recomputes"])
@pytest.mark.parametrize("seed", range(6))
def test_long_crowded_runs(seed: int, config: Scheduler.Config) -> None:
    """What hypothesis's short runs seldom reach. A run without hits or preemptions would prove nothing."""
    owner = Owner(config)
    crowd(owner, random.Random(seed), 250)
    owner.finish_everything()
    load = owner.core.load()
    assert load.preemptions > 0 and load.prefix_hit_tokens > 0


@pytest.mark.parametrize("config", [CONFIG, RECOMPUTES], ids=["moves", "recomputes"])
def test_many_long_outputs_in_little_memory(config: Scheduler.Config) -> None:
    """Ten sequences that each want half of all columns: preempted again and again, and every token right."""
    owner = Owner(config)
    for index in range(10):
        owner.add(request(tuple(range(index, index + 9)), 14), here=index % 2 == 0)
    owner.finish_everything()
    assert owner.core.load().preemptions > 2


def test_a_second_turn_computes_and_receives_its_new_tokens_and_at_most_one_block() -> None:
    """A chat on one worker after the other: what both have seen is neither computed nor sent again."""
    owner = Owner(RECOMPUTES)
    turn = request(tuple(range(15)), 6)
    owner.add(turn, here=True)
    owner.finish_everything()
    before = owner.core.load()
    follow_up = request((*turn.context, 7, 7, 7), 1)
    owner.add(follow_up)
    owner.finish_everything()
    after = owner.core.load()
    new_tokens = len(follow_up.prompt) - len(turn.context)
    computed = len(follow_up.prompt) - (after.prefix_hit_tokens - before.prefix_hit_tokens)
    assert new_tokens <= computed <= new_tokens + BLOCK


def test_nothing_is_shared_across_tenants() -> None:
    """Paired: the same prompt hits within its tenant and misses across."""
    owner = Owner()
    hits: list[int] = []
    for tenant in ("acme", "acme", "emca"):
        owner.add(*choices(1, tuple(range(9)), 1, tenant=tenant))
        owner.finish_everything()
        hits.append(owner.core.load().prefix_hit_tokens)
    assert hits == [0, 8, 8]


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
    owner.core.finish_step(StepOutput(plan.step_id, {1: (Sampled(5),)}), 3_500)
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
