"""The fields that say what an answer looks like, and in what order requests are served: everything that concerns the
router alone, and no engine.
"""

from typing import Any, Final

from control_plane.router.validation.fields import (
    Fields,
    boolean,
    integer,
    object_or_empty,
    optional_integer,
    refuse,
    strings,
)
from engine.base import limits

STREAM_OPTIONS: Final = ("include_usage", "continuous_usage_stats")


def read_answer(fields: Fields) -> dict[str, Any]:
    """Keyword arguments of `ValidatedRequest`."""
    return {
        "choices": _choices(fields),
        "stream": boolean(fields, "stream"),
        **_stream_options(fields),
        "stop": _stop(fields),
        "include_stop": boolean(fields, "include_stop_str_in_output"),
        "prompt_logprobs": optional_integer(fields, "prompt_logprobs", 0, limits.LOGPROBS_MAX),
        "return_token_ids": boolean(fields, "return_token_ids"),
        "tokens_as_ids": boolean(fields, "return_tokens_as_token_ids"),
        "priority": integer(fields, "priority", 0, -limits.PRIORITY_MAX, limits.PRIORITY_MAX),
        "cache_salt": _cache_salt(fields),
    }


def _choices(fields: Fields) -> int:
    choices = integer(fields, "n", 1, 1, limits.CHOICES_MAX)
    best_of = optional_integer(fields, "best_of", 1, limits.CHOICES_MAX)
    if best_of not in (None, choices):
        raise refuse("best_of", "must be the same as n: choices are not ranked here")
    return choices


def _stream_options(fields: Fields) -> dict[str, bool]:
    options = object_or_empty(fields, "stream_options")
    if options and not boolean(fields, "stream"):
        raise refuse("stream_options", "needs stream to be true")
    include_usage, continuous_usage = (boolean(options, name, prefix="stream_options.") for name in STREAM_OPTIONS)
    return {"include_usage": include_usage, "continuous_usage": include_usage and continuous_usage}


def _stop(fields: Fields) -> tuple[str, ...]:
    """One string or a list of them; the empty string, alone, is none."""
    stop = fields.get("stop")
    if isinstance(stop, str):
        fields = {"stop": [stop] if stop else None}
    stops = strings(fields, "stop", limits.STOP_STRINGS_MAX, limits.STOP_STRING_CHARACTERS_MAX)
    if sum(map(len, stops)) > limits.STOP_CHARACTERS_MAX:
        raise refuse("stop", f"at most {limits.STOP_CHARACTERS_MAX} characters together")
    return stops


def _cache_salt(fields: Fields) -> str:
    """A salt parts its users from others of their tenant; `user` is a name in the client's own books and parts none."""
    salt = fields.get("cache_salt")
    if salt is None:
        return ""
    if type(salt) is not str or not 1 <= len(salt) <= limits.CACHE_SALT_CHARACTERS_MAX:
        raise refuse("cache_salt", f"must be a string of 1 to {limits.CACHE_SALT_CHARACTERS_MAX} characters")
    return salt
