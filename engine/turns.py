"""Turns: which running sequences decode in the next step, and who gives way when columns run out.

A running sequence that cannot grow skips the step while somebody's columns are on their way back. If nobody's are, the
least urgent running sequence is preempted. Where prompts are computed too it goes back to the queue at once; elsewhere,
or if it could never fit here again, or has images, it has to leave, and the scheduler says so.
"""

from dataclasses import dataclass, field, replace
from itertools import islice

from engine.sequence import Phase, Sequence, Sequences, Urgency
from engine.sequence_memory import SequenceMemory


@dataclass(slots=True)
class Turn:
    """`ready` have a slot for their next token; `leaving` were preempted and are still filed as running."""

    ready: list[Sequence] = field(default_factory=list)
    leaving: list[Sequence] = field(default_factory=list)


class Turns:
    """Turns go round: with more running sequences than a step takes, those that waited longest go first."""

    def __init__(self, sequences: Sequences, memory: SequenceMemory, *, sequences_max: int, recompute: bool) -> None:
        self._sequences = sequences
        self._memory = memory
        self._sequences_max = sequences_max
        self._recompute = recompute
        self._starved: list[Sequence] = []
        self.preemptions = 0

    @property
    def spare_columns(self) -> int:
        """What new work has to leave: one column for each running sequence that waits for one."""
        return sum(sequence.phase is Phase.RUNNING for sequence in self._starved)

    def next(self) -> Turn:
        members = list(islice(self._sequences.among(Phase.RUNNING), self._sequences_max))
        turn = Turn()
        self._starved = self._grow([s for s in members if not self._memory.has_room(s)], turn)
        behind = {sequence.seq_id for sequence in (*self._starved, *turn.leaving)}
        turn.ready = [s for s in members if s.phase is Phase.RUNNING and s.seq_id not in behind]
        for sequence in turn.ready:
            self._sequences.move(sequence, Phase.RUNNING)  # to the end of the round
        return turn

    def _grow(self, needy: list[Sequence], turn: Turn) -> list[Sequence]:
        """Columns go to the most urgent: the least urgent is who gives its own for them. Returns who is left out."""
        starved = [s for s in sorted(needy, key=_urgency) if not self._memory.grow(s)]
        while starved and not turn.leaving and not self._columns_coming_back():
            victim = max(self._sequences.among(Phase.RUNNING), key=_urgency)
            self._preempt(victim, turn)
            starved = [s for s in starved if s is not victim and not self._memory.grow(s)]
        return starved

    def _preempt(self, sequence: Sequence, turn: Turn) -> None:
        self.preemptions += 1
        if self._recompute and not sequence.sees and self._memory.could_hold(len(sequence.token_ids)):
            self._memory.drop(sequence)
            wait_again(self._sequences, sequence)
        else:
            turn.leaving.append(sequence)

    def _columns_coming_back(self) -> bool:
        """Somebody is about to be released, or moves to a target that has already granted the memory.

        A held prefill without a target does not count: its target may be waiting for *our* columns. Everything that
        counts has a deadline at its owner, so a skipped step is never skipped for ever.
        """
        if self._sequences.count(Phase.PAUSED, Phase.FINISHED, Phase.FAILED):
            return True
        return any(sequence.bound for sequence in self._sequences.among(Phase.HELD))


def wait_again(sequences: Sequences, sequence: Sequence) -> None:
    """To the queue, at the place of its arrival: tokens and scores are reported already, its KV is to be computed."""
    sequence.sampling = replace(sequence.sampling, prompt_logprobs=None)
    sequences.move(sequence, Phase.WAITING)


def _urgency(sequence: Sequence) -> Urgency:
    return sequence.urgency
