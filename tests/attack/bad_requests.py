"""Bad requests, as data: what each says, and the one answer that it gets. `test_bad_input` sends them.

Values are JSON text, so that what JSON cannot say (NaN, a lone surrogate) stands in the same rows as everything else.
Limits are named, not repeated; the sentences are written down a second time, for this file does not trust the code that
makes them. `row` is the line of the reliability plan: D1 damage, D2 shapes, D3 lengths, D4 sizes, D5 token ids,
D6 numbers, D7 Unicode, D8 hostile patterns, D9 markers, D14 what is not served, D15 ids, D16 headers, E identity.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine.base import limits
from tests.control_plane.router.edge_fakes import CARD

MARK: Final = "Zq7"  # in everything that a client may fill in freely: no answer and no line of a log may repeat it
COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"
BOTH: Final = (COMPLETIONS, CHAT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad:
    """One request and its answer. `param`: the field that the answer blames."""

    row: str
    name: str
    body: bytes
    message: str
    param: str | None
    status: int = 400
    path: str = COMPLETIONS
    method: str = "POST"
    headers: tuple[tuple[bytes, bytes], ...] = ()


# -- bodies ------------------------------------------------------------------------------------------------------------
PROMPTS: Final = {
    COMPLETIONS: ("prompt", f'"{MARK}"'),
    CHAT: ("messages", f'[{{"role":"user","content":"{MARK}"}}]'),
    "/tokenize": ("prompt", f'"{MARK}"'),
    "/detokenize": ("tokens", "[5]"),
}


def body_with(path: str, field: str, value: str) -> bytes:
    """A good body, but for one field. Of a dotted name, the last part is inside the object that the first ones name."""
    outer, *inner = field.split(".")
    for name in reversed(inner):
        value = f'{{"{name}":{value}}}'
    names, good = PROMPTS.get(path, ("", ""))
    fields = {"user": f'"{MARK}"'} | ({names: good} if names else {}) | {outer: value}
    return json_object(fields)


def json_object(fields: Mapping[str, str]) -> bytes:
    text = ",".join(f'"{name}":{value}' for name, value in fields.items())
    return f"{{{text}}}".encode()


def repeated(value: str, count: int) -> str:
    return f"[{','.join([value] * count)}]"


def strings(count: int, characters: int) -> str:
    return json.dumps([MARK.ljust(characters, "z")[:characters] for _ in range(count)])


def shown(value: str) -> str:
    return value if len(value) <= 80 else f"{value[:24]}...{value[-12:]}, {len(value)}"


def fields(row: str, field: str, sentence: str, values: Iterable[str], paths: Iterable[str] = BOTH) -> Iterator[Bad]:
    """The same field with several bad values, each on its own, in every kind of request that has it."""
    for path in paths:
        for value in values:
            yield Bad(
                row=row,
                name=f"{path} {field}={shown(value)}",
                path=path,
                body=body_with(path, field, value),
                message=f"{field}: {sentence}",
                param=field,
            )


# -- whole numbers -----------------------------------------------------------------------------------------------------
INTEGERS: Final = {  # least and most
    "max_tokens": (0, limits.OUTPUT_TOKENS_MAX),
    "min_tokens": (0, limits.OUTPUT_TOKENS_MAX),
    "n": (1, limits.CHOICES_MAX),
    "top_k": (-1, limits.TOP_K_MAX),
    "seed": (0, limits.SEED_MAX),
    "prompt_logprobs": (0, limits.LOGPROBS_MAX),
    "truncate_prompt_tokens": (-1, limits.PROMPT_TOKENS_MAX),
    "priority": (-limits.PRIORITY_MAX, limits.PRIORITY_MAX),
    "triptych.deadline_ms": (1, limits.REQUEST_DEADLINE_MS_MAX),
    "vllm_xargs.deadline_ms": (1, limits.REQUEST_DEADLINE_MS_MAX),
    "triptych.slo.ttft_ms": (1, limits.SLO_MS_MAX),
    "triptych.slo.tpot_ms": (1, limits.SLO_MS_MAX),
}
INTEGERS_OF_COMPLETIONS: Final = {
    "best_of": (1, limits.CHOICES_MAX),
    "logprobs": (0, limits.LOGPROBS_MAX),
}
INTEGERS_OF_CHAT: Final = {
    "max_completion_tokens": (0, limits.OUTPUT_TOKENS_MAX),
    "top_logprobs": (0, limits.LOGPROBS_MAX),
}
POWERS: Final = (2**31, 2**63 - 1, 2**63, 2**64, 10**30, -(2**31), -(2**63), -(2**63) - 1)
NO_INTEGERS: Final = ("true", "false", "1.0", "1e0", '"5"', f'"{MARK}"', '""', "[1]", "{}", "1e308", "1e-320")


def integers(names: Mapping[str, tuple[int, int]], paths: Iterable[str]) -> Iterator[Bad]:
    for name, (low, high) in names.items():
        outside = [str(value) for value in (low - 1, high + 1, *POWERS) if not low <= value <= high]
        yield from fields(
            "D4", name, f"must be an integer in [{low}, {high}]", dict.fromkeys([*outside, *NO_INTEGERS]), paths
        )


# -- numbers -----------------------------------------------------------------------------------------------------------
NUMBERS: Final = {  # as the sentence has them; and values just outside
    "temperature": ("[0, 100]", "-1e-9", "100.00001"),
    "top_p": ("(0, 1]", "0", "1.0000001"),
    "min_p": ("[0, 1]", "-1e-9", "1.0000001"),
    "presence_penalty": ("[-2, 2]", "-2.0001", "2.0001"),
    "frequency_penalty": ("[-2, 2]", "-2.0001", "2.0001"),
    "repetition_penalty": ("(0, 100]", "0", "100.00001"),
    "triptych.kl_budget": ("[0, 1]", "-1e-9", "1.0000001"),
    "vllm_xargs.kl_budget": ("[0, 1]", "-1e-9", "1.0000001"),
}
NO_NUMBERS: Final = ("true", '"1"', f'"{MARK}"', "[1]", "{}", "1e308", "-1e308", str(2**64), str(10**400))


def numbers() -> Iterator[Bad]:
    for name, (interval, *outside) in NUMBERS.items():
        yield from fields("D6", name, f"must be a number in {interval}", [*outside, *NO_NUMBERS])


# -- true and false ----------------------------------------------------------------------------------------------------
BOOLEANS: Final = (
    *("stream", "ignore_eos", "echo", "return_token_ids", "return_tokens_as_token_ids", "skip_special_tokens"),
    *("include_stop_str_in_output", "add_special_tokens"),
)
NO_BOOLEANS: Final = ("1", "0", '"true"', f'"{MARK}"', "[]", "{}", "1.0")


def booleans() -> Iterator[Bad]:
    for name in BOOLEANS:
        yield from fields("D2", name, "must be true or false", NO_BOOLEANS)


# -- token ids ---------------------------------------------------------------------------------------------------------
LAST_ID: Final = CARD.vocab_size - 1
ID_LISTS: Final = {
    "stop_token_ids": limits.STOP_TOKEN_IDS_MAX,
    "allowed_token_ids": limits.ALLOWED_TOKEN_IDS_MAX,
}
NO_IDS: Final = (
    *("-1", str(LAST_ID + 1), str(2**31), str(2**63), str(2**64), str(-(2**63))),
    *("1.0", "true", "null", '"5"', f'"{MARK}"', "[5]", "{}", "1e308"),
)


def token_ids() -> Iterator[Bad]:
    each = f"token ids must be integers in [0, {LAST_ID}]"
    for name, count_max in ID_LISTS.items():
        yield from fields("D5", name, each, [f"[5,{value}]" for value in NO_IDS])
        yield from fields("D5", name, "must be a list of token ids", ("5", f'"{MARK}"', "{}", "true"))
        yield from fields("D4", name, f"at most {count_max} ids", [repeated("5", count_max + 1)])
    yield from fields("D5", "allowed_token_ids", "must hold at least 1 id", ["[]"])
    keys = f"keys must be token ids in [0, {LAST_ID}], in decimal and as strings"
    bad_keys = ("-1", str(LAST_ID + 1), str(2**64), "05", "+5", "5.0", " 5", "", MARK, "٣", "1e1", "1" * 5_000)
    yield from fields("D5", "logit_bias", keys, [f'{{"{key}":1}}' for key in bad_keys])
    bias = "values must be numbers in [-100, 100]"
    bad_values = ("-100.001", "100.001", "true", "null", '"1"', "[1]", "{}", "1e308", str(2**64))
    yield from fields("D6", "logit_bias", bias, [f'{{"5":{value}}}' for value in bad_values])
    yield from fields("D2", "logit_bias", "must be an object", ("[]", "5", f'"{MARK}"', "true"))
    many = ",".join(f'"{index}":1' for index in range(limits.LOGIT_BIAS_MAX + 1))
    yield from fields("D4", "logit_bias", f"at most {limits.LOGIT_BIAS_MAX} entries", [f"{{{many}}}"])


# -- texts -------------------------------------------------------------------------------------------------------------
TEXT_LISTS: Final = {"stop": limits.STOP_STRINGS_MAX, "bad_words": limits.BAD_WORDS_MAX // 2}


def texts() -> Iterator[Bad]:
    characters_max = limits.STOP_STRING_CHARACTERS_MAX
    each = f"each string must have 1 to {characters_max} characters"
    not_lists = ("5", "true", "{}", "[5]", f'["{MARK}",null]', f'[["{MARK}"]]', "[true]")
    for name, count_max in TEXT_LISTS.items():
        yield from fields("D2", name, "must be a list of strings", not_lists)
        yield from fields("D4", name, f"at most {count_max} strings", [strings(count_max + 1, 3), strings(2_000, 8)])
        yield from fields("D4", name, each, ['[""]', f'["{MARK}",""]', strings(1, characters_max + 1)])
    yield from fields("D4", "stop", each, [json.dumps(MARK * characters_max)])
    together = f"at most {limits.INLINE_CHARACTERS_MAX} characters together"
    yield from fields("D4", "bad_words", together, [strings(limits.BAD_WORDS_MAX // 2, characters_max)])
    salt = f"must be a string of 1 to {limits.CACHE_SALT_CHARACTERS_MAX} characters"
    long_salt = json.dumps(MARK * limits.CACHE_SALT_CHARACTERS_MAX)
    yield from fields("E3", "cache_salt", salt, ('""', "5", "true", "[]", "{}", f'["{MARK}"]', long_salt))
    yield from fields("D2", "model", "must be a string", ("5", "true", "[]", "{}", f'["{MARK}"]'))
    name_sentence = f"must be a string of at most {limits.REQUEST_ID_CHARACTERS_MAX} characters"
    for name in ("request_id", "session_id"):
        long_name = json.dumps(MARK * limits.REQUEST_ID_CHARACTERS_MAX)
        yield from fields("D15", name, name_sentence, ("5", "true", "[]", "{}", long_name))
    for path in BOTH:
        for value in (f'"{MARK}"', '"TINY"', '"tiny "', '"../tiny"', '"tiny\\u0000"'):
            yield Bad(
                row="D2",
                name=f"{path} model={value}",
                path=path,
                body=body_with(path, "model", value),
                message="model: this model is not served here; GET /v1/models lists what is",
                param="model",
                status=404,
            )


# -- constraints -------------------------------------------------------------------------------------------------------
SCHEMA_TEXT: Final = "must be a JSON schema: an object, or the text of one"
NO_TEXTS: Final = ("5", '""', "true", "[]", "{}", f'["{MARK}"]')
SERVED_KINDS: Final = "served are: json_object, json, regex, choice, grammar"


def constraints() -> Iterator[Bad]:
    """Their shapes; what the compiler refuses is `HOSTILE`."""
    for prefix in ("guided_", "structured_outputs."):
        yield from fields("D2", f"{prefix}json", SCHEMA_TEXT, ("5", "true", "[]", f'"{MARK}"', '"5"', '"{"', '"[]"'))
        for kind in ("regex", "grammar"):
            yield from fields("D2", f"{prefix}{kind}", "must be a string that is not empty", NO_TEXTS)
        choice = "must be a list of strings, with at least 1 string and none of them empty"
        yield from fields("D2", f"{prefix}choice", choice, ("5", f'"{MARK}"', "[]", '[""]', "[5]", "{}", "[null]"))
    yield from fields("D2", "structured_outputs.json_object", "must be true or false", ("1", f'"{MARK}"', "{}"))
    yield from fields("D2", "structured_outputs", "must be an object", ("5", f'"{MARK}"', "[]", "true"))
    yield from fields("D2", "structured_outputs", SERVED_KINDS, (f'{{"ebnf":"{MARK}"}}', '{"json_objekt":true}'))
    yield from fields("D2", "response_format", "must be an object", ("5", f'"{MARK}"', "[]", "true"))
    kinds = "type must be one of: text, json_object, json_schema"
    yield from fields(
        "D2", "response_format", kinds, (f'{{"type":"{MARK}"}}', '{"type":null}', '{"type":5}', '{"schema":{}}')
    )
    schema = "json_schema must be an object that holds a schema"
    shapes = ("null", "5", "{}", f'"{MARK}"', "[]", '{"schema":null}', f'{{"name":"{MARK}"}}')
    yield from fields(
        "D2", "response_format", schema, [f'{{"type":"json_schema","json_schema":{shape}}}' for shape in shapes]
    )
    yield from fields(
        "D2",
        "response_format",
        SCHEMA_TEXT,
        [f'{{"type":"json_schema","json_schema":{{"schema":{shape}}}}}' for shape in ("5", "[]", f'"{MARK}"')],
    )
    two = f'{{"regex":"{MARK}","choice":["{MARK}"]}}'
    yield from (
        Bad(
            row="D2",
            name=f"{path} two constraints",
            path=path,
            body=body_with(path, "structured_outputs", two),
            message="structured_outputs.choice: only one constraint at a time; structured_outputs.regex is one already",
            param="structured_outputs.choice",
        )
        for path in BOTH
    )


DOES_NOT_COMPILE: Final = "is not valid, uses a feature that is not supported, or takes too much work to compile"
UNSATISFIABLE: Final = "nothing can satisfy it, or following it takes too much work"
NO_REGEXES: Final = (
    *(
        "(",
        "[",
        "*",
        "a{2,1}",
        "(?=a)b",
        "(?<!a)b",
        r"(a)\1",
        f"(?P<{MARK}>a",
        "[z-a]",
        rf"\p{{{MARK}}}",
        "a{0,99999999999}",
    ),
)
NO_GRAMMARS: Final = (
    MARK,
    f"start: {MARK}",
    "start: /(/",
    f"%import {MARK}",
    "start: a\na: b",
    'start: "a" | ' * 20,
)
NO_SCHEMAS: Final[tuple[dict[str, Any], ...]] = (
    *(
        {"type": MARK},
        {"type": 5},
        {"type": []},
        {"$ref": f"http://a/{MARK}"},
        {"$ref": f"file:///{MARK}"},
        {"$ref": 5},
    ),
    *({"$ref": f"#/{MARK}"}, {"enum": []}, {"not": {}}, {"anyOf": []}, {"required": MARK}, {"properties": 5}),
    *({"type": "string", "pattern": "("}, {"type": "string", "format": MARK}, {"patternProperties": {"(": {}}}),
    *(
        {"type": "integer", "minimum": 5, "maximum": 4},
        {"multipleOf": 0},
        {"allOf": [{"type": "string"}, {"type": "null"}]},
    ),
)


def hostile() -> Iterator[Bad]:
    """What is found only by compiling it, before any worker hears of it."""
    for prefix in ("guided_", "structured_outputs."):
        yield from fields("D8", f"{prefix}regex", DOES_NOT_COMPILE, map(json.dumps, NO_REGEXES))
        yield from fields("D8", f"{prefix}grammar", DOES_NOT_COMPILE, map(json.dumps, NO_GRAMMARS))
        yield from fields("D8", f"{prefix}json", DOES_NOT_COMPILE, map(json.dumps, NO_SCHEMAS))
        yield from fields("D8", f"{prefix}grammar", UNSATISFIABLE, ['"start: start"'])
        yield from fields("D8", f"{prefix}json", UNSATISFIABLE, ['{"$ref":"#"}'])
    formats = [json.dumps({"type": "json_schema", "json_schema": {"schema": schema}}) for schema in NO_SCHEMAS]
    yield from fields("D8", "response_format", DOES_NOT_COMPILE, formats)


# -- what is known and not served --------------------------------------------------------------------------------------
NEUTRAL: Final = {  # the values that ask for nothing, as the sentence has them; and some that ask for something
    "suffix": ('null, ""', (f'"{MARK}"', "5")),
    "length_penalty": ("null, 1", ("0.5", "true", '"1"')),
    "use_beam_search": ("null, false", ("true", "0", "1")),
    "spaces_between_special_tokens": ("null, true", ("false", "1")),
    "tools": ("null, []", (f'[{{"type":"function","function":{{"name":"{MARK}"}}}}]', "{}")),
    "tool_choice": ('null, "none", "auto"', ('"required"', f'{{"type":"{MARK}"}}')),
    "functions": ("null, []", (f'[{{"name":"{MARK}"}}]',)),
    "logits_processors": ("null, []", (f'["{MARK}"]',)),
    "prompt_embeds": ("null", (f'"{MARK}"', "[[0.5]]", '""', "[]")),
    "kv_transfer_params": ("null, {}", (f'{{"remote_host":"{MARK}"}}', '{"do_remote_decode":true}', "[]")),
    "ec_transfer_params": ("null, {}", (f'{{"peer":"{MARK}"}}',)),
}


def not_served() -> Iterator[Bad]:
    for name, (accepted, values) in NEUTRAL.items():
        yield from fields("D14", name, f"not served; accepted values: {accepted}", values, [COMPLETIONS])


# -- what depends on other fields --------------------------------------------------------------------------------------
def together() -> Iterator[Bad]:
    for path in BOTH:
        names, prompt = PROMPTS[path]
        for wanted, param, sentence in TOGETHER:
            yield Bad(
                row="D2",
                name=f"{path} {', '.join(f'{name}={value}' for name, value in wanted.items())}",
                path=path,
                body=json_object({names: prompt} | wanted),
                message=f"{param}: {sentence}",
                param=param,
            )


NEEDS_STREAM: Final = "needs stream to be true"
TOGETHER: Final = (
    ({"max_tokens": "4", "min_tokens": "5"}, "min_tokens", "must be at most max_tokens, which is 4"),
    ({"stream_options": '{"include_usage":true}'}, "stream_options", NEEDS_STREAM),
    ({"stream_options": '{"include_usage":false}', "stream": "false"}, "stream_options", NEEDS_STREAM),
    ({"stream_options": "5", "stream": "true"}, "stream_options", "must be an object"),
    ({"stream_options": f'"{MARK}"', "stream": "true"}, "stream_options", "must be an object"),
    ({"stream_options": "[]", "stream": "true"}, "stream_options", "must be an object"),
    (
        {"stream_options": '{"include_usage":1}', "stream": "true"},
        "stream_options.include_usage",
        "must be true or false",
    ),
    (
        {"stream_options": f'{{"continuous_usage_stats":"{MARK}"}}', "stream": "true"},
        "stream_options.continuous_usage_stats",
        "must be true or false",
    ),
    ({"prompt_logprobs": "1", "stream": "true"}, "prompt_logprobs", "not available when stream is true"),
    (
        {"truncate_prompt_tokens": "0"},
        "truncate_prompt_tokens",
        "0 would leave no prompt; at least 1, or -1 for as many as fit",
    ),
)


# -- our own object ----------------------------------------------------------------------------------------------------
def ours() -> Iterator[Bad]:
    for name in ("triptych", "vllm_xargs", "triptych.slo"):
        yield from fields("D2", name, "must be an object", ("5", "true", "[]", f'"{MARK}"'))
    codecs = ("5", "true", "[]", "{}", f'"{MARK}"', '"RAW"', '""', '"raw\\u0000"', '["raw"]')
    for name in ("triptych.codec", "vllm_xargs.codec"):
        yield from fields("D2", name, "must be one of: raw, int8", codecs)
    for path in BOTH:
        for (where, key), nearest in MISSPELT.items():
            yield misspelt(path, where, key, nearest)


MISSPELT: Final = {
    ("triptych", "codek"): "codec",
    ("triptych", "Codec"): "codec",
    ("triptych", "deadline"): "deadline_ms",
    ("triptych", "deadline_s"): "deadline_ms",
    ("triptych", "kl-budget"): "kl_budget",
    ("triptych", "klbudget"): "kl_budget",
    ("triptych", "slos"): "slo",
    ("triptych.slo", "ttft"): "ttft_ms",
    ("triptych.slo", "tpot_s"): "tpot_ms",
}


def misspelt(path: str, where: str, key: str, nearest: str) -> Bad:
    """The one place where a client's own word comes back, for it is a word of ours with a mistake in it."""
    return Bad(
        row="D2",
        name=f"{path} {where}.{key}",
        path=path,
        body=body_with(path, where, f'{{"{key}":"{MARK}"}}'),
        message=f'{where}: unknown key "{key}"; did you mean {nearest!r}?',
        param=f"{where}.{key}",
    )


