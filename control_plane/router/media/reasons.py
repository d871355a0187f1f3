"""Why an image is not taken: a fixed set of sentences. Each is told to the client behind the image's place, and its
value is a metric's label; no word of a library's, and none of the client's, is in either.

Torch-free, Pillow-free, asyncio-free: the decoding process imports it too.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from engine.base import limits


class Reason(StrEnum):
    DATA_URL = "data_url"
    BASE64 = "base64"
    FILE_BYTES = "file_bytes"
    EMPTY = "empty"
    FORMAT = "format"
    SIDE = "side"
    PIXELS = "pixels"
    BROKEN = "broken"
    MEMORY = "memory"
    TIME = "time"
    CRASH = "crash"
    LAYOUT = "layout"  # the model's own limit


SENTENCES: Final[Mapping[Reason, str]] = {
    Reason.DATA_URL: "must be a data URL of base64 text, as in data:image/png;base64,...",
    Reason.BASE64: "its base64 text is damaged, or not whole",
    Reason.FILE_BYTES: f"at most {limits.IMAGE_FILE_BYTES_MAX} bytes as a file",
    Reason.EMPTY: "must hold at least 1 byte",
    Reason.FORMAT: "must be a PNG, JPEG, WebP or GIF file",
    Reason.SIDE: f"at most {limits.IMAGE_SIDE_MAX} pixels wide or high",
    Reason.PIXELS: f"at most {limits.IMAGE_PIXELS_MAX} pixels",
    Reason.BROKEN: "the file is damaged, or not whole",
    Reason.MEMORY: f"takes more than {limits.MEDIA_CHILD_BYTES_MAX} bytes of memory to decode",
    Reason.TIME: f"takes more than {limits.MEDIA_DECODE_MS} ms to decode",
    Reason.CRASH: "cannot be decoded",
    Reason.LAYOUT: "the served model does not take images of this shape",
}


class ImageRefused(Exception):
    """Raised where an image's place in the request is not known."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason
