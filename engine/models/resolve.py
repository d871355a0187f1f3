"""Which folder a model's name means: a local folder, a GGUF file, or a model of the Hugging Face hub.

    a directory             with *.safetensors; or with one *.gguf file, which is converted once (`checkpoint`)
    a path to a .gguf file  likewise
    org/name                the hub's model: from its local cache if that is whole, else downloaded into it

Nothing here imports torch or transformers, so a router may ask too. Nothing that was fetched is run.
"""

import json
import re
from pathlib import Path

from engine.base.errors import InvalidArgument
from engine.models.checkpoint import Progress, ensure_converted

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Weights that are read as data, and what names their shapes, their tokens and their chat template.
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt")
_INDEX = "model.safetensors.index.json"


def is_hub_id(reference: str) -> bool:
    """`org/name` names a model of the hub unless there is such a path here."""
    return _HUB_ID.fullmatch(reference) is not None and not Path(reference).exists() and not _is_gguf(Path(reference))


def resolve_model(reference: str, progress: Progress, cache_dir: Path | None = None) -> Path:
    """The folder of safetensors that `--model reference` means. May convert or download: not for an event loop."""
    path = Path(reference).expanduser()
    if path.is_dir():
        return _folder(path, cache_dir, progress)
    if path.is_file() and _is_gguf(path):
        return ensure_converted(path, cache_dir, progress)
    if is_hub_id(reference):
        return _from_hub(reference, progress)
    raise InvalidArgument(
        f"model: '{reference}' is neither a directory, a .gguf file, an org/name of the hub nor a known name",
        field="model",
    )


def _folder(path: Path, cache_dir: Path | None, progress: Progress) -> Path:
    gguf_files = sorted(path.glob("*.gguf"))
    if not gguf_files or any(path.glob("*.safetensors")):
        return path
    if len(gguf_files) > 1:
        names = ", ".join(file.name for file in gguf_files)
        raise InvalidArgument(f"model: {path} holds several GGUF files, name one of them: {names}", field="model")
    return ensure_converted(gguf_files[0], cache_dir, progress)


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf"


def _from_hub(hub_id: str, progress: Progress) -> Path:
    """The cache comes first: a model that is here does not change under a running deployment, and needs no network."""
    try:
        cached = _snapshot(hub_id, local_files_only=True)
    except InvalidArgument:
        cached = None
    if cached is not None and _is_whole(cached):
        return cached
    progress(f"downloading {hub_id}")
    downloaded = _snapshot(hub_id, local_files_only=False)
    if not _is_whole(downloaded):
        raise _unavailable(hub_id, "no config.json, or not all *.safetensors")
    return downloaded


def _snapshot(hub_id: str, *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_WANTED), local_files_only=local_files_only))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _unavailable(hub_id, str(error).strip().partition("\n")[0]) from error


def _unavailable(hub_id: str, reason: str) -> InvalidArgument:
    return InvalidArgument(
        f"model: '{hub_id}' is not in the hub's local cache and could not be downloaded ({reason}); "
        "name a local folder or a .gguf file with --model",
        field="model",
    )


def _is_whole(folder: Path) -> bool:
    """Whether an interrupted download left something out: the configuration, or a file of the weights."""
    if not (folder / "config.json").exists():
        return False
    if not (folder / _INDEX).exists():
        return any(folder.glob("*.safetensors"))
    files = set(json.loads((folder / _INDEX).read_bytes())["weight_map"].values())
    return all((folder / file).exists() for file in files)
