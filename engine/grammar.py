"""Constrained output: which tokens keep a sequence inside the language it was asked for. Built on llguidance.

    constraint --compile--> matcher --output tokens--> state --> mask: one bit per token

A mask is a function of the constraint and the output tokens alone. Live matchers are a cache: a sequence that arrives
from another worker has its output replayed, and a sequence that stays pays for one token per step. The end of
sequence is in the mask exactly where the output is complete; where it cannot go on, nothing else is. That is
why the scheduler ends a complete constrained output even where ends are to be ignored (`ignore_eos`).

What a constraint may cost is bounded by work counted, not by a clock (`limits.CONSTRAINT_*`), so that every worker
gives up at much the same point: the sequence fails, alone. Copies of a matcher share what its lexer has learnt, and the
lexer's budget; so a sequence whose copy fails gets one matcher of its own, and fails if that one does.

`check_constraint` is what the router's edge asks. Neither torch nor the model's vocabulary is needed for that.
"""

import functools
import json
import math
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from engine.base import limits
from engine.base.errors import InvalidArgument
from engine.types import Constraint, ConstraintKind

FAILED: Final = "constraint"
"""Why a slice failed: its constraint cannot be obeyed, or costs too much. `StepOutput.failed`."""

# White space between JSON's tokens. Unbounded, as JSON has it, a small model may write nothing else until its length.
_JSON_OPTIONS: Final[Any] = {"whitespace_pattern": r"[ \t\r\n]{0,32}", "lenient": False}
_EOS: Final = 256
_DIGITS_MAX: Final = 18  # of a divisor: more would be slow even to multiply

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class ConstraintFailed(Exception):
    """The constraint gives no mask here. The text is fixed: what a client wrote is in no message and no log."""


# -- the edge ----------------------------------------------------------------------------------------------------------
def check_constraint(constraint: Constraint) -> None:
    """Raise `InvalidArgument` if no sequence could obey this constraint, or only at too high a cost.

    Callable in any thread; it takes milliseconds, and at most about half a second for a hostile one. llguidance lets
    go of the GIL while it compiles and computes (measured: another thread is never held up for more than 25 ms).
    """
    try:
        matcher = _compile(constraint, _byte_tokenizer())
        _mask(matcher)
    except ConstraintFailed as error:
        raise InvalidArgument(f"constraint: {error}", field="constraint") from None


@functools.cache
def _byte_tokenizer() -> LLTokenizer:
    """Made once: that costs more than checking most constraints does."""
    return LLTokenizer(TokenizerWrapper(_Bytes()))


