"""Grouped quantisation against a second, plain implementation; the packing of bits; sizes; what a payload may say."""

import subprocess
import sys

import numpy as np
import pytest

from engine.base.errors import FrameError
from engine.kv.schema import Stream
from kv_transfer.codecs import Atom, AtomShape, Unencodable, codecs, elements
from kv_transfer.codecs.grouped import SINK_TOKENS
from kv_transfer.codecs.grouped_kernels import GROUP_TOKENS, disordered, narrowed, ordered, pack, unpack, widened

HEAD_DIM = 16
ROUNDING = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 2**-18}
CODECS = {"int8": (8, 0), "int4": (4, SINK_TOKENS), "int3": (3, SINK_TOKENS)}  # bits, raw tokens
every_codec = pytest.mark.parametrize("name", CODECS)
every_dtype = pytest.mark.parametrize("dtype", sorted(elements.DTYPES))


def atom_of(values: np.ndarray, dtype: str = "float32", start: int = 0, **stream: object) -> Atom:
    """An atom of values_LHPTD."""
    layers, heads, parts, tokens, head_dim = values.shape
    of = {"name": "kv", "layers": layers, "heads": heads, "parts": parts, "head_dim": head_dim, "dtype": dtype}
    shape = AtomShape(Stream(**of | stream), (0, layers), (start, start + tokens), (0, heads))
    return Atom(shape, elements.from_float32(values, dtype))


def noise(tokens: int, *, parts: int = 2, head_dim: int = HEAD_DIM) -> np.ndarray:
    values = np.random.default_rng(tokens).standard_normal((2, 3, parts, tokens, head_dim)).astype(np.float32)
    values[..., 5] = 30 + 3 * values[..., 5]
    return values


def round_trip(name: str, atom: Atom) -> np.ndarray:
    codec, dtype = codecs.get(name)(), atom.shape.stream.dtype
    payload = bytes(codec.encode(atom, 0))
    return elements.to_float32(codec.decode_untrusted(memoryview(payload), atom.shape, 0), dtype)


def quantised(values: np.ndarray, axis: int, bits: int) -> np.ndarray:
    """What sharing one grid along an axis makes of numbers, in float64."""
    low, high = (extreme(values, axis=axis, keepdims=True).astype(np.float64) for extreme in (np.min, np.max))
    step = (high - low) / (2**bits - 1)
    codes = np.floor(np.divide(values - low, step, out=np.zeros(values.shape), where=step > 0) + 0.5)
    return low + codes * step


def expected(values: np.ndarray, bits: int, first: int, *, keys: bool = True) -> np.ndarray:
    result = values.astype(np.float64)
    coded = [(max(start, first), start + GROUP_TOKENS) for start in range(0, values.shape[3], GROUP_TOKENS)]
    for part in range(values.shape[2]):
        per_channel = keys and part == 0
        for start, end in coded:
            group = values[:, :, part, start:end]
            result[:, :, part, start:end] = quantised(group, -2 if per_channel else -1, bits)
    return result


def expect_like(got: np.ndarray, values: np.ndarray, exact: np.ndarray, dtype: str) -> None:
    """All but a few, which are half way between two steps, so that float32 may put them on either side."""
    close = np.isclose(got, exact, rtol=ROUNDING[dtype], atol=1e-5)
    assert close.mean() > 0.99
    assert np.abs(got - values)[~close].max(initial=0) <= 1.01 * np.abs(exact - values).max()


@every_codec
@every_dtype
@pytest.mark.parametrize(("start", "tokens"), [(0, 5), (0, 64), (0, 130), (2, 130), (7, 1), (64, 67), (99_999, 200)])
def test_numbers_become_the_nearest_step_of_their_groups_grid(name: str, dtype: str, start: int, tokens: int) -> None:
    bits, raw = CODECS[name]
    atom = atom_of(noise(tokens), dtype, start)
    values = elements.to_float32(atom.bytes_LHPTX, dtype)
    expect_like(round_trip(name, atom), values, expected(values, bits, min(max(raw - start, 0), tokens)), dtype)


@every_codec
def test_streams_without_keys_have_a_grid_per_token_and_part(name: str) -> None:
    values = noise(70, parts=3)
    values[:, :, :, 40] *= 1_000  # a loud token is its own affair
    atom = atom_of(values, start=64, role="latent")
    expect_like(round_trip(name, atom), values, expected(values, CODECS[name][0], 0, keys=False), "float32")


