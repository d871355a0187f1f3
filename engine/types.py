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


class ConstraintKind(StrEnum):
    """What a constrained output must look like. `Constraint.text` is the schema, pattern or grammar itself."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"  # any JSON object; no text
    REGEX = "regex"
    CHOICE = "choice"  # text: a JSON list of strings
    GRAMMAR = "grammar"  # Lark syntax


@dataclass(frozen=True, slots=True)
class Constraint:
    """The language that the output must be in. A value: the automaton is rebuilt from it wherever the request goes."""

    kind: ConstraintKind
    text: str = ""

    def __post_init__(self) -> None:
        if len(self.text.encode()) > limits.CONSTRAINT_BYTES_MAX:
            raise InvalidArgument(
                f"constraint: at most {limits.CONSTRAINT_BYTES_MAX} bytes of {self.kind.value}", field="constraint"
            )


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely the model found one token: natural logarithms of its own distribution, before any parameter below."""

    logprob: float
    rank: int  # 1 for the likeliest
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), likeliest first


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to pick the next token. Sampling is a pure function of logits, these, the choice, the output position and
    the tokens so far (DESIGN 1): no sampler state travels.

    `seed` is always set by the time a worker sees this: the router draws one when the client gave none, so that a
    request that moves between workers continues the same random sequence. Stop *strings* are the router's business.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    presence_penalty: float = 0.0  # of tokens in the output so far
    frequency_penalty: float = 0.0  # likewise, times how often
    repetition_penalty: float = 1.0  # of tokens in prompt and output
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()  # empty: all
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that are never completed
    constraint: Constraint | None = None
    seed: int = 0
    max_tokens: int = limits.OUTPUT_TOKENS_DEFAULT
    min_tokens: int = 0  # neither end of sequence nor stop tokens before so many
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # of output tokens: None: none; k: the token's own and the k likeliest
    prompt_logprobs: int | None = None  # likewise, of the prompt's tokens but the first

    def __post_init__(self) -> None:
        for field, (low, high) in _RANGES.items():
            _require_range(field, getattr(self, field), low, high)
        _require_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _require_range("repetition_penalty", self.repetition_penalty, 0.0, limits.REPETITION_PENALTY_MAX, low_open=True)
        for field in ("logprobs", "prompt_logprobs"):
            _require_range(field, getattr(self, field) or 0, 0, limits.LOGPROBS_MAX)
        for field, count_max in _COUNTS.items():
            _require_count(field, len(getattr(self, field)), count_max)
        self._check_ids()

    def _check_ids(self) -> None:
        if any(not math.isfinite(bias) for _, bias in self.logit_bias):
            raise InvalidArgument("logit_bias: values must be finite", field="logit_bias")
        if not all(self.bad_words) or sum(map(len, self.bad_words)) > limits.BAD_WORDS_TOKENS_MAX:
            text = f"bad_words: none may be empty, {limits.BAD_WORDS_TOKENS_MAX} tokens at most in all"
            raise InvalidArgument(text, field="bad_words")
        for field, ids in self.token_ids_by_field():
            if any(token < 0 for token in ids):
                raise InvalidArgument(f"{field}: ids must be >= 0", field=field)

    def token_ids_by_field(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Every token id in here, under the name of its field: whoever knows the vocabulary checks the upper end."""
        return (
            ("stop_token_ids", self.stop_token_ids),
            ("allowed_token_ids", self.allowed_token_ids),
            ("logit_bias", tuple(token for token, _ in self.logit_bias)),
            ("bad_words", tuple(token for word in self.bad_words for token in word)),
        )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


# Closed ranges; NaN and infinities are in none.
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, limits.TEMPERATURE_MAX),
    "top_k": (0, limits.TOP_K_MAX),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "seed": (0, limits.SEED_MAX),
    "max_tokens": (0, limits.OUTPUT_TOKENS_MAX),
    "min_tokens": (0, limits.OUTPUT_TOKENS_MAX),
}
_COUNTS = {
    "stop_token_ids": limits.STOP_TOKEN_IDS_MAX,
    "logit_bias": limits.LOGIT_BIAS_MAX,
    "allowed_token_ids": limits.ALLOWED_TOKEN_IDS_MAX,
    "bad_words": limits.BAD_WORDS_MAX,
}


def _require_count(field: str, count: int, count_max: int) -> None:
    if count > count_max:
        raise InvalidArgument(f"{field}: at most {count_max} entries, got {count}", field=field)


def _require_range(field: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    """Refuse NaN, infinities and anything outside [low, high] (or (low, high])."""
    inside = math.isfinite(value) and low <= value <= high and not (low_open and value == low)
    if not inside:
        bracket = "(" if low_open else "["
        raise InvalidArgument(f"{field}: must be in {bracket}{low:g}, {high:g}], got {value!r}", field=field)
