"""What every registered codec promises. A new codec is in here by existing; its own test adds its paper's claim."""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pytest

from engine.base.errors import FrameError
from engine.kv.schema import ITEM_BYTES, Stream
from kv_transfer.codecs import (
    Atom,
    AtomShape,
    Codec,
    Unencodable,
    check_codec_untrusted,
    choose,
    codecs,
    elements,
    encode_or_raw,
)

LAYERS, HEADS, HEAD_DIM = 2, 3, 16
TOKENS = (0, 1, 2, 63, 64, 65, 200)


@dataclass(frozen=True)
class Case:
    codec: str
    dtype: str
    role: str
    level: int

    @property
    def stream(self) -> Stream:
        parts = 2 if self.role == "kv" else 1
        return Stream(
            name=self.role,
            layers=LAYERS,
            heads=HEADS,
            head_dim=HEAD_DIM,
            dtype=self.dtype,
            parts=parts,
            role=self.role,
        )

    @property
    def made(self) -> Codec:
        return codecs.get(self.codec)()


def all_cases() -> Iterator[Case]:
    for name in codecs.names():
        codec = codecs.get(name)
        for dtype in sorted(codec.dtypes):
            for level in codec.levels:
                yield from (Case(name, dtype, role, level) for role in ("kv", "latent"))


CASES = list(all_cases())
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, asdict(case).values())))
every_codec = pytest.mark.parametrize("name", codecs.names())


def shape_of(case: Case, tokens: int) -> AtomShape:
    return AtomShape(case.stream, (0, LAYERS), (7, 7 + tokens), (0, HEADS))


