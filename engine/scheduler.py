"""Scheduler: which tokens of which sequences the next step computes, and what the step's output means.

Pure: no clock, no tensor, no KV byte. It asks the allocator for columns and never touches what is in them.

    plan    running decodes (one token each), then prefill chunks, first come first served, within the token budget
    apply   one token for each slice that asked for one: Prefilled, TokensSampled, or the sequence's failure

Memory policy (DESIGN 1, "no deadlock"): columns are granted whole or not at all, and only `release` takes them back.
A running sequence that cannot grow skips the step while somebody's columns are on their way back; if nobody's are,
the youngest running sequence is paused and gives its own. New work is refused columns that a skipper waits for, so
what comes back reaches it and one preemption never causes the next.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import islice

from engine.base import limits
from engine.commands import (
    Activate,
    AddPrefill,
    Admitted,
    BlockTable,
    EngineEvent,
    EngineLoad,
    Paused,
    Prefilled,
    Reserve,
    Reserved,
    SampledToken,
    SequenceSlice,
    StepFailed,
    StepOutput,
    StepPlan,
    TokensSampled,
)
from engine.kv.allocator import ColumnAllocator
from engine.types import FinishReason, SamplingParams


class Phase(Enum):
    """Where a sequence is. `release` leaves from any of them and frees whatever columns there are.

    WAITING -> PREFILLING -> HELD | RUNNING | FINISHED          HELD -> RUNNING (decode here) | PAUSED
    RESERVED -> RUNNING -> PAUSED | FINISHED                    WAITING, PREFILLING, RUNNING -> FAILED
    """

    WAITING = auto()  # no memory yet
    PREFILLING = auto()  # all columns are here; chunks are left to compute
    HELD = auto()  # prefilled; a Source moves the KV away
    RESERVED = auto()  # columns lent to a writer
    RUNNING = auto()
    PAUSED = auto()  # stopped between two tokens; a Source moves the KV away
    FINISHED = auto()
    FAILED = auto()


LEAVING = (Phase.HELD, Phase.PAUSED, Phase.FINISHED, Phase.FAILED)


class Failure:
    """`StepFailed.reason`: the whole set (it becomes a metric label)."""

    STEP_RAISED = "step_raised"
    NO_TOKEN = "no_token"
    EXCEEDS_MEMORY = "exceeds_memory"


@dataclass(slots=True, eq=False)
class Sequence:
    """The scheduler's record of one sequence.

    token_ids   0 ......... computed ......... len
    KV          | in columns | to be computed |        while running, exactly the last token is not computed
    """

    seq_id: int
    arrival: int  # preemption takes the youngest
    phase: Phase
    token_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    sampling: SamplingParams = field(default_factory=SamplingParams)
    tenant: str = ""
    decode_here: bool = False
    bound: bool = True  # nobody has to find a target for it (any more)
    pause_wanted: bool = False  # asked while still prefilling
    computed: int = 0
    passes: int = 0  # admissions that overtook it because it did not fit

    @property
    def sample_position(self) -> int:
        """Output position of the next token."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.computed


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

        def __post_init__(self) -> None:
            if min(self.block_size, self.step_tokens, self.step_sequences, self.near_turn_tokens) < 1:
                raise ValueError(f"sizes and budgets must be >= 1: {self}")
            if min(self.growth_reserve_tokens, self.passes_max) < 0 or self.unbound_prefills_max < 1:
                raise ValueError(f"reserves must be >= 0, unbound_prefills_max >= 1: {self}")

    def __init__(self, config: Config, allocator: ColumnAllocator) -> None:
        self._config = config
        self._allocator = allocator
        self._sequences: dict[int, Sequence] = {}
        self._in: dict[Phase, dict[int, Sequence]] = {phase: {} for phase in Phase}  # in order of entry
        self._starved: set[int] = set()  # running, and without a column for the next token
        self._retries: deque[SequenceSlice] = deque()  # slices of a step that raised, to be run one by one
        self._events: list[EngineEvent] = []
        self._arrivals = 0
        self._plan: StepPlan | None = None
        self._planned_us = 0
        self._steps = 0
        self._step_us = 0

    # -- commands ------------------------------------------------------------------------------------------------------
    def add_prefill(self, command: AddPrefill) -> None:
        if not command.token_ids:
            raise ValueError("a prefill needs at least one token")
        sequence = self._add(command.seq_id, Phase.WAITING)
        self._describe(sequence, command)
        sequence.decode_here = command.decode_here
        last_token = sequence.sample_position + 1 >= command.sampling.max_tokens
        sequence.bound = command.decode_here or last_token
        if self._columns_for(len(command.token_ids)) > self._allocator.total_columns:
            self._fail(sequence, Failure.EXCEEDS_MEMORY)  # an answer, not a wait without end

    def decode_here(self, seq_id: int) -> None:
        sequence = self._sequences.get(seq_id)
        if sequence is None:
            return
        sequence.decode_here = sequence.bound = True
        if sequence.phase is Phase.HELD:
            self._move(sequence, Phase.RUNNING)

    def mark_bound(self, seq_id: int) -> None:
        if sequence := self._sequences.get(seq_id):
            sequence.bound = True

    def reserve(self, command: Reserve) -> None:
        wanted = self._columns_for(command.context_tokens + command.growth_tokens)
        count = min(wanted, self._allocator.total_columns)  # the context is a must, growth is not
        if count < self._columns_for(command.context_tokens) or not self._fits(count):
            self._events.append(Reserved(seq_id=command.seq_id, block_table=None))
            return
        self._add(command.seq_id, Phase.RESERVED)
        self._allocator.allocate(command.seq_id, count, lent=True)
        self._events.append(Reserved(seq_id=command.seq_id, block_table=self._table(command.seq_id)))

    def activate(self, command: Activate) -> None:
        """The writer is done:  [KV of token_ids[:-1] | pending token) -> the batch. Unknown: released meanwhile."""
        sequence = self._sequences.get(command.seq_id)
        if sequence is None:
            return
        if sequence.phase is not Phase.RESERVED:
            raise ValueError(f"sequence {command.seq_id} is {sequence.phase.name}, not RESERVED")
        self._describe(sequence, command)
        sequence.computed = len(command.token_ids) - 1
        if self._columns_for(sequence.computed) > len(self._table(command.seq_id)):
            raise ValueError(f"sequence {command.seq_id}: more KV than columns were reserved for")
        self._allocator.unlend(command.seq_id)
        self._move(sequence, Phase.RUNNING)

    def pause(self, seq_id: int) -> None:
        """Stop between two tokens. One that still prefills stops at its first token, which is the next such place."""
        sequence = self._sequences.get(seq_id)
        if sequence is None:
            return
        if sequence.phase in (Phase.RUNNING, Phase.HELD):
            self._pause(sequence, preempted=False)
        elif sequence.phase in (Phase.WAITING, Phase.PREFILLING):
            sequence.pause_wanted = True

    def release(self, seq_id: int) -> None:
        sequence = self._sequences.pop(seq_id, None)
        if sequence is not None:
            del self._in[sequence.phase][seq_id]
            self._starved.discard(seq_id)
            self._allocator.release(seq_id)

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
        sampled: list[SampledToken] = []
        for piece in plan.slices:
            self._apply_slice(piece, output, sampled)
        if sampled:
            self._events.append(TokensSampled(tokens=tuple(sampled)))
        return self.take_events()

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

    # -- what there is -------------------------------------------------------------------------------------------------
    @property
    def seq_ids(self) -> tuple[int, ...]:
        return tuple(self._sequences)

    def streams_kv(self, seq_id: int) -> bool:
        """Somebody may want this sequence's KV while it is computed."""
        return not self._sequences[seq_id].decode_here

    def load(self) -> EngineLoad:
        uncomputed = (self._in[Phase.WAITING], self._in[Phase.PREFILLING])
        return EngineLoad(
            waiting=len(self._in[Phase.WAITING]),
            prefilling=len(self._in[Phase.PREFILLING]),
            running=len(self._in[Phase.RUNNING]),
            waiting_tokens=sum(sequence.uncomputed_tokens for part in uncomputed for sequence in part.values()),
            free_columns=self._allocator.free_columns,
            total_columns=self._allocator.total_columns,
            lent_columns=self._allocator.lent_columns,
            held_sequences=sum(len(self._in[phase]) for phase in LEAVING),
            steps=self._steps,
            step_ms=self._step_us / 1_000,
            idle=not self._sequences,
        )

    def check_integrity(self) -> None:
        """I3, from the scheduler's side: who has columns, and that they hold what is said to be in them."""
        self._allocator.check_integrity()
        filed = {seq_id: phase for phase, members in self._in.items() for seq_id in members}
        if filed != {seq_id: sequence.phase for seq_id, sequence in self._sequences.items()}:
            raise RuntimeError("a sequence is filed under another phase than its own")
        owners = set(self._allocator.owners)
        if not owners <= self._sequences.keys():
            raise RuntimeError(f"columns of unknown sequences {sorted(owners - self._sequences.keys())}")
        if owners & self._in[Phase.WAITING].keys():
            raise RuntimeError("a waiting sequence has columns")
        for seq_id, sequence in self._sequences.items():
            columns = len(self._table(seq_id)) if seq_id in owners else 0
            if self._columns_for(sequence.computed) > columns:
                raise RuntimeError(f"sequence {seq_id}: {sequence.computed} tokens of KV in {columns} columns")

    # -- batches -------------------------------------------------------------------------------------------------------
    def _next_batch(self) -> tuple[SequenceSlice, ...]:
        """Decodes grow first: what is left in free columns is then for admission."""
        decodes = self._decode_slices()
        self._admit()
        prefills = self._prefill_slices(
            budget_tokens=self._config.step_tokens - len(decodes),
            room=self._config.step_sequences - len(decodes),
        )
        return (*decodes, *prefills)

    def _next_retry(self) -> tuple[SequenceSlice, ...]:
        """The next slice of a failed step, alone and unchanged, unless its sequence has left meanwhile."""
        while self._retries:
            piece = self._retries.popleft()
            sequence = self._sequences.get(piece.seq_id)
            if sequence and sequence.phase in (Phase.PREFILLING, Phase.RUNNING):
                return (piece,)
        return ()

    def _decode_slices(self) -> list[SequenceSlice]:
        """One token for each running sequence that has a slot for it.

        Turns go round; columns go to the oldest, because the youngest is who is paused for them.
        """
        running = self._in[Phase.RUNNING]
        turns = min(self._config.step_sequences, self._config.step_tokens)
        turn = tuple(islice(running.values(), turns))
        self._starved = {sequence.seq_id for sequence in sorted(turn, key=_arrival) if not self._grow(sequence)}
        if self._starved and not self._columns_coming_back():
            self._pause(max(running.values(), key=_arrival), preempted=True)
        ready = [s for s in turn if s.phase is Phase.RUNNING and s.seq_id not in self._starved]
        for sequence in ready:
            running[sequence.seq_id] = running.pop(sequence.seq_id)  # to the end of the round
        return [self._slice(sequence, tokens=1) for sequence in ready]

    def _prefill_slices(self, *, budget_tokens: int, room: int) -> list[SequenceSlice]:
        slices: list[SequenceSlice] = []
        for sequence in self._in[Phase.PREFILLING].values():
            if budget_tokens < 1 or len(slices) >= room:
                break
            tokens = min(sequence.uncomputed_tokens, budget_tokens)
            slices.append(self._slice(sequence, tokens=tokens))
            budget_tokens -= tokens
        return slices

    def _slice(self, sequence: Sequence, *, tokens: int) -> SequenceSlice:
        end = sequence.computed + tokens
        return SequenceSlice(
            seq_id=sequence.seq_id,
            token_ids=tuple(sequence.token_ids[sequence.computed : end]),
            start=sequence.computed,
            block_table=self._table(sequence.seq_id),
            sampling=sequence.sampling,
            sample_position=sequence.sample_position if end == len(sequence.token_ids) else None,
            is_prefill=sequence.phase is Phase.PREFILLING,
            tenant=sequence.tenant,
        )

    # -- admission -----------------------------------------------------------------------------------------------------
    def _admit(self) -> None:
        """Give waiting prompts all their columns, in order, as their turn comes near.

        Two things hold a prompt back. *No slot*: it needs a target and too many without one hold columns already;
        others may pass, since slots do not depend on them. *No memory*: others may pass too, but each one delays it,
        so after `passes_max` nobody does (long prompts do not starve).
        """
        backlog_tokens = sum(sequence.uncomputed_tokens for sequence in self._in[Phase.PREFILLING].values())
        unbound = self._unbound_prefills()
        blocked: Sequence | None = None  # the first that did not fit
        for sequence in tuple(self._in[Phase.WAITING].values()):
            if backlog_tokens >= self._config.near_turn_tokens:
                return
            if not sequence.bound and unbound >= self._config.unbound_prefills_max:
                continue
            if blocked and blocked.passes >= self._config.passes_max:
                return
            if not self._admit_one(sequence):
                blocked = blocked or sequence
                continue
            backlog_tokens += sequence.uncomputed_tokens
            unbound += not sequence.bound
            if blocked:
                blocked.passes += 1

    def _admit_one(self, sequence: Sequence) -> bool:
        count = self._columns_to_prefill(sequence)
        if not self._fits(count):
            return False
        self._allocator.allocate(sequence.seq_id, count)
        self._move(sequence, Phase.PREFILLING)
        table = self._table(sequence.seq_id)
        context_tokens = len(sequence.token_ids)
        self._events.append(Admitted(seq_id=sequence.seq_id, block_table=table, context_tokens=context_tokens))
        return True

    def _columns_to_prefill(self, sequence: Sequence) -> int:
        """Its context, and room to grow if it stays. Never more than there is: only the context is a must."""
        tokens = len(sequence.token_ids)
        if sequence.decode_here:
            outputs_left = max(0, sequence.sampling.max_tokens - sequence.sample_position - 1)  # the last is not stored
            tokens += min(self._config.growth_reserve_tokens, outputs_left)
        return min(self._columns_for(tokens), self._allocator.total_columns)

    def _unbound_prefills(self) -> int:
        holders = (self._in[Phase.PREFILLING], self._in[Phase.HELD])
        return sum(not sequence.bound for part in holders for sequence in part.values())

    # -- columns -------------------------------------------------------------------------------------------------------
    def _columns_for(self, tokens: int) -> int:
        return -(-tokens // self._config.block_size)

    def _table(self, seq_id: int) -> BlockTable:
        return self._allocator.table(seq_id)

    def _fits(self, count: int) -> bool:
        """Enough for new work, with one column left for each running sequence that waits for one."""
        return count + len(self._starved) <= self._allocator.free_columns

    def _grow(self, sequence: Sequence) -> bool:
        """Make sure that the next token's slot exists."""
        has = len(self._table(sequence.seq_id))
        return self._columns_for(sequence.computed + 1) <= has or bool(self._allocator.allocate(sequence.seq_id, 1))

    def _columns_coming_back(self) -> bool:
        """Somebody is about to be released, or moves to a target that has already granted the memory.

        A held prefill without a target does not count: its target may be waiting for *our* columns. Everything that
        counts has a deadline at its owner, so a skipped step is never skipped for ever.
        """
        if any(self._in[phase] for phase in (Phase.PAUSED, Phase.FINISHED, Phase.FAILED)):
            return True
        return any(sequence.bound for sequence in self._in[Phase.HELD].values())

    # -- outcomes ------------------------------------------------------------------------------------------------------
    def _end_step(self, now_us: int) -> StepPlan:
        if self._plan is None:
            raise RuntimeError("no step is under way")
        plan, self._plan = self._plan, None
        self._step_us = now_us - self._planned_us
        return plan

    def _apply_slice(self, piece: SequenceSlice, output: StepOutput, sampled: list[SampledToken]) -> None:
        sequence = self._sequences[piece.seq_id]
        reason = output.failed.get(piece.seq_id)
        if reason is None and piece.sample_position is not None and piece.seq_id not in output.tokens:
            reason = Failure.NO_TOKEN
        if reason is not None:
            self._fail(sequence, reason)
            return
        sequence.computed = piece.start + len(piece.token_ids)
        if piece.sample_position is not None:
            self._accept(sequence, piece.sample_position, output.tokens[piece.seq_id], sampled)

    def _accept(self, sequence: Sequence, position: int, token_id: int, sampled: list[SampledToken]) -> None:
        sequence.token_ids.append(token_id)
        finish = self._finish_reason(sequence, position, token_id)
        if sequence.phase is Phase.PREFILLING:
            self._events.append(Prefilled(seq_id=sequence.seq_id, token_id=token_id, finish=finish))
            self._move(sequence, Phase.RUNNING if sequence.decode_here else Phase.HELD)
        else:
            sampled.append(SampledToken(sequence.seq_id, position, token_id, finish))
        if finish is not None:
            self._move(sequence, Phase.FINISHED)
        elif sequence.pause_wanted:
            self._pause(sequence, preempted=False)

    def _finish_reason(self, sequence: Sequence, position: int, token_id: int) -> FinishReason | None:
        """Why this token is the last. With `max_tokens` 0 it is sampled all the same, and the router drops it."""
        sampling = sequence.sampling
        if sampling.max_tokens == 0:
            return FinishReason.LENGTH
        is_eos = token_id in self._config.eos_token_ids and not sampling.ignore_eos
        if is_eos or token_id in sampling.stop_token_ids:
            return FinishReason.STOP
        if position + 1 >= sampling.max_tokens or len(sequence.token_ids) >= self._config.max_model_len:
            return FinishReason.LENGTH
        return None

    def _pause(self, sequence: Sequence, *, preempted: bool) -> None:
        """From here on a Source owns the range:  [KV of token_ids[:-1] | pending token)."""
        self._move(sequence, Phase.PAUSED)
        self._events.append(
            Paused(
                seq_id=sequence.seq_id,
                token_ids=tuple(sequence.token_ids),
                block_table=self._table(sequence.seq_id),
                preempted=preempted,
            )
        )

    def _fail(self, sequence: Sequence, reason: str) -> None:
        self._move(sequence, Phase.FAILED)
        self._events.append(StepFailed(seq_ids=(sequence.seq_id,), reason=reason))

    # -- records -------------------------------------------------------------------------------------------------------
    def _add(self, seq_id: int, phase: Phase) -> Sequence:
        if seq_id in self._sequences:
            raise ValueError(f"sequence id {seq_id} is in use; ids are never reused")
        self._arrivals += 1
        sequence = Sequence(seq_id, self._arrivals, phase)
        self._sequences[seq_id] = self._in[phase][seq_id] = sequence
        return sequence

    def _describe(self, sequence: Sequence, command: AddPrefill | Activate) -> None:
        sequence.token_ids = list(command.token_ids)
        sequence.prompt_tokens = command.prompt_tokens
        sequence.sampling = command.sampling
        sequence.tenant = command.tenant

    def _move(self, sequence: Sequence, phase: Phase) -> None:
        del self._in[sequence.phase][sequence.seq_id]
        self._starved.discard(sequence.seq_id)
        sequence.phase = phase
        self._in[phase][sequence.seq_id] = sequence


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