@every_codec
@every_dtype
def test_the_smallest_and_the_largest_of_a_group_are_kept(name: str, dtype: str) -> None:
    atom = atom_of(noise(64), dtype, start=64)
    values, got = elements.to_float32(atom.bytes_LHPTX, dtype), round_trip(name, atom)
    for part, axis in ((0, -2), (1, -1)):
        for extreme in (np.min, np.max):
            wanted = extreme(values[:, :, part], axis=axis)
            np.testing.assert_allclose(extreme(got[:, :, part], axis=axis), wanted, rtol=3e-7)


@every_codec
@every_dtype
def test_decoding_and_encoding_again_changes_nothing(name: str, dtype: str) -> None:
    """KV that was lossily decoded must not be encoded again (DESIGN 2.7); if it is, little comes of it."""
    once = round_trip(name, atom_of(noise(64), dtype, start=64))
    twice = round_trip(name, atom_of(once, dtype, start=64))
    np.testing.assert_allclose(twice, once, rtol=0.01, atol=0.02 if dtype == "bfloat16" else 1e-3)


@every_codec
@every_dtype
def test_equal_numbers_stay_as_they_are(name: str, dtype: str) -> None:
    values = noise(70)
    values[1] = 0
    values[0, 0, 0, :, 3] = -2.5
    values[0, 0, 1, 9] = 0.75
    got, same = round_trip(name, atom_of(values, dtype, start=7)), slice(0, GROUP_TOKENS)
    np.testing.assert_array_equal(got[1], 0)
    np.testing.assert_array_equal(got[0, 0, 0, same, 3], -2.5)
    np.testing.assert_array_equal(got[0, 0, 1, 9], 0.75)


@every_dtype
@pytest.mark.parametrize("name", ["int4", "int3"])
@pytest.mark.parametrize(("start", "raw"), [(0, 4), (1, 3), (3, 1), (4, 0), (100_000, 0)])
def test_the_first_positions_of_a_sequence_are_raw_and_in_nobodys_group(
    name: str, dtype: str, start: int, raw: int
) -> None:
    values = noise(64)
    values[:, :, :, :raw] *= 100
    atom = atom_of(values, dtype, start)
    got, stored = round_trip(name, atom), elements.to_float32(atom.bytes_LHPTX, dtype)
    np.testing.assert_array_equal(got[:, :, :, :raw], stored[:, :, :, :raw])
    assert (got[:, :, :, raw:] != stored[:, :, :, raw:]).mean() > 0.3
    bits = CODECS[name][0]
    ordinary = np.ptp(values[:, :, :, raw:], axis=(3, 4)).max()
    assert np.abs(got - stored).max() <= ordinary / (2**bits - 1) + 0.2


@every_codec
def test_the_size_is_the_bits_and_two_bounds_for_64_numbers(name: str) -> None:
    values = noise(256, head_dim=64)
    for dtype, item_bits in (("bfloat16", 16), ("float16", 16), ("float32", 32)):
        payload = codecs.get(name)().encode(atom_of(values, dtype, start=64), 0)
        assert 8 * len(payload) == values.size * (CODECS[name][0] + 2 * item_bits / 64)


def test_kernels_round_widen_and_order_numbers_as_elements_and_numpy_do() -> None:
    upper = np.random.default_rng(0).integers(0, 0x7F00, 200, dtype=np.uint32) << 16
    bits = np.concatenate([upper, upper | 0x8000, upper | 0x7FFF, upper | 0x8001])  # ties, and beside ties
    numbers = np.concatenate([bits, bits | 0x8000_0000]).view(np.float32)
    rounded = elements.from_float32(numbers, "bfloat16").view(np.uint16)
    np.testing.assert_array_equal([narrowed(number, 16) for number in numbers], rounded)
    np.testing.assert_array_equal(
        [widened(bits, 16) for bits in rounded], (rounded.astype(np.uint32) << 16).view(np.float32)
    )
    orders = np.array([ordered(bits, 0) for bits in numbers.view(np.uint32)])
    np.testing.assert_array_equal(numbers[np.argsort(orders)], np.sort(numbers))
    np.testing.assert_array_equal([disordered(order) for order in orders], numbers)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 11, 64])
