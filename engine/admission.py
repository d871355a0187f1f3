"""Admission: which waiting prompts get their columns now. No prompt runs before it has all of them (DESIGN 1).

It decides by order, slots and memory; what the steps make of those admitted is `batching`'s business.
"""

from dataclasses import dataclass

from engine.base import limits
from engine.sequence import Phase, Sequence, Sequences
from engine.sequence_memory import SequenceMemory


class Admission:
    """The most urgent first: by priority, then by arrival. A preempted sequence keeps the place of its arrival."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        growth_reserve_tokens: int = limits.GROWTH_RESERVE_TOKENS  # of a prefill that decodes here
        unbound_prefills_max: int = limits.UNBOUND_PREFILLS_MAX
        near_turn_tokens: int = limits.NEAR_TURN_TOKENS
        passes_max: int = limits.PASSES_MAX
        tries_max: int = limits.ADMISSION_TRIES_MAX

    def __init__(self, config: Config, sequences: Sequences, memory: SequenceMemory) -> None:
        self._config = config
        self._sequences = sequences
        self._memory = memory

    def admit(self, *, spare: int) -> list[Sequence]:
        """Give waiting prompts all their columns, in order, as their turn comes near. Returns those that got them.

        Two things hold a prompt back. *No slot*: it needs a target and too many without one hold columns already;
        others may pass, since slots do not depend on them. *No memory*: others may pass too, but each one delays it,
        so after `passes_max` nobody does (long prompts do not starve). Only more urgent ones may still come first.
        """
        admitted: list[Sequence] = []
        backlog_tokens = sum(sequence.uncomputed_tokens for sequence in self._sequences.among(Phase.PREFILLING))
        unbound = self._unbound_prefills()
        refused: list[Sequence] = []  # did not fit
        for sequence in self._sequences.waiting():
            if backlog_tokens >= self._config.near_turn_tokens or self._nobody_may_pass(refused):
                break
            if not sequence.bound and unbound >= self._config.unbound_prefills_max:
                continue
            if not self._memory.admit(sequence, self._growth_tokens(sequence), spare=spare):
                refused.append(sequence)
                continue
            self._sequences.move(sequence, Phase.PREFILLING)
            admitted.append(sequence)
            backlog_tokens += sequence.uncomputed_tokens
            unbound += not sequence.bound
            if refused:
                refused[0].passes += 1
        return admitted

    def _nobody_may_pass(self, refused: list[Sequence]) -> bool:
        if not refused:
            return False
        return refused[0].passes >= self._config.passes_max or len(refused) >= self._config.tries_max

    def _unbound_prefills(self) -> int:
        return sum(not sequence.bound for sequence in self._sequences.among(Phase.PREFILLING, Phase.HELD))

    def _growth_tokens(self, sequence: Sequence) -> int:
        """Room for the outputs of a sequence that stays. A group's are its children's, who find their own."""
        if not sequence.decode_here or sequence.is_group:
            return 0
        outputs_left = max(0, sequence.sampling.max_tokens - sequence.sample_position - 1)  # the last is not stored
        return min(self._config.growth_reserve_tokens, outputs_left)
