"""Folders: where this user keeps what can be made again."""

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """TRIPTYCH_CACHE, else `triptych` in the user's cache directory."""
    if own := os.environ.get("TRIPTYCH_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triptych"
