"""Profiles that come with the package: one file for each model, "<model>.safetensors". Written by `triptych profile`.

A worker finds the one of its model by the checkpoint's fingerprint, whatever the checkpoint is called. Of the others
only the header is read.
"""

import json
from pathlib import Path

from kv_transfer.profile import Profile, load

FOLDER = Path(__file__).parent


def packaged(fingerprint: str, folder: Path = FOLDER) -> Profile | None:
    """The profile of the model with this fingerprint (`CacheSchema.model`), if there is one."""
    paths = (path for path in sorted(folder.glob("*.safetensors")) if _model_of(path) == fingerprint)
    path = next(paths, None)
    return None if path is None else load(path)


def _model_of(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return str(json.loads(file.metadata()["triptych"])["model"])
