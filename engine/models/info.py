"""What a checkpoint folder says about its model, without loading it, and which models a configuration rules out.

Router, controller and launcher need layer counts and stop tokens but must start without torch, so this module reads
JSON and file sizes only. It does not know how a model is loaded (`checkpoint`) or run (`model_runner`). What no
configuration tells, `model_runner.verify` finds out.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.base.errors import InvalidArgument
from engine.kv.schema import CacheSchema, Stream

_NOT_THE_MODEL = frozenset({"transformers_version", "dtype", "torch_dtype", "_name_or_path", "_model_name_or_path"})
_HEADER_BYTES_MAX = 64 << 20
_SAMPLES, _SAMPLE_BYTES = 16, 4096

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
_CONSTANT_ROPE = frozenset({"default", "linear", "llama3", "yarn", "proportional"})
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The facts about a model that other processes need. `fingerprint` differs whenever KV must not be exchanged."""

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


def describe(path: Path) -> ModelInfo:
    """Read a Hugging Face style folder: config.json, generation_config.json, *.safetensors."""
    config = _read_json(path / "config.json")
    generation_file = path / "generation_config.json"
    generation = _read_json(generation_file) if generation_file.exists() else {}
    require_servable(config)
    try:
        return ModelInfo(
            name=path.name,
            family=config["model_type"],
            layers=_get(config, "num_hidden_layers"),
            kv_heads=_kv_heads(config),
            head_dim=_head_dim(config),
            vocab_size=config["vocab_size"],
            max_model_len=_get(config, "max_position_embeddings"),
            eos_token_ids=_token_ids(generation.get("eos_token_id", config.get("eos_token_id"))),
            dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
            fingerprint=_fingerprint(path, config),
            window_tokens=window_of(config),
            experts=experts_of(config),
        )
    except KeyError as error:
        raise InvalidArgument(f"model: {path}/config.json has no {error}", field="model") from error


def require_servable(config: Mapping[str, Any]) -> None:
    """Refuse what the configuration alone shows to be beyond us: a config.json, or a loaded configuration as a dict."""
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
    if "vision_config" in config or "audio_config" in config or "text_config" in config:
        yield "a model of images or sound; only text models are served"
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"model: cannot read {path}: {error}", field="model") from error
    if not isinstance(value, dict):
        raise InvalidArgument(f"model: {path} does not hold a JSON object", field="model")
    return value


def _fingerprint(path: Path, config: Mapping[str, Any]) -> str:
    """Hash what defines the model: its configuration and, for each weight file, name, size, header and samples.

    Hashing all bytes would cost seconds per gigabyte at each start. Names and shapes alone would not tell two
    fine-tunes apart, hence the samples. Keys that change with the tool that saved the folder are left out.
    """
    digest = hashlib.sha256()
    defining = {key: value for key, value in config.items() if key not in _NOT_THE_MODEL}
    digest.update(json.dumps(defining, sort_keys=True).encode())
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InvalidArgument(f"model: {path} holds no *.safetensors file", field="model")
    for file in files:
        digest.update(f"\0{file.name}\0{file.stat().st_size}\0".encode())
        for piece in _header_and_samples(file):
            digest.update(piece)
    return digest.hexdigest()


def _header_and_samples(file: Path) -> Iterator[bytes]:
    size_bytes = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if header_bytes > min(size_bytes, _HEADER_BYTES_MAX):
            raise InvalidArgument(f"model: {file} is not a safetensors file", field="model")
        yield stream.read(header_bytes)
        for sample in range(_SAMPLES):
            stream.seek(8 + header_bytes + (size_bytes - 8 - header_bytes) * sample // _SAMPLES)
            yield stream.read(_SAMPLE_BYTES)
