"""Constrained output: every finished output is in its language, state is replayable, hostile constraints stay cheap.

Logits are random, so nothing but the mask keeps an output on its path.
"""

import json
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from engine.base import limits
from engine.base.errors import InvalidArgument
from engine.grammar import ConstraintFailed, Grammars, check_constraint
from engine.sampling import Failure, Row, sample_batch
from engine.types import Constraint, ConstraintKind, SamplingParams
from tests.engine.random_schemas import random_schema
from tests.engine.tiny_tokenizers import EOS, SIZE, ids_of, save_tokenizer, text_of

STEPS_MAX = 600


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of small steps: a second thread would only be waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def grammars(tokenizer: Path) -> Grammars:
    return Grammars(config_of(tokenizer))


def config_of(tokenizer: Path, **settings: int) -> Grammars.Config:
    return Grammars.Config(tokenizer=tokenizer, vocab_size=SIZE + 3, eos_token_ids=(EOS,), **settings)


def schema(value: Any) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(value))


def regex(pattern: str) -> Constraint:
    return Constraint(ConstraintKind.REGEX, pattern)


def tokens_in(mask: bytes) -> set[int]:
    return {8 * index + bit for index, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1}


def allowed(grammars: Grammars, constraint: Constraint, text: str) -> str:
    """What may follow `text`, as text; the end is shown as "$"."""
    tokens = tokens_in(grammars.mask(constraint, hash(text), ids_of(text)))
    assert max(tokens) < SIZE, "an id that spells nothing"
    return text_of(sorted(tokens)) + "$" * (EOS in tokens)


class Writer:
    """Writes one constrained output from random logits, with a growing wish to close what is open and to end."""

    def __init__(self, grammars: Grammars, vocab_size: int, closing: Iterable[int], eos: int) -> None:
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._closing = torch.tensor(sorted(closing))
        self._eos = eos

    def write(self, constraint: Constraint, seed: int) -> list[int]:
        """The output without its end. Fails the test if it does not end."""
        generator = torch.Generator().manual_seed(seed)
        output: list[int] = []
        while len(output) < STEPS_MAX:
            logits_V = torch.randn(self._vocab_size, generator=generator)
            logits_V[self._closing] += 2.0 + 0.1 * len(output)
            token = self._pick(logits_V, constraint, seed, output)
            if token == self._eos:
                return output
            output.append(token)
        pytest.fail(f"no end after {STEPS_MAX} tokens")

    def _pick(self, logits_V: torch.Tensor, constraint: Constraint, seed: int, output: list[int]) -> int:
        mask = self._grammars.mask(constraint, seed, output)
        params = SamplingParams(temperature=1.0, seed=seed)
        (picked,) = sample_batch(logits_V[None], [Row(params=params, position=len(output), context=output, mask=mask)])
        assert not isinstance(picked, Failure), picked
        return picked[0].token_id


def tiny_writer(grammars: Grammars) -> Writer:
    return Writer(grammars, SIZE + 3, {EOS, *ids_of('"}],')}, EOS)


def assert_valid(text: str, schema: Any) -> None:
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


# -- languages ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(40))
def test_what_is_written_satisfies_its_schema(seed: int, grammars: Grammars) -> None:
    wanted = random_schema(seed)
    if "ü" in json.dumps(wanted, ensure_ascii=False) or "é" in json.dumps(wanted, ensure_ascii=False):
        wanted = json.loads(
            json.dumps(wanted, ensure_ascii=False).replace("ü", "u").replace("ï", "i").replace("é", "e")
        )
    assert_valid(text_of(tiny_writer(grammars).write(schema(wanted), seed)), wanted)


@pytest.mark.model
@pytest.mark.timeout(300)
def test_200_schemas_are_satisfied_with_a_real_vocabulary(model_dir: Path) -> None:
    from tokenizers import Tokenizer

    from engine.models.info import describe

    info, tokenizer = describe(model_dir), Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    (eos,) = info.eos_token_ids
    grammars = Grammars(
        Grammars.Config(
            tokenizer=model_dir / "tokenizer.json", vocab_size=info.vocab_size, eos_token_ids=info.eos_token_ids
        )
    )
    closing = {token for text, token in tokenizer.get_vocab().items() if set(text) <= set('"}],')}
    writer = Writer(grammars, info.vocab_size, {eos, *closing}, eos)
    for seed in range(200):
        wanted = random_schema(seed)
        check_constraint(schema(wanted))
        assert_valid(tokenizer.decode(writer.write(schema(wanted), seed)), wanted)


