"""DeviceArena: whatever the ranges, it holds and returns what the host's arena does. On an accelerator, the same."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kv.arena import POISON, Arena, Range
from engine.kv.device_arena import DeviceArena
from engine.kv.schema import CacheSchema, Stream

KV = Stream(name="kv", layers=3, heads=2, head_dim=4, dtype="bfloat16")
SCHEMA = CacheSchema("m", (KV,))
HEAD_BYTES = KV.head_dim * KV.item_bytes
TOKENS = 40

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator on this machine")
DEVICES = ["cpu", pytest.param("cuda", marks=(pytest.mark.gpu, NO_GPU))]


def ranges(size: int) -> st.SearchStrategy[Range]:
    return st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda pair: (min(pair), max(pair)))


def random_bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def pair(block_size: int, device: str) -> tuple[Arena, DeviceArena, tuple[int, ...]]:
    blocks = -(-TOKENS // block_size)
    sizes: dict[str, Any] = {"columns": blocks + 3, "block_size": block_size}
    table = np.random.default_rng(block_size).permutation(blocks + 3)[:blocks]
    return Arena(SCHEMA, **sizes), DeviceArena(SCHEMA, device=device, **sizes), tuple(map(int, table))


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    block_size=st.sampled_from([1, 3, 8, 16]),
    layers=ranges(KV.layers),
    tokens=ranges(TOKENS),
    heads=ranges(KV.heads),
)
def test_equals_the_hosts_arena(device: str, block_size: int, layers: Range, tokens: Range, heads: Range) -> None:
    host, ours, table = pair(block_size, device)
    spans = (layers[1] - layers[0], heads[1] - heads[0], KV.parts, tokens[1] - tokens[0], HEAD_BYTES)
    data_LHPTX = random_bytes(*spans)
    data_LHPTX.flags.writeable = False  # as a frame's payload is
    for arena in (host, ours):
        arena.write(table, layers, tokens, heads, data_LHPTX)
    np.testing.assert_array_equal(ours.array, host.array)
    into = bytearray(data_LHPTX.size)
    got = ours.read(table, layers, tokens, heads, into=memoryview(into))
    np.testing.assert_array_equal(got, data_LHPTX)
    assert bytes(into) == data_LHPTX.tobytes()
    whole = ((0, KV.layers), (0, TOKENS))
    np.testing.assert_array_equal(ours.read(table, *whole), host.read(table, *whole))


@pytest.mark.parametrize("device", DEVICES)
def test_whole_columns(device: str) -> None:
    _, arena, table = pair(8, device)
    arena.poison(table[:2])
    arena.copy_column(table[0], table[2])
    arena.zero(table[:1])
    assert [int(arena.array[column].max()) for column in table[:4]] == [0, POISON, POISON, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_refuses_what_the_hosts_arena_refuses(device: str) -> None:
    _, arena, table = pair(8, device)
    with pytest.raises(ValueError, match="column ids"):
        arena.read((arena.columns,), (0, 1), (0, 8))
    with pytest.raises(ValueError, match="data must be"):
        arena.write(table, (0, 1), (0, 8), None, random_bytes(1, 1, 2, 8, HEAD_BYTES))


@pytest.mark.gpu
@NO_GPU
def test_a_read_waits_for_what_was_marked() -> None:
    """A slow kernel writes a column; a codec thread's read, started at once, sees all of it."""
    _, arena, table = pair(8, "cuda")
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        busy = busy @ busy
    arena.bytes_CLHPSX[table[0]] = 7
    arena.mark_computed()
    assert int(arena.read(table, (0, KV.layers), (0, 8)).min()) == 7