def test_packed_codes_are_bit_streams_of_the_channels(bits: int, tokens: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (tokens, 5), dtype=np.uint8)
    packed = np.zeros((-(-bits * tokens // 8), 5), np.uint8)
    pack(codes, bits, packed)
    stream = np.unpackbits(packed, axis=0, bitorder="little")[: bits * tokens].reshape(tokens, bits, 5)
    np.testing.assert_array_equal((stream * (1 << np.arange(bits))[None, :, None]).sum(1), codes)
    unpacked = np.zeros_like(codes)
    unpack(packed, bits, unpacked)
    np.testing.assert_array_equal(unpacked, codes)


@every_codec
@every_dtype
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("token", [0, 66])
@pytest.mark.parametrize("bad", ["inf", "-inf", "nan", "-nan", "2^126"])
def test_what_cannot_be_had_back_is_refused_before_it_is_sent(
    name: str, dtype: str, part: int, token: int, bad: str
) -> None:
    if (dtype, bad) == ("float16", "2^126"):
        return
    values = noise(70)
    values[1, 0, part, token, 2] = 2.0**126 if bad == "2^126" else float(bad)
    with pytest.raises(Unencodable):
        codecs.get(name)().encode(atom_of(values, dtype), 0)


@every_codec
@every_dtype
def test_the_largest_numbers_come_back_finite_and_within_the_bound(name: str, dtype: str) -> None:
    largest = 65_504.0 if dtype == "float16" else (2 - 2.0**-7) * 2.0**125
    values = np.where(noise(70) > 0, np.float32(largest), np.float32(-largest))
    values[..., 7] *= 0.3
    got = round_trip(name, atom_of(values, dtype))
    stored = elements.to_float32(elements.from_float32(values, dtype), dtype)
    assert np.isfinite(got).all()
    bound = codecs.get(name)().error_bound(atom_of(values, dtype).shape, 0, float(np.abs(stored).max()))
    assert np.abs(got.astype(np.float64) - stored).max() <= bound


@every_codec
@every_dtype
@pytest.mark.parametrize("scale", [1e-45, 1e-41, 1e-38, 1e-30, 1e-7, 1.0])
def test_the_bound_holds_for_numbers_of_any_size(name: str, dtype: str, scale: float) -> None:
    atom = atom_of(noise(70) * np.float32(scale), dtype)
    stored = elements.to_float32(atom.bytes_LHPTX, dtype).astype(np.float64)
    bound = codecs.get(name)().error_bound(atom.shape, 0, float(np.abs(stored).max()))
    assert np.abs(round_trip(name, atom) - stored).max() <= bound


@every_codec
def test_the_bound_is_no_more_than_it_has_to_be(name: str) -> None:
    """Numbers half way between two steps of the widest grid come within a percent of it."""
    steps = 2 ** CODECS[name][0] - 1
    half_way = -1 + 2 / steps * (np.arange(steps) + 0.4999)
    values = np.resize(half_way, (1, 1, 2, 64, HEAD_DIM)).astype(np.float32)
    values[..., 0, :], values[..., 1, :] = 1, -1
    values[..., 0], values[..., 1] = 1, -1
    atom = atom_of(values, start=64)
    bound = codecs.get(name)().error_bound(atom.shape, 0, 1.0)
    assert 0.99 * bound < np.abs(round_trip(name, atom) - values).max() <= bound


@every_codec
@every_dtype
@pytest.mark.parametrize("bits", [0x7F80, 0x7FC0, 0xFF80, 0xFFFF])
def test_bounds_and_raw_tokens_that_no_encoder_writes_are_refused(name: str, dtype: str, bits: int) -> None:
    """Infinity and NaN of either sign: whatever comes over the wire, what is written to memory is finite."""
    codec, atom = codecs.get(name)(), atom_of(noise(70), dtype)
    payload = bytes(codec.encode(atom, 0))
    forged = bits.to_bytes(2, "little")
    for offset in (0, 512):
        at = offset + (2 if dtype == "float32" else 0)
        with pytest.raises(FrameError, match="payload"):
            codec.decode_untrusted(memoryview(payload[:at] + forged + payload[at + 2 :]), atom.shape, 0)


@every_codec
@every_dtype
def test_any_payload_that_is_taken_is_finite(name: str, dtype: str) -> None:
    """Also bounds in the wrong order, and all codes at their largest."""
    atom = atom_of(noise(7), dtype)
    codec, generator, taken = codecs.get(name)(), np.random.default_rng(3), 0
    payload = np.frombuffer(bytes(codec.encode(atom, 0)), np.uint8)
    for _ in range(300):
        forged = payload.copy()
        forged[generator.integers(0, forged.size, 3)] = generator.integers(0, 256, 3)
        try:
            decoded = codec.decode_untrusted(forged.data, atom.shape, 0)
        except FrameError:
            continue
        taken += 1
        assert np.isfinite(elements.to_float32(decoded, dtype)).all()
    assert taken > 30


def test_listing_and_making_codecs_does_not_load_numba() -> None:
    script = (
        "import sys; from kv_transfer.codecs import codecs; "
        "[codecs.get(name) for name in codecs.names()]; codecs.get('int4')(); sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=15).returncode == 0
