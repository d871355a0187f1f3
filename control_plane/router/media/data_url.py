"""Data URLs (RFC 2397): `data:[type/subtype][;name=value]*;base64,TEXT`.

The type is a label and decides nothing: what a file is, its bytes say. Strict all the same, because what is nearly a
data URL is somebody's mistake or somebody's trick: base64 of the standard alphabet, padded, without white space, and
no percent-encoding anywhere.

What does not belong here: which files are images (`pictures`).
"""

import binascii
import re
from typing import Final

from control_plane.router.media.reasons import ImageRefused, Reason
from engine.base import limits

HEAD_BYTES_MAX: Final = 256  # everything before the comma; real ones have 22 to 40
TEXT_BYTES_MAX: Final = 4 * -(-limits.IMAGE_FILE_BYTES_MAX // 3)
URL_BYTES_MAX: Final = HEAD_BYTES_MAX + TEXT_BYTES_MAX

_TOKEN: Final = rb"[A-Za-z0-9!#$&^_.+-]+"
_HEAD: Final = re.compile(
    rb"data:(?:%s/%s)?(?:;%s=%s)*;base64," % (_TOKEN, _TOKEN, _TOKEN, _TOKEN), re.IGNORECASE | re.DOTALL
)


def is_data_url(url: str) -> bool:
    """What it claims to be; whether it is one, decoding finds out."""
    return url[:5].lower() == "data:"


def file_in_data_url_untrusted(url: bytes) -> bytes:
    """Raises `ImageRefused`."""
    if len(url) > URL_BYTES_MAX:
        raise ImageRefused(Reason.FILE_BYTES)
    head = _HEAD.match(url, 0, HEAD_BYTES_MAX)
    if head is None:
        raise ImageRefused(Reason.DATA_URL)
    text = memoryview(url)[head.end() :]
    if len(text) % 4:  # strict mode lets some padding pass that is too long
        raise ImageRefused(Reason.BASE64)
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error:
        raise ImageRefused(Reason.BASE64) from None
