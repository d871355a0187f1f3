"""The fields of requests as JSON schemas: what each means in one line, and its limits from where they are kept.

What does not belong here: paths, answers and statuses (`openapi`), and checking a request, which is `validation`'s: a
schema cannot say what depends on several fields, so not everything that fits it is served.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from control_plane.router.text.vocabulary import ModelCard
from control_plane.router.validation import chat_fields, sampling_fields, tokenization
from control_plane.router.validation.validator import NOT_SERVED
from engine.base import limits

Schema = dict[str, Any]
NULL: Final[Schema] = {"type": "null"}


# -- kinds of values ---------------------------------------------------------------------------------------------------
def integer(text: str, low: int, high: int) -> Schema:
    return {"type": ["integer", "null"], "minimum": low, "maximum": high, "description": text}


def number(text: str, low: float, high: float, *, low_open: bool = False) -> Schema:
    bound = "exclusiveMinimum" if low_open else "minimum"
    return {"type": ["number", "null"], bound: low, "maximum": high, "description": text}


def boolean(text: str) -> Schema:
    return {"type": ["boolean", "null"], "description": text}


def string(text: str, **limited: Any) -> Schema:
    return {"type": ["string", "null"], **limited, "description": text}


def array(items: Schema, count_max: int | None, text: str = "", *, count_min: int = 0) -> Schema:
    bound = {} if count_max is None else {"maxItems": count_max}
    described = {"description": text} if text else {}
    return {"type": ["array", "null"], "items": items, "minItems": count_min, **bound, **described}


def either(text: str, *kinds: Schema) -> Schema:
    return {"anyOf": [*kinds], "description": text}


def record(
    properties: Mapping[str, Schema], text: str, *, required: Iterable[str] = (), closed: bool = False
) -> Schema:
    """`closed`: an unknown key is refused; elsewhere it is accepted and ignored."""
    needed = sorted(required)
    return {
        "type": "object",
        "properties": dict(properties),
        **({"required": needed} if needed else {}),
        **({"additionalProperties": False} if closed else {}),
        "description": text,
    }


def optional(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]}


# -- fields of every request for text ----------------------------------------------------------------------------------
def shared(card: ModelCard) -> dict[str, Schema]:
    """What completions and chats have in common."""
    return {
        "model": model(card),
        **_lengths(),
        **_sampling(),
        **_token_choices(card),
        **_answer(),
        **_constraints(),
        **_sharing(),
        "truncate_prompt_tokens": integer(
            "keep so many of the prompt's last tokens; -1: as many as fit", -1, limits.PROMPT_TOKENS_MAX
        ),
        "triptych": triptych(),
        "vllm_xargs": optional(record(knobs(), "for clients that cannot send triptych; others' arguments are ignored")),
    }


def model(card: ModelCard) -> Schema:
    text = "the model's name, as GET /v1/models has it; without it the served one is meant"
    return {"enum": [card.name, None], "description": text}


def _lengths() -> dict[str, Schema]:
    tokens_max = limits.OUTPUT_TOKENS_MAX
    return {
        "max_tokens": integer("tokens to produce; prompt and output together must fit the model", 0, tokens_max),
        "min_tokens": integer("no end of text before so many", 0, tokens_max),
        "ignore_eos": boolean("go on after the model's end of text"),
    }


def _sampling() -> dict[str, Schema]:
    penalty_max = limits.PENALTY_ABS_MAX
    return {
        "temperature": number("0 is greedy; the default is 1", 0, limits.TEMPERATURE_MAX),
        "top_p": number("the likeliest tokens with so much probability together", 0, 1, low_open=True),
        "top_k": integer("so many of the likeliest tokens; 0 and -1: all", -1, limits.TOP_K_MAX),
        "min_p": number("tokens at least so likely, relative to the likeliest", 0, 1),
        "seed": integer("the same seed gives the same tokens; without one it is drawn", 0, limits.SEED_MAX),
        "presence_penalty": number("on tokens that were produced already", -penalty_max, penalty_max),
        "frequency_penalty": number("likewise, times how often", -penalty_max, penalty_max),
        "repetition_penalty": number(
            "divides the score of tokens seen before; 1 does nothing", 0, limits.REPETITION_PENALTY_MAX, low_open=True
        ),
    }


def _token_choices(card: ModelCard) -> dict[str, Schema]:
    """Which tokens may be chosen, and which end the text."""
    bias_max = sampling_fields.LOGIT_BIAS_ABS_MAX
    word = _text(limits.STOP_STRING_CHARACTERS_MAX)
    return {
        "logit_bias": {
            "type": ["object", "null"],
            "propertyNames": {"pattern": "^(0|[1-9][0-9]*)$"},
            "additionalProperties": {"type": "number", "minimum": -bias_max, "maximum": bias_max},
            "maxProperties": limits.LOGIT_BIAS_MAX,
            "description": "added to the scores of tokens, by token id in decimal",
        },
        "allowed_token_ids": array(
            token_id(card), limits.ALLOWED_TOKEN_IDS_MAX, "no other token is produced", count_min=1
        ),
        "bad_words": array(word, sampling_fields.BAD_WORDS_MAX, "texts that are not produced"),
        "stop_token_ids": array(token_id(card), limits.STOP_TOKEN_IDS_MAX, "tokens that end the text"),
        "stop": either(
            f"texts that end the text; at most {limits.STOP_CHARACTERS_MAX} characters together",
            string("one of them", maxLength=limits.STOP_STRING_CHARACTERS_MAX),
            array(word, limits.STOP_STRINGS_MAX),
        ),
        "include_stop_str_in_output": boolean("the text that ended it is part of it"),
    }


def _answer() -> dict[str, Schema]:
    """What the answer looks like."""
    return {
        "n": integer(
            f"answers to one prompt; at most {limits.REQUEST_CHOICES_MAX} to all of them", 1, limits.CHOICES_MAX
        ),
        "best_of": integer("the same as n, or nothing", 1, limits.CHOICES_MAX),
        "stream": boolean("server-sent events, one for each piece of text"),
        "stream_options": {
            "type": ["object", "null"],
            "properties": {
                "include_usage": boolean("a last event with the numbers of tokens"),
                "continuous_usage_stats": boolean("the numbers so far in every event; needs include_usage"),
            },
            "description": "only with stream",
        },
        "echo": boolean("begin the answer with the prompt's text"),
        "prompt_logprobs": integer(
            "score the prompt's tokens, with so many alternatives; not with stream", 0, limits.LOGPROBS_MAX
        ),
        "return_token_ids": boolean("the ids of prompt and output beside the text"),
        "return_tokens_as_token_ids": boolean("write token_id:5 for a token's text in lists of log-probabilities"),
        "skip_special_tokens": boolean("leave special tokens out of the text; the default is true"),
        "add_special_tokens": boolean("begin the prompt with the model's special tokens, where it has any"),
    }


def _constraints() -> dict[str, Schema]:
    """At most one of all of them, of at most `CONSTRAINT_BYTES_MAX` bytes."""
    values = {
        "json": either("a JSON schema", {"type": "object"}, string("its text")),
        "regex": string("a regular expression, matched whole", minLength=1),
        "choice": array(_text(), None, "one of these texts", count_min=1),
        "grammar": string("a grammar in Lark's notation", minLength=1),
    }
    switch = {"json_object": boolean("any JSON object")}
    return {
        "response_format": {
            "type": ["object", "null"],
            "properties": {
                "type": {"enum": ["text", "json_object", "json_schema"]},
                "json_schema": {"type": "object", "properties": {"schema": {"type": "object"}}},
            },
            "description": "OpenAI's way to constrain the output",
        },
        "structured_outputs": {
            "type": ["object", "null"],
            "properties": values | switch,
            "description": "vLLM's way to constrain the output",
        },
        **{f"guided_{name}": schema for name, schema in values.items()},
    }


def _sharing() -> dict[str, Schema]:
    return {
        "priority": integer(
            "lower is earlier, among requests of one tenant", -limits.PRIORITY_MAX, limits.PRIORITY_MAX
        ),
        "cache_salt": string(
            "computed prompts are shared only with requests of the same salt",
            minLength=1,
            maxLength=limits.CACHE_SALT_CHARACTERS_MAX,
        ),
        "request_id": string(
            "your own name for it, for logs; the header x-request-id comes before it",
            maxLength=limits.REQUEST_ID_CHARACTERS_MAX,
        ),
        "session_id": string("accepted; it changes nothing here", maxLength=limits.REQUEST_ID_CHARACTERS_MAX),
        "user": {"description": "a name in your own books; it changes nothing here"},
    }


def triptych() -> Schema:
    slo = {
        "ttft_ms": integer("the first token is of no use later", 1, limits.SLO_MS_MAX),
        "tpot_ms": integer("a target for each further token", 1, limits.SLO_MS_MAX),
    }
    wanted = optional(record(slo, "how soon it is wanted; the headers x-slo-* say the same", closed=True))
    return optional(
        record({**knobs(), "slo": wanted}, "this server's own knobs; an unknown one is refused", closed=True)
    )


def knobs() -> dict[str, Schema]:
    return {
        "codec": string("how computed prompts travel between workers, by name"),
        "kl_budget": number("nats per token that this may cost; 0 is exact", 0, limits.KL_BUDGET_MAX),
        "deadline_ms": integer("of the whole request, from its first byte", 1, limits.REQUEST_DEADLINE_MS_MAX),
    }


# -- bodies ------------------------------------------------------------------------------------------------------------
def completion(card: ModelCard) -> Schema:
    own = {
        "prompt": either("text or token ids, or a list of either", *_one_prompt(card), *_several(card)),
        "logprobs": integer("score the output's tokens, with so many alternatives", 0, limits.LOGPROBS_MAX),
    }
    return record(own | shared(card) | not_served(NOT_SERVED), "a text to go on with", required=["prompt"])


def chat(card: ModelCard) -> Schema:
    own = {
        **conversation(card),
        "max_completion_tokens": integer("the newer name of max_tokens", 0, limits.OUTPUT_TOKENS_MAX),
        "logprobs": boolean("score the output's tokens"),
        "top_logprobs": integer("with so many alternatives; needs logprobs", 0, limits.LOGPROBS_MAX),
        "reasoning_effort": string("a variable that some templates read", maxLength=limits.MESSAGE_NAME_CHARACTERS_MAX),
    }
    other = not_served({**NOT_SERVED, **chat_fields.NOT_SERVED})
    return record(own | shared(card) | other, "a conversation to go on with", required=["messages"])


def tokenize(card: ModelCard) -> Schema:
    own = {
        "model": model(card),
        "prompt": string("a text; or else messages"),
        **conversation(card),
        "add_special_tokens": boolean("begin with the model's special tokens, where it has any"),
        "return_token_strs": boolean("the tokens' own texts beside their ids"),
    }
    return record(own | not_served(tokenization.TOKENIZE_NOT_SERVED), "what to read")


def detokenize(card: ModelCard) -> Schema:
    properties = {"model": model(card), "tokens": array(token_id(card), limits.PROMPT_TOKENS_MAX, "token ids")}
    return record(properties, "what to write", required=["tokens"])


def abort() -> Schema:
    ids = {"type": "array", "items": {"type": "string"}, "description": "of answers, or the bare ids of gRPC"}
    text = f"which requests to end, in at most {limits.ABORT_BYTES_MAX} bytes; ids that nobody knows are no error"
    return record({"request_ids": ids}, text, required=["request_ids"])


def not_served(neutral: Mapping[str, tuple[Any, ...]]) -> dict[str, Schema]:
    """Accepted only where the value asks for nothing: an answer as if the field were not there would be wrong."""
    return {
        name: {"enum": [None, *values], "description": "known and not served: only what asks for nothing is accepted"}
        for name, values in neutral.items()
    }


# -- prompts -----------------------------------------------------------------------------------------------------------
def _one_prompt(card: ModelCard) -> list[Schema]:
    tokens_max = min(limits.PROMPT_TOKENS_MAX, card.max_model_len - 1)
    return [_text(), {"type": "array", "items": token_id(card), "minItems": 1, "maxItems": tokens_max}]


def _several(card: ModelCard) -> list[Schema]:
    return [{"type": "array", "items": one, "minItems": 1, "maxItems": limits.PROMPTS_MAX} for one in _one_prompt(card)]


def conversation(card: ModelCard) -> dict[str, Schema]:
    variable = {"type": "string", "maxLength": limits.TEMPLATE_VARIABLE_CHARACTERS_MAX}
    return {
        "messages": {
            "type": "array",
            "items": message(card),
            "minItems": 1,
            "maxItems": limits.MESSAGES_MAX,
            "description": "what was said so far",
        },
        "add_generation_prompt": boolean("begin the model's turn; the default is true"),
        "continue_final_message": boolean("go on with the last message instead"),
        "chat_template_kwargs": {
            "type": ["object", "null"],
            "maxProperties": limits.TEMPLATE_VARIABLES_MAX,
            "propertyNames": {"pattern": "^[A-Za-z][A-Za-z0-9_]*$", "maxLength": limits.MESSAGE_NAME_CHARACTERS_MAX},
            "additionalProperties": {"anyOf": [{"type": ["number", "boolean", "null"]}, variable]},
            "description": "variables that the model's own template reads",
        },
    }


def message(card: ModelCard) -> Schema:
    """Only an assistant's may be without content: OpenAI's own answers say null beside tool calls. Only a user's may
    have images."""
    contents, seen = _contents(_text_part()), _contents(_text_part(), _image_part(card))
    names = {
        "name": string("who of several said it", maxLength=limits.MESSAGE_NAME_CHARACTERS_MAX),
        "tool_call_id": string("whose result it is", maxLength=limits.MESSAGE_NAME_CHARACTERS_MAX),
    }
    others = {"enum": [role for role in chat_fields.ROLES if role not in ("assistant", "user")]}
    asked = {
        "role": {"const": "user"},
        "content": either("what was said", *(seen if card.images_max else contents)),
        **names,
    }
    told = {"role": others, "content": either("what was said", *contents), **names}
    answered = {"role": {"const": "assistant"}, "content": either("what was said", *contents, NULL), **names}
    return {
        "anyOf": [
            record(asked, "a user's turn", required=["role", "content"]),
            record(told, "a turn", required=["role", "content"]),
            record(answered, "the model's turn", required=["role"]),
        ]
    }


def _contents(*parts: Schema) -> list[Schema]:
    one = parts[0] if len(parts) == 1 else {"anyOf": [*parts]}
    return [_text(), {"type": "array", "items": one, "maxItems": limits.MESSAGE_PARTS_MAX}]


def _text_part() -> Schema:
    kind = {"enum": [*chat_fields.TEXT_PARTS]}
    return record({"type": kind, "text": _text()}, "a piece of text", required=["type", "text"])


def _image_part(card: ModelCard) -> Schema:
    url = {"type": "string", "description": "data:image/png;base64,...; others only where the operator allows them"}
    detail = {"enum": [None, *chat_fields.DETAILS], "description": "it changes nothing here"}
    source = either("where it is", url, record({"url": url, "detail": detail}, "likewise", required=["url"]))
    label = string("a name in your own books; it changes nothing here", maxLength=limits.REQUEST_ID_CHARACTERS_MAX)
    properties = {"type": {"enum": [*chat_fields.IMAGE_PARTS]}, "image_url": source, "uuid": label}
    text = f"an image, of at most {card.images_max} in all: PNG, JPEG, WebP, or the first frame of a GIF"
    return record(properties, text, required=["type", "image_url"])


# -- values ------------------------------------------------------------------------------------------------------------
def token_id(card: ModelCard) -> Schema:
    return {"type": "integer", "minimum": 0, "maximum": card.vocab_size - 1}


def _text(characters_max: int | None = None) -> Schema:
    return {"type": "string", "minLength": 1} | ({} if characters_max is None else {"maxLength": characters_max})
