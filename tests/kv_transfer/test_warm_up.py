"""Warming up: after it no codec compiles anything, whatever piece of a prompt comes first."""

from collections.abc import Iterator
from itertools import product
from types import ModuleType

import pytest

from engine.base import jit
from engine.kv.schema import Stream
from kv_transfer.codecs import cachegen_kernels, codecs, grouped_kernels, transform_kernels
from kv_transfer.warm_up import warm_up
from tests.kv_transfer.codecs import synthetic

KERNELS = (grouped_kernels, cachegen_kernels, transform_kernels)
STARTS_AND_TOKENS = tuple(product((0, 16, 64), (2, 16, 128, 132, 300)))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[jit.Kernel]]:
    """Kernels in the order in which they are made, none of which another test has called."""
    kernels: list[jit.Kernel] = []
    make = jit._jit
    monkeypatch.setattr(
        jit, "_jit", lambda function, **options: kernels.append(make(function, **options)) or kernels[-1]
    )
    for module in KERNELS:
        forget_kernels(module)
    yield kernels


def forget_kernels(module: ModuleType) -> None:
    for value in vars(module).values():
        if getattr(value, "__module__", None) == module.__name__ and hasattr(value, "cache_clear"):
            value.cache_clear()


def compiled_for(kernels: list[jit.Kernel]) -> list[object]:
    return [signature for kernel in kernels for signature in kernel.signatures]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", codecs.names())
@pytest.mark.timeout(120)  # a machine that has not compiled them yet
def test_nothing_is_left_to_compile(name: str, made: list[jit.Kernel]) -> None:
    stream = Stream(name="kv", layers=2, heads=2, head_dim=16, dtype="bfloat16")
    worker = synthetic.codec_set(stream)
    warm_up(worker, name)
    before = compiled_for(made)
    codec = worker.get(name)
    for (start, tokens), level in product(STARTS_AND_TOKENS, {codec.levels[0], codec.levels[-1]}):
        atom = synthetic.atom(stream, start, tokens)
        payload = codec.encode(atom, level)
        codec.decode_untrusted(memoryview(payload), atom.shape, level)
    assert compiled_for(made) == before
    assert before or name == "raw"
