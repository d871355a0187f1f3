"""Raw: no copy in either direction, and no length but the right one."""

import numpy as np
import pytest

from engine.base.errors import FrameError
from engine.kv.schema import Stream
from kv_transfer.codecs import Atom, AtomShape, codecs

SHAPE = AtomShape(Stream(name="kv", layers=2, heads=2, head_dim=4, dtype="uint8"), (0, 2), (3, 8), (0, 2))


def test_the_payload_is_the_atoms_memory() -> None:
    bytes_LHPTX = np.arange(SHAPE.raw_bytes, dtype=np.uint8).reshape(SHAPE.LHPTX)
    payload = codecs.get("raw")().encode(Atom(SHAPE, bytes_LHPTX), 0)
    bytes_LHPTX[0, 0, 0, 0, 0] = 99
    assert payload[0] == 99 and len(payload) == SHAPE.raw_bytes


def test_the_decoded_atom_is_the_payloads_memory() -> None:
    payload = bytearray(SHAPE.raw_bytes)
    decoded = codecs.get("raw")().decode_untrusted(memoryview(payload), SHAPE, 0)
    payload[-1] = 7
    assert decoded[-1, -1, -1, -1, -1] == 7


@pytest.mark.parametrize("size", [0, SHAPE.raw_bytes - 1, SHAPE.raw_bytes + 1])
def test_another_length_is_refused(size: int) -> None:
    with pytest.raises(FrameError, match="length"):
        codecs.get("raw")().decode_untrusted(memoryview(bytes(size)), SHAPE, 0)
