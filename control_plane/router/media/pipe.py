"""What the router and its decoding processes say to each other, byte by byte.

    router -> child   kind, length, and the image as it came
    child  -> router  READY once; then for each image: reason, width, height, digest, and width * height * 3 bytes

Apart from `child` so that a router loads no library that looks into images.
"""

import os
import signal
import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Final

from control_plane.router.media.data_url import URL_BYTES_MAX
from control_plane.router.media.reasons import Reason

READY: Final = b"!"
REQUEST: Final = struct.Struct("<BI")  # kind, bytes that follow
ANSWER: Final = struct.Struct("<BII32s")  # 0 or a reason's number, width, height, digest
REASONS: Final = tuple(Reason)  # number 1 is the first
JSON_EXPANSION: Final = 6  # \u0041 is one character
BYTES_MAX: Final = JSON_EXPANSION * URL_BYTES_MAX
PIECE_BYTES: Final = 1 << 20
TOO_LONG: Final = signal.SIGPROF  # of ITIMER_PROF, which counts CPU time


class Kind(IntEnum):
    """How an image comes."""

    FILE = 0
    DATA_URL = 1
    DATA_URL_JSON = 2  # between a JSON string's quotes: escapes are still in it


def read(pipe: int, size_bytes: int) -> bytes | None:
    """So many bytes; None: the other side has gone. Joined without the interpreter's lock, where they are many."""
    pieces: list[bytes] = []
    while size_bytes:
        piece = os.read(pipe, min(size_bytes, PIECE_BYTES))
        if not piece:
            return None
        pieces.append(piece)
        size_bytes -= len(piece)
    return b"".join(pieces)


def write(pipe: int, pieces: Sequence[bytes]) -> None:
    for piece in pieces:
        view = memoryview(piece)
        while view:
            view = view[os.write(pipe, view[:PIECE_BYTES]) :]
