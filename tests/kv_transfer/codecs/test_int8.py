"""Int8: half the bytes; errors within half a step of the numbers that share a scale; keys keep their quiet channels."""

import numpy as np
import pytest

from engine.base.errors import FrameError
from engine.kv.schema import Stream
from kv_transfer.codecs import Atom, AtomShape, Unencodable, codecs, elements
from kv_transfer.codecs.int8 import GROUP_TOKENS

HEAD_DIM = 64
STEP = 1 / 127 * (1 + 2**-7)  # of the largest number; a scale is rounded up to a bfloat16


def shape_of(tokens: int, dtype: str, **stream: object) -> AtomShape:
    kv = Stream(**{"name": "kv", "layers": 2, "heads": 2, "head_dim": HEAD_DIM, "dtype": dtype} | stream)
    return AtomShape(kv, (0, 2), (0, tokens), (0, 2))


def outliers(tokens: int = 128) -> np.ndarray:
    """Keys and values [2, 2, 2, T, D] with two channels that are always large."""
    values = np.random.default_rng(0).standard_normal((2, 2, 2, tokens, HEAD_DIM)).astype(np.float32)
    values[..., [5, 40]] *= 30
    return values


def encode(values: np.ndarray, dtype: str = "float32", **stream: object) -> tuple[AtomShape, bytes]:
    shape = shape_of(values.shape[3], dtype, **stream)
    return shape, bytes(codecs.get("int8")().encode(Atom(shape, elements.from_float32(values, dtype)), 0))


def round_trip(values: np.ndarray, dtype: str = "float32", **stream: object) -> np.ndarray:
    shape, payload = encode(values, dtype, **stream)
    return elements.to_float32(codecs.get("int8")().decode_untrusted(memoryview(payload), shape, 0), dtype)


@pytest.mark.parametrize(("dtype", "ratio"), [("bfloat16", 8.25 / 16), ("float16", 8.25 / 16), ("float32", 8.25 / 32)])
def test_the_size_is_8_bits_and_a_quarter(dtype: str, ratio: float) -> None:
    shape, payload = encode(outliers(), dtype)
    assert len(payload) == ratio * shape.raw_bytes


def test_errors_are_within_half_a_step_of_what_shares_the_scale() -> None:
    values = outliers()
    error = np.abs(round_trip(values) - values)
    keys, values_ = values[:, :, 0], values[:, :, 1]
    groups = np.abs(keys).reshape(2, 2, -1, GROUP_TOKENS, HEAD_DIM).max(-2, keepdims=True)
    assert (error[:, :, 0].reshape(2, 2, -1, GROUP_TOKENS, HEAD_DIM) <= STEP / 2 * groups * 1.00001).all()
    assert (error[:, :, 1] <= STEP / 2 * np.abs(values_).max(-1, keepdims=True) * 1.00001).all()


def test_a_keys_quiet_channels_do_not_pay_for_the_loud_ones() -> None:
    """KIVI's reason for its axes. The same numbers with one scale per token, as values have, lose ten times as much."""
    values = outliers()
    values[:, :, 1] = values[:, :, 0]
    quiet = [channel for channel in range(HEAD_DIM) if channel not in (5, 40)]
    error = (round_trip(values) - values)[..., quiet]
    per_channel, per_token = (np.sqrt((error[:, :, part] ** 2).mean()) for part in (0, 1))
    assert per_channel < 0.01
    assert per_token > 10 * per_channel


def test_streams_without_keys_have_a_scale_per_token() -> None:
    values = outliers()[:, :, :1]
    values[:, :, :, 7] = 1e4  # a loud token is its own affair
    decoded = round_trip(values, parts=1, role="latent")
    assert (np.abs(decoded - values) <= STEP / 2 * np.abs(values).max(-1, keepdims=True) * 1.00001).all()


@pytest.mark.parametrize("dtype", sorted(elements.DTYPES))
def test_zeros_stay_zeros_beside_anything(dtype: str) -> None:
    values = outliers()
    values[1] = 0
    values[0, 0, 1, 9] = 0
    values[0, 1, 0, :, 3] = 0
    decoded = round_trip(values, dtype)
    assert (decoded[elements.to_float32(elements.from_float32(values, dtype), dtype) == 0] == 0).all()
    assert decoded.any()


def test_what_is_too_small_for_a_scale_becomes_zero() -> None:
    values = np.full((2, 2, 2, 3, HEAD_DIM), 1e-40, np.float32)
    assert not round_trip(values).any()
    np.testing.assert_allclose(round_trip(np.full_like(values, 2e-36)), 2e-36, rtol=STEP)


@pytest.mark.parametrize("dtype", sorted(elements.DTYPES))
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("bad", ["inf", "-inf", "nan", "largest"])
def test_what_cannot_be_had_back_is_refused_before_it_is_sent(dtype: str, part: int, bad: str) -> None:
    values = outliers(70)
    values[1, 0, part, 66, 2] = elements.LARGEST[dtype] if bad == "largest" else float(bad)
    with pytest.raises(Unencodable):
        encode(values, dtype)


@pytest.mark.parametrize("dtype", sorted(elements.DTYPES))
def test_large_numbers_come_back_finite(dtype: str) -> None:
    values = outliers() / 200 * np.float32(0.98 * elements.LARGEST[dtype])
    values = np.clip(values, -0.98 * elements.LARGEST[dtype], 0.98 * elements.LARGEST[dtype])
    decoded = round_trip(values, dtype)
    assert np.isfinite(decoded).all()
    assert np.abs(decoded - values).max() <= 0.006 * np.abs(values).max()


@pytest.mark.parametrize("dtype", sorted(elements.DTYPES))
@pytest.mark.parametrize("scale_bits", [0x7F80, 0x7FC0, 0x8001, 0xFFFF])
def test_a_scale_that_no_encoder_writes_is_refused(dtype: str, scale_bits: int) -> None:
    """Infinity, NaN, minus: whatever comes over the wire, what is written to memory is finite."""
    shape, payload = encode(outliers(70), dtype)
    forged = scale_bits.to_bytes(2, "little") + payload[2:]
    with pytest.raises(FrameError, match="payload"):
        codecs.get("int8")().decode_untrusted(memoryview(forged), shape, 0)


@pytest.mark.parametrize("dtype", sorted(elements.DTYPES))
def test_any_payload_that_is_taken_is_finite(dtype: str) -> None:
    shape, payload = encode(outliers(3), dtype)
    codec, generator, taken = codecs.get("int8")(), np.random.default_rng(3), 0
    for _ in range(300):
        forged = np.frombuffer(payload, np.uint8).copy()
        forged[generator.integers(0, forged.size, 3)] = generator.integers(0, 256, 3)
        try:
            decoded = codec.decode_untrusted(forged.data, shape, 0)
        except FrameError:
            continue
        taken += 1
        assert np.isfinite(elements.to_float32(decoded, dtype)).all()
    assert taken > 30