@pytest.mark.parametrize("seed", range(5))
def test_a_json_object_is_one(seed: int, grammars: Grammars) -> None:
    text = text_of(tiny_writer(grammars).write(Constraint(ConstraintKind.JSON_OBJECT), seed))
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("pattern", ["[a-c]{3,9}", "(yes|no|maybe) .{0,3}!", "x+y*", r"\d{3}-\d{4}", ""])
@pytest.mark.parametrize("seed", range(3))
def test_a_pattern_is_matched_from_end_to_end(pattern: str, seed: int, grammars: Grammars) -> None:
    assert re.fullmatch(pattern, text_of(tiny_writer(grammars).write(regex(pattern), seed)))


def test_a_choice_is_one_of_the_texts_and_each_can_be_had(grammars: Grammars) -> None:
    texts = ["a.b", "a|b", "[x]", "back\\slash", "two words", "{3}", "^a$"]
    constraint = Constraint(ConstraintKind.CHOICE, json.dumps(texts))
    assert {text_of(tiny_writer(grammars).write(constraint, seed)) for seed in range(60)} == set(texts)


def test_a_grammar_is_followed(grammars: Grammars) -> None:
    constraint = Constraint(ConstraintKind.GRAMMAR, 'start: "(" start ")" | "x"')
    for seed in range(8):
        text = text_of(tiny_writer(grammars).write(constraint, seed))
        assert re.fullmatch(r"\(*x\)*", text)
        assert text.count("(") == text.count(")")


def test_white_space_cannot_go_on_for_ever(grammars: Grammars) -> None:
    constraint = schema({"type": "array", "items": {"type": "integer"}})
    assert " " in allowed(grammars, constraint, "[" + " " * 31)
    assert " " not in allowed(grammars, constraint, "[" + " " * 32)
    assert "]" in allowed(grammars, constraint, "[\n    1,\n    2\n")


# -- the end -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("pattern", "text", "following"),
    [("ab*", "", "a"), ("ab*", "a", "b$"), ("ab*", "abb", "b$"), ("ab", "a", "b"), ("ab", "ab", "$"), ("a?", "", "a$")],
)
def test_the_end_is_allowed_exactly_where_the_output_is_complete(
    pattern: str, text: str, following: str, grammars: Grammars
) -> None:
    assert allowed(grammars, regex(pattern), text) == following


@pytest.mark.parametrize("text", ["ab", "abb"])
def test_after_an_end_that_was_ignored_only_ends_follow(text: str, grammars: Grammars) -> None:
    output = ids_of(text)
    for _ in range(3):
        output.append(EOS)
        assert tokens_in(grammars.mask(regex("ab+"), 1, output)) == {EOS}
        assert tokens_in(grammars.mask(regex("ab+"), 100 + len(output), output)) == {EOS}, "all at once"
        assert tokens_in(grammars.mask(regex("ab+"), 200 + len(output), [*output, *ids_of("a")])) == {EOS}, "not read"


def test_every_end_of_a_model_ends(tokenizer: Path) -> None:
    ends = (EOS, *ids_of("~"))
    grammars = Grammars(Grammars.Config(tokenizer=tokenizer, vocab_size=SIZE, eos_token_ids=ends))
    assert tokens_in(grammars.mask(regex("a"), 1, ids_of("a"))) == set(ends)


