"""Frames: the one wire format of the bulk link, between a Source and a Target. A fixed header, then a payload.

    kind       from    payload                                    sequence
    DATA       source  an atom, encoded                           its own, minted by the source
    END        source  `End`: tokens, frame count, digest         its own
    ABORT      source  -                                          any
    ACK        target  -                                          of the DATA it answers: placed
    NACK       target  -                                          of the DATA it answers: damaged, send again
    COMMITTED  target  -                                          any: every frame is in memory
    REFUSED    target  `TransferRefusal`, two bytes               any: the transfer is over

DATA says which part of which stream it holds (layers, tokens, heads), never where that part lives: block ids, block
sizes and devices stay inside a worker. Frames arrive in any order, any number of times; each is checked alone.

The checksum (xxh3_64 over the whole frame, its own field as zero) finds damage. It is no signature: who can forge a
transfer id can also compute a checksum, so a frame that passes is *intact*, and still only a claim.
`check_atom_untrusted` compares the claim with the schema, the Target with what it granted.

This module neither encodes KV (`codecs`) nor decides anything (`source`, `target`).
"""

import io
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import accumulate
from operator import attrgetter
from typing import Final, Literal, NoReturn

from xxhash import xxh3_64

from engine.base import limits
from engine.base.errors import FrameError
from engine.kv.schema import Stream
from kv_transfer.codecs import AtomShape, Encoding

MAGIC: Final = b"TKV1"
WIRE_VERSION: Final = 1
KV_STREAM: Final = 0  # `CacheSchema.kv`, the only stream that today's arenas hold

FrameReason = Literal[
    "length",  # not as long as it says, or longer than a frame may be
    "magic",
    "version",
    "kind",
    "range",  # layers, tokens, heads or ranks that are empty, too large, or outside the schema or the grant
    "codec",  # not a codec's name, or not one for this stream, level and tables
    "checksum",
    "payload",  # a body or an encoded atom that contradicts itself
    "schema",
    "epoch",
    "transfer",
    "link",
]
"""Every `FrameError.reason` of this package: metric labels, so the set is fixed."""


class FrameKind(IntEnum):
    """What a frame is. Values are the wire's."""

    DATA = 1
    END = 2
    ACK = 3
    NACK = 4
    COMMITTED = 5
    REFUSED = 6
    ABORT = 7


