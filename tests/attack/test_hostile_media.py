"""Attack: image files against the processes that decode them (reliability D10, D11). Each gives its picture, compared
pixel by pixel, or one of the fixed reasons; and the next picture is decoded, by the same process or by its successor.

Files are made here: none is kept in the repository, and none is known to a virus scanner.
"""

import asyncio
import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO

import pytest
from PIL import Image

from control_plane.router.media import child, pipe
from control_plane.router.media.decoding import Child, Config, Decoded, Decoders, ImageFile
from control_plane.router.media.pipe import Kind
from control_plane.router.media.reasons import SENTENCES, ImageRefused, Reason
from engine.base import limits
from engine.base.errors import Internal, ResourceExhausted
from tests.control_plane.router.seeing import asking, data_url, image_part, picture, saved, seeing

pytestmark = [pytest.mark.procs, pytest.mark.timeout(120)]

PNG_START = b"\x89PNG\r\n\x1a\n"
SMALL = picture()


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    """One child: whatever an attack leaves behind is there for the next one."""
    made = Decoders(Config(children=1))
    yield made
    made.close()


async def decode(decoders: Decoders, file: bytes) -> Decoded:
    return await decoders.decode(ImageFile(Kind.FILE, [file]), wait_ms=60_000)


async def refusal(decoders: Decoders, file: bytes, kind: Kind = Kind.FILE) -> Reason:
    with pytest.raises(ImageRefused) as raised:
        await decoders.decode(ImageFile(kind, [file]), wait_ms=60_000)
    return raised.value.reason


async def is_well(decoders: Decoders) -> None:
    decoded = await decode(decoders, saved(SMALL))
    assert decoded.picture.pixels == SMALL.tobytes()
    assert decoders.children == 1