def atom_of(case: Case, tokens: int, *, seed: int = 0) -> Atom:
    """Numbers of very different sizes: large channels, a row of zeros, a tiny head. Any bytes where dtype has none."""
    shape = shape_of(case, tokens)
    generator = np.random.default_rng(seed)
    if case.dtype not in elements.DTYPES:
        return Atom(shape, generator.integers(0, 256, shape.LHPTX, dtype=np.uint8))
    values = generator.standard_normal((*shape.LHPTX[:-1], HEAD_DIM)).astype(np.float32)
    values[..., 3] *= 30
    values[:, 0] *= 1e-3
    values[..., tokens // 2 : tokens // 2 + 1, :] = 0
    return Atom(shape, elements.from_float32(values, case.dtype))


def round_trip(case: Case, atom: Atom) -> np.ndarray:
    payload = case.made.encode(atom, case.level)
    return case.made.decode_untrusted(memoryview(payload), atom.shape, case.level)


@every_case
@pytest.mark.parametrize("tokens", TOKENS)
def test_an_atom_comes_back_within_the_stated_error(case: Case, tokens: int) -> None:
    atom = atom_of(case, tokens)
    decoded = round_trip(case, atom)
    assert decoded.shape == atom.shape.LHPTX and decoded.dtype == np.uint8
    if case.made.lossless:
        np.testing.assert_array_equal(decoded, atom.bytes_LHPTX)
        return
    original, got = (elements.to_float32(data, case.dtype) for data in (atom.bytes_LHPTX, decoded))
    largest = np.abs(original).max(initial=0)
    assert np.abs(got - original).max(initial=0) <= case.made.error_of_max * largest


@every_case
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_payload_is_no_longer_than_declared(case: Case, tokens: int) -> None:
    atom = atom_of(case, tokens)
    assert len(case.made.encode(atom, case.level)) <= case.made.payload_bytes_max(atom.shape)


@every_case
def test_the_same_atom_gives_the_same_bytes_and_stays_as_it_was(case: Case) -> None:
    atom, twin = atom_of(case, 65), atom_of(case, 65)
    atom.bytes_LHPTX.flags.writeable = False
    first = bytes(case.made.encode(atom, case.level))
    assert first == bytes(case.made.encode(twin, case.level)) == bytes(case.made.encode(atom, case.level))
    np.testing.assert_array_equal(atom.bytes_LHPTX, twin.bytes_LHPTX)


@every_case
def test_decoding_does_not_write_into_the_payload(case: Case) -> None:
    payload = bytearray(case.made.encode(atom_of(case, 65), case.level))
    before = bytes(payload)
    case.made.decode_untrusted(memoryview(payload).toreadonly(), shape_of(case, 65), case.level)
    assert payload == before


@every_case
def test_a_block_local_codec_may_be_cut_at_its_multiple(case: Case) -> None:
    step = case.made.token_multiple
    if not case.made.block_local:
        return
    whole = atom_of(case, 2 * step + 5)
    pieces = []
    for start in range(0, 2 * step + 5, step):
        bytes_LHPTX = np.ascontiguousarray(whole.bytes_LHPTX[:, :, :, start : start + step])
        pieces.append(round_trip(case, Atom(shape_of(case, bytes_LHPTX.shape[3]), bytes_LHPTX)))
    np.testing.assert_array_equal(np.concatenate(pieces, axis=3), round_trip(case, whole))


@every_case
def test_layers_and_heads_may_be_cut_anywhere(case: Case) -> None:
    whole = atom_of(case, 70)
    cut = Atom(AtomShape(case.stream, (1, 2), (7, 77), (1, 3)), np.ascontiguousarray(whole.bytes_LHPTX[1:2, 1:3]))
    np.testing.assert_array_equal(round_trip(case, cut), round_trip(case, whole)[1:2, 1:3])


@every_case
def test_numbers_that_are_none_come_back_or_are_refused_at_the_source(case: Case) -> None:
    """Whatever happens, the far end never decodes something else than what was declared."""
    if case.dtype not in elements.DTYPES:
        return
    for bad in (np.inf, -np.inf, np.nan, np.float32(elements.LARGEST[case.dtype])):
        atom = atom_of(case, 65)
        values = elements.to_float32(atom.bytes_LHPTX, case.dtype).copy()
        values[1, 2, 0, 40, 5] = bad
        atom = Atom(atom.shape, elements.from_float32(values, case.dtype))
        name, level, payload = encode_or_raw(case.codec, atom, case.level)
        decoded = codecs.get(name)().decode_untrusted(memoryview(payload), atom.shape, level)
        if name == "raw" or case.made.lossless:
            np.testing.assert_array_equal(decoded, atom.bytes_LHPTX)
        else:
            assert np.isfinite(bad)  # a codec that takes infinities must be lossless


@every_case
def test_every_truncation_is_refused(case: Case) -> None:
    atom = atom_of(case, 3)
    payload = bytes(case.made.encode(atom, case.level))
    for end in range(len(payload)):
        with pytest.raises(FrameError):
            case.made.decode_untrusted(memoryview(payload)[:end], atom.shape, case.level)


@every_case
def test_a_thousand_mutations_are_refused_or_decode_to_the_right_shape(case: Case) -> None:
    atom = atom_of(case, 66)
    payload = bytes(case.made.encode(atom, case.level))
    dice = random.Random(5)
    for _ in range(1_000):
        mutated = bytearray(payload)
        for _ in range(dice.choice((1, 1, 4, 64))):
            mutated[dice.randrange(len(mutated))] = dice.choice((0, 0x7F, 0x80, 0xFF, dice.randrange(256)))
        mutated += dice.randbytes(dice.choice((0, 0, 0, 1, 9)))
        try:
            decoded = case.made.decode_untrusted(memoryview(mutated), atom.shape, case.level)
        except FrameError:
            continue
        assert len(mutated) == len(payload) or not case.made.lossless
        assert decoded.shape == atom.shape.LHPTX and decoded.dtype == np.uint8


@every_codec
def test_a_codec_is_for_some_dtypes_and_levels_and_says_so(name: str) -> None:
    codec = codecs.get(name)
    assert codec.dtypes <= set(ITEM_BYTES) and codec.levels and codec.token_multiple >= 1
    assert codec.paper and codec.loses and codec.composes_with
    assert (codec.error_of_max == 0) == codec.lossless
    for dtype in ITEM_BYTES:
        shape = shape_of(Case(name, dtype, "kv", 0), 16)
        if dtype not in codec.dtypes:
            with pytest.raises(FrameError, match="codec"):
                check_codec_untrusted(name, codec.levels[0], shape, 10)
            assert choose(name, [name], shape.stream) == "raw"
            assert encode_or_raw(name, atom_of(Case(name, dtype, "kv", 0), 16), codec.levels[0])[0] == "raw"
        else:
            assert choose(name, [name], shape.stream) == name
            assert check_codec_untrusted(name, codec.levels[0], shape, 10)
            with pytest.raises(FrameError, match="codec"):
                check_codec_untrusted(name, max(codec.levels) + 1, shape, 10)
            with pytest.raises(FrameError, match="length"):
                check_codec_untrusted(name, codec.levels[0], shape, codec().payload_bytes_max(shape) + 1)


@every_codec
def test_settings_survive_json(name: str) -> None:
    config = getattr(codecs.get(name), "Config", None)
    if config is not None:
        assert config(**json.loads(json.dumps(asdict(config())))) == config()


def test_what_one_end_lacks_is_sent_raw() -> None:
    stream = CASES[0].stream
    assert choose("int8", ["raw"], stream) == "raw"
    assert choose("unheard-of", ["unheard-of", "raw"], stream) == "raw"
    assert "raw" in codecs.names()


def test_unencodable_is_not_an_error_of_the_wire() -> None:
    assert not issubclass(Unencodable, FrameError)