class TransferRefusal(IntEnum):
    """Why a target ended a transfer. Values are the wire's."""

    UNKNOWN_TRANSFER = 1
    WRONG_EPOCH = 2
    WRONG_SCHEMA = 3
    CORRUPT = 4
    EXPIRED = 5
    INVALID = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameHeader:
    """What a frame says about itself. Ranges are half open; all but DATA leave them empty.

    `epoch` is the target's, as the source was told it. `tables` is the digest of what the codec was made from, 0 for
    one without tables: with others the payload would decode to other numbers. `payload_bytes` is filled in by `seal`,
    `raw_bytes` (the atom's size before encoding) by `EncodeJob`. Heads are numbered over the whole model, whatever
    `tp_size` is.
    """

    kind: FrameKind
    transfer_id: bytes
    epoch: int
    sequence: int
    schema_digest: bytes
    codec: str = ""
    level: int = 0
    stream: int = KV_STREAM
    layer_start: int = 0
    layer_end: int = 0
    token_start: int = 0
    token_end: int = 0
    head_start: int = 0
    head_end: int = 0
    tp_rank: int = 0
    tp_size: int = 1
    payload_bytes: int = 0
    raw_bytes: int = 0
    tables: int = 0

    @property
    def encoding(self) -> Encoding:
        return Encoding(self.codec, self.level, self.tables)


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Body of END: the source has sent everything.

    `branches` has the tokens that the source sampled after the transferred context, per choice: the first is what the
    target feeds first, and a choice that ended at the source has none. Without any branch it is no context that has
    been sent, but rows that nothing follows (an embedding). `frames` counts the DATA frames; `digest`
    combines their checksums (`combine`). The header's encoding says what the KV has come through, on this way or
    an earlier one: it may be lossy although every DATA frame is raw.
    """

    branches: tuple[tuple[int, ...], ...]
    frames: int
    digest: int
    rope_delta: int = 0  # from a token's index to its position, after images (M-RoPE)


# Little-endian, without padding; 112 bytes, so that a payload starts 16-byte aligned.
#   magic version kind checksum | transfer_id epoch sequence | schema_digest codec level
#   | stream layers heads tp | tokens payload_bytes raw_bytes | tables
_HEADER: Final = struct.Struct("<4sHHQ 16sQI 16s16sH H2H2H2H 2III I")
_PLACE: Final = (
    *("stream", "layer_start", "layer_end", "head_start", "head_end"),
    *("tp_rank", "tp_size", "token_start", "token_end"),
)
_FIELDS: Final = (
    *("transfer_id", "epoch", "sequence", "schema_digest", "codec", "level"),
    *(*_PLACE, "payload_bytes", "raw_bytes", "tables"),
)
HEADER_BYTES: Final = _HEADER.size
_CHECKSUM: Final = slice(8, 16)
_SCHEMA_DIGEST: Final = slice(44, 60)

# digest, frames, rope_delta, branches; then the length of each branch, then all tokens
_END: Final = struct.Struct("<QIiI")
_END_NUMBER_BYTES: Final = 4
_REFUSAL: Final = struct.Struct("<H")
_BODY_BYTES: Final = {FrameKind.DATA: None, FrameKind.END: None, FrameKind.REFUSED: _REFUSAL.size}  # others: none

_CODEC_NAME: Final = re.compile(rb"([a-z0-9_-]{0,16})\x00*")
LEVEL_MAX: Final = 0xFFFF
TRANSFER_ID_BYTES: Final = 16
_KINDS: Final = frozenset(FrameKind)
_TOKENS_MAX: Final = limits.PROMPT_TOKENS_MAX + limits.OUTPUT_TOKENS_MAX

_atom_of = attrgetter(*_PLACE, "raw_bytes")
_NO_ATOM: Final = (0, 0, 0, 0, 0, 0, 1, 0, 0, 0)  # tp_size is 1 even where it means nothing


# -- writing -----------------------------------------------------------------------------------------------------------
def seal(header: FrameHeader, payload_parts: Sequence[bytes | memoryview]) -> bytes:
    """The whole frame. Copies the payload once; raises ValueError for a header that no receiver would take."""
    return b"".join([_sealed_head(header, payload_parts), *payload_parts])


class Draft:
    """A frame whose payload is written where it will be sent from, and which is sealed without a copy.

    one buffer   | header, written last | payload, written first ... |
    """

    def __init__(self, payload_bytes: int) -> None:
        # Whatever a BytesIO was made from, and nobody else looks at, it hands out again as it is.
        self._file = io.BytesIO(bytes(HEADER_BYTES + payload_bytes))
        self._frame = self._file.getbuffer()
        self.payload = self._frame[HEADER_BYTES:]

    def seal(self, header: FrameHeader) -> bytes:
        """As `seal`, once. If somebody still has a view of the payload, and could write to it, this is a copy."""
        self._frame[:HEADER_BYTES] = _sealed_head(header, [self.payload])
        self.payload.release()
        self._frame.release()
        return self._file.getvalue()


def _sealed_head(header: FrameHeader, payload_parts: Sequence[bytes | memoryview]) -> bytearray:
    header = replace(header, payload_bytes=sum(len(part) for part in payload_parts))
    reason = _why_not_sealable(header)
    if reason is not None:
        raise ValueError(f"not a frame ({reason}): {header}")
    head = bytearray(_pack(header))
    head[_CHECKSUM] = _checksum(head, payload_parts).to_bytes(8, "little")
    return head


def seal_reply(
    kind: FrameKind,
    *,
    transfer_id: bytes,
    epoch: int,
    sequence: int,
    schema_digest: bytes,
    refusal: TransferRefusal | None = None,
) -> bytes:
    """ACK, NACK, COMMITTED or REFUSED; only the last has a `refusal`."""
    header = FrameHeader(
        kind=kind, transfer_id=transfer_id, epoch=epoch, sequence=sequence, schema_digest=schema_digest
    )
    return seal(header, [] if refusal is None else [_REFUSAL.pack(refusal)])


def serialize_end(end: End) -> bytes:
    lengths = [len(branch) for branch in end.branches]
    tokens = [token for branch in end.branches for token in branch]
    numbers = struct.pack(f"<{len(lengths) + len(tokens)}I", *lengths, *tokens)
    return _END.pack(end.digest, end.frames, end.rope_delta, len(lengths)) + numbers


def _why_not_sealable(header: FrameHeader) -> FrameReason | None:
    """Only our own mistakes: what a header that came over the wire cannot have wrong, then what it can."""
    if not len(header.transfer_id) == len(header.schema_digest) == TRANSFER_ID_BYTES:
        return "length"
    if not fits_codec_name(header.codec):
        return "codec"
    return _why_implausible(header)


def fits_codec_name(name: str) -> bool:
    """Whether a header can say this name, whatever it means."""
    codec = _CODEC_NAME.fullmatch(name.encode())
    return codec is not None and codec[1] == name.encode()


def _pack(header: FrameHeader) -> bytes:
    """With 0 for the checksum: it is over everything else, so it comes last."""
    values = {name: getattr(header, name) for name in _FIELDS} | {"codec": header.codec.encode()}
    try:
        return _HEADER.pack(MAGIC, WIRE_VERSION, header.kind, 0, *values.values())
    except struct.error as error:
        raise ValueError(f"not a frame ({error}): {header}") from error


# -- reading -----------------------------------------------------------------------------------------------------------
def parse_header_untrusted(data: bytes) -> FrameHeader:
    """A header whose every field is plausible and whose lengths are this frame's. Its payload is not looked at."""
    if not HEADER_BYTES <= len(data) <= HEADER_BYTES + limits.FRAME_PAYLOAD_BYTES_MAX:
        _refuse("length")
    header = _unpack_untrusted(data)
    if len(data) != HEADER_BYTES + header.payload_bytes:
        _refuse("length")
    reason = _why_implausible(header)
    if reason is not None:
        _refuse(reason)
    return header