# -- making files ------------------------------------------------------------------------------------------------------
def chunk(kind: bytes, data: bytes, *, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def png(width: int, height: int, *, depth: int = 8, colour: int = 2, rows: bytes = b"", extra: bytes = b"") -> bytes:
    """With any header, whatever is in it."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return PNG_START + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def with_chunk(file: bytes, extra: bytes) -> bytes:
    """A PNG with one chunk more, behind its header."""
    at = len(PNG_START) + 25
    return file[:at] + extra + file[at:]


def jpeg_of_size(width: int, height: int) -> bytes:
    """The header of a small JPEG says another size."""
    file = bytearray(saved(SMALL, "JPEG"))
    at = file.index(b"\xff\xc0") + 5
    file[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(file)


def gif_of_size(width: int, height: int) -> bytes:
    file = bytearray(saved(SMALL, "GIF"))
    file[6:10] = struct.pack("<HH", width, height)
    return bytes(file)


def webp_of_size(width: int, height: int) -> bytes:
    """An extended header with a canvas of that size, and a small picture."""
    inner = saved(SMALL, "WEBP", lossless=True)[12:]
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + sides + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def frames(form: str, count: int, **options: object) -> bytes:
    first, *others = (picture(seed=seed) for seed in range(count))
    return saved(first, form, save_all=True, append_images=others, duration=10, loop=0, **options)


def turned(orientation: int, form: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(SMALL, form, exif=exif.tobytes())


def bomb(width: int, height: int) -> bytes:
    """A few kilobytes of one colour."""
    return saved(Image.new("1", (width, height)), "PNG", optimize=False)


# -- files with a right answer -----------------------------------------------------------------------------------------
GREY = picture(mode="L")
ALPHA = picture(mode="RGBA")
CMYK = picture(mode="CMYK")
PALETTE = SMALL.quantize(16)
GREY16 = bytes(byte for at in range(200) for byte in (at, 255 - at))  # high byte first


def on_white(image: Image.Image) -> Image.Image:
    """By arithmetic of our own: c * a + 255 * (1 - a), rounded."""
    source = image.convert("RGBA").tobytes()
    seen = [
        round((source[at + band] * source[at + 3] + 255 * (255 - source[at + 3])) / 255)
        for at in range(0, len(source), 4)
        for band in range(3)
    ]
    return Image.frombytes("RGB", image.size, bytes(seen))


def first_frame(file: bytes) -> Image.Image:
    return Image.open(BytesIO(file)).convert("RGB")


def upside_down() -> Image.Image:
    width, height = SMALL.size
    source = SMALL.tobytes()
    rotated = [source[3 * at : 3 * at + 3] for at in reversed(range(width * height))]
    return Image.frombytes("RGB", (width, height), b"".join(rotated))


def quarter_turn() -> Image.Image:
    """Clockwise: orientation 6, a telephone held upright."""
    width, height = SMALL.size
    pixels = [SMALL.getpixel((row, height - 1 - column)) for row in range(width) for column in range(height)]
    return Image.frombytes("RGB", (height, width), b"".join(bytes(pixel) for pixel in pixels))  # type: ignore[arg-type]


TRANSPARENT_PALETTE = saved(PALETTE, "PNG", transparency=3)
GIFS = frames("GIF", 200)
WEBPS = frames("WEBP", 12, lossless=True)
JPEG = saved(SMALL, "JPEG", quality=95)
PROGRESSIVE = saved(SMALL, "JPEG", quality=95, progressive=True)
CMYK_JPEG = saved(CMYK, "JPEG", quality=100)
ODD_CHUNK = chunk(b"prVt", b"<script>alert(1)</script>")
PROFILE = chunk(b"iCCP", b"x\0\0" + zlib.compress(b"no profile of any colour" * 100))

RIGHT: dict[str, tuple[bytes, Image.Image]] = {
    "1 x 1": (saved(picture(1, 1)), picture(1, 1)),
    "1 x the longest side": (saved(picture(1, limits.IMAGE_SIDE_MAX)), picture(1, limits.IMAGE_SIDE_MAX)),
    "the longest side x 1": (saved(picture(limits.IMAGE_SIDE_MAX, 1)), picture(limits.IMAGE_SIDE_MAX, 1)),
    "grey": (saved(GREY), GREY.convert("RGB")),
    "black and white": (saved(picture(mode="L").convert("1")), picture(mode="L").convert("1").convert("RGB")),
    "16 bits of grey": (
        png(20, 10, depth=16, colour=0, rows=b"".join(b"\0" + GREY16[at : at + 40] for at in range(0, 400, 40))),
        Image.frombytes("L", (20, 10), GREY16[::2]).convert("RGB"),
    ),
    "16 bits of colour": (
        png(2, 1, depth=16, colour=2, rows=b"\0" + bytes(range(12))),
        Image.frombytes("RGB", (2, 1), bytes(range(0, 12, 2))),
    ),
    "palette": (saved(PALETTE), PALETTE.convert("RGB")),
    "palette with a transparent colour": (TRANSPARENT_PALETTE, on_white(Image.open(BytesIO(TRANSPARENT_PALETTE)))),
    "alpha": (saved(ALPHA), on_white(ALPHA)),
    "grey and alpha": (saved(picture(mode="LA")), on_white(picture(mode="LA"))),
    "CMYK": (CMYK_JPEG, first_frame(CMYK_JPEG)),
    "progressive JPEG": (PROGRESSIVE, first_frame(PROGRESSIVE)),
    "upside down": (turned(3), upside_down()),
    "a quarter turn": (turned(6), quarter_turn()),
    "no such orientation": (turned(99), SMALL),
    "200 frames of GIF": (GIFS, picture(seed=0).quantize().convert("RGB")),
    "animated WebP": (WEBPS, picture(seed=0)),
    "animated PNG": (frames("PNG", 12), picture(seed=0)),
    "lossless WebP": (saved(SMALL, "WEBP", lossless=True), SMALL),
    "WebP with alpha": (saved(ALPHA, "WEBP", lossless=True, exact=True), on_white(ALPHA)),
    "interlaced GIF": (saved(PALETTE, "GIF", interlace=1), PALETTE.convert("RGB")),
    "an unknown chunk": (with_chunk(saved(SMALL), ODD_CHUNK), SMALL),
    "a broken colour profile": (with_chunk(saved(SMALL), PROFILE), SMALL),
    "8 MB of metadata": (with_chunk(saved(SMALL), chunk(b"prVt", bytes(8 << 20))), SMALL),
    "rubbish behind the end": (saved(SMALL) + b"PK\x03\x04" * 1_000, SMALL),
    "EXIF that is none": (saved(SMALL, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), SMALL),
}
CLOSE = 1  # rounding of alpha differs by one


@pytest.mark.parametrize("name", RIGHT)
async def test_a_strange_file_gives_its_picture(decoders: Decoders, name: str) -> None:
    file, meant = RIGHT[name]
    decoded = (await decode(decoders, file)).picture
    assert (decoded.width, decoded.height) == meant.size
    assert all(abs(got - wanted) <= CLOSE for got, wanted in zip(decoded.pixels, meant.tobytes(), strict=True))
    await is_well(decoders)


async def test_the_same_pixels_have_the_same_digest_and_others_do_not(decoders: Decoders) -> None:
    file = saved(picture(20, 10))
    digest = (await decode(decoders, file)).digest
    assert (await decode(decoders, with_chunk(file, ODD_CHUNK))).digest == digest
    assert (await decode(decoders, saved(picture(20, 10), "WEBP", lossless=True))).digest == digest
    reshaped = Image.frombytes("RGB", (10, 20), picture(20, 10).tobytes())
    others = [saved(reshaped), saved(picture(20, 10, seed=2)), saved(picture(20, 11))]
    assert len({digest, *[(await decode(decoders, other)).digest for other in others]}) == 4


# -- files that are refused --------------------------------------------------------------------------------------------
TOO_LONG = limits.IMAGE_SIDE_MAX + 1
ITXT_BOMB = chunk(b"iTXt", b"x\0\1\0\0\0" + zlib.compress(bytes(128 << 20), 9))
DAMAGED_CRC = with_chunk(saved(SMALL), chunk(b"PLTE", bytes(3), crc=7))
HALF_PNG = saved(picture(200, 200))
HALF_JPEG = saved(picture(200, 200), "JPEG")

REFUSED: dict[str, tuple[Callable[[], bytes], Reason]] = {
    "0 bytes": (lambda: b"", Reason.EMPTY),
    "50,000 x 50,000": (lambda: png(50_000, 50_000), Reason.SIDE),
    "50,000 x 50,000 GIF": (lambda: gif_of_size(50_000, 50_000), Reason.SIDE),
    "50,000 x 50,000 JPEG": (lambda: jpeg_of_size(50_000, 50_000), Reason.SIDE),
    "16,384 x 16,384 WebP": (lambda: webp_of_size(16_384, 16_384), Reason.PIXELS),
    "a line that is too long": (lambda: saved(picture(TOO_LONG, 1)), Reason.SIDE),
    "a column that is too long": (lambda: saved(picture(1, TOO_LONG)), Reason.SIDE),
    "a bomb of one colour": (lambda: bomb(8_192, 8_192), Reason.PIXELS),
    "one pixel row too many": (lambda: bomb(4_096, 4_097), Reason.PIXELS),
    "0 x 0": (lambda: png(0, 0), Reason.BROKEN),
    "4 billion wide": (lambda: png(0xFFFFFFFF, 1), Reason.SIDE),
    "a bomb of text": (lambda: with_chunk(saved(SMALL), ITXT_BOMB), Reason.BROKEN),
    "a damaged check sum": (lambda: DAMAGED_CRC, Reason.BROKEN),
    "half a PNG": (lambda: HALF_PNG[: len(HALF_PNG) // 2], Reason.BROKEN),
    "half a JPEG": (lambda: HALF_JPEG[: len(HALF_JPEG) // 2], Reason.BROKEN),
    "half a WebP": (lambda: saved(picture(200, 200), "WEBP")[:900], Reason.BROKEN),
    "half a GIF": (lambda: saved(picture(200, 200), "GIF")[:900], Reason.BROKEN),
    "a PNG without pixels": (lambda: PNG_START + chunk(b"IHDR", bytes(13)), Reason.BROKEN),
    "the first bytes of a PNG": (lambda: PNG_START, Reason.BROKEN),
    "the first bytes of a JPEG": (lambda: b"\xff\xd8\xff", Reason.BROKEN),
    "the first bytes of a GIF": (lambda: b"GIF89a", Reason.BROKEN),
    "the first bytes of a WebP": (lambda: b"RIFF\0\0\0\0WEBPVP8X", Reason.BROKEN),
    "a PNG of noise": (lambda: PNG_START + picture(99, 99).tobytes(), Reason.BROKEN),
    "no such depth": (lambda: png(9, 9, depth=3), Reason.BROKEN),
    "SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', Reason.FORMAT),
    "HTML": (lambda: b"<!DOCTYPE html><script>alert(1)</script>", Reason.FORMAT),
    "PDF": (lambda: b"%PDF-1.7\n1 0 obj\n", Reason.FORMAT),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", Reason.FORMAT),
    "TIFF": (lambda: saved(SMALL, "TIFF"), Reason.FORMAT),
    "ICO": (lambda: saved(SMALL, "ICO"), Reason.FORMAT),
    "BMP": (lambda: saved(SMALL, "BMP"), Reason.FORMAT),
    "PPM": (lambda: saved(SMALL, "PPM"), Reason.FORMAT),
    "TGA": (lambda: saved(SMALL, "TGA"), Reason.FORMAT),
    "JPEG 2000": (lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(90), Reason.FORMAT),
    "a zip archive": (lambda: b"PK\x03\x04" + bytes(90), Reason.FORMAT),
    "a text": (lambda: b"not an image at all", Reason.FORMAT),
    "too many bytes": (lambda: bytes(limits.IMAGE_FILE_BYTES_MAX + 1), Reason.FILE_BYTES),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_hostile_file_is_refused_for_a_fixed_reason(decoders: Decoders, name: str) -> None:
    make, reason = REFUSED[name]
    assert await refusal(decoders, make()) is reason
    await is_well(decoders)


def test_there_are_enough_of_both() -> None:
    assert len(RIGHT) >= 25 and len(REFUSED) >= 35
    assert all(re.fullmatch(r"[a-zA-Z0-9 ,;:./+-]+", sentence) for sentence in SENTENCES.values())


async def test_any_damage_gives_a_picture_or_a_reason(decoders: Decoders) -> None:
    """One byte in each place of each format's header and body."""
    for form in ("PNG", "JPEG", "WEBP", "GIF"):
        file = saved(picture(12, 12), form)
        for at in range(0, len(file), max(1, len(file) // 40)):
            damaged = file[:at] + bytes([file[at] ^ 0xFF]) + file[at + 1 :]
            try:
                await decode(decoders, damaged)
            except ImageRefused as refused:
                assert refused.reason in (Reason.BROKEN, Reason.FORMAT, Reason.SIDE, Reason.PIXELS)
    await is_well(decoders)


# -- text around files -------------------------------------------------------------------------------------------------
GOOD = saved(SMALL)
TEXT = data_url(GOOD).partition(",")[2]
BAD_URLS = {
    "": Reason.DATA_URL,
    "data:": Reason.DATA_URL,
    "data:image/png": Reason.DATA_URL,
    f"data:image/png,{TEXT}": Reason.DATA_URL,
    f"data:image/png;base32,{TEXT}": Reason.DATA_URL,
    f"data:image/png;base64;x=y,{TEXT}": Reason.DATA_URL,
    f"data: image/png;base64,{TEXT}": Reason.DATA_URL,
    f"data:image/png;base64 ,{TEXT}": Reason.DATA_URL,
    f"data:image/png\n;base64,{TEXT}": Reason.DATA_URL,
    f"data:image/png;{'x' * 300};base64,{TEXT}": Reason.DATA_URL,
    f"data:{'a' * 300}/png;base64,{TEXT}": Reason.DATA_URL,
    f"data:image/png;base64,{TEXT[:-1]}": Reason.BASE64,
    f"data:image/png;base64,{TEXT}=": Reason.BASE64,
    f"data:image/png;base64,{TEXT[:8]}\n{TEXT[8:]}": Reason.BASE64,
    f"data:image/png;base64,{TEXT[:8]} {TEXT[8:]}": Reason.BASE64,
    f"data:image/png;base64,{TEXT[:8]}%2B{TEXT[8:]}": Reason.BASE64,
    f"data:image/png;base64,{TEXT[:8]}é{TEXT[8:]}": Reason.BASE64,
    f"data:image/png;base64,{TEXT[:8]}-_{TEXT[10:]}": Reason.BASE64,
    f"data:image/png;base64,{TEXT[:8]}===={TEXT[8:]}": Reason.BASE64,
    "data:image/png;base64,": Reason.EMPTY,
    "data:image/png;base64,AAAA": Reason.FORMAT,
}


@pytest.mark.parametrize("url", BAD_URLS, ids=lambda url: url[:48])
async def test_a_broken_data_url_is_refused(decoders: Decoders, url: str) -> None:
    assert await refusal(decoders, url.encode(), Kind.DATA_URL) is BAD_URLS[url]


@pytest.mark.parametrize(
    "head",
    [
        *("data:image/png;base64,", "data:;base64,", "DATA:IMAGE/PNG;BASE64,", "data:image/jpeg;base64,"),
        *("data:text/html;base64,", "data:image/svg+xml;base64,", "data:image/png;name=a.png;charset=utf-8;base64,"),
    ],
)
async def test_a_type_is_a_label(decoders: Decoders, head: str) -> None:
    decoded = await decoders.decode(ImageFile(Kind.DATA_URL, [(head + TEXT).encode()]), wait_ms=60_000)
    assert decoded.picture.pixels == SMALL.tobytes()


async def test_json_may_write_any_character_as_an_escape(decoders: Decoders) -> None:
    url = data_url(GOOD)
    spelt = "".join(f"\\u{ord(letter):04x}" for letter in url)
    for text in (url, url.replace("/", "\\/"), spelt):
        assert json.loads(f'"{text}"') == url
        decoded = await decoders.decode(ImageFile(Kind.DATA_URL_JSON, [text.encode()]), wait_ms=60_000)
        assert decoded.picture.pixels == SMALL.tobytes()
    for text in (url + "\\", url + "\\x", url + "\\u12", url + "\\ud800"):
        assert await refusal(decoders, text.encode(), Kind.DATA_URL_JSON) is Reason.BASE64


# -- the process -------------------------------------------------------------------------------------------------------
def end(pid: int) -> None:
    """Dead, and for its parent to find so."""
    os.kill(pid, 9)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def with_limit(name: str, value: int) -> tuple[str, ...]:
    """A child with a limit that is reached sooner."""
    lines = (
        f"from engine.base import limits; limits.{name} = {value}",
        f"from {child.__name__} import main; main()",
    )
    return ("-c", "\n".join(lines))


def scans(side: int, count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again: little to send, much to decode."""
    file = saved(Image.new("RGB", (side, side), (9, 99, 200)), "JPEG", progressive=True)
    last = file.rindex(b"\xff\xda")
    return file[:last] + file[last:-2] * count + b"\xff\xd9"


async def test_what_takes_too_long_ends_with_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel counts the CPU time, inside a library too."""
    monkeypatch.setattr("control_plane.router.media.decoding.COMMAND", with_limit("MEDIA_DECODE_MS", 200))
    decoders = Decoders(Config(children=1))
    assert await refusal(decoders, scans(4_096, 500)) is Reason.TIME
    assert decoders.children == 0
    await is_well(decoders)
    decoders.close()


class Sleeper(Child):
    """Its process stands still: only the wall's clock is left."""

    def decode(self, file: ImageFile, wall_ms: int) -> Decoded:
        os.kill(self.pid, 19)  # SIGSTOP
        return super().decode(file, 50)


async def test_a_child_that_stands_still_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    decoders = Decoders(Config(children=1))
    with monkeypatch.context() as patched:
        patched.setattr("control_plane.router.media.decoding.Child", Sleeper)
        assert await refusal(decoders, GOOD) is Reason.TIME
        assert decoders.children == 0
    await is_well(decoders)
    decoders.close()


async def test_a_child_that_is_killed_is_replaced() -> None:
    """Idle or at work, by the kernel or by anybody."""
    decoders = Decoders(Config(children=1))
    await is_well(decoders)
    for one in decoders.pids:
        end(one)
    await is_well(decoders)
    decoders.close()


async def test_memory_is_bounded_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits into the limit of pixels fits into that of memory; a smaller one shows what happens if it does not."""
    monkeypatch.setattr("control_plane.router.media.decoding.COMMAND", with_limit("MEDIA_CHILD_BYTES_MAX", 150 << 20))
    decoders = Decoders(Config(children=1))
    assert await refusal(decoders, saved(Image.new("RGBA", (4_096, 4_096)))) is Reason.MEMORY
    await is_well(decoders)
    decoders.close()


@pytest.mark.slow
async def test_the_largest_picture_of_each_format_is_decoded(decoders: Decoders) -> None:
    side = 4_096
    for image, form in (
        (Image.new("RGBA", (side, side), (9, 8, 7, 255)), "PNG"),
        (Image.new("RGB", (side, side)), "JPEG"),
        (Image.new("RGB", (side, side)), "WEBP"),
        (Image.new("P", (side, side)), "GIF"),
    ):
        decoded = (await decode(decoders, saved(image, form))).picture
        assert (decoded.width, decoded.height) == (side, side)
    await is_well(decoders)


async def test_a_process_that_does_not_start_is_our_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.router.media.decoding.COMMAND", ("-c", "raise SystemExit(1)"))
    decoders = Decoders(Config(children=1))
    with pytest.raises(Internal):
        await decode(decoders, GOOD)
    assert decoders.children == 0
    decoders.close()


@pytest.mark.parametrize(
    "says",
    [
        b"\xff" * pipe.ANSWER.size,
        pipe.ANSWER.pack(0, 1 << 31, 1 << 31, b""),
        pipe.ANSWER.pack(0, limits.IMAGE_SIDE_MAX, limits.IMAGE_SIDE_MAX, b""),
        pipe.ANSWER.pack(0, 0, 0, b""),
        pipe.ANSWER.pack(0, 10, 10, b"") + b"short",
        b"",
    ],
)
async def test_a_child_is_not_believed(says: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that an image has taken over may write what it likes: no more memory is taken for it than for an image."""
    script = f"import os; os.write(1, b'!'); os.read(0, 9); os.write(1, {says!r})"
    monkeypatch.setattr("control_plane.router.media.decoding.COMMAND", ("-c", script))
    decoders = Decoders(Config(children=1))
    assert await refusal(decoders, GOOD) is Reason.CRASH
    assert decoders.children == 0
    decoders.close()


async def test_the_queue_has_an_end_and_closing_wakes_everybody() -> None:
    decoders = Decoders(Config(children=1, waiting_max=2))
    waiting = [asyncio.create_task(decode(decoders, GOOD)) for _ in range(3)]
    done = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(one) for one in done] == [Decoded, Decoded, ResourceExhausted]
    decoders.close()
    assert decoders.children == 0


# -- through the whole edge --------------------------------------------------------------------------------------------
async def test_clients_read_the_place_and_the_sentence_and_nothing_else() -> None:
    with seeing() as router:
        for make, reason in (REFUSED["SVG"], REFUSED["50,000 x 50,000"], REFUSED["half a PNG"]):
            answer = await router.converse(messages=asking("what is", image_part(data_url(make())), "?"))
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, "messages[0].content[1]")
            assert error["message"] == f"messages[0].content[1]: {SENTENCES[reason]}"
            assert router.sample("triptych_bad_images_total", reason=reason.value) == 1
        assert router.core.delivered == []
        assert (await router.converse(messages=asking("what is", image_part()))).status_code == 200
