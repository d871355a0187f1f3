"""Codecs: KV of some layers and tokens <-> bytes, at a level. One file per published method, found by scanning.

A codec sees an *atom*: one stream, layers [a, b), tokens [a, b), heads [a, b), as bytes in wire order. It sees no
blocks, requests, workers or links, and it keeps nothing between atoms: each payload is decoded alone, in any order, on
any worker. Jobs (`kv_transfer.jobs`) bring atoms to it and payloads to the wire.

What methods need beyond that is added beside `Codec`, as a further Protocol that some codecs satisfy as well, so that
nothing here is torn out:

- static tables, calibrated offline: `Profiled(Codec)` with `profile(atoms) -> Profile`; instances are made from a
  profile, whose hash takes the frame header's reserved field. `AtomShape` already names layers, heads and positions,
  which is what a table is indexed with (and what tells the first four tokens, the sinks, from others).
- state across a sequence (deltas, refinement, scores known at the end): `open(...) -> Encoder` with `push(atom)` and
  `close(...)`. A codec as below is the encoder whose `push` is `encode`.
- levels with a price: `estimate(shape, level)` for the controller; `levels` already lists what may be asked for.

Legend: L layers, H kv heads, P parts (K, V), T tokens, D head dim, X bytes of one token's head (D * item bytes).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from engine.base.errors import FrameError
from engine.base.registry import Registry
from engine.kv.arena import Bytes, Range
from engine.kv.schema import Stream

RAW = "raw"
"""The codec that every worker has, for every stream: what is fallen back to, never to an error (DESIGN 2.6)."""

EXACT = ""
"""The identity of KV that is just as it was computed (`identity_of`)."""

Payload = bytes | memoryview


class Unencodable(ValueError):
    """This atom cannot be had back within the codec's stated loss. Send it raw."""


@dataclass(frozen=True, slots=True)
class AtomShape:
    """Which part of which stream an atom is. Both ends know it before the first payload byte is read."""

    stream: Stream
    layers: Range
    tokens: Range
    heads: Range

    @property
    def LHPTX(self) -> tuple[int, int, int, int, int]:
        """Dimensions of the atom's bytes in wire order."""
        layers, heads, tokens = (end - start for start, end in (self.layers, self.heads, self.tokens))
        return layers, heads, self.stream.parts, tokens, self.stream.head_dim * self.stream.item_bytes

    @property
    def raw_bytes(self) -> int:
        layers, heads, parts, tokens, head_bytes = self.LHPTX
        return layers * heads * parts * tokens * head_bytes


@dataclass(frozen=True, slots=True, eq=False)
class Atom:
    """An atom's numbers: `bytes_LHPTX` is uint8, C-contiguous, of `shape.LHPTX`. Not to be written to."""

    shape: AtomShape
    bytes_LHPTX: Bytes


class Codec(Protocol):
    """A way to write an atom down. Made without arguments; its settings are the defaults of its `Config`, if any.

    Runs on a codec thread beside the engine: few large calls that give up the GIL, no Python per token or block.
    """

    paper: ClassVar[str]
    loses: ClassVar[str]  # what is not the same after a round trip, in words for METHODS.md
    needs: ClassVar[tuple[str, ...]]  # what the engine must collect for it beyond the KV itself
    composes_with: ClassVar[str]
    lossless: ClassVar[bool]
    error_of_max: ClassVar[float]  # at every level: |decoded - original| <= this * the atom's largest |original|
    dtypes: ClassVar[frozenset[str]]
    levels: ClassVar[tuple[int, ...]]  # least lossy first
    token_multiple: ClassVar[int]  # atoms of a multiple of this many tokens ...
    block_local: ClassVar[bool]  # ... decode to the same whether they are encoded apart or together

    def encode(self, atom: Atom, level: int) -> Payload:
        """Deterministic. Raises `Unencodable`, and nothing else for an atom of a dtype in `dtypes`."""

    def decode_untrusted(self, payload: memoryview, shape: AtomShape, level: int) -> Bytes:
        """`bytes_LHPTX` of an atom of this shape, perhaps read-only, perhaps a view of the payload.

        The payload's length is compared with what `shape` implies before anything is allocated; a length inside the
        payload is a claim, not a fact. Raises only FrameError.
        """

    def payload_bytes_max(self, shape: AtomShape) -> int:
        """No payload for this shape is longer."""


codecs: Registry[type[Codec]] = Registry("kv_transfer.codecs", kind="codec", group="triptych.codec")


def choose(wanted: str, offered_by_peer: Sequence[str], stream: Stream) -> str:
    """The codec to use for a stream: the wanted one if both ends have it and it takes the dtype, else `raw`."""
    shared = wanted in offered_by_peer and wanted in codecs
    return wanted if shared and stream.dtype in codecs.get(wanted).dtypes else RAW


def identity_of(name: str, level: int) -> str:
    """What KV is once it has come through this codec: `EXACT`, or a text that no other codec or level has.

    Lossy KV is never taken for exact, nor for another loss (DESIGN 4). What is not installed here may lose anything.
    """
    exact = name in codecs and codecs.get(name).lossless
    return EXACT if exact else f"{name}/{level}"


def codec_of(identity: str) -> tuple[str, int]:
    """(codec, level) that KV of this identity came through."""
    name, _, level = identity.partition("/")
    return (RAW, 0) if identity == EXACT else (name, int(level))


def encode_or_raw(name: str, atom: Atom, level: int) -> tuple[str, int, Payload]:
    """(codec, level, payload) of what to send: what was asked for, or `raw` where that is impossible or no shorter."""
    codec = codecs.get(name)()
    if atom.shape.stream.dtype in codec.dtypes:
        try:
            payload = codec.encode(atom, level)
        except Unencodable:
            pass
        else:
            if len(payload) < atom.shape.raw_bytes:
                return name, level, payload
    return RAW, 0, codecs.get(RAW)().encode(atom, 0)


def check_codec_untrusted(name: str, level: int, shape: AtomShape, payload_bytes: int) -> Codec:
    """The codec that a received frame names, if it may be used for this atom at all.

    A frame makes us import at most a plug-in that this worker's operator installed.
    """
    if name not in codecs:
        raise FrameError("codec")
    codec = codecs.get(name)()
    if shape.stream.dtype not in codec.dtypes or level not in codec.levels:
        raise FrameError("codec")
    if payload_bytes > codec.payload_bytes_max(shape):
        raise FrameError("length")
    return codec