def verify_checksum_untrusted(data: bytes) -> None:
    """Refuse a frame of which any bit differs from what `seal` wrote."""
    if len(data) < HEADER_BYTES:
        _refuse("length")
    if _checksum(data[:HEADER_BYTES], [memoryview(data)[HEADER_BYTES:]]) != checksum_of(data):
        _refuse("checksum")


def schema_named_untrusted(data: bytes) -> bytes:
    """The schema that a frame names: who of several parses it. Of what is no frame, anything."""
    return data[_SCHEMA_DIGEST]


def payload_of(data: bytes) -> memoryview:
    """Without a copy."""
    return memoryview(data)[HEADER_BYTES:]


def checksum_of(data: bytes) -> int:
    """What the frame says, not what it is: see `verify_checksum_untrusted`."""
    return int.from_bytes(data[_CHECKSUM], "little")


def combine(digest: int, checksum: int) -> int:
    """Digest of a set of frames, starting from 0. The order does not matter: frames arrive in any."""
    return (digest + checksum) & 0xFFFF_FFFF_FFFF_FFFF


def parse_end_untrusted(payload: memoryview | bytes) -> End:
    """Branches may be empty, but not all of them: nothing would be left to decode, hence nothing to transfer for.
    Whether there has to be one, and what positions there are, is for the Target to say.

    Counts are compared with the length before they size anything.
    """
    if len(payload) < _END.size:
        _refuse("payload")
    digest, frames, rope_delta, branches = _END.unpack_from(payload)
    numbers, rest = divmod(len(payload) - _END.size, _END_NUMBER_BYTES)
    if rest or branches > min(limits.CHOICES_MAX, numbers):
        _refuse("payload")  # a length for each branch
    lengths = struct.unpack_from(f"<{branches}I", payload, _END.size)
    if sum(lengths) != numbers - branches or (lengths and not any(lengths)):
        _refuse("payload")
    tokens = struct.unpack_from(f"<{numbers - branches}I", payload, _END.size + branches * _END_NUMBER_BYTES)
    ends = list(accumulate(lengths))
    return End(
        branches=tuple(tokens[end - length : end] for end, length in zip(ends, lengths, strict=True)),
        frames=frames,
        digest=digest,
        rope_delta=rope_delta,
    )


