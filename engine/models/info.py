"""What a checkpoint folder says about its model, without loading it, and which models a configuration rules out.

Router, controller and launcher need layer counts and stop tokens but must start without torch, so this module reads
JSON and file sizes only. It does not know how a model is loaded (`checkpoint`) or run (`model_runner`). What no
configuration tells, `model_runner.verify` finds out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.base.errors import InvalidArgument
from engine.kv.schema import CacheSchema, Stream
from engine.models.files import fingerprint, read_json, read_json_if_there
from engine.models.text_config import SEEING, text_config
from engine.vision.info import VisionInfo, vision_of

# GPT-2 and its kin have names of their own for the same numbers.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "hidden_size": ("n_embd", "d_model"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "max_sequence_length"),
}
# Families whose heads are not hidden_size / heads wide when their configuration is silent.
_HEAD_DIMS: Mapping[str, int] = {
    "gemma": 256,
    "gemma2": 256,
    "gemma3_text": 256,
    "glm": 128,
    "glm4": 128,
    "qwen3": 128,
}
# "dynamic" and "longrope" change their frequencies with the longest position that a *call* sees. Keys are stored
# rotated, so what a token's key is must not depend on which tokens were packed beside it.
# "mrope" is "default" in three dimensions: what a token's position is, only its own sequence decides.
_CONSTANT_ROPE = frozenset({"default", "linear", "llama3", "yarn", "proportional", "mrope"})
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_ABOUT_MORE_THAN_TEXT = frozenset({"vision_config", "audio_config", "text_config"})
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The facts about a model that other processes need: of the language model, and of its eyes where it has some.

    `fingerprint` differs whenever KV must not be exchanged.
    """

    name: str
    family: str
    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str  # of the stored weights
    fingerprint: str
    window_tokens: int | None = None  # how far back the layers see that do not see everything; None: all see all
    experts: int = 0  # of each mixture-of-experts layer; 0: a dense model
    vision: VisionInfo | None = None  # None: it only reads


def describe(path: Path) -> ModelInfo:
    """Read a Hugging Face style folder: config.json, generation_config.json, *.safetensors, and for a model that sees
    what is there about its processor."""
    config = read_json(path / "config.json")
    require_servable(config)
    try:
        return _model_info(path, config)
    except KeyError as error:
        raise InvalidArgument(f"model: {path}/config.json has no {error}", field="model") from error


def _model_info(path: Path, config: Mapping[str, Any]) -> ModelInfo:
    text, model = text_config(config), fingerprint(path, config)
    return ModelInfo(
        name=path.name,
        family=config["model_type"],
        layers=_get(text, "num_hidden_layers"),
        kv_heads=_kv_heads(text),
        head_dim=_head_dim(text),
        vocab_size=text["vocab_size"],
        max_model_len=_get(text, "max_position_embeddings"),
        eos_token_ids=_eos_token_ids(path, config, text),
        dtype=_stored_dtype(config) or _stored_dtype(text) or "float32",
        fingerprint=model,
        window_tokens=window_of(text),
        experts=experts_of(text),
        vision=vision_of(path, config, model) if config["model_type"] in SEEING else None,
    )


def require_servable(config: Mapping[str, Any]) -> None:
    """Refuse what the configuration alone shows to be beyond us: a config.json, or a loaded configuration as a dict,
    of a whole model or of its language model."""
    reason = next(_reasons_against(config), None)
    if reason is not None:
        raise InvalidArgument(f"model: {config.get('model_type', 'no model_type')}: {reason}", field="model")


def window_of(config: Mapping[str, Any]) -> int | None:
    """The sliding window, if any layer has one."""
    layer_types = config.get("layer_types") or ("sliding_attention",)
    if config.get("use_sliding_window") is False or "sliding_attention" not in layer_types:
        return None
    return config.get("sliding_window") or None


def experts_of(config: Mapping[str, Any]) -> int:
    return next((count for name in _EXPERT_COUNTS if isinstance(count := config.get(name), int)), 0)


def schema_for(info: ModelInfo, dtype: str) -> CacheSchema:
    """What one cached token of this model holds when it is served in `dtype`."""
    kv = Stream(name="kv", layers=info.layers, heads=info.kv_heads, head_dim=info.head_dim, dtype=dtype)
    return CacheSchema(info.fingerprint, (kv,))


# -- reading a configuration -------------------------------------------------------------------------------------------
def _reasons_against(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("model_type") not in SEEING and not _ABOUT_MORE_THAN_TEXT.isdisjoint(config):
        yield f"a model of images or sound; only text models and {', '.join(sorted(SEEING))} are served"
    config = text_config(config)
    if config.get("is_encoder_decoder"):
        yield "an encoder-decoder model; only decoder-only models are served"
    if config.get("kv_lora_rank"):
        yield "caches a latent instead of keys and values (kv_lora_rank), which memory does not hold yet"
    if isinstance(config.get("num_key_value_heads"), list):
        yield "its layers differ in KV heads, and memory holds the same number for all"
    for kind in sorted(set(config.get("layer_types") or ()) - _LAYER_TYPES):
        yield f"layers of type {kind!r} are not supported"
    for kind in _rope_types(config):
        if kind not in _CONSTANT_ROPE:
            yield f"rope type {kind!r} depends on the length of a call"


def _rope_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Of all layers, or of each layer type (Gemma-3 turns local and global layers by different angles)."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key) or {}
        per_layer_type = [value for value in rope.values() if isinstance(value, Mapping)]
        for parameters in per_layer_type or [rope]:
            yield parameters.get("rope_type") or parameters.get("type") or "default"


def _get(config: Mapping[str, Any], key: str) -> Any:
    """Under its own name, or under one that a family has for it."""
    for name in (key, *_ALIASES[key]):
        if config.get(name) is not None:
            return config[name]
    raise KeyError(key)


def _kv_heads(config: Mapping[str, Any]) -> int:
    if config.get("multi_query"):  # GPT-BigCode
        return 1
    kv_heads: int = config.get("num_key_value_heads") or _get(config, "num_attention_heads")
    return kv_heads


def _head_dim(config: Mapping[str, Any]) -> int:
    by_family = _HEAD_DIMS.get(config["model_type"])
    head_dim: int = (
        config.get("head_dim") or by_family or _get(config, "hidden_size") // _get(config, "num_attention_heads")
    )
    return head_dim


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _eos_token_ids(path: Path, config: Mapping[str, Any], text: Mapping[str, Any]) -> tuple[int, ...]:
    """What generation_config.json says counts, also if it says that there is none."""
    stated = read_json_if_there(path / "generation_config.json")
    for source in (stated, config, text):
        if "eos_token_id" in source:
            return _token_ids(source["eos_token_id"])
    return ()


def _stored_dtype(config: Mapping[str, Any]) -> str | None:
    return config.get("dtype") or config.get("torch_dtype")
