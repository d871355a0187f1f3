"""Weights of a folder into a module of transformers: safetensors only, no code from the folder, no network.

What transformers says on the way is not for workers' logs, which machines read; what it says about a folder that cannot
be loaded becomes one sentence. Which module a folder wants is not decided here (`checkpoint`, `parts`).
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from engine.base.errors import InvalidArgument

_DTYPES: Final = ("float32", "bfloat16", "float16")
_LOCAL: Final = {"local_files_only": True, "trust_remote_code": False}


def load_config(path: Path) -> Any:
    """The folder's configuration, as transformers has it for the family."""
    from transformers import AutoConfig

    with quiet_transformers(), refusing(f"cannot load {path}"):
        return AutoConfig.from_pretrained(path, **_LOCAL)


def load_weights(module_class: Any, path: Path, dtype: str, attention: str = "eager") -> Any:
    """`module_class` with the folder's weights, widened or rounded to `dtype`, for inference. Refuses a folder that
    lacks some: transformers would fill them with random numbers. Weights that the module has no use for are not read.
    """
    if dtype not in _DTYPES:
        raise InvalidArgument(f"dtype: one of {', '.join(_DTYPES)}, got {dtype!r}", field="dtype")
    with quiet_transformers(), refusing(f"cannot load {path}"):
        model, report = module_class.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, use_safetensors=True, output_loading_info=True, **_LOCAL
        )
    if report["missing_keys"]:
        raise InvalidArgument(f"model: {path} lacks the weights {_some(report['missing_keys'])}", field="model")
    model.train(False)
    return model


def load_image_processor(path: Path) -> Any:
    """The model's own, in the form that needs no torchvision: the same on every machine."""
    from transformers import AutoImageProcessor

    with quiet_transformers(), refusing(f"cannot load the image processor of {path}"):
        return AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            path, backend="pil", **_LOCAL
        )


def _some(names: Iterable[str], count: int = 3) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:count]) + (f" and {len(ordered) - count} more" if len(ordered) > count else "")


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever transformers says about a folder or file becomes one sentence that names it."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InvalidArgument(f"model: {what}: {reason}", field="model") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
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
