"""Server-sent events as OpenAI's dialect uses them: one line of `data:` per event. For our own clients.

Everything else of the format (names, ids, comments, retries) is skipped; what the data mean is the caller's business.
"""

from typing import Final

from engine.base.errors import FrameError

DONE: Final = b"[DONE]"
LINE_BYTES_MAX: Final = 4 << 20  # one event with the log-probabilities of a long prompt; more is no answer of a server


class EventLines:
    """Bytes in, as they come; the data of every whole event out."""

    def __init__(self) -> None:
        self._rest = b""

    def feed_untrusted(self, received: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + received).split(b"\n")
        if len(self._rest) > LINE_BYTES_MAX:
            raise FrameError("length")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
