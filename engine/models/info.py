"""What a checkpoint folder says about its model, without loading it.

Router, controller and launcher need layer counts and stop tokens but must start without torch, so this module reads
JSON and file sizes only. It does not know how a model is run (`family`) or loaded (`checkpoint`).
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


def describe(path: Path) -> ModelInfo:
    """Read a Hugging Face style folder: config.json, generation_config.json, *.safetensors."""
    config = _read_json(path / "config.json")
    generation_file = path / "generation_config.json"
    generation = _read_json(generation_file) if generation_file.exists() else {}
    try:
        return ModelInfo(
            name=path.name,
            family=config["model_type"],
            layers=config["num_hidden_layers"],
            kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            vocab_size=config["vocab_size"],
            max_model_len=config["max_position_embeddings"],
            eos_token_ids=_token_ids(generation.get("eos_token_id", config.get("eos_token_id"))),
            dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
            fingerprint=_fingerprint(path, config),
        )
    except KeyError as error:
        raise InvalidArgument(f"model: {path}/config.json has no {error}", field="model") from error


def schema_for(info: ModelInfo, dtype: str) -> CacheSchema:
    """What one cached token of this model holds when it is served in `dtype`."""
    kv = Stream(name="kv", layers=info.layers, heads=info.kv_heads, head_dim=info.head_dim, dtype=dtype)
    return CacheSchema(info.fingerprint, (kv,))


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
