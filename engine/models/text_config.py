"""The language model's part of a config.json: all of it, or what a model that sees keeps under text_config.

A text_config may leave out what its family takes for granted (LLaVA-1.5's says little more than "llama"), and Qwen2-VL
was published with its numbers beside vision_config, not below it. Readers of the result need not know.
"""

from collections.abc import Mapping
from typing import Any

# Families that see, and the family of the language model inside when their configuration does not name it.
SEEING: Mapping[str, str] = {
    "idefics3": "llama",
    "llava": "llama",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen2_vl": "qwen2_vl_text",
    "smolvlm": "llama",
}
_LLAMA: Mapping[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
}
_QWEN2_VL: Mapping[str, Any] = {
    "vocab_size": 152_064,
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "eos_token_id": 151_645,
}
# What transformers' configuration classes fill in.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    "qwen2": {
        **_LLAMA,
        "vocab_size": 151_936,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
        "use_sliding_window": False,
        "eos_token_id": None,
    },
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen2_vl_text": _QWEN2_VL,
}
_ONCE_FLAT = frozenset({"qwen2_5_vl_text", "qwen2_vl_text"})
_OF_THE_WHOLE = frozenset({"vision_config", "model_type"})


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's configuration; `config` itself of a model that only reads."""
    if (inside := SEEING.get(config.get("model_type", ""))) is None:
        return config
    text = config.get("text_config")
    if text is None and inside in _ONCE_FLAT:
        text = {key: value for key, value in config.items() if key not in _OF_THE_WHOLE}
    return _with_defaults({"model_type": inside, **(text or {})})


def _with_defaults(text: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**DEFAULTS.get(text["model_type"], {}), **text}
