"""A model's tokenizer files as one zip archive, for gateways that tokenise on this server's behalf.

Made when somebody asks for the first time, off the event loop, and kept: the files of a model that is served do not
change. Only files that a tokenizer is made of are in it; weights never are.
"""

import asyncio
import hashlib
import io
import zipfile
from pathlib import Path
from typing import Final

from engine.base.errors import FailedPrecondition

CHUNK_BYTES: Final = 64 << 10  # what gateways expect of one message
FILES: Final = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "tiktoken.model"),
    *("chat_template.json", "chat_template.jinja", "config.json", "generation_config.json"),
)


class TokenizerBundle:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._making = asyncio.Lock()
        self._archive: tuple[bytes, str] | None = None

    async def archive(self) -> tuple[bytes, str]:
        """Its bytes, and their SHA-256 in hexadecimal."""
        async with self._making:
            if self._archive is None:
                self._archive = await asyncio.to_thread(_archive, self._folder)
        return self._archive


def _archive(folder: Path) -> tuple[bytes, str]:
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if not found:
        raise FailedPrecondition("GetTokenizer: this model has no tokenizer files")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in found:
            archive.writestr(_undated(path.name), path.read_bytes())
    data = buffer.getvalue()
    return data, hashlib.sha256(data).hexdigest()


def _undated(name: str) -> zipfile.ZipInfo:
    """Without the file's own time, so that the same files have the same digest wherever they were copied to."""
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_DEFLATED
    return info