class _Bytes:
    """The smallest vocabulary that can write everything: one token per byte, and an end."""

    eos_token_id = _EOS
    bos_token_id = None
    tokens: Final = (*(bytes([byte]) for byte in range(_EOS)), b"<eos>")
    special_token_ids: Final = (_EOS,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


# -- the executor ------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class _Live:
    """A sequence's matcher, and the output that it has read. `alone`: it shares its lexer with nobody."""

    constraint: Constraint
    matcher: LLMatcher
    output: list[int]
    alone: bool = False

    def advance(self, output: Sequence[int], ends: frozenset[int]) -> bytes:
        """Read what is new and say what may follow. Nothing is read after an end that the scheduler ignored."""
        unread = list(output[len(self.output) :])
        if unread and ends.isdisjoint(self.output[-1:]):
            first_end = next((index for index, token in enumerate(unread) if token in ends), len(unread))
            if not self.matcher.consume_tokens(unread[: first_end + 1]):
                raise ConstraintFailed("the output is not in its language, or takes too much work to follow")
        self.output += unread
        return _mask(self.matcher)


class Grammars:
    """Masks for one model's vocabulary. Used by the engine thread alone."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        tokenizer: Path  # a tokenizer.json
        vocab_size: int  # of the logits
        eos_token_ids: tuple[int, ...]
        live_max: int = limits.MATCHERS_MAX
        spares_max: int = limits.MATCHER_SPARES_MAX

    def __init__(self, config: Config) -> None:
        self._tokenizer = LLTokenizer(
            config.tokenizer.read_text(encoding="utf-8"), n_vocab=config.vocab_size, eos_token=[*config.eos_token_ids]
        )
        self._ends = frozenset(config.eos_token_ids)
        self._live: _Recent[int, _Live] = _Recent(config.live_max)
        self._spares: _Recent[Constraint, LLMatcher | None] = _Recent(config.spares_max)  # None: does not compile

    def mask(self, constraint: Constraint, seq_id: int, output: Sequence[int]) -> bytes:
        """Bit t, lowest first, says whether token t may follow `output`. Raises `ConstraintFailed`."""
        live = self._live.get(seq_id)
        if live is None or live.constraint != constraint or live.output != output[: len(live.output)]:
            live = _Live(constraint, self._spare(constraint).deep_copy(), [])
        try:
            mask = live.advance(output, self._ends)
        except ConstraintFailed:
            if live.alone:
                raise
            self._spares.drop(constraint)
            live = _Live(constraint, self._compiled(constraint), [], alone=True)
            mask = live.advance(output, self._ends)
        self._live.put(seq_id, live)
        return mask

    def _spare(self, constraint: Constraint) -> LLMatcher:
        """What sequences of this constraint are copied from. That one does not compile is remembered too."""
        if constraint not in self._spares:
            self._spares.put(constraint, None)
            self._spares.put(constraint, self._compiled(constraint))
        matcher = self._spares.get(constraint)
        if matcher is None:
            raise ConstraintFailed("it did not compile before")
        return matcher

    def _compiled(self, constraint: Constraint) -> LLMatcher:
        return _compile(constraint, self._tokenizer)


def _mask(matcher: LLMatcher) -> bytes:
    mask: bytes = matcher.compute_bitmask()
    if matcher.is_error():
        raise ConstraintFailed("nothing can satisfy it, or following it takes too much work")
    return mask


class _Recent(Generic[Key, Value]):
    """The last so many values, by use."""

    def __init__(self, count_max: int) -> None:
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._count_max = count_max

    def __contains__(self, key: Key) -> bool:
        return key in self._values

    def get(self, key: Key) -> Value | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def drop(self, key: Key) -> None:
        self._values.pop(key, None)

    def put(self, key: Key, value: Value) -> None:
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._count_max:
            self._values.popitem(last=False)


# -- compiling ---------------------------------------------------------------------------------------------------------
def _compile(constraint: Constraint, tokenizer: LLTokenizer) -> LLMatcher:
    try:
        matcher = LLMatcher(tokenizer, _grammar(constraint), log_level=0, limits=_limits())
    except (ValueError, RecursionError):  # llguidance's own parser of JSON; its text would quote the schema
        raise ConstraintFailed("is not JSON, or nested too deeply") from None
    if matcher.is_error():
        raise ConstraintFailed("is not valid, uses a feature that is not supported, or takes too much work to compile")
    return matcher


def _limits() -> LLParserLimits:
    return LLParserLimits(
        initial_lexer_fuel=limits.CONSTRAINT_COMPILE_FUEL,
        step_lexer_fuel=limits.CONSTRAINT_STEP_FUEL,
        step_max_items=limits.CONSTRAINT_STEP_ITEMS_MAX,
        max_items_in_row=limits.CONSTRAINT_ROW_ITEMS_MAX,
        max_lexer_states=limits.CONSTRAINT_LEXER_STATES_MAX,
        max_grammar_size=limits.CONSTRAINT_SYMBOLS_MAX,
        verbose_errors=False,
    )


def _grammar(constraint: Constraint) -> str:
    """In llguidance's own form. Raises ValueError and RecursionError for what is not JSON, or not reasonably so."""
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            grammar = _json_grammar(json.loads(constraint.text))
        case ConstraintKind.JSON_OBJECT:
            grammar = _json_grammar({"type": "object"})
        case ConstraintKind.REGEX:
            grammar = LLMatcher.grammar_from_regex(constraint.text)
        case ConstraintKind.CHOICE:
            grammar = LLMatcher.grammar_from_regex(_choice_pattern(json.loads(constraint.text)))
        case ConstraintKind.GRAMMAR:
            if "%json" in constraint.text:  # it would go round `_check_work`
                raise ConstraintFailed("%json is not supported inside a grammar: use a JSON schema")
            grammar = LLMatcher.grammar_from_lark(constraint.text)
    return str(grammar)


def _json_grammar(schema: Any) -> str:
    schema = {} if schema is True else schema
    if not isinstance(schema, dict):
        raise ConstraintFailed("a JSON schema is an object, and not false")
    _check_work(schema)
    # Written anew, so that both sides have read the same: names given twice, large numbers.
    grammar: str = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_OPTIONS)
    return grammar


def _choice_pattern(choices: Any) -> str:
    """The pattern of exactly these texts. Everything but letters and digits is written as its number."""
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise ConstraintFailed("choices are a list of at least one text")
    texts = ("".join(map(_literal, choice)) for choice in choices)
    return f"(?:{'|'.join(texts)})"


def _literal(character: str) -> str:
    return character if character.isascii() and character.isalnum() else f"\\x{{{ord(character):X}}}"


def _check_work(schema: Any) -> None:
    """The two ways to make llguidance work that it does not count.

    Optional properties cost the square of their number. A divisor of a million takes eight seconds and 400 MB; all
    divisors are looked at together, on one scale, because `allOf` may join any of them.
    """
    divisors = []
    for members in _objects_in(schema):
        if len(members) > limits.CONSTRAINT_MEMBERS_MAX:
            raise ConstraintFailed(f"at most {limits.CONSTRAINT_MEMBERS_MAX} members in one object of a JSON schema")
        divisor = members.get("multipleOf")
        if isinstance(divisor, int | float) and math.isfinite(divisor):
            divisors.append(abs(Decimal(str(divisor))))
    if _common_multiple(divisors) > limits.CONSTRAINT_MULTIPLE_MAX:
        raise ConstraintFailed(f"multipleOf: least common multiple at most {limits.CONSTRAINT_MULTIPLE_MAX} units")


def _common_multiple(divisors: Sequence[Decimal]) -> int:
    """Of all, in units of the last decimal place that any of them has."""
    scale = min((int(divisor.as_tuple().exponent) for divisor in divisors), default=0)
    if any(divisor.adjusted() - scale > _DIGITS_MAX for divisor in divisors):
        return limits.CONSTRAINT_MULTIPLE_MAX + 1
    return math.lcm(*(int(divisor.scaleb(-scale)) or 1 for divisor in divisors))


def _objects_in(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object at any depth, without recursion."""
    unseen = [value]
    while unseen:
        value = unseen.pop()
        if isinstance(value, dict):
            yield value
            unseen.extend(value.values())
        elif isinstance(value, list):
            unseen.extend(value)
