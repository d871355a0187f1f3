"""Reading a checkpoint folder's files without torch: JSON, and a fingerprint of the weights.

What the files mean is not known here.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.base.errors import InvalidArgument

_NOT_THE_MODEL = frozenset({"transformers_version", "dtype", "torch_dtype", "_name_or_path", "_model_name_or_path"})
_HEADER_BYTES_MAX = 64 << 20
_SAMPLES, _SAMPLE_BYTES = 16, 4096


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"model: cannot read {path}: {error}", field="model") from error
    if not isinstance(value, dict):
        raise InvalidArgument(f"model: {path} does not hold a JSON object", field="model")
    return value


def read_json_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def fingerprint(path: Path, config: Mapping[str, Any]) -> str:
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
