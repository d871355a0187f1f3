"""Codecs: KV of some layers and tokens <-> bytes, at a level. One file per published method, found by scanning.

A codec sees an *atom*: one stream, layers [a, b), tokens [a, b), heads [a, b), as bytes in wire order. It sees no
blocks, requests, workers or links, and it keeps nothing between atoms: each payload is decoded alone, in any order, on
any worker. Jobs (`kv_transfer.jobs`) bring atoms to it and payloads to the wire.

    Codec        what every method is: encode, decode, and its capabilities as data on the class
    Profiled     a codec that is made from tables calibrated for one model (`kv_transfer.profile`)
    Encoding     which codec, level and tables some KV goes through: what sources, targets and routers speak of
    CodecSet     the codecs that one worker has for its model: those without tables, and those it has tables for

What methods need beyond that is added beside `Codec`, as a further Protocol that some codecs satisfy as well, so that
nothing here is torn out:

- state across a sequence (refinement, scores known at the end): `open(...) -> Encoder` with `push(atom)` and
  `close(...)`. A codec as below is the encoder whose `push` is `encode`.

Legend: L layers, H kv heads, P parts (K, V), T tokens, D head dim, X bytes of one token's head (D * item bytes).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol, cast

from engine.base.errors import FrameError
from engine.base.registry import Registry
from engine.kv.arena import Bytes, Range
from engine.kv.schema import Stream
from kv_transfer.calibration import Calibration
from kv_transfer.profile import Profile, Tables

RAW = "raw"
"""The codec that every worker has, for every stream: what is fallen back to, never to an error (DESIGN 2.6)."""

EXACT = ""
"""The identity of KV that is just as it was computed (`Encoding.identity`)."""

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
    """A way to write an atom down. Made without arguments, or from its `Tables` if it is `profiled`.

    Runs on a codec thread beside the engine: few large calls that give up the GIL, no Python per token or block.
    """

    paper: ClassVar[str]
    loses: ClassVar[str]  # what is not the same after a round trip, in words for METHODS.md
    needs: ClassVar[tuple[str, ...]]  # what the engine must collect for it beyond the KV itself
    composes_with: ClassVar[str]
    lossless: ClassVar[bool]
    profiled: ClassVar[bool]  # made from tables that were calibrated for one model: see `Profiled`
    dtypes: ClassVar[frozenset[str]]
    levels: ClassVar[tuple[int, ...]]  # least lossy first
    token_multiple: ClassVar[int]  # atoms of a multiple of this many tokens ...
    block_local: ClassVar[bool]  # ... decode to the same whether they are encoded apart or together
    cuts_layers: ClassVar[bool]  # an atom of some layers decodes to the same as those layers of a larger atom
    cuts_heads: ClassVar[bool]  # the same for heads; without it, an atom of some heads only is `Unencodable`

    def encode(self, atom: Atom, level: int) -> Payload:
        """Deterministic. Raises `Unencodable`, and nothing else for an atom of a dtype in `dtypes`."""

    def decode_untrusted(self, payload: memoryview, shape: AtomShape, level: int) -> Bytes:
        """`bytes_LHPTX` of an atom of this shape, perhaps read-only, perhaps a view of the payload.

        The payload's length is compared with what `shape` implies before anything is allocated; a length inside the
        payload is a claim, not a fact. Raises only FrameError, for a shape and a level that were checked: by
        `frame.check_atom_untrusted` and `CodecSet.check_untrusted`.
        """

    def payload_bytes_max(self, shape: AtomShape) -> int:
        """No payload for this shape is longer."""

    def error_bound(self, shape: AtomShape, level: int, largest: float) -> float:
        """|decoded - original| of every number of an atom of this shape whose largest |original| is `largest`."""


class Profiled(Codec, Protocol):
    """A codec with tables. `levels` may then be finer than what its profile has measured curves for."""

    def __init__(self, tables: Tables, stream: Stream) -> None:
        """Expands the tables, once per worker. Raises InvalidArgument if they are not for such a stream."""

    @staticmethod
    def calibrate(calibration: Calibration) -> Tables:
        """Deterministic. From what a model's KV looked like over texts."""


