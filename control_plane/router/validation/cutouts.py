"""Long data URLs are cut out of a body as it arrives, so that tens of megabytes of images cost the event loop nothing
but looking for two quotes: what is decoded as JSON is as small as a body without images.

    {"url":"data:image/png;base64,iVBORw0K..."}   arrives, in parts of any length
    {"url":"<reference 0>"}                       is decoded; cutout 0 goes to the decoding process as it is

In JSON an unescaped quote before `data:` opens a string, and the next unescaped one closes it; in anything that is no
JSON it may be otherwise, but quotes stay where they are, so it is no JSON afterwards either. A reference begins with a
noncharacter: who writes one himself gets an image of his own body, or what he wrote. A string that turns out to be no
image is put back before anybody reads it, once.

What does not belong here: what is in a body (`body`), and in an image (`media`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from engine.base import limits

CUT_BYTES_MIN: Final = limits.INLINE_CHARACTERS_MAX  # shorter ones cost next to nothing where they are
MARK: Final = "\ufdd0"
_MARK: Final = MARK.encode()
_REFERENCE: Final = re.compile(rb'"%s([0-9]{1,9})"' % _MARK)
_OPENING: Final = b'"data:'
_OPENINGS_MAX: Final = 8 * limits.IMAGES_CEILING  # beyond that nobody sends images: nothing more is looked for
_STEP_BYTES: Final = 256


@dataclass(frozen=True, slots=True)
class Cutout:
    """What stood between the quotes, escapes and all, in the pieces that it came in."""

    pieces: Sequence[bytes]
    size_bytes: int

    def quoted(self) -> bytes:
        return b'"%s"' % b"".join(self.pieces)


@dataclass(frozen=True, slots=True)
class Cutouts:
    """Those of one body, by number."""

    items: Sequence[Cutout] = ()

    @property
    def size_bytes(self) -> int:
        return sum(item.size_bytes for item in self.items)

    def named(self, text: str) -> Cutout | None:
        """What a string that was decoded stands for, if it stands for anything."""
        if not (self.items and text.startswith(MARK)):
            return None
        number = text[len(MARK) :]
        known = number.isascii() and number.isdigit() and len(number) < 10 and int(number) < len(self.items)
        return self.items[int(number)] if known else None

    def bytes_in(self, raw: bytes | msgspec.Raw) -> int:
        """Of all that this piece of JSON refers to."""
        if not self.items:
            return 0
        numbers = {int(found[1]) for found in _REFERENCE.finditer(memoryview(raw))}
        return sum(self.items[number].size_bytes for number in numbers if number < len(self.items))

    def put_back(self, raw: bytes | msgspec.Raw) -> bytes | msgspec.Raw:
        """The piece of JSON as the client wrote it. Each cutout once: a second reference to it is the client's own, and
        ten thousand of them would be ten thousand copies."""
        if not self.items:
            return raw
        left = dict(enumerate(self.items))

        def original(found: "re.Match[bytes]") -> bytes:
            item = left.pop(int(found[1]), None)
            return found[0] if item is None else item.quoted()

        return _REFERENCE.sub(original, bytes(raw))


NO_CUTOUTS: Final = Cutouts()


@dataclass(frozen=True, slots=True)
class Body:
    """A whole body: JSON, and what was cut out of it."""

    json: bytes
    cutouts: Cutouts = NO_CUTOUTS


class Sieve:
    """Takes a body's parts as they come. `rest_bytes` is what is kept as JSON so far."""

    def __init__(self) -> None:
        self.rest_bytes = 0
        self._rest: list[bytes] = []
        self._cutouts: list[Cutout] = []
        self._open: list[bytes] | None = None  # the pieces so far of a string that may be cut out
        self._carry = b""  # the end of the last part, where it may be the beginning of an opening
        self._behind_backslash = False  # what comes before `_carry`, or before the next part, ends in an odd number
        self._openings = 0

    def feed(self, part: bytes) -> None:
        data, self._carry = self._carry + part, b""
        at = 0
        while at < len(data):
            at = self._outside(data, at) if self._open is None else self._inside(data, at)
        kept = len(data) - len(self._carry)
        self._behind_backslash = self._escaped(data, kept)

    def whole(self) -> Body:
        """For the one who decodes it; the pieces are not kept beside it."""
        self._abandon()
        self._keep(self._carry)
        rest, self._rest = self._rest, []
        cutouts, self._cutouts = self._cutouts, []
        return Body(b"".join(rest), Cutouts(cutouts))

    # -- between and in strings ----------------------------------------------------------------------------------------
    def _outside(self, data: bytes, at: int) -> int:
        start = data.find(_OPENING, at) if self._openings <= _OPENINGS_MAX else -1
        if start < 0:
            end = len(data) - _beginning_at_end(data[max(at, len(data) - len(_OPENING)) :])
            self._keep(data[at:end])
            self._carry = data[end:]
            return len(data)
        self._keep(data[at : start + 1])
        self._openings += 1
        if not self._escaped(data, start):
            self._open = []
        return start + 1

    def _inside(self, data: bytes, at: int) -> int:
        assert self._open is not None
        end = data.find(b'"', at)
        if end < 0:
            self._open.append(data[at:])
            return len(data)
        self._open.append(data[at:end])
        if self._escaped(data, end):  # no data URL has a quote in it
            self._abandon()
            return end
        self._close()
        self._keep(b'"')
        return end + 1

    def _close(self) -> None:
        pieces, self._open = self._open or [], None
        size_bytes = sum(map(len, pieces))
        if size_bytes < CUT_BYTES_MIN:
            self._keep(*pieces)
            return
        self._keep(b"%s%d" % (_MARK, len(self._cutouts)))
        self._cutouts.append(Cutout(pieces, size_bytes))

    def _abandon(self) -> None:
        pieces, self._open = self._open or [], None
        self._keep(*pieces)

    def _keep(self, *pieces: bytes) -> None:
        self._rest += pieces
        self.rest_bytes += sum(map(len, pieces))

    def _escaped(self, data: bytes, at: int) -> bool:
        """An odd number of backslashes stands before `data[at]`; they may have come with earlier parts."""
        backslashes, end = 0, at
        while end:
            step = data[max(0, end - _STEP_BYTES) : end]
            found = len(step) - len(step.rstrip(b"\\"))
            backslashes += found
            if found < len(step):
                return backslashes % 2 == 1
            end -= len(step)
        return (backslashes + self._behind_backslash) % 2 == 1


def _beginning_at_end(tail: bytes) -> int:
    """How many of the last bytes may be the beginning of an opening."""
    lengths = range(min(len(tail), len(_OPENING) - 1), 0, -1)
    return next((length for length in lengths if tail.endswith(_OPENING[:length])), 0)
