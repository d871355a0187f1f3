"""Row coded: what codecs that code KV row by row have in common. Not a codec itself.

A *row* is one token's K or V of one layer, all heads: an atom of some heads only is `Unencodable`. The first 4
positions of a sequence (attention sinks, like no other token) stay as they are.

    payload    raw tokens | rANS stream (`rans`): rows, in an order that is the codec's

A codec says how many words a row may take at most, and puts and gets all rows of an atom.

Legend: i layers of the atom, L of the model, H kv heads, P parts, T tokens, R raw tokens, D head dim, X bytes of D
numbers.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from engine.base.errors import FrameError
from engine.kv.arena import Bytes
from engine.kv.schema import Stream
from kv_transfer.codecs import Atom, AtomShape, Payload, Unencodable, elements, rans
from kv_transfer.codecs.elements import Numbers

RAW_TOKENS: Final = 4


@dataclass(frozen=True, slots=True)
class Layout:
    """How an atom lies in its payload. A function of its shape alone, so both ends agree."""

    shape: AtomShape
    row_words_max: int

    @property
    def first(self) -> int:
        """Of the atom's tokens, the first that is coded."""
        start, end = self.shape.tokens
        return min(max(RAW_TOKENS - start, 0), end - start)

    @property
    def raw_LHPRX(self) -> tuple[int, int, int, int, int]:
        layers, heads, parts, _, head_bytes = self.shape.LHPTX
        return layers, heads, parts, self.first, head_bytes

    @property
    def raw_bytes(self) -> int:
        return math.prod(self.raw_LHPRX)

    @property
    def words_max(self) -> int:
        layers, _, parts, tokens, _ = self.shape.LHPTX
        return layers * parts * (tokens - self.first) * self.row_words_max

    @property
    def payload_bytes_max(self) -> int:
        return self.raw_bytes + rans.stream_bytes_max(self.words_max)


class RowCoded:
    """All of a codec but its rows."""

    needs: ClassVar[tuple[str, ...]] = ()
    composes_with: ClassVar[str] = "every retention method that keeps all heads of a token"
    lossless: ClassVar[bool] = False
    dtypes: ClassVar[frozenset[str]] = elements.DTYPES
    token_multiple: ClassVar[int] = 1
    block_local: ClassVar[bool] = True
    cuts_layers: ClassVar[bool] = True
    cuts_heads: ClassVar[bool] = False

    def encode(self, atom: Atom, level: int) -> Payload:
        dtype = atom.shape.stream.dtype
        if not _has_all_heads(atom.shape):
            raise Unencodable("some heads only: rows are of all of them")
        layout = self._layout(atom.shape)
        raw_LHPRX = atom.bytes_LHPTX[:, :, :, : layout.first]
        if not elements.all_finite(raw_LHPRX, dtype):
            raise Unencodable("infinite or not a number")
        writer = rans.Writer(layout.words_max, layout.raw_bytes)
        numbers_iHPTD = elements.to_numbers(atom.bytes_LHPTX, dtype)
        payload = writer.seal(self._put_rows(numbers_iHPTD, layout, level, writer))
        payload[: layout.raw_bytes].reshape(layout.raw_LHPRX)[...] = raw_LHPRX
        return payload.data

    def decode_untrusted(self, payload: memoryview, shape: AtomShape, level: int) -> Bytes:
        if not _has_all_heads(shape):
            raise FrameError("range")
        layout, dtype = self._layout(shape), shape.stream.dtype
        if not layout.raw_bytes <= len(payload) <= layout.payload_bytes_max:
            raise FrameError("length")
        raw_LHPRX = np.frombuffer(payload[: layout.raw_bytes], np.uint8).reshape(layout.raw_LHPRX)
        if not elements.all_finite(raw_LHPRX, dtype):
            raise FrameError("payload")
        stream = payload[layout.raw_bytes :]
        states, words, end = rans.open_untrusted(stream, layout.row_words_max)
        numbers_iHPTD = elements.zero_numbers((*shape.LHPTX[:4], shape.stream.head_dim), dtype)
        cursor = self._get_rows_untrusted(numbers_iHPTD, layout, level, states, words, end)
        if not rans.finished(states, cursor, end):
            raise FrameError("payload")
        bytes_LHPTX = elements.from_numbers(numbers_iHPTD, dtype)
        bytes_LHPTX[:, :, :, : layout.first] = raw_LHPRX
        return bytes_LHPTX

    def payload_bytes_max(self, shape: AtomShape) -> int:
        return self._layout(shape).payload_bytes_max

    def _layout(self, shape: AtomShape) -> Layout:
        return Layout(shape, self._row_words_max(shape.stream))

    def _row_words_max(self, stream: Stream) -> int:
        """That a row takes of the rANS stream, its escapes with it."""
        raise NotImplementedError

    def _put_rows(self, numbers_iHPTD: Numbers, layout: Layout, level: int, writer: rans.Writer) -> int:
        """All rows from token `layout.first` on, backwards. Returns the cursor, or raises `Unencodable`."""
        raise NotImplementedError

    def _get_rows_untrusted(
        self, numbers_iHPTD: Numbers, layout: Layout, level: int, states: Numbers, words: Numbers, end: int
    ) -> int:
        """Writes all rows from token `layout.first` on, every number finite. Returns the cursor, or raises FrameError;
        begins no row behind `end`, where zeros for one row follow."""
        raise NotImplementedError


def _has_all_heads(shape: AtomShape) -> bool:
    return shape.heads == (0, shape.stream.heads)