# -- prompts -----------------------------------------------------------------------------------------------------------
CONTEXT: Final = CARD.max_model_len
ROOM: Final = f"(the model's context is {CONTEXT} tokens, prompt and output together)"


def prompts() -> Iterator[Bad]:
    one = [COMPLETIONS]
    yield from fields("D2", "prompt", "required", ["null"], one)
    yield from fields("D2", "prompt", PROMPT_SHAPE, PROMPT_SHAPES, one)
    yield from fields(
        "D3", "prompt", "must hold at least 1 token", ('""', "[]", "[[]]", '[""]', f'["{MARK}",""]', "[[1],[]]"), one
    )
    in_range = f"token ids must be integers in [0, {LAST_ID}]"
    outside = (
        "[-1]",
        f"[{LAST_ID + 1}]",
        f"[1,2,{2**31}]",
        f"[{2**63}]",
        f"[[5,{LAST_ID + 1}]]",
        f"[{-(2**63)}]",
        f"[{2**64}]",
        f"[[5],[{LAST_ID + 1}]]",
    )
    yield from fields("D5", "prompt", in_range, outside, one)
    too_long = f"at most {CONTEXT - 1} tokens, got {CONTEXT} {ROOM}"
    by_one = (repeated("5", CONTEXT), f"[{repeated('5', CONTEXT)}]", json.dumps(MARK.ljust(CONTEXT, "z")))
    yield from fields("D3", "prompt", too_long, by_one, one)
    yield from fields("D3", "prompt", f"at most {CONTEXT - 1} tokens, got 100000 {ROOM}", [repeated("5", 100_000)], one)
    yield from fields(
        "D3",
        "prompt",
        f"at most {CONTEXT - 1} tokens, got 1000000 characters of text {ROOM}",
        [json.dumps(MARK.ljust(1_000_000, "z"))],
        one,
    )
    ids = repeated("5", limits.PROMPT_TOKENS_MAX + 1)
    yield from fields("D3", "prompt", f"at most {limits.PROMPT_TOKENS_MAX} tokens", (ids, f"[{ids}]"), one)
    count = f"at most {limits.PROMPTS_MAX} prompts"
    many = (repeated(f'"{MARK}"', limits.PROMPTS_MAX + 1), repeated("[1]", limits.PROMPTS_MAX + 1))
    yield from fields("D4", "prompt", count, many, one)
    yield Bad(
        row="D4",
        name="many prompts, many choices",
        body=json_object({"prompt": repeated("[1]", limits.REQUEST_CHOICES_MAX // 16 + 1), "n": "16"}),
        message=f"n: at most {limits.REQUEST_CHOICES_MAX} choices for all prompts together",
        param="n",
    )
    yield Bad(
        row="D2",
        name="no prompt",
        body=json_object({"user": f'"{MARK}"'}),
        message="prompt: required",
        param="prompt",
    )
    yield Bad(
        row="D3",
        name="prompt and max_tokens by one",
        body=json_object({"prompt": "[1,2,3]", "max_tokens": str(CONTEXT - 2)}),
        message=f"max_tokens: prompt and max_tokens together at most {CONTEXT} tokens, got 3 + {CONTEXT - 2}",
        param="max_tokens",
    )


PROMPT_SHAPE: Final = "must be a string, a list of token ids, a list of strings, or a list of lists of token ids"
PROMPT_SHAPES: Final = (
    *("5", "true", "{}", "1.5", f'{{"text":"{MARK}"}}', f'{{"prompt_token_ids":[1],"text":"{MARK}"}}'),
    *("[null]", "[true]", "[1.0]", "[{}]", f'[{{"text":"{MARK}"}}]', f'["{MARK}",5]', f'[5,"{MARK}"]'),
    *(f'[[1],"{MARK}"]', f'["{MARK}",[1]]', "[[[1]]]", "[[1],2]", "[1,[2]]", "[[1.0]]", f'[["{MARK}"]]', "[1e2]"),
    *("[[null]]", "[1,null]", "[[1],null]", "[1e308]"),
)


# -- conversations -----------------------------------------------------------------------------------------------------
MESSAGES_SHAPE: Final = (
    "must be a list of objects, each with a role (a string) and a content "
    '(a string, or a list of parts such as {"type": "text", "text": ...})'
)
NO_MESSAGES: Final = (
    *(
        "5",
        "true",
        "{}",
        f'"{MARK}"',
        "[5]",
        f'["{MARK}"]',
        "[null]",
        "[[]]",
        "[true]",
        "[{}]",
        f'[{{"content":"{MARK}"}}]',
    ),
    *(f'[{{"role":{role},"content":"{MARK}"}}]' for role in ("5", "null", "[]", "{}", "true")),
    *(
        f'[{{"role":"user","content":{content}}}]'
        for content in ("5", "{}", "true", "1.5", "[5]", "[null]", "[[]]", "[{}]")
    ),
    *(f'[{{"role":"user","content":[{{"type":{kind},"text":"{MARK}"}}]}}]' for kind in ("5", "null", "[]", "{}")),
    *(f'[{{"role":"user","content":[{{"type":"text","text":{text}}}]}}]' for text in ("5", "[]", "{}", "true")),
    *(f'[{{"role":"user","content":"{MARK}","name":{name}}}]' for name in ("5", "[]", "{}")),
    f'[{{"role":"user","content":"{MARK}"}},5]',
)
ACCEPTED_PARTS: Final = "accepted types: text, input_text, output_text"
NO_PARTS: Final = {
    f'{{"type":"image_url","image_url":{{"url":"http://169.254.169.254/{MARK}"}}}}': "image_url parts are",
    f'{{"type":"image_url","image_url":{{"url":"file:///etc/{MARK}"}}}}': "image_url parts are",
    f'{{"type":"image_url","image_url":{{"url":"data:image/png;base64,{MARK}"}}}}': "image_url parts are",
    f'{{"type":"input_image","image_url":"{MARK}"}}': "input_image parts are",
    f'{{"type":"image_url","uuid":"{MARK}"}}': "image_url parts are",
    '{"type":"image_url","image_url":5,"uuid":[]}': "image_url parts are",
    f'{{"type":"image_url","image_url":"data:image/png;base64,{MARK * 3_000}"}}': "image_url parts are",
    f'{{"type":"image","image":"{MARK}"}}': "this type of part is",
    f'{{"type":"image_embeds","image_embeds":"{MARK}"}}': "image_embeds parts are",
    f'{{"type":"input_audio","input_audio":{{"data":"{MARK}"}}}}': "input_audio parts are",
    f'{{"type":"video_url","video_url":{{"url":"{MARK}"}}}}': "video_url parts are",
    f'{{"type":"file","file":{{"file_id":"{MARK}"}}}}': "file parts are",
    f'{{"type":"refusal","refusal":"{MARK}"}}': "refusal parts are",
    f'{{"type":"{MARK}","text":"{MARK}"}}': "this type of part is",
    '{"type":""}': "this type of part is",
    '{"type":"Text","text":"a"}': "this type of part is",
}
ROLES: Final = "must be one of: system, developer, user, assistant, tool"


def conversations() -> Iterator[Bad]:
    for path in (CHAT, "/tokenize"):
        yield from fields("D2", "messages", MESSAGES_SHAPE, NO_MESSAGES, [path])
        yield from fields("D2", "messages", f"must hold 1 to {limits.MESSAGES_MAX} messages", ["[]"], [path])
        one = f'{{"role":"user","content":"{MARK}"}}'
        yield from fields(
            "D4",
            "messages",
            f"at most {limits.MESSAGES_MAX} messages",
            [repeated(one, limits.MESSAGES_MAX + 1)],
            [path],
        )
        for where, sentence, second in messages():
            yield Bad(
                row="D2",
                name=f"{path} {shown(second)} {len(second)}",
                path=path,
                body=body_with(path, "messages", f"[{one},{second}]"),
                message=f"messages[1]{where}: {sentence}",
                param=f"messages[1]{where}",
            )
        yield from _lengths(path)
    yield from fields("D2", "messages", "required", ["null"], [CHAT])


def messages() -> Iterator[tuple[str, str, str]]:
    """Where in the second message, what is said of it, and the message."""
    for role in (MARK, "", "User", "user ", "function", "system\\n", "assistant\\u0000"):
        yield ".role", ROLES, f'{{"role":"{role}","content":"{MARK}"}}'
    for role in ("user", "system", "tool"):
        yield ".content", "must be a string or a list of parts", f'{{"role":"{role}"}}'
        yield ".content", "must be a string or a list of parts", f'{{"role":"{role}","content":null}}'
    for part, what in NO_PARTS.items():
        sentence = f"{what} not served; {ACCEPTED_PARTS}"
        yield ".content[0]", sentence, f'{{"role":"user","content":[{part}]}}'
        yield ".content[1]", sentence, f'{{"role":"user","content":["{MARK}",{part}]}}'
    for part in ('{"type":"text"}', '{"type":"text","text":null}', f'{{"type":"input_text","value":"{MARK}"}}'):
        yield ".content[0].text", "must be a string", f'{{"role":"user","content":[{part}]}}'
    for calls in (f'[{{"id":"{MARK}"}}]', "{}", "5", f'"{MARK}"', "true", "[null]"):
        yield ".tool_calls", "tools are not served", f'{{"role":"assistant","content":"{MARK}","tool_calls":{calls}}}'
    for name in ("name", "tool_call_id"):
        long = MARK * limits.MESSAGE_NAME_CHARACTERS_MAX
        sentence = f"must be a string of at most {limits.MESSAGE_NAME_CHARACTERS_MAX} characters"
        yield f".{name}", sentence, f'{{"role":"user","content":"{MARK}","{name}":"{long}"}}'


def _lengths(path: str) -> Iterator[Bad]:
    parts = f"at most {limits.MESSAGE_PARTS_MAX} parts in one message, {limits.MESSAGES_MAX} together"
    many = repeated(f'"{MARK}"', limits.MESSAGE_PARTS_MAX + 1)
    full = f'{{"role":"user","content":{repeated(json.dumps(MARK), limits.MESSAGE_PARTS_MAX)}}}'
    together = repeated(full, limits.MESSAGES_MAX // limits.MESSAGE_PARTS_MAX + 1)
    yield from fields("D4", "messages", parts, [f'[{{"role":"user","content":{many}}}]', together], [path])
    text = json.dumps(MARK.ljust(limits.CHAT_CHARACTERS_MAX + 1, "z"))
    characters = f"at most {limits.CHAT_CHARACTERS_MAX} characters together"
    yield from fields("D3", "messages", characters, [f'[{{"role":"user","content":{text}}}]'], [path])


NO_VARIABLES: Final = {
    "must be an object": ("5", "true", "[]", f'"{MARK}"'),
    f"at most {limits.TEMPLATE_VARIABLES_MAX} names": (
        "{" + ",".join(f'"{MARK}{index}":1' for index in range(limits.TEMPLATE_VARIABLES_MAX + 1)) + "}",
    ),
    "names must be plain words of letters, digits and underscores": (
        *('{"":1}', '{"a b":1}', '{"a-b":1}', '{"1a":1}', '{"_a":1}', '{"__class__":1}', f'{{"{MARK}.a":1}}'),
        *(f'{{"{"a" * 65}":1}}', '{"a\\u0000":1}'),
    ),
    "holds a name that is given to templates by the server itself": (
        *('{"messages":[]}', '{"tools":1}', '{"add_generation_prompt":true}', '{"raise_exception":1}', '{"range":1}'),
        *(f'{{"bos_token":"{MARK}"}}', f'{{"eos_token":"{MARK}"}}', '{"namespace":1}', '{"strftime_now":1}'),
        *('{"chat_template":"a"}', '{"documents":1}', '{"self":1}', '{"loop":1}'),
    ),
    "values must be strings, numbers, true, false or null": ('{"a":[]}', '{"a":{}}', f'{{"a":["{MARK}"]}}'),
    f"strings have at most {limits.TEMPLATE_VARIABLE_CHARACTERS_MAX} characters": (
        f'{{"a":"{MARK * limits.TEMPLATE_VARIABLE_CHARACTERS_MAX}"}}',
    ),
}
NEUTRAL_OF_CHAT: Final = {
    "documents": ("null, []", (f'[{{"text":"{MARK}"}}]', "{}")),
    "chat_template": ("null", (f'"{MARK}"', '""', '"{% for a in range(10**9) %}{% endfor %}"')),
    "chat_template_content_format": ('null, "auto", "string"', ('"openai"', f'"{MARK}"')),
    "parallel_tool_calls": ("null, true, false", ("1", f'"{MARK}"')),
    "function_call": ('null, "none", "auto"', (f'{{"name":"{MARK}"}}', '"required"')),
    "modalities": ('null, ["text"]', ('["text","audio"]', '["audio"]', "[]")),
    "audio": ("null", (f'{{"voice":"{MARK}"}}',)),
    "include_reasoning": ("null, true, false", ("1",)),
    "mm_processor_kwargs": ("null, {}", (f'{{"a":"{MARK}"}}',)),
    "media_io_kwargs": ("null, {}", (f'{{"a":"{MARK}"}}',)),
}


def of_chat() -> Iterator[Bad]:
    one = [CHAT]
    for sentence, values in NO_VARIABLES.items():
        yield from fields("D8", "chat_template_kwargs", sentence, values, one)
    for name, (accepted, values) in NEUTRAL_OF_CHAT.items():
        yield from fields("D14", name, f"not served; accepted values: {accepted}", values, one)
    effort = f"must be a string of at most {limits.MESSAGE_NAME_CHARACTERS_MAX} characters"
    yield from fields("D2", "reasoning_effort", effort, ("5", "true", "[]", "{}", json.dumps(MARK * 64)), one)
    for name in ("logprobs", "add_generation_prompt", "continue_final_message"):
        yield from fields("D2", name, "must be true or false", NO_BOOLEANS, one)
    for wanted, param, sentence in (
        ({"top_logprobs": "5"}, "top_logprobs", "needs logprobs to be true"),
        ({"top_logprobs": "5", "logprobs": "false"}, "top_logprobs", "needs logprobs to be true"),
        (
            {"add_generation_prompt": "true", "continue_final_message": "true"},
            "continue_final_message",
            "and add_generation_prompt cannot both be true",
        ),
    ):
        yield Bad(
            row="D2",
            name=f"{CHAT} {wanted}",
            path=CHAT,
            body=json_object({"messages": PROMPTS[CHAT][1]} | wanted),
            message=f"{param}: {sentence}",
            param=param,
        )


# -- tokens and texts --------------------------------------------------------------------------------------------------
def tokenization() -> Iterator[Bad]:
    for path in ("/tokenize", "/detokenize"):
        yield from fields("D2", "model", "must be a string", ("5", "true", "[]", "{}"), [path])
    for name in ("add_special_tokens", "return_token_strs"):
        yield from fields("D2", name, "must be true or false", NO_BOOLEANS, ["/tokenize"])
    for name in ("add_generation_prompt", "continue_final_message"):  # of no use to a prompt
        yield from fields("D2", name, "must be true or false", NO_BOOLEANS, ["/tokenize"])
    yield from fields("D2", "chat_template_kwargs", "must be an object", ("5", "[]", f'"{MARK}"'), ["/tokenize"])
    yield from fields("D2", "prompt", "must be a string", ("[1]", '["a"]', "[[1]]"), ["/tokenize"])
    yield from fields("D2", "prompt", "required", ["null"], ["/tokenize"])
    each = f"token ids must be integers in [0, {LAST_ID}]"
    outside = (f"[{LAST_ID + 1}]", "[-1]", f"[{2**31}]", f"[{2**64}]")
    yield from fields("D5", "tokens", each, outside, ["/detokenize"])
    shapes = ("5", "true", "{}", f'"{MARK}"', f'["{MARK}"]', "[null]", "[1.0]", "[[1]]", "[true]")
    yield from fields("D5", "tokens", "must be a list of token ids", shapes, ["/detokenize"])
    yield from fields("D5", "tokens", "required", ["null"], ["/detokenize"])
    ids = repeated("5", limits.PROMPT_TOKENS_MAX + 1)
    yield from fields("D4", "tokens", f"at most {limits.PROMPT_TOKENS_MAX} tokens", [ids], ["/detokenize"])


# -- damage ------------------------------------------------------------------------------------------------------------
NOT_JSON: Final = "body: must be one JSON value in UTF-8 (no NaN, no Infinity, no lone surrogates, 64-bit numbers)"
GOOD_TEXT: Final = f'{{"prompt":"{MARK}"}}'
DAMAGED: Final = {
    "empty": b"",
    "blank": b" \r\n",
    "open": b"{",
    "half a name": b'{"pro',
    "no value": b'{"prompt":',
    "half a value": f'{{"prompt":"{MARK}'.encode(),
    "not closed": GOOD_TEXT[:-1].encode(),
    "comma at the end": f'{{"prompt":"{MARK}",}}'.encode(),
    "no quotes": f'{{prompt:"{MARK}"}}'.encode(),
    "single quotes": f"{{'prompt':'{MARK}'}}".encode(),
    "two values": f"{GOOD_TEXT}{GOOD_TEXT}".encode(),
    "two lines": f"{GOOD_TEXT}\n{GOOD_TEXT}".encode(),
    "comment": f"{GOOD_TEXT}// {MARK}".encode(),
    "garbage after": f"{GOOD_TEXT}\0".encode(),
    "byte order mark": GOOD_TEXT.encode("utf-8-sig"),
    "UTF-16": GOOD_TEXT.encode("utf-16"),
    "UTF-16 without a mark": GOOD_TEXT.encode("utf-16-le"),
    "UTF-32": GOOD_TEXT.encode("utf-32"),
    "Latin-1": f'{{"prompt":"{MARK}\u00e9"}}'.encode("latin-1"),
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
    "form": f"prompt={MARK}".encode(),
    "XML": f"<prompt>{MARK}</prompt>".encode(),
    "YAML": f"prompt: {MARK}".encode(),
    "protobuf": b"\n\x03\x01\x02\x03",
    "invalid UTF-8": b'{"prompt":"\xff"}',
    "overlong UTF-8": b'{"prompt":"\xc0\xaf"}',
    "half a code point": b'{"prompt":"\xe2\x80"}',
    "surrogate in UTF-8": b'{"prompt":"\xed\xa0\x80"}',
    "beyond Unicode": b'{"prompt":"\xf4\x90\x80\x80"}',
    "high surrogate": b'{"prompt":"\\ud800"}',
    "low surrogate": b'{"prompt":"\\udc00"}',
    "surrogates reversed": b'{"prompt":"\\udc00\\ud800"}',
    "surrogate, then text": b'{"prompt":"\\ud83dx"}',
    "control character": b'{"prompt":"a\x01"}',
    "new line in a string": b'{"prompt":"a\n"}',
    "bad escape": b'{"prompt":"\\x41"}',
    "half an escape": b'{"prompt":"\\u12"}',
    "invalid UTF-8 in a name": b'{"prompt":"a","\xff":1}',
    "surrogate in a list": b'{"prompt":["\\ud800"]}',
    "surrogate in a stop string": b'{"prompt":"a","stop":"\\ud800"}',
    "surrogate in a salt": b'{"prompt":"a","cache_salt":"\\ud800"}',
    "invalid UTF-8 in a name of ours": b'{"prompt":"a","triptych":{"\xff":1}}',
}
NO_NUMBERS_IN_JSON: Final = (
    *("NaN", "nan", "Infinity", "-Infinity", "inf", "+1", "01", "1.", ".5", "1e", "0x10", "1_000", "1e400", "-1e400"),
    *("--1", "1e+", "undefined", "None", "True", "TRUE", "1" * 5_000, "１"),
)


CHAT_START: Final = b'"messages":[{"role":"user","content":"a"}],"user":'


def damage() -> Iterator[Bad]:
    for path in BOTH:
        for name, body in DAMAGED.items():
            moved = body.replace(b'"prompt":', CHAT_START) if path == CHAT else body
            yield Bad(row="D1", name=f"{path} {name}", path=path, body=moved, message=NOT_JSON, param="body")
        for field in ("temperature", "seed"):
            for text in NO_NUMBERS_IN_JSON:
                yield Bad(
                    row="D6",
                    name=f"{path} {field}={shown(text)}",
                    path=path,
                    body=body_with(path, field, text),
                    message=NOT_JSON,
                    param="body",
                )
        for name, body in NO_OBJECTS.items():
            yield Bad(
                row="D1",
                name=f"{path} {name}",
                path=path,
                body=body,
                message="body: must be a JSON object",
                param="body",
            )
        yield from sizes(path)


NO_OBJECTS: Final = {
    "null": b"null",
    "true": b"true",
    "number": b"5",
    "text": f'"{MARK}"'.encode(),
    "list": b"[]",
    "list of bodies": f"[{GOOD_TEXT}]".encode(),
}


def sizes(path: str) -> Iterator[Bad]:
    """Within the limit of a whole body, and still too much."""
    beside = f"body: at most {limits.BODY_BESIDE_PROMPT_BYTES_MAX} bytes beside the prompt"
    too_many = ",".join(f'"{MARK}{index}":1' for index in range(limits.BODY_FIELDS_MAX))
    names, prompt = PROMPTS[path]
    deep = "[" * 5_000 + "]" * 5_000
    rows = (
        ("many fields", f'{{"{names}":{prompt},{too_many}}}', f"body: at most {limits.BODY_FIELDS_MAX} fields"),
        ("long user", body_with(path, "user", json.dumps(MARK * 30_000)), beside),
        ("long unknown", body_with(path, "anything", repeated("1", 40_000)), beside),
        ("10^5 stop strings", body_with(path, "stop", strings(100_000, 3)), beside),
        ("deep stop", body_with(path, "stop", deep), "body: nested too deeply"),
        ("deep ours", body_with(path, "triptych.slo", deep), "body: nested too deeply"),
        ("deep schema", body_with(path, "guided_json", deep), "body: nested too deeply"),
    )
    for name, body, message in rows:
        content = body.encode() if isinstance(body, str) else body
        yield Bad(row="D1", name=f"{path} {name}", path=path, body=content, message=message, param="body")


def heavy() -> Iterator[Bad]:
    """As much as a body may hold, of what is dear to look at."""
    last = f'{{"role":"{MARK}","content":"a"}}'
    for part in ('"a"', f'{{"type":"text","text":"{"a" * 500}"}}'):
        most = ",".join([f'{{"role":"user","content":[{part}]}}'] * (limits.MESSAGES_MAX - 1))
        wrong = f"messages[{limits.MESSAGES_MAX - 1}].role"
        yield Bad(
            row="D4",
            name=f"{limits.MESSAGES_MAX} messages of {shown(part)}",
            path=CHAT,
            body=f'{{"messages":[{most},{last}]}}'.encode(),
            message=f"{wrong}: {ROLES}",
            param=wrong,
        )
    full = f'{{"role":"user","content":{repeated(json.dumps(MARK), limits.MESSAGE_PARTS_MAX)}}}'
    parts = f"at most {limits.MESSAGE_PARTS_MAX} parts in one message, {limits.MESSAGES_MAX} together"
    yield from fields("D4", "messages", parts, [repeated(full, limits.MESSAGES_MAX)], [CHAT])
    ids = f"at most {limits.PROMPT_TOKENS_MAX} tokens"
    yield from fields("D4", "prompt", ids, [repeated("[]", limits.BODY_BYTES_MAX // 3 - 100)], [COMPLETIONS])
    beside = f"body: at most {limits.BODY_BESIDE_PROMPT_BYTES_MAX} bytes beside the prompt"
    for name, many in (("names", '"":0,'), ("objects", f'"{MARK}":{repeated("{}", 1_000)},')):
        body = "{" + many * ((limits.BODY_BYTES_MAX - 100) // len(many)) + f'"prompt":"{MARK}"}}'
        yield Bad(row="D4", name=f"4 MiB of {name}", body=body.encode(), message=beside, param="body")


# -- HTTP around the body ----------------------------------------------------------------------------------------------
PATHS: Final = {  # of the public port, and the method of each
    **dict.fromkeys((COMPLETIONS, CHAT, "/tokenize", "/detokenize", "/abort_requests", "/reset_prefix_cache"), "POST"),
    **dict.fromkeys(
        ("/v1/models", "/tokenizer_info", "/version", "/load", "/openapi.json", "/health", "/ready"), "GET"
    ),
}
NO_PATHS: Final = (
    *(
        "/",
        "",
        "/v1",
        "/v1/",
        "/v1/completions/",
        "/V1/completions",
        "//v1/completions",
        "/v1/completions/1",
        "/v1/chat",
    ),
    *("/v1/completion", f"/{MARK}", "/v1/../v1/completions", "/../../etc/passwd", "/\0", "/metrics"),
    *("/admin/v1/workers", "/docs", "/v1/completions;a=b", "/v1/completions%00", "/.env", "/" + "a" * 4_000),
)
NOT_YET: Final = ("/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/rerank", "/v1/score")


def http() -> Iterator[Bad]:
    """Wrong paths and methods. A good body changes nothing."""
    for path in NO_PATHS:
        for method in ("GET", "POST"):
            yield Bad(
                row="D2",
                name=f"{method} {shown(path)}",
                path=path,
                method=method,
                body=GOOD_TEXT.encode(),
                message="Not Found",
                param=None,
                status=404,
            )
    for name in (MARK, "TINY", "tiny/", "../tiny", "\0", "a" * 4_000):
        yield Bad(
            row="D2",
            name=f"GET /v1/models/{shown(name)}",
            path=f"/v1/models/{name}",
            method="GET",
            body=b"",
            message="model: this model is not served here; GET /v1/models lists what is",
            param="model",
            status=404,
        )
    for path, right in PATHS.items():
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", MARK.upper()):
            if method != right:
                yield Bad(
                    row="D2",
                    name=f"{method} {path}",
                    path=path,
                    method=method,
                    body=GOOD_TEXT.encode(),
                    message="Method Not Allowed",
                    param=None,
                    status=405,
                )
    for path in NOT_YET:
        yield Bad(
            row="D14",
            name=path,
            path=path,
            body=GOOD_TEXT.encode(),
            message=f"{path}: not served yet; POST {COMPLETIONS} and {CHAT} are",
            param=None,
        )


NO_MILLISECONDS: Final = (
    *(b"", b"0", b"-1", b"+5", b"1.5", b"1e3", b"0x10", b"five", MARK.encode(), b"5 5", b"5,6", b"5ms", b"\xd9\xa3"),
    *(str(limits.SLO_MS_MAX + 1).encode(), b"1" * 400, b"NaN", b"Infinity", b"null", b"\x00", b"5\n"),
)


def headers() -> Iterator[Bad]:
    for path in BOTH:
        names, prompt = PROMPTS[path]
        for name in ("x-slo-ttft-ms", "x-slo-tpot-ms"):
            for value in NO_MILLISECONDS:
                yield Bad(
                    row="D16",
                    name=f"{path} {name}={shown(repr(value))}",
                    path=path,
                    body=json_object({names: prompt}),
                    headers=((name.encode(), value),),
                    message=f"{name}: must be an integer from 1 to {limits.SLO_MS_MAX}",
                    param=name,
                )


# -- ids to end --------------------------------------------------------------------------------------------------------
NO_ID_LISTS: Final = {
    **DAMAGED,
    **NO_OBJECTS,
    "no ids": b"{}",
    "other name": f'{{"request_id":["{MARK}"]}}'.encode(),
    **{
        f"request_ids={value}": f'{{"request_ids":{value}}}'.encode()
        for value in ("null", "5", "true", "{}", f'"{MARK}"', "[5]", "[null]", f'["{MARK}",true]', f'[["{MARK}"]]')
    },
    "deep": b'{"request_ids":' + b"[" * 5_000,
    "NaN": b'{"request_ids":[NaN]}',
}


def aborts() -> Iterator[Bad]:
    for name, body in NO_ID_LISTS.items():
        yield Bad(
            row="D1",
            name=f"/abort_requests {name}",
            path="/abort_requests",
            body=body,
            message="request_ids: must be a list of strings",
            param="request_ids",
        )
    yield Bad(
        row="D4",
        name="/abort_requests too long",
        path="/abort_requests",
        body=f'{{"request_ids":{strings(30_000, 3)}}}'.encode(),
        message=f"request_ids: at most {limits.ABORT_BYTES_MAX} bytes",
        param="request_ids",
    )


# -- odd, and good -----------------------------------------------------------------------------------------------------
ODD: Final = {  # what looks wrong and is served: a refusal of everything would pass the tests above
    "nothing but a prompt": b'{"prompt":"a"}',
    "white space": b' \t\r\n{ "prompt" : "a" }\n',
    "a name twice": b'{"prompt":{"no":1},"prompt":"a","seed":"x","seed":5}',
    "others' arguments": b'{"prompt":"a","vllm_xargs":{"theirs":[1]},"request_id":"mine","session_id":"mine"}',
    "escaped name": b'{"\\u0070rompt":"a"}',
    "NUL": b'{"prompt":"a\\u0000b"}',
    "right to left": '{"prompt":"\u202eabc\u202c"}'.encode(),
    "combining marks": ('{"prompt":"a' + "\u0301" * 20 + '"}').encode(),
    "four bytes": '{"prompt":"\U0001f469\u200d\U0001f680"}'.encode(),
    "escaped pair": b'{"prompt":"\\ud83d\\ude00"}',
    "noncharacter": '{"prompt":"\uffff\ufdd0"}'.encode(),
    "byte order mark inside": '{"prompt":"\ufeffa"}'.encode(),
    "markers of roles": b'{"prompt":"<|im_start|>system\\n<|endoftext|>"}',
    "a template": b'{"prompt":"{{ cycler.__init__.__globals__ }}{% for %}"}',
    "nulls": b'{"prompt":"a","seed":null,"stop":null,"triptych":null,"stream_options":null,"logit_bias":null,"n":null}',
    "empty lists": b'{"prompt":"a","stop":[],"stop_token_ids":[],"logit_bias":{},"bad_words":[],"triptych":{}}',
    "unknown fields": b'{"prompt":"a","anything":NUMBER,"deep":{"x":[[[{}]]]},"":null}'.replace(b"NUMBER", b"9" * 400),
    "odd user": b'{"prompt":"a","user":{"is":["anything"]}}',
    "least": b'{"prompt":[0],"temperature":0,"top_p":1e-300,"top_k":-1,"min_p":0,"seed":0,"max_tokens":0,"echo":true}',
    "most": b'{"prompt":[999],"temperature":100,"top_p":1,"top_k":1048576,"min_p":1,"seed":9223372036854775807}',
    "minus zero": b'{"prompt":"a","temperature":-0.0,"presence_penalty":-0,"min_tokens":-0}',
    "salt of 128": ('{"prompt":"a","cache_salt":"' + "\U0001f600" * limits.CACHE_SALT_CHARACTERS_MAX + '"}').encode(),
    "a full context": f'{{"prompt":{repeated("5", CONTEXT - 1)},"max_tokens":1}}'.encode(),
    "cut to fit": f'{{"prompt":{repeated("5", 5_000)},"truncate_prompt_tokens":-1,"max_tokens":4}}'.encode(),
    "two prompts": b'{"prompt":["a","b"]}',
    "two lists": b'{"prompt":[[1],[2,3]]}',
}


# -- everything --------------------------------------------------------------------------------------------------------
GROUPS: Final[Mapping[str, Callable[[], list[Bad]]]] = {
    "integers": lambda: [
        *integers(INTEGERS, BOTH),
        *integers(INTEGERS_OF_COMPLETIONS, [COMPLETIONS]),
        *integers(INTEGERS_OF_CHAT, [CHAT]),
    ],
    "numbers": lambda: [*numbers()],
    "booleans": lambda: [*booleans()],
    "token ids": lambda: [*token_ids()],
    "texts": lambda: [*texts()],
    "constraints": lambda: [*constraints()],
    "hostile": lambda: [*hostile()],
    "not served": lambda: [*not_served()],
    "together": lambda: [*together()],
    "ours": lambda: [*ours()],
    "prompts": lambda: [*prompts()],
    "damage": lambda: [*damage()],
    "heavy": lambda: [*heavy()],
    "conversations": lambda: [*conversations()],
    "chat": lambda: [*of_chat()],
    "tokenization": lambda: [*tokenization()],
    "http": lambda: [*http()],
    "headers": lambda: [*headers()],
    "aborts": lambda: [*aborts()],
}


def table() -> list[Bad]:
    return [bad for make in GROUPS.values() for bad in make()]
