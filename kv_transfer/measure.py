"""Measuring a codec on given KV, through the bytes that would be sent: how many, what comes out of them, how fast.

KV is cut into atoms as a source cuts the chunks of a prompt; each costs a frame's header. What the loss does to
a model is measured elsewhere (`engine.quality`); tables are part of a profile and are never sent.

Legend: L layers, H kv heads, P parts (K, V), T tokens, D head dim, X bytes of one token's head.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from engine.kv.schema import Stream
from kv_transfer.calibration import Floats
from kv_transfer.codecs import Atom, AtomShape, CodecSet, elements
from kv_transfer.frame import HEADER_BYTES
from kv_transfer.jobs import atoms

CHUNK_TOKENS: Final = 256
_REPEATS: Final = 3
_BITS_PER_BYTE: Final = 8


@dataclass(frozen=True, slots=True)
class Received:
    """KV that came through a codec."""

    kv_LHPTD: Floats
    sent_bytes: int

    @property
    def bits_per_element(self) -> float:
        return _BITS_PER_BYTE * self.sent_bytes / self.kv_LHPTD.size


@dataclass(frozen=True, slots=True)
class Rates:
    """Megabytes of raw KV in the stream's dtype per second of CPU time, whatever threads it was spent on."""

    encode_mb_s: float
    decode_mb_s: float


def send(codecs: CodecSet, name: str, level: int, kv_LHPTD: Floats) -> Received:
    """What a target gets, and for how many bytes. An atom that the codec cannot encode goes raw, as in a transfer."""
    received_LHPTD, sent_bytes = np.empty_like(kv_LHPTD), 0
    for atom in cut(codecs.stream, kv_LHPTD):
        used, used_level, payload = codecs.encode_or_raw(name, atom, level)
        decoded_LHPTX = codecs.get(used).decode_untrusted(memoryview(payload), atom.shape, used_level)
        numbers_LHPTD = elements.to_float32(np.ascontiguousarray(decoded_LHPTX), codecs.stream.dtype)
        received_LHPTD[slice(*atom.shape.layers), :, :, slice(*atom.shape.tokens)] = numbers_LHPTD
        sent_bytes += HEADER_BYTES + len(payload)
    return Received(received_LHPTD, sent_bytes)


def rates(codecs: CodecSet, name: str, level: int, kv_LHPTD: Floats) -> Rates:
    """The best of some repetitions over one chunk: neighbours on the machine only ever slow one down."""
    chunk = list(cut(codecs.stream, kv_LHPTD[:, :, :, :CHUNK_TOKENS]))
    sent = [codecs.encode_or_raw(name, atom, level) for atom in chunk]

    def encode() -> None:
        for atom in chunk:
            codecs.encode_or_raw(name, atom, level)

    def decode() -> None:
        for atom, (used, used_level, payload) in zip(chunk, sent, strict=True):
            codecs.get(used).decode_untrusted(memoryview(payload), atom.shape, used_level)

    megabytes = sum(atom.shape.raw_bytes for atom in chunk) / 1e6
    return Rates(megabytes / _best_s(encode), megabytes / _best_s(decode))


def cut(stream: Stream, kv_LHPTD: Floats) -> Iterator[Atom]:
    """The atoms of the chunks of a prompt from position 0: all layers, all heads."""
    layers, heads, _, tokens, _ = kv_LHPTD.shape
    for start in range(0, tokens, CHUNK_TOKENS):
        chunk = (start, min(start + CHUNK_TOKENS, tokens))
        for layer_range, token_range in atoms(stream, (0, layers), chunk):
            shape = AtomShape(stream, layer_range, token_range, (0, heads))
            numbers_LHPTD = kv_LHPTD[slice(*layer_range), :, :, slice(*token_range)]
            yield Atom(shape, elements.from_float32(np.ascontiguousarray(numbers_LHPTD), stream.dtype))


def _best_s(work: Callable[[], None]) -> float:
    """CPU time of the process: other programs do not count, a matrix product's own threads do."""
    times_s = []
    for _ in range(_REPEATS):
        start_s = time.process_time()
        work()
        times_s.append(time.process_time() - start_s)
    return max(min(times_s), 1e-9)
