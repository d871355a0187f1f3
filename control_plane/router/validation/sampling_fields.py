"""The fields that say how to pick tokens, in vLLM's words, as values of `SamplingParams`.

What does not belong here: `max_tokens` and `seed` (each prompt has its own, see `validation`), constraints
(`constraint_fields`), stop strings (they are the router's own business).
"""

from collections.abc import Sequence
from typing import Any, Final

from control_plane.router.text.vocabulary import Vocabulary
from control_plane.router.validation.fields import (
    Fields,
    boolean,
    integer,
    is_number,
    number,
    object_or_empty,
    optional_integer,
    refuse,
    strings,
    token_ids,
)
from engine.base import limits

LOGIT_BIAS_ABS_MAX: Final = 100.0
BAD_WORDS_MAX: Final = limits.BAD_WORDS_MAX // 2  # each may be spelled in two ways


def read_sampling(fields: Fields, *, vocab_size: int) -> dict[str, Any]:
    """Keyword arguments of `SamplingParams`, all but the bad words: those are texts to tokenise."""
    return {
        "temperature": number(fields, "temperature", 1.0, 0.0, limits.TEMPERATURE_MAX),
        "top_p": number(fields, "top_p", 1.0, 0.0, 1.0, low_open=True),
        "top_k": max(0, integer(fields, "top_k", 0, -1, limits.TOP_K_MAX)),  # vLLM: -1 and 0 are all
        "min_p": number(fields, "min_p", 0.0, 0.0, 1.0),
        "presence_penalty": number(fields, "presence_penalty", 0.0, -limits.PENALTY_ABS_MAX, limits.PENALTY_ABS_MAX),
        "frequency_penalty": number(fields, "frequency_penalty", 0.0, -limits.PENALTY_ABS_MAX, limits.PENALTY_ABS_MAX),
        "repetition_penalty": number(
            fields, "repetition_penalty", 1.0, 0.0, limits.REPETITION_PENALTY_MAX, low_open=True
        ),
        "min_tokens": integer(fields, "min_tokens", 0, 0, limits.OUTPUT_TOKENS_MAX),
        "ignore_eos": boolean(fields, "ignore_eos"),
        "stop_token_ids": token_ids(fields, "stop_token_ids", limits.STOP_TOKEN_IDS_MAX, vocab_size),
        "allowed_token_ids": _allowed_token_ids(fields, vocab_size),
        "logit_bias": _logit_bias(fields, vocab_size),
        **_logprobs(fields),
    }


def _logprobs(fields: Fields) -> dict[str, int | None]:
    """With `echo` the answer's list covers the prompt too, so its tokens are scored with as many alternatives."""
    logprobs = optional_integer(fields, "logprobs", 0, limits.LOGPROBS_MAX)
    of_prompt = optional_integer(fields, "prompt_logprobs", 0, limits.LOGPROBS_MAX)
    if of_prompt is not None and boolean(fields, "stream"):
        raise refuse("prompt_logprobs", "not available when stream is true")
    if logprobs is not None and boolean(fields, "echo"):
        of_prompt = max(logprobs, of_prompt or 0)
    return {"logprobs": logprobs, "prompt_logprobs": of_prompt}


def _allowed_token_ids(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    if fields.get("allowed_token_ids") == []:
        raise refuse("allowed_token_ids", "must hold at least 1 id")
    return token_ids(fields, "allowed_token_ids", limits.ALLOWED_TOKEN_IDS_MAX, vocab_size)


def _logit_bias(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    biases = object_or_empty(fields, "logit_bias")
    if len(biases) > limits.LOGIT_BIAS_MAX:
        raise refuse("logit_bias", f"at most {limits.LOGIT_BIAS_MAX} entries")
    for bias in biases.values():
        if not is_number(bias) or not -LOGIT_BIAS_ABS_MAX <= bias <= LOGIT_BIAS_ABS_MAX:
            raise refuse("logit_bias", f"values must be numbers in [-{LOGIT_BIAS_ABS_MAX:g}, {LOGIT_BIAS_ABS_MAX:g}]")
    if not all(_is_token_id(key, vocab_size) for key in biases):
        raise refuse("logit_bias", f"keys must be token ids in [0, {vocab_size - 1}], in decimal and as strings")
    return tuple((int(key), float(bias)) for key, bias in biases.items())


def _is_token_id(key: str, vocab_size: int) -> bool:
    """One spelling per id: "5", not "05" or "+5", so that no id is given twice."""
    return key.isascii() and key.isdecimal() and len(key) <= 10 and key == str(int(key)) and int(key) < vocab_size


def read_bad_words(fields: Fields) -> list[str]:
    """Each word as it is spelled at the start of a text and inside one, where a space comes before it."""
    words = strings(fields, "bad_words", BAD_WORDS_MAX, limits.STOP_STRING_CHARACTERS_MAX)
    if sum(map(len, words)) > limits.INLINE_CHARACTERS_MAX:
        raise refuse("bad_words", f"at most {limits.INLINE_CHARACTERS_MAX} characters together")
    return [prefix + word.lstrip() for word in words for prefix in ("", " ")]


def encode_bad_words(spellings: Sequence[str], vocabulary: Vocabulary) -> tuple[tuple[int, ...], ...]:
    encoded = [tuple(vocabulary.encode(spelling, add_special_tokens=False)) for spelling in spellings]
    if not all(encoded):
        raise refuse("bad_words", "each must stand for at least 1 token")
    if sum(map(len, set(encoded))) > limits.BAD_WORDS_TOKENS_MAX:
        raise refuse("bad_words", f"at most {limits.BAD_WORDS_TOKENS_MAX} tokens together, with and without a space")
    return tuple(dict.fromkeys(encoded))
