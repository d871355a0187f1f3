"""Jobs: the work between an arena and a frame, done on a codec thread. And how a region is cut into frames.

    EncodeJob    arena -> atom -> payload -> frame         for a Source
    DecodeJob    frame -> payload -> atom -> arena         for a Target

A job is a value; its codecs are its worker's, which never change. It decides nothing and frees nothing: the machine
that started it keeps its units alive until it returns (DESIGN 2.2), and it makes few, large calls that give up the GIL
(DESIGN section 3). Which of its worker's arenas it is about, the schema in its header says.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from engine.base import limits
from engine.base.errors import FrameError
from engine.commands import BlockTable
from engine.kv.arena import Arena, Arenas, Range
from engine.kv.schema import Stream
from kv_transfer import frame as frames
from kv_transfer.codecs import RAW, Atom, AtomShape, CodecSet, Payload
from kv_transfer.frame import FrameHeader

Memory = Arena | Arenas

ATOM_TOKENS = 64
"""Atoms hold a multiple of this many tokens where they can: codecs want some (`Codec.token_multiple`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeJob:
    """Read an atom and make its frame. The result is the sealed frame.

    `header` is of kind DATA and names the codec and level wanted. The frame's own header says what it got: `raw` where
    the codec cannot keep its promise for these numbers (`Unencodable`) or does not save a byte.
    """

    header: FrameHeader
    table: BlockTable
    codecs: CodecSet

    def run(self, memory: Memory) -> bytes:
        arena = memory.of(self.header.schema_digest)
        shape = frames.atom_shape(self.header, arena.schema.kv)
        draft = frames.Draft(shape.raw_bytes)
        codec, level, payload = self._encode(arena, shape, draft.payload)
        tables = self.codecs.digest(codec)
        header = replace(self.header, codec=codec, level=level, tables=tables, raw_bytes=shape.raw_bytes)
        return draft.seal(header) if payload is None else frames.seal(header, [payload])

    def _encode(self, arena: Arena, shape: AtomShape, into: memoryview) -> tuple[str, int, Payload | None]:
        """(codec, level, payload). None for `raw`, whose payload is the atom as it is: it lies where it was read to."""
        atom = Atom(shape, arena.read(self.table, shape.layers, shape.tokens, shape.heads, into=into))
        codec, level, payload = self.codecs.encode_or_raw(self.header.codec, atom, self.header.level)
        return codec, level, None if codec == RAW else payload


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeJob:
    """Verify a DATA frame, decode it and write it into memory that was reserved for it. The result is its checksum.

    `header` is what `parse_header_untrusted` read from `frame`. Nothing is decoded before the checksum holds, and
    nothing is written before the whole atom is decoded. Raises only FrameError.
    """

    frame: bytes
    header: FrameHeader
    table: BlockTable
    codecs: CodecSet

    def run(self, memory: Memory) -> int:
        frames.verify_checksum_untrusted(self.frame)
        header = self.header
        arena = _arena_untrusted(memory, header.schema_digest)
        shape = frames.check_atom_untrusted(header, arena.schema.kv)
        if header.token_end > len(self.table) * arena.block_size:
            raise FrameError("range")
        codec = self.codecs.check_untrusted(header.codec, header.level, header.tables, shape, header.payload_bytes)
        bytes_LHPTX = codec.decode_untrusted(frames.payload_of(self.frame), shape, header.level)
        arena.write(self.table, shape.layers, shape.tokens, shape.heads, bytes_LHPTX)
        return frames.checksum_of(self.frame)


def _arena_untrusted(memory: Memory, schema_digest: bytes) -> Arena:
    try:
        return memory.of(schema_digest)
    except KeyError:
        raise FrameError("schema") from None


def atoms(
    stream: Stream,
    layers: Range,
    tokens: Range,
    max_bytes: int = limits.FRAME_PAYLOAD_BYTES_MAX,
    token_multiple: int = ATOM_TOKENS,
) -> Iterator[tuple[Range, Range]]:
    """Cut a region into (layers, tokens) of at most `max_bytes` raw, all heads, each cell once, in a fixed order.

    Tokens stay together as long as one layer of them fits; then layers go one at a time:

        fits      | all layers, all tokens |
        else      | a few layers, all tokens | the next layers, all tokens | ...
        else      | layer a, first tokens | layer a, next tokens | ... | layer a+1, first tokens | ...
    """
    span = tokens[1] - tokens[0]
    if span == 0:
        return
    layers_each, tokens_each = max_bytes // (stream.token_layer_bytes * span), span
    if layers_each == 0:
        layers_each, tokens_each = 1, _tokens_each(stream, max_bytes, token_multiple)
    for layer_range in _cut(layers, layers_each):
        for token_range in _cut(tokens, tokens_each):
            yield layer_range, token_range


def _tokens_each(stream: Stream, max_bytes: int, token_multiple: int) -> int:
    """How many tokens of one layer fit; a multiple if at least one multiple fits, because the limit comes first."""
    fitting = max_bytes // stream.token_layer_bytes
    if fitting == 0:
        raise ValueError(f"one token of one layer has {stream.token_layer_bytes} bytes, more than {max_bytes}")
    return fitting - fitting % token_multiple or fitting


def _cut(whole: Range, size: int) -> Iterator[Range]:
    for start in range(*whole, size):
        yield start, min(start + size, whole[1])