codecs: Registry[type[Codec]] = Registry("kv_transfer.codecs", kind="codec", group="triptych.codec")


@dataclass(frozen=True, slots=True)
class Encoding:
    """What KV goes through on its way: a codec, at a level, made from tables of this digest (0: it has none)."""

    codec: str = RAW
    level: int = 0
    tables: int = 0

    @property
    def identity(self) -> str:
        """What KV is from then on: `EXACT`, or "transform/7@00001a2b", which no other loss is called.

        Lossy KV is never taken for exact, nor for another loss (DESIGN 4). What is not installed here may lose
        anything.
        """
        if self.codec in codecs and codecs.get(self.codec).lossless:
            return EXACT
        return f"{self.codec}/{self.level}" + (f"@{self.tables:08x}" if self.tables else "")

    @classmethod
    def of(cls, identity: str) -> "Encoding":
        """The one that made KV this."""
        if identity == EXACT:
            return cls()
        codec, _, rest = identity.partition("/")
        level, _, tables = rest.partition("@")
        return cls(codec, int(level), int(tables or "0", 16))


RAW_ENCODING: Final = Encoding()


class CodecSet:
    """The codecs that a worker has for its stream. Made once at start; used from any thread, it never changes."""

    def __init__(self, stream: Stream, profile: Profile | None = None) -> None:
        self.stream = stream
        self.profile = profile
        tables = {} if profile is None else profile.tables
        self._digests = {name: tables[name].digest if _profiled(name) else 0 for name in _made_for(stream, tables)}
        self._made = {name: _make(name, stream, tables) for name in self._digests}

    def names(self) -> tuple[str, ...]:
        """`raw` is always one of them."""
        return tuple(sorted(self._made))

    def get(self, name: str) -> Codec:
        return self._made[name]

    def digest(self, name: str) -> int:
        """Of the tables that this codec was made from; 0 for one without tables."""
        return self._digests[name]

    def has(self, encoding: Encoding) -> bool:
        """Whether KV can go through this here."""
        codec = self._made.get(encoding.codec)
        return codec is not None and encoding.level in codec.levels and encoding.tables == self._digests[encoding.codec]

    def encode_or_raw(self, name: str, atom: Atom, level: int) -> tuple[str, int, Payload]:
        """(codec, level, payload) to send: what was asked for, or `raw` where that cannot be or is no shorter."""
        if name in self._made:
            try:
                payload = self._made[name].encode(atom, level)
            except Unencodable:
                pass
            else:
                if len(payload) < atom.shape.raw_bytes:
                    return name, level, payload
        return RAW, 0, self._made[RAW].encode(atom, 0)

    def check_untrusted(self, name: str, level: int, digest: int, shape: AtomShape, payload_bytes: int) -> Codec:
        """The codec that a received frame names, if it may be used for this atom at all."""
        if not self.has(Encoding(name, level, digest)):
            raise FrameError("codec")
        codec = self._made[name]
        if payload_bytes > codec.payload_bytes_max(shape):
            raise FrameError("length")
        return codec


def _made_for(stream: Stream, tables: Mapping[str, Tables]) -> list[str]:
    """Names of the codecs that take this stream's dtype and need no tables, or have them. They are made for KV, and
    judged on it: what is something else (an embedding) travels raw."""
    return [
        name
        for name in (codecs.names() if stream.role == "kv" else (RAW,))
        if stream.dtype in codecs.get(name).dtypes and (not _profiled(name) or name in tables)
    ]


def _profiled(name: str) -> bool:
    return codecs.get(name).profiled


def _make(name: str, stream: Stream, tables: Mapping[str, Tables]) -> Codec:
    kind = codecs.get(name)
    return cast("type[Profiled]", kind)(tables[name], stream) if kind.profiled else kind()
