"""Bodies that nobody would write: valid ones damaged byte by byte. Seeded, so that the same ones come every time."""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any, Final

from engine.base import limits

Mutation = Callable[[bytes, random.Random], bytes]

SAMPLING: Final[dict[str, Any]] = {
    "model": "tiny",
    "max_tokens": 4,
    "min_tokens": 1,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 7,
    "n": 2,
    "stop": ["END", "\n\n"],
    "stop_token_ids": [5, 6],
    "logit_bias": {"5": -1.5, "7": 100},
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.1,
    "bad_words": ["no"],
    "allowed_token_ids": [5, 6, 7],
    "priority": -3,
    "cache_salt": "pepper",
    "triptych": {"codec": "raw", "deadline_ms": 1_000, "kl_budget": 0.01, "slo": {"ttft_ms": 100, "tpot_ms": 10}},
    "user": "\u00e9\U0001f600",
}
STREAMED: Final = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
JSON_SCHEMA: Final = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
MESSAGES: Final = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "\u4e2d"}], "name": "ada"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "and?"},
]
GOOD: Final[dict[str, tuple[dict[str, Any], ...]]] = {
    "/v1/completions": (
        {"prompt": [1, 2, 3], **SAMPLING},
        {"prompt": "a text", **SAMPLING, **STREAMED},
        {"prompt": ["one", "two"], "max_tokens": 2, "n": 2},
        {"prompt": [[1, 2], [3]], "max_tokens": 2, "return_token_ids": True, "echo": True},
        {"prompt": [1, 2], "logprobs": 2, "prompt_logprobs": 1, "echo": True, "return_tokens_as_token_ids": True},
        {"prompt": "a", "response_format": JSON_SCHEMA},
        {"prompt": "a", "structured_outputs": {"regex": "a+"}},
        {"prompt": "a", "guided_choice": ["yes", "no"], "stream": True},
        {"prompt": "a", "max_tokens": None, "stop": "x", "suffix": None, "anything": {"else": [1, {"is": "ignored"}]}},
    ),
    "/v1/chat/completions": (
        {"messages": MESSAGES, **SAMPLING},
        {"messages": MESSAGES, **STREAMED, "logprobs": True, "top_logprobs": 2, "max_completion_tokens": 3},
        {"messages": MESSAGES[:3], "add_generation_prompt": False, "continue_final_message": True},
        {"messages": MESSAGES[3:], "chat_template_kwargs": {"thinking": False}, "response_format": JSON_SCHEMA},
    ),
    "/tokenize": (
        {"prompt": "a text", "add_special_tokens": True, "return_token_strs": True},
        {"messages": MESSAGES, "add_generation_prompt": True},
    ),
    "/detokenize": ({"tokens": [1, 2, 3], "model": "tiny"},),
    "/abort_requests": ({"request_ids": ["cmpl-1", "chatcmpl-2", "x"]},),
}

# -- damage ------------------------------------------------------------------------------------------------------------
VALUES: Final = (
    *(b"null", b"true", b"-1", b"0", b"1.0", b"1e308", b"-1e308", b"1e400", b"NaN", b"-0", b"1e-400"),
    *(b"2147483648", b"9223372036854775808", b"18446744073709551616", b"1" * 400, b"0." + b"1" * 400),
    *(b'""', b'"\\u0000"', b'"\\ud800"', b'"\\udc00\\ud800"', b'"\xff"', b'"\xed\xa0\x80"', b'"\xe2\x80\xae"'),
    *(b"[]", b"[[]]", b"{}", b'{"":{}}', b"[null]", b'[""]', b"[" * 3_000, b'{"a":' * 3_000),
    *(
        b"[" * 200 + b"]" * 200,
        b"[" + b"[]," * 2_000 + b"[]]",
        b'"' + b"a" * 5_000 + b'"',
        b'"' + b"\xcc\x81" * 500 + b'"',
    ),
    *(b'"<|im_start|>system"', b'"{{ cycler.__init__ }}"', b'"\\r\\nx-evil: 1"', b'"\\u001b[31m"', b'"tiny"', b'"raw"'),
)


def flip(body: bytes, dice: random.Random) -> bytes:
    """A few bits."""
    damaged = bytearray(body)
    for _ in range(dice.randint(1, 4)):
        damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
    return bytes(damaged)


def cut(body: bytes, dice: random.Random) -> bytes:
    return body[: dice.randrange(len(body))]


def drop(body: bytes, dice: random.Random) -> bytes:
    start, end = _span(body, dice)
    return body[:start] + body[end:]


def repeat(body: bytes, dice: random.Random) -> bytes:
    start, end = _span(body, dice)
    return body[:end] + body[start:end] * dice.choice((1, 2, 50)) + body[end:]


def overwrite(body: bytes, dice: random.Random) -> bytes:
    start, end = _span(body, dice)
    return body[:start] + dice.randbytes(end - start) + body[end:]


def splice(body: bytes, dice: random.Random) -> bytes:
    """The beginning of one and the end of another."""
    path = dice.choice(tuple(GOOD))
    other = encoded(dice.choice(GOOD[path]))
    return body[: dice.randrange(len(body))] + other[dice.randrange(len(other)) :]


def insert(body: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(body))
    return body[:place] + dice.choice(VALUES) + body[place:]


def revalue(body: bytes, dice: random.Random) -> bytes:
    """Still JSON but for what the value is: one field says something else."""
    fields: dict[str, Any] = json.loads(body)
    chosen = dice.choice(tuple(fields))
    texts = {name: json.dumps(value).encode() for name, value in fields.items()} | {chosen: dice.choice(VALUES)}
    return _joined(texts)


def exchange(body: bytes, dice: random.Random) -> bytes:
    """Two fields have each other's values."""
    fields: dict[str, Any] = json.loads(body)
    one, other = dice.choice(tuple(fields)), dice.choice(tuple(fields))
    fields[one], fields[other] = fields[other], fields[one]
    return encoded(fields)


def twice(body: bytes, dice: random.Random) -> bytes:
    """A name that occurs twice, with another value."""
    fields: dict[str, Any] = json.loads(body)
    name = json.dumps(dice.choice(tuple(fields))).encode()
    return body[:-1] + b"," + name + b":" + dice.choice(VALUES) + b"}"


def crowd(body: bytes, dice: random.Random) -> bytes:
    """Many fields that nobody knows."""
    count = dice.choice((1, limits.BODY_FIELDS_MAX - 30, limits.BODY_FIELDS_MAX))
    return body[:-1] + b"".join(b',"x%d":%d' % (index, index) for index in range(count)) + b"}"


MUTATIONS: Final[tuple[Mutation, ...]] = (
    *(flip, cut, drop, repeat, overwrite, splice, insert),
    *(revalue, revalue, revalue, revalue, exchange, twice, crowd),  # these get further than the parser
)


def damaged(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Paths and bodies."""
    dice = random.Random(seed)
    for _ in range(count):
        path = dice.choice(PATHS)
        body = encoded(dice.choice(GOOD[path]))
        yield path, dice.choice(MUTATIONS)(body, dice)


PATHS: Final = ("/v1/completions", "/v1/completions", "/v1/chat/completions", "/v1/chat/completions", *GOOD)


def encoded(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


def _joined(texts: dict[str, bytes]) -> bytes:
    return b"{" + b",".join(b"%s:%s" % (json.dumps(name).encode(), value) for name, value in texts.items()) + b"}"


def _span(body: bytes, dice: random.Random) -> tuple[int, int]:
    start = dice.randrange(len(body))
    return start, min(len(body), start + dice.choice((1, 2, 8, 64)))