# -- matchers are a cache ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(12))
def test_replay_gives_the_masks_of_going_step_by_step(seed: int, tokenizer: Path, grammars: Grammars) -> None:
    constraint = schema(random_schema(seed))
    output = tiny_writer(grammars).write(constraint, seed)
    for length in range(0, len(output) + 1, 1 + len(output) // 12):
        moved = Grammars(config_of(tokenizer)).mask(constraint, 1, output[:length])
        assert moved == Grammars(config_of(tokenizer)).mask(constraint, 2, output[:length])
        assert moved == grammars.mask(constraint, 1000 + length, output[:length])
    stepwise = [grammars.mask(constraint, 7, output[:length]) for length in range(len(output) + 1)]
    assert stepwise[-1] == Grammars(config_of(tokenizer)).mask(constraint, 1, output)


def test_sequences_take_turns_in_a_cache_of_one(tokenizer: Path, grammars: Grammars) -> None:
    small = Grammars(config_of(tokenizer, live_max=1, spares_max=1))
    outputs = {1: ids_of("aaxyxy"), 2: ids_of("abbbbb")}
    constraints = {1: regex("a*(xy)*"), 2: regex("ab*")}
    for length in range(7):
        for seq_id, output in outputs.items():
            expected = grammars.mask(constraints[seq_id], seq_id, output[:length])
            assert small.mask(constraints[seq_id], seq_id, output[:length]) == expected


def test_a_sequence_whose_output_is_another_is_not_believed(grammars: Grammars) -> None:
    constraint = regex("ab|cd")
    assert tokens_in(grammars.mask(constraint, 1, ids_of("a"))) == set(ids_of("b"))
    assert tokens_in(grammars.mask(constraint, 1, ids_of("c"))) == set(ids_of("d"))
    assert tokens_in(grammars.mask(constraint, 1, [])) == set(ids_of("ac"))
    assert tokens_in(grammars.mask(regex("x"), 1, [])) == set(ids_of("x"))


def test_an_output_outside_the_language_fails_and_its_neighbour_goes_on(grammars: Grammars) -> None:
    grammars.mask(regex("ab"), 1, ids_of("a"))
    with pytest.raises(ConstraintFailed):
        grammars.mask(regex("ab"), 2, ids_of("b"))
    assert tokens_in(grammars.mask(regex("ab"), 1, ids_of("a"))) == set(ids_of("b"))
    assert tokens_in(grammars.mask(regex("ab"), 3, ids_of("ab"))) == {EOS}


def test_a_neighbour_that_uses_up_the_shared_lexer_costs_nobody_his_output(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies share a lexer and its budget: who finds it spent gets one of his own."""
    monkeypatch.setattr(limits, "CONSTRAINT_LEXER_STATES_MAX", 400)
    constraint = regex("(.*a.{12}){2}b*")
    grammars.mask(constraint, 0, [])
    spent = 0
    for seq_id in range(1, 40):
        generator, output = random.Random(seq_id), list[int]()
        try:
            for _ in range(12):
                output.append(generator.choice(sorted(tokens_in(grammars.mask(constraint, seq_id, output)))))
        except ConstraintFailed:
            spent += 1
    assert spent < 39, "each fails only by its own work"
    assert grammars.mask(constraint, 99, ids_of("abc"))


class TiredMatcher:
    """Reads what it is given first, and nothing more."""

    def __init__(self) -> None:
        self._fresh = True

    def deep_copy(self) -> "TiredMatcher":
        return TiredMatcher()

    def consume_tokens(self, tokens: list[int]) -> bool:
        fresh, self._fresh = self._fresh, False
        return fresh

    def compute_bitmask(self) -> bytes:
        return b"\xff"

    def is_error(self) -> bool:
        return False


def test_a_sequence_gets_one_second_chance(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an end to them, every step of a hostile constraint would compile and replay."""
    compiled: list[TiredMatcher] = []

    def compile_one(constraint: Constraint, tokenizer: object) -> TiredMatcher:
        compiled.append(TiredMatcher())
        return compiled[-1]

    monkeypatch.setattr("engine.grammar._compile", compile_one)
    for output in ([], [5], [5, 5]):  # the copy reads one token; a matcher of its own reads two at once
        grammars.mask(regex("a"), 1, output)
    with pytest.raises(ConstraintFailed):
        grammars.mask(regex("a"), 1, [5, 5, 5])
    assert len(compiled) == 2


# -- what is refused ---------------------------------------------------------------------------------------------------
def nested(depth: int, key: str = "items") -> Any:
    value: Any = {"type": "integer"}
    for _ in range(depth):
        value = {"type": "array", key: value}
    return value


def properties(count: int, value: Any) -> Any:
    return {"type": "object", "properties": {f"p{index}": value for index in range(count)}}


REFUSED: dict[str, Callable[[], Constraint]] = {
    "not JSON": lambda: Constraint(ConstraintKind.JSON_SCHEMA, "{"),
    "not an object": lambda: schema([1]),
    "an unknown type": lambda: schema({"type": "foo"}),
    "an unknown keyword": lambda: schema({"type": "array", "uniqueItems": True}),
    "nothing satisfies false": lambda: schema(False),
    "nothing satisfies a minimum over the maximum": lambda: schema({"type": "integer", "minimum": 3, "maximum": 2}),
    "a reference to elsewhere": lambda: schema({"$ref": "http://example.com/schema"}),
    "a reference to itself": lambda: schema({"$ref": "#"}),
    "references in a circle": lambda: schema(
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    ),
    "brackets": lambda: Constraint(ConstraintKind.JSON_SCHEMA, "[" * limits.CONSTRAINT_BYTES_MAX),
    "nested 300 deep": lambda: schema(nested(300)),
    "nested 2,500 deep": lambda: Constraint(ConstraintKind.JSON_SCHEMA, '{"items":' * 2500 + "{}" + "}" * 2500),
    "4,000 properties": lambda: schema(properties(4000, {})),
    "products of alternatives": lambda: schema(
        {
            "allOf": [
                {"anyOf": [properties(1, {"type": "string", "minLength": 4 * a + b}) for b in range(4)]}
                for a in range(12)
            ]
        }
    ),
    "a large divisor": lambda: schema({"type": "integer", "multipleOf": 999_983}),
    "a large divisor of fractions": lambda: schema({"type": "number", "multipleOf": 12.34567}),
    "divisors with a large common multiple": lambda: schema(
        {"allOf": [{"type": "integer", "multipleOf": prime} for prime in (97, 101, 103)]}
    ),
    "a divisor that is hidden in a grammar": lambda: Constraint(
        ConstraintKind.GRAMMAR, 'start: %json {"type": "integer", "multipleOf": 999983}'
    ),
    "a divisor of many digits": lambda: schema({"type": "number", "multipleOf": 1e300}),
    "a broken pattern": lambda: regex("((("),
    "a look-ahead": lambda: regex("(?=a)b"),
    "a pattern nested 3,000 deep": lambda: regex("(" * 3000 + "a" + ")" * 3000),
    "stars on stars": lambda: regex("(" * 1000 + "a" + "*)" * 1000),
    "no choices": lambda: Constraint(ConstraintKind.CHOICE, "[]"),
    "choices that are no texts": lambda: Constraint(ConstraintKind.CHOICE, "[1]"),
    "a grammar without its rules": lambda: Constraint(ConstraintKind.GRAMMAR, "start: foo"),
    "8,000 optional symbols": lambda: Constraint(ConstraintKind.GRAMMAR, "start: " + '"a"? ' * 8000),
    "patterns that exclude each other": lambda: Constraint(
        ConstraintKind.GRAMMAR, r"start: A" + "\n" + r"A: /(.|\n)*b(.|\n){20}/ & ~/(.|\n)*b(.|\n){20}/"
    ),
}
# Compile, and cost little or fail in a later step.
COSTLY: dict[str, Callable[[], Constraint]] = {
    "a billion items": lambda: schema({"type": "array", "items": {}, "minItems": 10**9, "maxItems": 10**9}),
    "a billion characters": lambda: schema({"type": "string", "minLength": 10**9}),
    "9,000 values": lambda: schema({"enum": list(range(9_000))}),
    "400 patterns": lambda: schema(
        properties(40, {})
        | {"properties": {f"p{i}": {"type": "string", "pattern": f"^(.*x.{{{i % 30}}})+$"} for i in range(400)}}
    ),
    "900 lengths": lambda: schema(
        {"anyOf": [{"type": "string", "minLength": size, "maxLength": 37 * size} for size in range(900)]}
    ),
    "a tree": lambda: schema(
        {"$defs": {"n": {"type": "object", "properties": {"l": {"$ref": "#/$defs/n"}, "r": {"$ref": "#/$defs/n"}}}}}
        | {"$ref": "#/$defs/n"}
    ),
    "plus on plus": lambda: regex("(a+)+b"),
    "a state for each subset": lambda: regex(".*a.{60}"),
    "thrice": lambda: regex("(.*[ab].{60}){3}[cd].{90}"),
    "powers": lambda: regex("((((a{1,100}){1,100}){1,100}){1,100})"),
    "a billion letters": lambda: regex("a{1000000000}"),
    "an ambiguous grammar": lambda: Constraint(ConstraintKind.GRAMMAR, 'start: x\nx: x x x | x x | "a" |'),
    "2,000 doublings": lambda: Constraint(
        ConstraintKind.GRAMMAR,
        "".join(f"r{rule}: r{rule + 1} r{rule + 1}\n" for rule in range(2000)) + 'r2000: "a"\nstart: r0',
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_nobody_can_obey_or_afford_is_refused_at_the_edge_and_fails_in_a_worker(
    name: str, grammars: Grammars
) -> None:
    constraint = REFUSED[name]()
    with pytest.raises(InvalidArgument) as refusal:
        check_constraint(constraint)
    assert refusal.value.field == "constraint"
    assert refusal.value.message.startswith("constraint: ")
    assert len(refusal.value.message) < 120, "a fixed text"
    for seq_id in range(2):
        with pytest.raises(ConstraintFailed):
            grammars.mask(constraint, seq_id, [])


@pytest.mark.parametrize("name", [*REFUSED, *COSTLY])
def test_a_hostile_constraint_costs_less_than_a_second(name: str, grammars: Grammars) -> None:
    """Of this thread's CPU, at the edge and in a worker: the promise itself. Other programs do not count."""
    constraint = (REFUSED | COSTLY)[name]()
    started_s = time.thread_time()
    walk(grammars, constraint)
    worker_s = time.thread_time() - started_s
    edge(constraint)
    edge_s = time.thread_time() - started_s - worker_s
    assert max(worker_s, edge_s) < 1.0


def edge(constraint: Constraint) -> None:
    try:
        check_constraint(constraint)
    except InvalidArgument:
        return


def walk(grammars: Grammars, constraint: Constraint, steps: int = 64) -> None:
    """As a sequence would: until the end, a failure, or so many tokens."""
    generator, output = random.Random(5), list[int]()
    try:
        while len(output) < steps and EOS not in output:
            output.append(generator.choice(sorted(tokens_in(grammars.mask(constraint, 1, output)))))
    except ConstraintFailed:
        return


@pytest.mark.parametrize("name", COSTLY)
def test_what_is_costly_is_no_reason_to_refuse(name: str) -> None:
    check_constraint(COSTLY[name]())


@pytest.mark.parametrize(
    "constraint",
    [
        schema({"type": "number", "multipleOf": 0.01}),
        schema(properties(300, {"type": "string"})),
        schema({"properties": {"multipleOf": {"type": "integer", "multipleOf": 60}, "b": {"multipleOf": 0.5}}}),
        schema(True),
        Constraint(ConstraintKind.JSON_OBJECT),
        Constraint(ConstraintKind.CHOICE, '["", "é", "\\ud83d\\ude00"]'),
    ],
)
def test_what_people_ask_for_is_accepted(constraint: Constraint) -> None:
    check_constraint(constraint)


def test_no_message_quotes_the_constraint() -> None:
    secrets: Sequence[Constraint] = [
        schema({"type": "secret"}),
        Constraint(ConstraintKind.JSON_SCHEMA, '{"secret'),
        regex("(secret"),
        Constraint(ConstraintKind.GRAMMAR, "start: secret"),
        Constraint(ConstraintKind.CHOICE, '{"secret": 1}'),
    ]
    for constraint in secrets:
        with pytest.raises(InvalidArgument) as refusal:
            check_constraint(constraint)
        assert "secret" not in refusal.value.message
