"""A checkpoint's `tokenizer_config.json`: what templates and clients may know of it.

What does not belong here: encoding (`vocabulary` reads `tokenizer.json` for that).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from engine.base import limits
from engine.base.errors import InvalidArgument

FILE: Final = "tokenizer_config.json"
# Beside the special tokens. Anything else stays here: folders, host names and access tokens have been found in such
# files, and a class's own options mean nothing to who has only its name.
PUBLIC: Final = frozenset(
    (
        *("tokenizer_class", "add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces"),
        *("legacy", "padding_side", "truncation_side", "split_special_tokens", "errors"),
    )
)


def read_tokenizer_config(model_dir: Path) -> dict[str, Any]:
    """Empty where there is none."""
    file = model_dir / FILE
    if not file.is_file():
        return {}
    try:
        if file.stat().st_size > limits.TOKENIZER_CONFIG_BYTES_MAX:
            raise ValueError("larger than any real one")
        settings = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"model: cannot read {file}: {error}", field="model") from error
    if not isinstance(settings, dict):
        raise InvalidArgument(f"model: {file} does not hold a JSON object", field="model")
    return settings


def special_names(settings: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the others, each a text or an object that has one: what transformers gives to templates."""
    names = {key: _text_of(value) for key, value in settings.items() if key.endswith("_token")}
    return {key: text for key, text in names.items() if text is not None}


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a client needs to do as the tokenizer does, and no more."""
    plain = {key: value for key, value in settings.items() if key in PUBLIC and _is_plain(value)}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **plain, **special_names(settings)}


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (str, bool)


def _text_of(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