def parse_refusal_untrusted(payload: memoryview | bytes) -> TransferRefusal:
    if len(payload) != _REFUSAL.size:
        _refuse("payload")
    (code,) = _REFUSAL.unpack(payload)
    if code not in set(TransferRefusal):
        _refuse("payload")
    return TransferRefusal(code)


def check_atom_untrusted(header: FrameHeader, stream: Stream) -> AtomShape:
    """The atom that a DATA header claims to hold, if the stream has such an atom and it has the claimed size.

    `stream` is the receiver's `CacheSchema.kv`. What was granted (tokens, epoch, link) is the Target's to compare.
    """
    if header.kind is not FrameKind.DATA:
        _refuse("kind")
    if header.stream != KV_STREAM or header.layer_end > stream.layers or header.head_end > stream.heads:
        _refuse("range")
    shape = atom_shape(header, stream)
    if header.raw_bytes != shape.raw_bytes:
        _refuse("length")
    return shape


def atom_shape(header: FrameHeader, stream: Stream) -> AtomShape:
    """What a DATA header's ranges mean in this stream; trusts them."""
    return AtomShape(
        stream=stream,
        layers=(header.layer_start, header.layer_end),
        tokens=(header.token_start, header.token_end),
        heads=(header.head_start, header.head_end),
    )


# -- both --------------------------------------------------------------------------------------------------------------
def _checksum(head: bytes | bytearray, payload_parts: Sequence[bytes | memoryview]) -> int:
    state = xxh3_64(head[: _CHECKSUM.start] + bytes(8) + head[_CHECKSUM.stop :])
    for part in payload_parts:
        state.update(part)
    return state.intdigest()


def _unpack_untrusted(data: bytes) -> FrameHeader:
    magic, version, kind, _, *values = _HEADER.unpack_from(data)
    if magic != MAGIC:
        _refuse("magic")
    if version != WIRE_VERSION:
        _refuse("version")
    if kind not in _KINDS:
        _refuse("kind")
    fields = dict(zip(_FIELDS, values, strict=True))
    codec = _CODEC_NAME.fullmatch(fields.pop("codec"))
    if codec is None:
        _refuse("codec")
    return FrameHeader(kind=FrameKind(kind), codec=codec[1].decode("ascii"), **fields)


def _why_implausible(header: FrameHeader) -> FrameReason | None:
    """What makes a header wrong for any receiver. None: it may be right for some."""
    body_bytes = _BODY_BYTES.get(header.kind, 0)
    if header.payload_bytes > limits.FRAME_PAYLOAD_BYTES_MAX:
        return "length"
    if header.payload_bytes == 0 if body_bytes is None else header.payload_bytes != body_bytes:
        return "length"
    if header.tables and not header.codec:
        return "codec"
    return _why_no_atom(header) if header.kind is FrameKind.DATA else _why_no_control(header)


def _why_no_atom(header: FrameHeader) -> FrameReason | None:
    layers = 0 <= header.layer_start < header.layer_end
    heads = 0 <= header.head_start < header.head_end
    tokens = 0 <= header.token_start < header.token_end <= _TOKENS_MAX
    if not (layers and heads and tokens and 0 <= header.tp_rank < header.tp_size):
        return "range"
    if not 1 <= header.raw_bytes <= limits.FRAME_PAYLOAD_BYTES_MAX:
        return "length"
    return None if header.codec else "codec"


def _why_no_control(header: FrameHeader) -> FrameReason | None:
    """Fields that have no meaning must be as `FrameHeader` has them: a forger gets no room, a successor does."""
    return None if _atom_of(header) == _NO_ATOM else "range"


def _refuse(reason: FrameReason) -> NoReturn:
    raise FrameError(reason)
