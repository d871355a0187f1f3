"""From the packaged eyes and the default model to one checkpoint folder that plain transformers loads.

    config.json                LLaVA's, with the default model's configuration as text_config
    model.safetensors          the eyes, and the default model's tensors as they are
    tokenizer.json             the default model's, where one reserved token, which no text contains, is now `<image>`
    processor_config.json      LLaVA's processor around CLIP's image processor, 96x96
    chat_template.jinja        ChatML with pictures; no system prompt but the caller's

No tensor is added to the language model, so text without pictures runs exactly as in the default model. Nothing here
imports torch, so a router may ask too. Training is `bench.demo_vlm`'s.
"""

import contextlib
import hashlib
import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Final

from engine.base.folders import default_cache_dir
from engine.models.checkpoint import Progress, ensure_default_model

NAME: Final = "demo-vlm"
IMAGE_TOKEN: Final = "<image>"
WEIGHTS: Final = "weights.safetensors"
_AS_THEY_ARE: Final = ("processor_config.json", "chat_template.jinja")
_OF_THE_LANGUAGE_MODEL: Final = "language_model."  # what LLaVA's names put before a language model's

_HEADER_BYTES: Final = struct.Struct("<Q")  # before the header: how long it is
_ALIGNMENT_BYTES: Final = 8
_COPIED_BYTES: Final = 1 << 20


def _silent(message: str) -> None:
    """The default progress: nobody is watching."""


def ensure_demo_vlm(cache_dir: Path | None = None, progress: Progress = _silent) -> Path:
    """The model's folder, assembled first if this machine has never done so with these weights."""
    language_model = ensure_default_model(cache_dir, progress)
    folder = (cache_dir or default_cache_dir()) / "models" / f"{NAME}-{_version(language_model)}" / NAME
    if not folder.exists():
        progress(f"assembling {folder} (once; a few seconds)")
        folder.parent.mkdir(parents=True, exist_ok=True)
        assemble(folder, language_model)
    return folder


def assemble(out_dir: Path, language_model: Path | None = None) -> None:
    """Write the whole checkpoint to a folder that is new: it appears complete or not at all, whoever else writes it."""
    with packaged() as eyes:
        assemble_with(eyes, out_dir, language_model or ensure_default_model())


def assemble_with(eyes: Path, out_dir: Path, language_model: Path) -> None:
    """Likewise, with the files of another folder than the packaged one: what training tries out."""
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        _write_all(eyes, language_model, unfinished)
        unfinished.chmod(0o755)
        _publish(unfinished, out_dir)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _publish(unfinished: Path, out_dir: Path) -> None:
    try:
        unfinished.rename(out_dir)
    except OSError:
        if not (out_dir / "config.json").exists():
            raise  # otherwise another process was first, with the same files


@contextlib.contextmanager
def packaged() -> Iterator[Path]:
    """The folder of this package's files."""
    with as_file(files("engine.models.demo_vlm")) as folder:
        yield folder


def _version(language_model: Path) -> str:
    """Changes with every packaged file and with the language model."""
    digest = hashlib.sha256(str(language_model).encode())
    with packaged() as eyes:
        for name in ("config.json", WEIGHTS, *_AS_THEY_ARE):
            digest.update((eyes / name).read_bytes())
    return digest.hexdigest()[:16]


# -- the files ---------------------------------------------------------------------------------------------------------
def _write_all(eyes: Path, language_model: Path, folder: Path) -> None:
    config = read_config(eyes, language_model)
    _write_json(folder / "config.json", config)
    _write_weights(eyes, language_model, folder)
    _write_tokenizer(language_model, folder, config["image_token_index"])
    shutil.copyfile(language_model / "generation_config.json", folder / "generation_config.json")
    for name in _AS_THEY_ARE:
        shutil.copyfile(eyes / name, folder / name)


def read_config(eyes: Path, language_model: Path) -> dict[str, Any]:
    """Of the whole model, as config.json has it."""
    text_config = _read_json(language_model / "config.json")
    return _read_json(eyes / "config.json") | {"text_config": text_config}


def _write_weights(eyes: Path, language_model: Path, folder: Path) -> None:
    """Both files' tensors in one, copied as bytes: a safetensors file is a table of offsets and then the data."""
    parts = [(eyes / WEIGHTS, ""), (language_model / "model.safetensors", _OF_THE_LANGUAGE_MODEL)]
    tables = [_read_table(file) for file, _ in parts]
    merged: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for (_, prefix), table in zip(parts, tables, strict=True):
        for name, tensor in table.tensors.items():
            first, last = tensor["data_offsets"]
            merged[prefix + name] = tensor | {"data_offsets": [start + first, start + last]}
        start += table.data_bytes
    with (folder / "model.safetensors").open("wb") as out:
        out.write(_header(merged))
        for (file, _), table in zip(parts, tables, strict=True):
            with file.open("rb") as data:
                data.seek(table.data_start)
                shutil.copyfileobj(data, out, _COPIED_BYTES)


@dataclass(frozen=True, slots=True)
class _Table:
    """What a safetensors file says of its tensors."""

    tensors: dict[str, Any]
    data_start: int
    data_bytes: int


def _read_table(file: Path) -> _Table:
    with file.open("rb") as stream:
        (header_bytes,) = _HEADER_BYTES.unpack(stream.read(_HEADER_BYTES.size))
        tensors: dict[str, Any] = json.loads(stream.read(header_bytes))
    tensors.pop("__metadata__", None)
    data_start = _HEADER_BYTES.size + header_bytes
    return _Table(tensors, data_start, file.stat().st_size - data_start)


def _header(table: dict[str, Any]) -> bytes:
    """Filled up with spaces, so that the data is aligned."""
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return _HEADER_BYTES.pack(len(text)) + text


def _write_tokenizer(language_model: Path, folder: Path, image_token_id: int) -> None:
    """One reserved token gets another name; every id keeps its meaning in text."""
    tokenizer = _read_json(language_model / "tokenizer.json")
    (reserved,) = (token for token in tokenizer["added_tokens"] if token["id"] == image_token_id)
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary.pop(reserved["content"], None)
    vocabulary[IMAGE_TOKEN] = image_token_id
    reserved["content"] = IMAGE_TOKEN
    _write_json(folder / "tokenizer.json", tokenizer)
    settings = _read_json(language_model / "tokenizer_config.json")
    _write_json(folder / "tokenizer_config.json", settings | {"extra_special_tokens": {"image_token": IMAGE_TOKEN}})


def _read_json(file: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(file.read_text())
    return document


def _write_json(file: Path, document: dict[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
