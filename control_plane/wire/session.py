"""Session: the envelope around every control message, checked on receipt.

Each direction of a link numbers its envelopes from 1. A link is ordered, so a gap or a repeat is not weather: it is a
bug or a forgery, and the only safe answer is to end the session and start over (what both sides shared is then void).

Parsing is total: any bytes give an envelope or `FrameError`. Values inside an envelope are still a peer's claims;
the machines check those they use.
"""

from typing import Protocol, TypeVar

from google.protobuf.message import DecodeError, Message

from control_plane.wire import session_pb2 as pb
from engine.base import limits
from engine.base.errors import FrameError

WIRE_VERSION = 1


class Envelope(Protocol):
    """What the four generated envelope classes have in common."""

    sequence: int

    def SerializeToString(self, *, deterministic: bool = ...) -> bytes: ...  # protobuf's name


EnvelopeT = TypeVar("EnvelopeT", bound=Message)


class Session:
    """One link's numbering, both ways."""

    def __init__(self) -> None:
        self._sent = 0
        self._received = 0

    def seal(self, envelope: Envelope) -> bytes:
        """Number and serialise. Deterministic bytes, so that two runs of one seed compare equal."""
        self._sent += 1
        envelope.sequence = self._sent
        return envelope.SerializeToString(deterministic=True)

    def open_untrusted(self, kind: type[EnvelopeT], message: bytes) -> EnvelopeT:
        """Parse and check the number. Raises FrameError: "length", "protobuf" or "sequence"."""
        envelope = parse_untrusted(kind, message)
        if envelope.sequence != self._received + 1:  # type: ignore[attr-defined]  # every envelope has it
            raise FrameError("sequence")
        self._received += 1
        return envelope


def parse_untrusted(kind: type[EnvelopeT], message: bytes) -> EnvelopeT:
    """Parse one protobuf message of bounded size. Raises FrameError only."""
    if len(message) > limits.MESSAGE_BYTES_MAX:
        raise FrameError("length")
    try:
        return kind.FromString(message)
    except DecodeError:
        raise FrameError("protobuf") from None


def hello(kind: pb.Hello.Kind, sender: str) -> bytes:
    return pb.Hello(wire_version=WIRE_VERSION, kind=kind, sender=sender).SerializeToString(deterministic=True)


def parse_hello_untrusted(message: bytes) -> pb.Hello:
    """A peer's introduction. Raises FrameError: "protobuf", "version" or "kind"."""
    parsed = parse_untrusted(pb.Hello, message)
    if parsed.wire_version != WIRE_VERSION:
        raise FrameError("version")
    if parsed.kind == pb.Hello.KIND_UNSPECIFIED or len(parsed.sender) > limits.REQUEST_ID_CHARACTERS_MAX:
        raise FrameError("kind")
    return parsed
