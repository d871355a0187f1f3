"""From the bytes of a file to RGB pixels, at bounded cost. Runs in the decoding process only (`child`).

    format      PNG, JPEG, WebP, GIF by their first bytes; of several frames the first
    size        read from the header; nothing is decoded of what is too large
    upright     EXIF's orientation is applied, as transformers' `load_image` does
    RGB         transparency is put on white, as vLLM does it; palettes, grey and CMYK as Pillow converts them;
                of 16 bits the upper 8

What cannot be bounded here (time, memory, a decoder that crashes) is bounded by the process.
"""

import struct
from hashlib import sha256
from io import BytesIO
from typing import Final

from PIL import Image

from control_plane.router.media.reasons import ImageRefused, Reason
from engine.base import limits

Size = tuple[int, int]

MODE: Final = "RGB"
WHITE: Final = (255, 255, 255)
_ORIENTATION: Final = 0x0112  # EXIF's tag; what to do for each value but 1:
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAGIC: Final = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF87a": "GIF", b"GIF89a": "GIF"}


def decode_untrusted(file: bytes) -> Image.Image:
    """The picture as it is meant to be seen. Raises `ImageRefused`, or whatever Pillow does on a damaged file."""
    image = _opened(file, _format(file))
    _check_size(image.size)
    turn = _UPRIGHT.get(_orientation(image))
    image = _as_rgb(image)
    return image if turn is None else image.transpose(turn)


def digest_of(size: Size, pixels: bytes) -> bytes:
    """Names a picture by all that a model sees of it."""
    width, height = size
    digest = sha256(struct.pack("<4sII", MODE.encode(), width, height))
    digest.update(pixels)
    return digest.digest()


# -- headers -----------------------------------------------------------------------------------------------------------
def _format(file: bytes) -> str:
    if not file:
        raise ImageRefused(Reason.EMPTY)
    if file[:4] == b"RIFF" and file[8:12] == b"WEBP":
        _check_size(_webp_size(file))  # Pillow makes room for the pixels when it opens one
        return "WEBP"
    for magic, name in _MAGIC.items():
        if file.startswith(magic):
            return name
    raise ImageRefused(Reason.FORMAT)


def _webp_size(file: bytes) -> Size:
    """Of the canvas (RFC 9649, section 2.5 to 2.7)."""
    kind, body = file[12:16], file[20:30]
    if len(body) < 10:
        raise ImageRefused(Reason.BROKEN)
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", body, 6)
    return width & 0x3FFF, height & 0x3FFF


def _opened(file: bytes, name: str) -> Image.Image:
    """Reads the header only. One format: a plug-in that is not asked cannot be attacked."""
    Image.MAX_IMAGE_PIXELS = None  # ours is `_check_size`; Pillow's would be a warning
    return Image.open(BytesIO(file), formats=(name,))


def _check_size(size: Size) -> None:
    width, height = size
    if min(size) < 1:
        raise ImageRefused(Reason.BROKEN)
    if max(size) > limits.IMAGE_SIDE_MAX:
        raise ImageRefused(Reason.SIDE)
    if width * height > limits.IMAGE_PIXELS_MAX:
        raise ImageRefused(Reason.PIXELS)


def _orientation(image: Image.Image) -> int:
    """Metadata that cannot be read turns no picture around, and spoils none."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # the library raises nothing narrower
        return 1


# -- pixels ------------------------------------------------------------------------------------------------------------
def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey; `convert` would clip them to 8
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    if not image.has_transparency_data:
        return image.convert(MODE)
    seen = image.convert("RGBA")
    paper = Image.new(MODE, seen.size, WHITE)
    paper.paste(seen, mask=seen.getchannel("A"))
    return paper
