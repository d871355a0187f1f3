"""Files that readers see as they were or as they are, never in part."""

import os
import tempfile
from pathlib import Path

_MODE = 0o644  # a temporary file is its owner's alone; what is written here is for whoever may look into the folder


def replace_file(file: Path, data: bytes) -> None:
    """Makes folders that are missing. Raises OSError, and then nothing has changed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}-", delete=False) as stream:
        try:
            stream.write(data)
            stream.flush()
            os.chmod(stream.name, _MODE)
            os.replace(stream.name, file)
        except BaseException:
            os.unlink(stream.name)
            raise


def require_writable(file: Path) -> None:
    """Raises OSError where `replace_file` would, as far as that can be known beforehand."""
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=file.parent):
        pass
