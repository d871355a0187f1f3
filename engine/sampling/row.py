"""One row of logits to pick from: everything that the pick depends on beside the logits themselves."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from engine.commands import SequenceSlice
from engine.types import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """How to pick, once for each choice."""

    params: SamplingParams
    position: int  # of the output token that is picked
    choices: tuple[int, ...] = (0,)  # each draws by itself
    context: Sequence[int] = ()  # every token so far, prompt first
    prompt_tokens: int = 0
    mask: bytes | None = None  # of a constraint: one bit per token, lowest first

    @classmethod
    def of(cls, piece: SequenceSlice, mask: bytes | None = None) -> "Row":
        if piece.sample_position is None:
            raise ValueError(f"sequence {piece.seq_id} does not sample in this step")
        return cls(
            params=piece.sampling,
            position=piece.sample_position,
            choices=piece.choices,
            context=piece.context,
            prompt_tokens=piece.prompt_tokens,
            mask=mask,
        )

    @property
    def output(self) -> list[int]:
        return list(islice(self.context, self.prompt_tokens, None))

    @property
    def adjusted(self) -> bool:
        """Does any parameter change a logit? Most rows have none that does, and skip all of `adjust`."""
        params = self.params
        return (
            self.mask is not None
            or bool(params.allowed_token_ids or params.bad_words or params.logit_bias)
            or self.position < params.min_tokens
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
            or params.repetition_penalty != 1.0
        )
