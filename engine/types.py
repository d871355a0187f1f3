"""Words shared by every floor: what to sample, why a sequence ended, which roles a worker has.

No behaviour beyond validation; no tensors, no networks.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from engine.base import limits
from engine.base.errors import InvalidArgument


class Role(StrEnum):
    """What a worker may be asked to do. A worker has a *set* of these."""

    ENCODE = "encode"
    PREFILL = "prefill"
    DECODE = "decode"


class FinishReason(StrEnum):
    """Why a sequence ended by itself (OpenAI's words)."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to pick the next token. Sampling is a pure function of logits, these, and the output position.

    `seed` is always set by the time a worker sees this: the router draws one when the client gave none, so that a
    request that moves between workers continues the same random sequence.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = limits.OUTPUT_TOKENS_DEFAULT
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require_range("temperature", self.temperature, 0.0, limits.TEMPERATURE_MAX)
        _require_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _require_range("seed", self.seed, 0, limits.SEED_MAX)
        _require_range("max_tokens", self.max_tokens, 0, limits.OUTPUT_TOKENS_MAX)
        if len(self.stop_token_ids) > limits.STOP_TOKEN_IDS_MAX:
            raise InvalidArgument(
                f"stop_token_ids: at most {limits.STOP_TOKEN_IDS_MAX} ids, got {len(self.stop_token_ids)}",
                field="stop_token_ids",
            )
        if any(token < 0 for token in self.stop_token_ids):
            raise InvalidArgument("stop_token_ids: ids must be >= 0", field="stop_token_ids")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _require_range(field: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    """Refuse NaN, infinities and anything outside [low, high] (or (low, high])."""
    inside = math.isfinite(value) and low <= value <= high and not (low_open and value == low)
    if not inside:
        bracket = "(" if low_open else "["
        raise InvalidArgument(f"{field}: must be in {bracket}{low:g}, {high:g}], got {value!r}", field=field)
