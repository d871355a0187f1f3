"""Sequence: the scheduler's record of one sequence, and `Sequences`: the book in which all of them are filed by phase.

Records and their order, no policy: who moves from which phase to which, and why, is the scheduler's business.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeAlias

from engine.commands import SampledToken
from engine.images import PlacedImage
from engine.kv.prefix_cache import BlockChain
from engine.types import SamplingParams


class Phase(Enum):
    """Where a sequence is. `release` leaves from any of them and frees whatever columns there are.

    WAITING -> PREFILLING -> HELD | RUNNING | FINISHED          HELD -> RUNNING (decode here) | PAUSED
    RESERVED -> RUNNING -> PAUSED | FINISHED                    RUNNING -> WAITING (preempted, to be computed again)
    EXPECTED -> RUNNING | WAITING | FINISHED                    WAITING, PREFILLING, RUNNING, EXPECTED -> FAILED

    A group never runs: it ends, FINISHED, when its children start.
    """

    WAITING = auto()  # no memory yet, or no more
    PREFILLING = auto()  # all columns are here; chunks are left to compute
    HELD = auto()  # prefilled; a Source moves the KV away
    RESERVED = auto()  # columns granted, KV on its way
    EXPECTED = auto()  # a choice of a group that is not prefilled; no memory of its own
    RUNNING = auto()
    PAUSED = auto()  # stopped between two tokens; a Source moves the KV away
    FINISHED = auto()
    FAILED = auto()


LEAVING = (Phase.HELD, Phase.PAUSED, Phase.FINISHED, Phase.FAILED)

Urgency: TypeAlias = tuple[int, int, int]


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence.

    token_ids   0 ......... computed ......... len
    KV          | in columns | to be computed |        while running, exactly the last token is not computed

    blocks      0 ......... cached_blocks ......... named_blocks ......... len(table)
                | found in the cache | made here, others may share | being written |
    """

    seq_id: int
    arrival: int
    phase: Phase
    chain: BlockChain  # names of its blocks, for the prefix cache
    priority: int = 0
    token_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    sampling: SamplingParams = field(default_factory=SamplingParams)
    tenant: str = ""
    images: tuple[PlacedImage, ...] = ()  # of a prompt that is computed here
    rope_delta: int = 0  # from a token's index to its position, behind all images
    choices: tuple[int, ...] = (0,)
    children: tuple[int, ...] = ()  # a group's, one per choice
    first_tokens: tuple[SampledToken, ...] = ()  # a held group's, one per choice
    decode_here: bool = False
    bound: bool = True  # nobody has to find a target for it (any more)
    started: bool = False  # its first token is known: what it samples from now on is `TokensSampled`
    pause_wanted: bool = False  # asked before it ran
    computed: int = 0
    cached_blocks: int = 0
    named_blocks: int = 0
    nameable: bool = True  # False: the cache was reset since its KV was computed
    passes: int = 0  # admissions that overtook it because it did not fit

    @property
    def urgency(self) -> Urgency:
        """Lower goes first, and is preempted last. Choices of one request arrived together."""
        return self.priority, self.arrival, self.seq_id

    @property
    def is_group(self) -> bool:
        return len(self.choices) > 1 or bool(self.children)

    @property
    def sees(self) -> bool:
        """It has images. Their embeddings leave with its prefill: it cannot be computed again here."""
        return bool(self.chain.images)

    @property
    def sample_position(self) -> int:
        """Output position of the next token."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.computed


class Sequences:
    """Every sequence there is, by id and by phase."""

    def __init__(self) -> None:
        self._sequences: dict[int, Sequence] = {}
        self._in: dict[Phase, dict[int, Sequence]] = {phase: {} for phase in Phase}  # in order of entry
        self._queue: list[Urgency] = []  # of the waiting ones
        self._arrivals = 0

    def __getitem__(self, seq_id: int) -> Sequence:
        return self._sequences[seq_id]

    def __len__(self) -> int:
        return len(self._sequences)

    def get(self, seq_id: int) -> Sequence | None:
        return self._sequences.get(seq_id)

    def among(self, *phases: Phase) -> list[Sequence]:
        """In order of entry."""
        return [sequence for phase in phases for sequence in self._in[phase].values()]

    def count(self, *phases: Phase) -> int:
        return sum(len(self._in[phase]) for phase in phases)

    def waiting(self) -> list[Sequence]:
        """The most urgent first."""
        return [self._sequences[seq_id] for _, _, seq_id in self._queue]

    @property
    def seq_ids(self) -> tuple[int, ...]:
        return tuple(self._sequences)

    # -- filing --------------------------------------------------------------------------------------------------------
    def require_new(self, *seq_ids: int) -> None:
        for seq_id in seq_ids:
            if seq_id in self._sequences or seq_ids.count(seq_id) > 1:
                raise ValueError(f"sequence id {seq_id} is in use; ids are never reused")

    def add(
        self, seq_id: int, phase: Phase, chain: BlockChain, *, priority: int = 0, arrival: int | None = None
    ) -> Sequence:
        """File a new sequence; `arrival` is its group's if it has one."""
        self.require_new(seq_id)
        self._arrivals += 1
        sequence = Sequence(seq_id, self._arrivals if arrival is None else arrival, phase, chain, priority)
        self._sequences[seq_id] = sequence
        self._enter(sequence, phase)
        return sequence

    def move(self, sequence: Sequence, phase: Phase) -> None:
        """To another phase, or to the end of the same."""
        self._leave(sequence)
        self._enter(sequence, phase)

    def remove(self, seq_id: int) -> Sequence | None:
        sequence = self._sequences.pop(seq_id, None)
        if sequence is not None:
            self._leave(sequence)
        return sequence

    def check_integrity(self) -> None:
        filed = {seq_id: phase for phase, members in self._in.items() for seq_id in members}
        if filed != {seq_id: sequence.phase for seq_id, sequence in self._sequences.items()}:
            raise RuntimeError("a sequence is filed under another phase than its own")
        if self._queue != sorted(sequence.urgency for sequence in self.among(Phase.WAITING)):
            raise RuntimeError("the queue is not that of the waiting sequences")

    def _enter(self, sequence: Sequence, phase: Phase) -> None:
        sequence.phase = phase
        self._in[phase][sequence.seq_id] = sequence
        if phase is Phase.WAITING:
            insort(self._queue, sequence.urgency)

    def _leave(self, sequence: Sequence) -> None:
        del self._in[sequence.phase][sequence.seq_id]
        if sequence.phase is Phase.WAITING:
            del self._queue[bisect_left(self._queue, sequence.urgency)]
