"""The process that decodes: one image at a time from standard input, pixels to standard output, nothing else.

    pipe -> base64 text, or a file -> pixels -> pipe        base64 is decoded here, not on the router's loop

It bounds itself before it reads a byte: address space, CPU time for each image (the kernel ends the process, also
inside a library), no files, no core dump, no children. It is started with an empty environment, and what libraries
print goes nowhere. `python -m control_plane.router.media.child`.

What does not belong here: how the router holds it (`decoding`), what is said (`pipe`), pixels (`pictures`).
"""

import json
import os
import resource
import signal
import warnings
from typing import Final

from PIL import Image

from control_plane.router.media.data_url import file_in_data_url_untrusted
from control_plane.router.media.pictures import decode_untrusted, digest_of
from control_plane.router.media.pipe import ANSWER, READY, REASONS, REQUEST, Kind, read, write
from control_plane.router.media.reasons import ImageRefused, Reason
from engine.base import limits

FILES_MAX: Final = 16  # open at a time; libraries are loaded by then


def main() -> None:
    answers = os.dup(1)
    _silence()
    _load_plugins()
    _bound_process()
    write(answers, [READY])
    while (header := read(0, REQUEST.size)) is not None:
        kind, size_bytes = REQUEST.unpack(header)
        image = read(0, size_bytes)
        if image is None:
            return
        signal.setitimer(signal.ITIMER_PROF, limits.MEDIA_DECODE_MS / 1_000)  # its signal, `pipe.TOO_LONG`, ends it
        try:
            pieces = _answer(Kind(kind), image)
        except MemoryError:
            write(answers, [_refusal(Reason.MEMORY)])
            return  # the next image gets a heap of its own
        del image
        signal.setitimer(signal.ITIMER_PROF, 0)
        write(answers, pieces)
        del pieces


# -- one image ---------------------------------------------------------------------------------------------------------
def _answer(kind: Kind, data: bytes) -> list[bytes]:
    try:
        image = decode_untrusted(_file(kind, data))
        pixels = image.tobytes()
        return [ANSWER.pack(0, *image.size, digest_of(image.size, pixels)), pixels]
    except ImageRefused as refused:
        return [_refusal(refused.reason)]
    except MemoryError:
        raise
    except Exception:  # Pillow's plug-ins raise nearly everything
        return [_refusal(Reason.BROKEN)]


def _refusal(reason: Reason) -> bytes:
    return ANSWER.pack(1 + REASONS.index(reason), 0, 0, b"")


def _file(kind: Kind, data: bytes) -> bytes:
    file = data if kind is Kind.FILE else file_in_data_url_untrusted(_unescaped(kind, data))
    if len(file) > limits.IMAGE_FILE_BYTES_MAX:
        raise ImageRefused(Reason.FILE_BYTES)
    return file


def _unescaped(kind: Kind, text: bytes) -> bytes:
    """Some clients write every slash as a backslash and a slash."""
    if kind is Kind.DATA_URL or b"\\" not in text:
        return text
    try:
        return str(json.loads(b'"%s"' % text)).encode("ascii")
    except ValueError:
        raise ImageRefused(Reason.BASE64) from None


# -- the process -------------------------------------------------------------------------------------------------------
def _silence() -> None:
    """Standard output is the router's; whatever prints must not reach it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to everybody; ours ends with standard input


def _load_plugins() -> None:
    """Now: there are no files to load them from later."""
    Image.preinit()
    from PIL import MpoImagePlugin, WebPImagePlugin  # noqa: F401


def _bound_process() -> None:
    for bound, most in (
        (resource.RLIMIT_AS, limits.MEDIA_CHILD_BYTES_MAX),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, FILES_MAX),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(bound, (most, most))


if __name__ == "__main__":
    main()
