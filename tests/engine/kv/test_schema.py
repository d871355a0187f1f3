"""CacheSchema: byte counts, and a digest that tells apart everything that must not be mixed."""

from dataclasses import replace

import pytest

from engine.base.errors import InvalidArgument
from engine.kv.schema import CacheSchema, Stream

KV = Stream(name="kv", layers=5, heads=3, head_dim=64, dtype="bfloat16")


def test_bytes_of_a_token_count_every_part_head_layer_and_stream() -> None:
    latent = Stream(name="latent", layers=2, heads=1, head_dim=8, dtype="float32", parts=1, role="latent")
    schema = CacheSchema("m", (KV, latent))
    assert KV.token_layer_bytes == 2 * 3 * 64 * 2
    assert schema.token_bytes == 5 * 2 * 3 * 64 * 2 + 2 * 1 * 1 * 8 * 4
    assert schema.kv is KV


@pytest.mark.parametrize(
    "change",
    [
        {"name": "kv2"},
        {"layers": 6},
        {"heads": 4},
        {"head_dim": 32},
        {"dtype": "float16"},  # as many bytes, other numbers
        {"parts": 1},
        {"position_encoding": "rope_pending"},
        {"role": "latent"},
    ],
)
def test_digest_depends_on_each_field_of_a_stream(change: dict[str, object]) -> None:
    changed = replace(KV, **change)  # type: ignore[arg-type]
    assert CacheSchema("m", (KV,)).digest != CacheSchema("m", (changed,)).digest


def test_digest_depends_on_model_and_on_stream_order() -> None:
    other = replace(KV, name="other")
    digests = {
        CacheSchema("m", (KV, other)).digest,
        CacheSchema("m", (other, KV)).digest,
        CacheSchema("n", (KV, other)).digest,
        CacheSchema("m", (KV,)).digest,
    }
    assert len(digests) == 4


def test_digest_is_the_same_in_every_process() -> None:
    # Pinned: a change here makes workers of two versions refuse each other's KV. Then bump the wire version as well.
    assert CacheSchema("m", (KV,)).digest.hex() == "3902f50fffa80f88ba6b8d3c2a3471d7"


@pytest.mark.parametrize("change", [{"layers": 0}, {"heads": 0}, {"head_dim": -1}, {"parts": 0}, {"dtype": "int4"}])
def test_impossible_streams_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        replace(KV, **change)  # type: ignore[arg-type]
