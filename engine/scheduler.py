"""Scheduler: which tokens of which sequences the next step computes, and what the step's output means.

Pure: no clock, no tensor, no KV byte. It asks for columns (`sequence_memory`) and never touches what is in them.

    plan    running decodes (one token each), then chunks of prompts, as many as `batching` says
    apply   tokens for each slice that asked for some: Prefilled, TokensSampled, or the sequence's failure

Memory policy (DESIGN 1, "no deadlock"): columns are granted whole or not at all, and `release` takes them back. Prompts
wait for all of theirs (`admission`). Running sequences grow as they go; when nothing is left for one of them, the least
urgent gives its own (`turns`): it moves to another worker or, where prompts are computed too, waits for memory and
computes again what it does not find in the prefix cache. New work is refused columns that a running sequence waits for,
so what comes back reaches it and one preemption never causes the next.

Nobody starves: the most urgent sequence is never preempted for another, a preempted one keeps its place in the queue,
and each time that it is admitted again it comes at least one token further. Only urgency itself has no bound: more
urgent work always goes first, and what waits behind it for too long meets its request's deadline.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from engine.admission import Admission
from engine.base import limits
from engine.batching import Batch, Batching, Chunk, Prompt
from engine.batching.sarathi import Sarathi
from engine.commands import (
    Activate,
    AddPrefill,
    Admitted,
    Branch,
    DecodeHere,
    EngineEvent,
    EngineLoad,
    Paused,
    Prefilled,
    PromptScored,
    Reserve,
    Reserved,
    Sampled,
    SampledToken,
    SequenceSlice,
    StepFailed,
    StepOutput,
    StepPlan,
    TokensSampled,
)
from engine.images import rope_delta
from engine.kv.allocator import ColumnAllocator
from engine.sequence import LEAVING, Phase, Sequence, Sequences
from engine.sequence_memory import Copy, SequenceMemory
from engine.turns import Turns, wait_again
from engine.types import FinishReason


class Failure:
    """`StepFailed.reason`: the whole set (it becomes a metric label)."""

    STEP_RAISED = "step_raised"
    NO_TOKEN = "no_token"
    EXCEEDS_MEMORY = "exceeds_memory"
    NO_ROOM_TO_FORK = "no_room_to_fork"


class Scheduler:
    """Continuous batching with chunked prefill over one allocator."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        block_size: int = limits.BLOCK_SIZE_TOKENS
        step_tokens: int = limits.STEP_TOKENS_MAX
        step_sequences: int = limits.STEP_SEQUENCES_MAX
        growth_reserve_tokens: int = limits.GROWTH_RESERVE_TOKENS  # of a prefill that decodes here
        unbound_prefills_max: int = limits.UNBOUND_PREFILLS_MAX
        # Admitted and not yet computed tokens: two steps ahead leaves a step's time to find a target, and more would
        # take columns from running decodes long before they are of use.
        near_turn_tokens: int = limits.NEAR_TURN_TOKENS
        passes_max: int = limits.PASSES_MAX
        max_model_len: int = limits.PROMPT_TOKENS_MAX
        eos_token_ids: frozenset[int] = frozenset()
        recompute: bool = False  # this worker computes prompts, so a preempted sequence need not leave it
        prefix_cache: bool = True

        def __post_init__(self) -> None:
            if min(self.block_size, self.step_tokens, self.step_sequences, self.near_turn_tokens) < 1:
                raise ValueError(f"sizes and budgets must be >= 1: {self}")
            if min(self.growth_reserve_tokens, self.passes_max) < 0 or self.unbound_prefills_max < 1:
                raise ValueError(f"reserves must be >= 0, unbound_prefills_max >= 1: {self}")

        @property
        def admission(self) -> Admission.Config:
            return Admission.Config(
                growth_reserve_tokens=self.growth_reserve_tokens,
                unbound_prefills_max=self.unbound_prefills_max,
                near_turn_tokens=self.near_turn_tokens,
                passes_max=self.passes_max,
            )

    def __init__(
        self, config: Config, allocator: ColumnAllocator, batching: Batching | None = None, *, model: bytes = b""
    ) -> None:
        """`model` is the schema's digest: what cached KV is named after, beside its tokens and its tenant."""
        self._config = config
        self._allocator = allocator
        self._sequences = Sequences()
        self._memory = SequenceMemory(allocator, block_size=config.block_size, model=model, reuse=config.prefix_cache)
        self._admission = Admission(config.admission, self._sequences, self._memory)
        turns = min(config.step_sequences, config.step_tokens)
        self._turns = Turns(self._sequences, self._memory, sequences_max=turns, recompute=config.recompute)
        self._batching = batching or Sarathi(Sarathi.Config(step_tokens=config.step_tokens))
        self._retries: deque[SequenceSlice] = deque()  # slices of a step that raised, to be run one by one
        self._events: list[EngineEvent] = []
        self._plan: StepPlan | None = None
        self._planned_us = 0
        self._steps = 0
        self._step_us = 0

    # -- commands ------------------------------------------------------------------------------------------------------
    def add_prefill(self, command: AddPrefill) -> None:
        if not command.token_ids or not command.choices:
            raise ValueError("a prefill needs at least one token and one choice")
        if command.decode_here and len(command.choices) > 1:
            raise ValueError("a group decodes here by DecodeHere, which names its children")
        images = [placed.image for placed in command.images]
        chain = self._memory.chain(command.tenant, images=images)
        sequence = self._sequences.add(command.seq_id, Phase.WAITING, chain, priority=command.priority)
        sequence.images = command.images
        sequence.rope_delta = rope_delta(images)
        sequence.token_ids = list(command.token_ids)
        sequence.chain.extend(sequence.token_ids)
        sequence.prompt_tokens = command.prompt_tokens
        sequence.sampling = command.sampling
        sequence.tenant = command.tenant
        sequence.choices = command.choices
        sequence.decode_here = command.decode_here
        last_token = sequence.sample_position + 1 >= command.sampling.max_tokens
        sequence.bound = command.decode_here or last_token
        if not self._memory.could_hold(len(command.token_ids)):
            self._fail(sequence, Failure.EXCEEDS_MEMORY)  # an answer, not a wait without end

    def decode_here(self, command: DecodeHere) -> None:
        group = self._sequences.get(command.seq_id)
        if group is None or group.phase not in (Phase.WAITING, Phase.PREFILLING, Phase.HELD):
            return
        forks = len(group.choices) if len(group.choices) > 1 else 0
        if len(command.children) != forks:
            raise ValueError(f"sequence {group.seq_id}: {len(group.choices)} choices, {len(command.children)} children")
        group.decode_here = group.bound = True
        if command.children and not group.children:
            self._expect(group, command.children)
        if group.phase is Phase.HELD:
            self._continue_here(group)

    def mark_bound(self, seq_id: int) -> None:
        if sequence := self._sequences.get(seq_id):
            sequence.bound = True

    def reserve(self, command: Reserve) -> None:
        self._sequences.require_new(command.seq_id, *command.children)
        chain = self._memory.chain(command.tenant, command.identity, command.images)
        sequence = self._sequences.add(command.seq_id, Phase.RESERVED, chain, priority=command.priority)
        sequence.token_ids = list(command.token_ids)
        sequence.tenant = command.tenant
        sequence.chain.extend(sequence.token_ids)
        if not self._memory.reserve(sequence, command, spare=self._turns.spare_columns):
            self._sequences.remove(command.seq_id)
            self._events.append(Reserved(seq_id=command.seq_id, block_table=None))
            return
        self._expect(sequence, command.children, phase=Phase.RESERVED)
        self._events.append(
            Reserved(
                seq_id=command.seq_id,
                block_table=self._memory.table(sequence),
                cached_tokens=sequence.cached_blocks * self._config.block_size,
            )
        )

    def activate(self, command: Activate) -> None:
        """The writer is done:  [KV of token_ids | pending token of each branch) -> the batch. Unknown: released."""
        sequence = self._sequences.get(command.seq_id)
        if sequence is None:
            return
        if sequence.phase is not Phase.RESERVED:
            raise ValueError(f"sequence {command.seq_id} is {sequence.phase.name}, not RESERVED")
        if tuple(sequence.token_ids) != command.token_ids:
            raise ValueError(f"sequence {command.seq_id}: memory was reserved for other tokens")
        if not {branch.seq_id for branch in command.branches} <= set(sequence.children or (sequence.seq_id,)):
            raise ValueError(f"sequence {command.seq_id}: a branch that was not reserved")
        sequence.prompt_tokens = command.prompt_tokens
        sequence.sampling = command.sampling
        sequence.rope_delta = command.rope_delta
        self._memory.arrived(sequence)
        if sequence.children:
            self._fork(sequence, command.branches)
        else:
            (branch,) = command.branches
            self._follow(sequence, branch)
            self._run(sequence)

    def pause(self, seq_id: int) -> None:
        """Stop between two tokens. One that does not run yet stops at its first token, which is the next such place."""
        sequence = self._sequences.get(seq_id)
        if sequence is None:
            return
        if sequence.is_group:  # never runs: who is wanted are its children
            for child in self._unborn(sequence):
                child.pause_wanted = True
        elif sequence.phase in (Phase.RUNNING, Phase.HELD):
            self._pause(sequence, preempted=False)
        elif sequence.phase not in LEAVING:
            sequence.pause_wanted = True

    def release(self, seq_id: int) -> None:
        sequence = self._sequences.get(seq_id)
        if sequence is None:
            return
        self._finish_unborn(sequence)
        self._sequences.remove(seq_id)
        self._memory.release(seq_id)

    def reset_cache(self) -> None:
        """KV of before is never found again, nor what is computed from it: names of held blocks, and names to come."""
        self._memory.reset_cache()
        for sequence in self._sequences.among(*Phase):
            sequence.nameable = False

    # -- steps ---------------------------------------------------------------------------------------------------------
    def plan(self, now_us: int) -> StepPlan | None:
        """The next step, or None: nothing to do until a command changes something. `apply` or `step_raised` follows."""
        if self._plan is not None:
            raise RuntimeError(f"step {self._plan.step_id} is still under way")
        slices = self._next_retry() or self._next_batch()
        if not slices:
            return None
        self._steps += 1
        self._planned_us = now_us
        self._plan = StepPlan(self._steps, slices)
        return self._plan

    def apply(self, output: StepOutput, now_us: int) -> list[EngineEvent]:
        plan = self._end_step(now_us)
        if output.step_id != plan.step_id:
            raise ValueError(f"output of step {output.step_id} during step {plan.step_id}")
        self._batching.observe(plan, self._step_us)
        events = self.take_events()
        sampled: list[SampledToken] = []
        for piece in plan.slices:
            self._apply_slice(piece, output, sampled)
        if sampled:
            events.append(TokensSampled(tokens=tuple(sampled)))  # before what they lead to: Paused names them too
        return events + self.take_events()

    def step_raised(self, now_us: int) -> list[EngineEvent]:
        """The executor raised. Its sequences run one by one, so that only the culprit fails (reliability A19, I11)."""
        plan = self._end_step(now_us)
        if len(plan.slices) > 1:
            self._retries.extend(plan.slices)
        else:
            self._fail(self._sequences[plan.slices[0].seq_id], Failure.STEP_RAISED)
        return self.take_events()

    def take_events(self) -> list[EngineEvent]:
        """Events since the last call, in order. Planning makes some too: Admitted, Paused by preemption."""
        events, self._events = self._events, []
        return events

    def take_copies(self) -> list[Copy]:
        """Columns to copy, source to target, before the next command or step: commands and outcomes fork sequences."""
        return self._memory.take_copies()

    # -- what there is -------------------------------------------------------------------------------------------------
    @property
    def seq_ids(self) -> tuple[int, ...]:
        return self._sequences.seq_ids

    def streams_kv(self, seq_id: int) -> bool:
        """Somebody may want this sequence's KV while it is computed."""
        return not self._sequences[seq_id].decode_here

    def load(self) -> EngineLoad:
        count, uncomputed = self._sequences.count, self._sequences.among(Phase.WAITING, Phase.PREFILLING)
        return EngineLoad(
            waiting=count(Phase.WAITING),
            prefilling=count(Phase.PREFILLING),
            running=count(Phase.RUNNING),
            waiting_tokens=sum(sequence.uncomputed_tokens for sequence in uncomputed),
            free_columns=self._allocator.available_columns,
            total_columns=self._allocator.total_columns,
            lent_columns=self._allocator.lent_columns,
            cached_columns=self._allocator.cached_columns,
            held_sequences=count(*LEAVING),
            steps=self._steps,
            step_ms=self._step_us / 1_000,
            prefix_hit_tokens=self._memory.hit_tokens,
            prefix_query_tokens=self._memory.query_tokens,
            preemptions=self._turns.preemptions,
            idle=not self._sequences,
        )

    def check_integrity(self) -> None:
        """I3, from the scheduler's side: who has columns, and that they hold what is said to be in them."""
        self._allocator.check_integrity()
        self._sequences.check_integrity()
        owners = set(self._allocator.owners)
        if not owners <= set(self.seq_ids):
            raise RuntimeError(f"columns of unknown sequences {sorted(owners - set(self.seq_ids))}")
        if owners & {sequence.seq_id for sequence in self._sequences.among(Phase.WAITING, Phase.EXPECTED)}:
            raise RuntimeError("a sequence without KV has columns")
        for sequence in self._sequences.among(*Phase):
            columns = self._allocator.column_count(sequence.seq_id)
            if self._memory.columns_for(sequence.computed) > columns:
                raise RuntimeError(f"sequence {sequence.seq_id}: {sequence.computed} tokens of KV in {columns} columns")

    # -- batches -------------------------------------------------------------------------------------------------------
    def _next_batch(self) -> tuple[SequenceSlice, ...]:
        """Decodes grow first: what columns are left is then for admission."""
        turn = self._turns.next()
        for sequence in turn.leaving:
            self._pause(sequence, preempted=True)
        decodes = [self._slice(sequence, tokens=1) for sequence in turn.ready]
        for sequence in self._admission.admit(spare=self._turns.spare_columns):
            if not sequence.started:
                self._report_admitted(sequence)
        return (*decodes, *self._prefill_slices(decodes))

    def _next_retry(self) -> tuple[SequenceSlice, ...]:
        """The next slice of a failed step, alone and unchanged, unless its sequence has left meanwhile."""
        while self._retries:
            piece = self._retries.popleft()
            sequence = self._sequences.get(piece.seq_id)
            if sequence and sequence.phase in (Phase.PREFILLING, Phase.RUNNING):
                return (piece,)
        return ()

    def _prefill_slices(self, decodes: list[SequenceSlice]) -> list[SequenceSlice]:
        prefilling = sorted(self._sequences.among(Phase.PREFILLING), key=_priority)
        if not prefilling:
            return []
        batch = Batch(
            decode_contexts=tuple(piece.start + 1 for piece in decodes),
            prompts=tuple(Prompt(s.seq_id, s.computed, s.uncomputed_tokens) for s in prefilling),
            sequences_left=self._config.step_sequences - len(decodes),
        )
        chunks = self._batching.chunks(batch)
        _check_chunks(chunks, batch)
        return [self._slice(self._sequences[chunk.seq_id], tokens=chunk.tokens) for chunk in chunks]

    def _slice(self, sequence: Sequence, *, tokens: int) -> SequenceSlice:
        end = sequence.computed + tokens
        is_prefill = sequence.phase is Phase.PREFILLING
        return SequenceSlice(
            seq_id=sequence.seq_id,
            token_ids=tuple(sequence.token_ids[sequence.computed : end]),
            start=sequence.computed,
            block_table=self._memory.table(sequence),
            sampling=sequence.sampling,
            sample_position=sequence.sample_position if end == len(sequence.token_ids) else None,
            is_prefill=is_prefill,
            tenant=sequence.tenant,
            choices=sequence.choices,
            context=sequence.token_ids,
            prompt_tokens=sequence.prompt_tokens,
            images=sequence.images if is_prefill else (),
            rope_delta=0 if is_prefill else sequence.rope_delta,
        )

    def _report_admitted(self, sequence: Sequence) -> None:
        self._events.append(
            Admitted(
                seq_id=sequence.seq_id,
                block_table=self._memory.table(sequence),
                context_tokens=len(sequence.token_ids),
                cached_tokens=sequence.computed,
            )
        )

    # -- outcomes ------------------------------------------------------------------------------------------------------
    def _end_step(self, now_us: int) -> StepPlan:
        if self._plan is None:
            raise RuntimeError("no step is under way")
        plan, self._plan = self._plan, None
        self._step_us = now_us - self._planned_us
        return plan

    def _apply_slice(self, piece: SequenceSlice, output: StepOutput, sampled: list[SampledToken]) -> None:
        sequence = self._sequences[piece.seq_id]
        picks = output.tokens.get(piece.seq_id, ()) if piece.sample_position is not None else ()
        reason = output.failed.get(piece.seq_id)
        if reason is None and piece.sample_position is not None and len(picks) != len(piece.choices):
            reason = Failure.NO_TOKEN
        if reason is not None:
            self._fail(sequence, reason)
            return
        self._memory.computed(sequence, piece.start + len(piece.token_ids))
        if scores := output.prompt_logprobs.get(piece.seq_id):
            self._events.append(PromptScored(seq_id=piece.seq_id, start=piece.start + 1, logprobs=scores))
        if picks:
            self._accept(sequence, picks, sampled)

    def _accept(self, sequence: Sequence, picks: tuple[Sampled, ...], sampled: list[SampledToken]) -> None:
        tokens = tuple(self._token(sequence, *pair) for pair in zip(sequence.choices, picks, strict=True))
        if sequence.started:
            sampled.append(tokens[0])
        else:
            self._events.append(Prefilled(seq_id=sequence.seq_id, tokens=tokens))
        sequence.started = True
        if not sequence.is_group:
            sequence.token_ids.append(tokens[0].token_id)
        if all(token.finish for token in tokens):
            self._finish_unborn(sequence)
            self._sequences.move(sequence, Phase.FINISHED)
            return
        sequence.first_tokens = tokens if sequence.is_group else ()
        if sequence.phase is Phase.PREFILLING:
            self._after_prefill(sequence)

    def _after_prefill(self, sequence: Sequence) -> None:
        self._sequences.move(sequence, Phase.HELD)
        if sequence.decode_here:
            self._continue_here(sequence)
        elif sequence.pause_wanted:
            self._pause(sequence, preempted=False)

    def _token(self, sequence: Sequence, choice: int, pick: Sampled) -> SampledToken:
        position = sequence.sample_position
        finish = self._finish_reason(sequence, position, pick.token_id)
        return SampledToken(sequence.seq_id, position, pick.token_id, finish, choice, pick.logprobs)

    def _finish_reason(self, sequence: Sequence, position: int, token_id: int) -> FinishReason | None:
        """Why this token is the last. With `max_tokens` 0 it is sampled all the same, and the router drops it."""
        sampling = sequence.sampling
        if sampling.max_tokens == 0:
            return FinishReason.LENGTH
        # A complete constrained output has nothing left to say but ends, so that one ends it in any case.
        ignores_eos = sampling.ignore_eos and sampling.constraint is None
        is_eos = token_id in self._config.eos_token_ids and not ignores_eos
        if position >= sampling.min_tokens and (is_eos or token_id in sampling.stop_token_ids):
            return FinishReason.STOP
        if position + 1 >= sampling.max_tokens or len(sequence.token_ids) + 1 >= self._config.max_model_len:
            return FinishReason.LENGTH
        return None

    def _run(self, sequence: Sequence) -> None:
        self._sequences.move(sequence, Phase.RUNNING)
        if sequence.pause_wanted:
            self._pause(sequence, preempted=False)

    def _pause(self, sequence: Sequence, *, preempted: bool) -> None:
        """From here on a Source owns the range:  [KV of token_ids[:-1] | pending token)."""
        self._sequences.move(sequence, Phase.PAUSED)
        self._events.append(
            Paused(
                seq_id=sequence.seq_id,
                token_ids=tuple(sequence.token_ids),
                block_table=self._memory.table(sequence),
                preempted=preempted,
                rope_delta=sequence.rope_delta,
            )
        )

    def _fail(self, sequence: Sequence, reason: str) -> None:
        """It takes its unborn children along. Whatever is in its columns, nobody shall find it in the cache."""
        failing = [sequence, *self._unborn(sequence)]
        for member in failing:
            self._memory.disown(member)
            self._sequences.move(member, Phase.FAILED)
        self._events.append(StepFailed(seq_ids=tuple(member.seq_id for member in failing), reason=reason))

    # -- groups --------------------------------------------------------------------------------------------------------
    #   AddPrefill(choices)  +  DecodeHere(children)    children EXPECTED, then forked by the group's first tokens
    #   Reserve(children)    +  Activate(branches)      children RESERVED, then forked by the branches
    def _expect(self, group: Sequence, children: tuple[int, ...], *, phase: Phase = Phase.EXPECTED) -> None:
        """File the sequences that a group's choices will be. Released or paused they may be from now on."""
        self._sequences.require_new(*children)
        group.children = children
        for child_id in children:
            chain = self._memory.chain(group.tenant)  # until the group has all of its own
            self._sequences.add(child_id, phase, chain, priority=group.priority, arrival=group.arrival)

    def _unborn(self, group: Sequence) -> list[Sequence]:
        children = [self._sequences.get(child_id) for child_id in group.children]
        return [child for child in children if child and child.phase in (Phase.EXPECTED, Phase.RESERVED)]

    def _finish_unborn(self, group: Sequence) -> None:
        for child in self._unborn(group):
            self._sequences.move(child, Phase.FINISHED)

    def _continue_here(self, sequence: Sequence) -> None:
        """First tokens are sampled, all KV is here, nobody else is its target."""
        if not sequence.children:
            self._run(sequence)
            return
        pairs = zip(sequence.children, sequence.first_tokens, strict=True)
        self._fork(sequence, [Branch(seq_id=i, choice=t.choice, token_id=t.token_id) for i, t in pairs if not t.finish])

    def _fork(self, group: Sequence, branches: Iterable[Branch]) -> None:
        """Each choice that goes on becomes a sequence that shares the group's full blocks; the group is over."""
        branch_of = {branch.seq_id: branch for branch in branches}
        for child in self._unborn(group):
            if branch := branch_of.get(child.seq_id):
                self._start_child(group, child, branch)
        self._finish_unborn(group)
        self._sequences.move(group, Phase.FINISHED)

    def _start_child(self, group: Sequence, child: Sequence, branch: Branch) -> None:
        child.token_ids = list(group.token_ids)
        child.prompt_tokens = group.prompt_tokens
        child.sampling = group.sampling
        child.tenant = group.tenant
        child.rope_delta = group.rope_delta
        child.chain = group.chain.fork()
        self._follow(child, branch)
        if self._memory.fork(group, child, spare=self._turns.spare_columns):
            self._run(child)
        elif child.sees:
            self._fail(child, Failure.NO_ROOM_TO_FORK)  # the embeddings it would be computed from are gone
        elif self._memory.could_hold(len(child.token_ids)):
            wait_again(self._sequences, child)  # its prefix is cached as long as nobody needs the room
        else:
            self._fail(child, Failure.EXCEEDS_MEMORY)

    def _follow(self, sequence: Sequence, branch: Branch) -> None:
        """The first token is known, and reported: this sequence samples what comes after it."""
        sequence.token_ids.append(branch.token_id)
        sequence.choices = (branch.choice,)
        sequence.started = sequence.decode_here = True


def _check_chunks(chunks: list[Chunk], batch: Batch) -> None:
    """A batching method is a plug-in: what it may not do is a bug of its own, and named here."""
    uncomputed = {prompt.seq_id: prompt.uncomputed_tokens for prompt in batch.prompts}
    for seq_id, tokens in chunks:
        if not 1 <= tokens <= uncomputed.pop(seq_id, 0):
            raise ValueError(f"batching: a chunk of {tokens} tokens of sequence {seq_id} cannot be")
    if len(chunks) > max(batch.sequences_left, 0):
        raise ValueError(f"batching: {len(chunks)} chunks, and room for {batch.sequences_left}")
    if not chunks and not batch.decode_contexts:
        raise ValueError("batching: prompts wait, and an empty step would be the last")


def _priority(sequence: Sequence) -> int:
    return sequence.priority
