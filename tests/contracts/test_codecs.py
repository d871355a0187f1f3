"""What every registered codec promises. A new codec is in here by existing; its own test adds its paper's claim.

Codecs with tables are calibrated to synthetic KV. Of many levels three are tried: the first, the middle and the last.
"""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from engine.base.errors import FrameError, InvalidArgument
from engine.kv.arena import Range
from engine.kv.schema import ITEM_BYTES, Stream
from kv_transfer import profile as profiles
from kv_transfer.codecs import RAW, Atom, AtomShape, Codec, CodecSet, Unencodable, codecs, elements
from kv_transfer.profile import Profile, Tables
from tests.kv_transfer.codecs import synthetic

pytestmark = pytest.mark.timeout(120)  # whoever is first calibrates a codec and compiles its kernels
STREAM = Stream(name="kv", layers=2, heads=3, head_dim=16, dtype="bfloat16")
TOKENS = (0, 1, 2, 5, 63, 64, 65, 200)
STARTS = (0, 3, 7, 64, 100_000)


@dataclass(frozen=True)
class Case:
    codec: str
    dtype: str
    level: int

    @property
    def stream(self) -> Stream:
        return replace(STREAM, dtype=self.dtype)

    @property
    def codecs(self) -> CodecSet:
        return synthetic.codec_set(self.stream)

    @property
    def made(self) -> Codec:
        return self.codecs.get(self.codec)


def levels(codec: type[Codec], dtype: str) -> list[int]:
    """Of dtypes that models rarely serve in, one."""
    count = len(codec.levels)
    picked = {0, count // 2, count - 1} if dtype == STREAM.dtype else {count // 2}
    return [codec.levels[index] for index in sorted(picked)]


def all_cases() -> Iterator[Case]:
    for name in codecs.names():
        for dtype in sorted(codecs.get(name).dtypes):
            yield from (Case(name, dtype, level) for level in levels(codecs.get(name), dtype))


every_case = pytest.mark.parametrize(
    "case", list(all_cases()), ids=lambda case: "-".join(map(str, asdict(case).values()))
)
every_codec = pytest.mark.parametrize("name", codecs.names())
every_profiled_codec = pytest.mark.parametrize("name", [name for name in codecs.names() if codecs.get(name).profiled])


# -- atoms -------------------------------------------------------------------------------------------------------------
def natural(case: Case, tokens: int, start: int = 7) -> Atom:
    """As a model would fill it."""
    if case.dtype in elements.DTYPES:
        return synthetic.atom(case.stream, start, tokens)
    shape = AtomShape(case.stream, (0, STREAM.layers), (start, start + tokens), (0, STREAM.heads))
    return Atom(shape, np.random.default_rng(0).integers(0, 256, shape.LHPTX, dtype=np.uint8))


def strange(case: Case, tokens: int, start: int = 7) -> Atom:
    """Numbers of very different sizes: a loud channel, a faint head, tokens of zeros, a part of zeros."""
    atom = natural(case, tokens, start)
    if case.dtype not in elements.DTYPES:
        return atom
    values_LHPTD = elements.to_float32(atom.bytes_LHPTX, case.dtype).copy()
    values_LHPTD[..., 3] *= 30
    values_LHPTD[:, 0] *= 1e-3
    values_LHPTD[..., tokens // 2 : tokens // 2 + 1, :] = 0
    values_LHPTD[1, 2, 0] = 0
    return Atom(atom.shape, elements.from_float32(values_LHPTD, case.dtype))


def cut(atom: Atom, *, layers: Range | None = None, heads: Range | None = None, tokens: Range | None = None) -> Atom:
    """Some of an atom; tokens are counted from its first."""
    shape, start = atom.shape, atom.shape.tokens[0]
    layers, heads, tokens = layers or shape.layers, heads or shape.heads, tokens or (0, shape.tokens[1] - start)
    bytes_LHPTX = atom.bytes_LHPTX[slice(*layers), slice(*heads), :, slice(*tokens)]
    cut_shape = replace(shape, layers=layers, heads=heads, tokens=(start + tokens[0], start + tokens[1]))
    return Atom(cut_shape, np.ascontiguousarray(bytes_LHPTX))


def encode(case: Case, atom: Atom) -> bytes:
    return bytes(case.made.encode(atom, case.level))


def decode(case: Case, payload: bytes, shape: AtomShape) -> np.ndarray:
    return case.made.decode_untrusted(memoryview(payload), shape, case.level)


def round_trip(case: Case, atom: Atom) -> np.ndarray:
    return decode(case, encode(case, atom), atom.shape)


def expect_kept(case: Case, atom: Atom, decoded: np.ndarray) -> None:
    """Within the codec's own bound, and exactly if it says that it loses nothing."""
    assert decoded.shape == atom.shape.LHPTX and decoded.dtype == np.uint8
    if case.made.lossless:
        np.testing.assert_array_equal(decoded, atom.bytes_LHPTX)
        return
    original, got = (elements.to_float32(data, case.dtype) for data in (atom.bytes_LHPTX, decoded))
    largest = float(np.abs(original).max(initial=0))
    error = float(np.abs(got - original).max(initial=0))
    assert error <= case.made.error_bound(atom.shape, case.level, largest)


def expect_kept_or_raw(case: Case, atom: Atom) -> None:
    """As a job does it: what the codec cannot promise for travels raw."""
    name, level, payload = case.codecs.encode_or_raw(case.codec, atom, case.level)
    decoded = case.codecs.get(name).decode_untrusted(memoryview(bytes(payload)), atom.shape, level)
    expect_kept(Case(name, case.dtype, level), atom, decoded)


# -- a round trip ------------------------------------------------------------------------------------------------------
@every_case
@pytest.mark.parametrize("tokens", TOKENS)
def test_an_atom_comes_back_within_the_stated_error(case: Case, tokens: int) -> None:
    atom = natural(case, tokens)
    expect_kept(case, atom, round_trip(case, atom))
    expect_kept_or_raw(case, strange(case, tokens))


@every_case
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("tokens", [1, 5, 64, 67])
def test_an_atom_may_stand_anywhere_in_a_sequence(case: Case, start: int, tokens: int) -> None:
    atom = natural(case, tokens, start)
    expect_kept(case, atom, round_trip(case, atom))
    expect_kept_or_raw(case, strange(case, tokens, start))


@every_case
def test_a_bound_is_worth_something(case: Case) -> None:
    """Numbers a hundred times smaller may not be off by as much; and no codec bounds its error by more than it sees."""
    shape = natural(case, 64).shape
    bound = case.made.error_bound(shape, case.level, 1.0)
    assert (bound == 0) == case.made.lossless
    if not case.made.profiled:  # with tables, a bound may be of steps that are what they are
        assert bound <= 2
    assert case.made.error_bound(shape, case.level, 0.01) <= bound


@every_case
def test_a_payload_is_no_longer_than_declared_and_shorter_than_raw(case: Case) -> None:
    for tokens in TOKENS:
        atom = natural(case, tokens)
        assert len(encode(case, atom)) <= case.made.payload_bytes_max(atom.shape)
    atom = natural(case, 128)
    assert case.made.lossless or len(encode(case, atom)) < 0.8 * atom.shape.raw_bytes


@every_case
def test_the_same_atom_gives_the_same_bytes_and_stays_as_it_was(case: Case) -> None:
    atom, twin = natural(case, 65), natural(case, 65)
    atom.bytes_LHPTX.flags.writeable = False
    assert encode(case, atom) == encode(case, twin) == encode(case, atom)
    np.testing.assert_array_equal(atom.bytes_LHPTX, twin.bytes_LHPTX)


@every_case
def test_decoding_does_not_write_into_the_payload(case: Case) -> None:
    atom = natural(case, 65)
    payload = bytearray(encode(case, atom))
    before = bytes(payload)
    case.made.decode_untrusted(memoryview(payload).toreadonly(), atom.shape, case.level)
    assert payload == before


@every_case
def test_payloads_are_decoded_alone_and_in_any_order(case: Case) -> None:
    atoms = [natural(case, tokens, start) for start, tokens in ((0, 64), (64, 9), (640, 65))]
    payloads = [encode(case, atom) for atom in atoms]
    expected = [decode(case, payload, atom.shape) for payload, atom in zip(payloads, atoms, strict=True)]
    for index in (2, 0, 1, 1, 2, 0):
        np.testing.assert_array_equal(decode(case, payloads[index], atoms[index].shape), expected[index])


@every_case
def test_a_payload_may_lie_at_any_address(case: Case) -> None:
    atom = natural(case, 65)
    payload = encode(case, atom)
    expected = decode(case, payload, atom.shape)
    for offset in (1, 2, 3, 5):
        moved = memoryview(bytes(offset) + payload)[offset:]
        np.testing.assert_array_equal(case.made.decode_untrusted(moved, atom.shape, case.level), expected)


# -- cuts --------------------------------------------------------------------------------------------------------------
@every_case
@pytest.mark.parametrize("start", [0, 2, 7, 64])
def test_a_block_local_codec_may_be_cut_at_its_multiple(case: Case, start: int) -> None:
    if not case.made.block_local:
        return
    step = case.made.token_multiple
    whole = natural(case, 2 * step + 5, start)
    pieces = [cut(whole, tokens=tokens) for tokens in ((0, step), (step, 2 * step), (2 * step, 2 * step + 5))]
    together = np.concatenate([round_trip(case, piece) for piece in pieces], axis=3)
    np.testing.assert_array_equal(together, round_trip(case, whole))


@every_case
def test_layers_may_be_cut_if_the_codec_says_so(case: Case) -> None:
    whole = natural(case, 70)
    for layer in range(STREAM.layers):
        piece = cut(whole, layers=(layer, layer + 1))
        decoded = round_trip(case, piece)
        expect_kept(case, piece, decoded)
        if case.made.cuts_layers:
            np.testing.assert_array_equal(decoded, round_trip(case, whole)[layer : layer + 1])


@every_case
def test_heads_may_be_cut_if_the_codec_says_so_or_travel_raw(case: Case) -> None:
    whole = natural(case, 70)
    piece = cut(whole, layers=(1, 2), heads=(1, 3))
    if case.made.cuts_heads:
        np.testing.assert_array_equal(round_trip(case, piece), round_trip(case, whole)[1:2, 1:3])
        return
    with pytest.raises(Unencodable):
        case.made.encode(piece, case.level)
    expect_kept_or_raw(case, piece)
    for payload in (encode(case, whole), encode(case, cut(whole, layers=(1, 2))), bytes(64)):
        with pytest.raises(FrameError):
            decode(case, payload, piece.shape)


# -- numbers that are none ---------------------------------------------------------------------------------------------
@every_case
@pytest.mark.parametrize("token", [0, 40, 64])
@pytest.mark.parametrize("part", [0, 1])
def test_numbers_that_are_none_come_back_or_are_refused_at_the_source(case: Case, part: int, token: int) -> None:
    """Whatever happens, the far end never decodes something else than what was declared."""
    if case.dtype not in elements.DTYPES:
        return
    for bad in (np.inf, -np.inf, np.nan, elements.LARGEST[case.dtype], -elements.LARGEST[case.dtype]):
        atom = natural(case, 65, start=0)
        values_LHPTD = elements.to_float32(atom.bytes_LHPTX, case.dtype).copy()
        values_LHPTD[1, 2, part, token, 5] = bad
        atom = Atom(atom.shape, elements.from_float32(values_LHPTD, case.dtype))
        if not (case.made.lossless or np.isfinite(bad)):
            with pytest.raises(Unencodable):
                case.made.encode(atom, case.level)
        expect_kept_or_raw(case, atom)


@every_case
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-41, 1e4])
def test_atoms_of_any_size_come_back_or_travel_raw(case: Case, scale: float) -> None:
    """All zeros, all but zeros, all large: no division by a scale that is none."""
    if case.dtype not in elements.DTYPES:
        return
    atom = natural(case, 65)
    values_LHPTD = elements.to_float32(atom.bytes_LHPTX, case.dtype) * np.float32(scale)
    expect_kept_or_raw(case, Atom(atom.shape, elements.from_float32(values_LHPTD, case.dtype)))


@every_case
def test_zeros_come_back_as_zeros(case: Case) -> None:
    atom = natural(case, 65)
    zeros = Atom(atom.shape, np.zeros_like(atom.bytes_LHPTX))
    name, level, payload = case.codecs.encode_or_raw(case.codec, zeros, case.level)
    decoded = case.codecs.get(name).decode_untrusted(memoryview(payload), zeros.shape, level)
    if case.dtype not in elements.DTYPES or not codecs.get(name).profiled:
        assert not decoded.any()


# -- what comes over the wire ------------------------------------------------------------------------------------------
@every_case
def test_every_truncation_is_refused(case: Case) -> None:
    atom = natural(case, 3)
    payload = encode(case, atom)
    for end in range(len(payload)):
        with pytest.raises(FrameError):
            decode(case, payload[:end], atom.shape)


@every_case
def test_a_payload_of_another_shape_is_refused_or_decodes_to_the_shape_asked_for(case: Case) -> None:
    payload = encode(case, natural(case, 64))
    for tokens, start in ((0, 7), (1, 7), (63, 7), (65, 7), (64, 0), (1_000, 7)):
        shape = natural(case, tokens, start).shape
        try:
            assert decode(case, payload, shape).shape == shape.LHPTX
        except FrameError:
            continue


@every_case
def test_five_hundred_mutations_are_refused_or_decode_to_finite_numbers(case: Case) -> None:
    atom = natural(case, 66, start=2)
    payload = encode(case, atom)
    dice = random.Random(5)
    for _ in range(500):
        mutated = bytearray(payload)
        for _ in range(dice.choice((1, 1, 4, 64))):
            mutated[dice.randrange(len(mutated))] = dice.choice((0, 0x7F, 0x80, 0xFF, dice.randrange(256)))
        mutated += dice.randbytes(dice.choice((0, 0, 0, 1, 9)))
        try:
            decoded = decode(case, bytes(mutated), atom.shape)
        except FrameError:
            continue
        assert len(mutated) == len(payload) or not case.made.lossless
        assert decoded.shape == atom.shape.LHPTX and decoded.dtype == np.uint8
        if not case.made.lossless:
            assert np.isfinite(elements.to_float32(decoded, case.dtype)).all()


# -- the set -----------------------------------------------------------------------------------------------------------
@every_codec
def test_a_codec_says_what_it_is(name: str) -> None:
    codec = codecs.get(name)
    assert codec.paper and codec.loses and codec.composes_with
    assert codec.dtypes <= set(ITEM_BYTES) and codec.token_multiple >= 1
    assert codec.levels and len(set(codec.levels)) == len(codec.levels)


@every_codec
@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_frames_are_checked_for_codec_level_tables_and_length(name: str, dtype: str) -> None:
    kind, case = codecs.get(name), Case(name, dtype, codecs.get(name).levels[0])
    shape = natural(case, 16).shape
    if dtype not in kind.dtypes:
        assert name not in case.codecs.names()
        with pytest.raises(FrameError, match="codec"):
            case.codecs.check_untrusted(name, case.level, 0, shape, 10)
        assert case.codecs.encode_or_raw(name, natural(case, 16), case.level)[0] == RAW
        return
    digest, longest = case.codecs.digest(name), case.made.payload_bytes_max(shape)
    assert (digest != 0) == kind.profiled
    assert case.codecs.check_untrusted(name, case.level, digest, shape, longest) is case.made
    for level, tables in ((max(kind.levels) + 1, digest), (-1, digest), (case.level, digest ^ 1)):
        with pytest.raises(FrameError, match="codec"):
            case.codecs.check_untrusted(name, level, tables, shape, 10)
    with pytest.raises(FrameError, match="length"):
        case.codecs.check_untrusted(name, case.level, digest, shape, longest + 1)


@every_codec
def test_what_a_worker_lacks_is_sent_raw_and_refused(name: str) -> None:
    """No profile, no tables: codecs that need them are not offered."""
    kind, atom, bare = codecs.get(name), natural(Case(name, STREAM.dtype, 0), 128), CodecSet(STREAM)
    assert (name in bare.names()) == (not kind.profiled)
    if kind.profiled:
        assert bare.encode_or_raw(name, atom, kind.levels[0])[:2] == (RAW, 0)
        with pytest.raises(FrameError, match="codec"):
            bare.check_untrusted(name, kind.levels[0], synthetic.tables(name, STREAM).digest, atom.shape, 10)


def test_raw_is_always_there_and_unencodable_is_no_error_of_the_wire() -> None:
    assert RAW in CodecSet(replace(STREAM, dtype="uint8")).names()
    assert CodecSet(STREAM).encode_or_raw("unheard-of", natural(Case(RAW, STREAM.dtype, 0), 1), 3)[:2] == (RAW, 0)
    assert not issubclass(Unencodable, FrameError)


@every_codec
def test_other_streams_than_keys_and_values_are_taken_or_refused_at_the_start(name: str) -> None:
    """One part, no keys. A codec whose tables are for keys and values says so before any frame."""
    stream = replace(STREAM, name="latent", role="latent", parts=1)
    kind = codecs.get(name)
    try:
        made = kind(synthetic.tables(name, STREAM), stream) if kind.profiled else kind()  # type: ignore[call-arg]
    except InvalidArgument:
        assert kind.profiled
        return
    shape = AtomShape(stream, (0, STREAM.layers), (0, 65), (0, STREAM.heads))
    values_LHPTD = np.random.default_rng(0).standard_normal((*shape.LHPTX[:-1], STREAM.head_dim)).astype(np.float32)
    atom = Atom(shape, elements.from_float32(values_LHPTD, stream.dtype))
    try:
        payload = made.encode(atom, kind.levels[0])
    except Unencodable:
        assert kind.profiled
        return
    got = elements.to_float32(made.decode_untrusted(memoryview(payload), shape, kind.levels[0]), stream.dtype)
    error = np.abs(got - elements.to_float32(atom.bytes_LHPTX, stream.dtype)).max()
    assert error <= made.error_bound(shape, kind.levels[0], float(np.abs(values_LHPTD).max()))


# -- tables ------------------------------------------------------------------------------------------------------------
@every_profiled_codec
def test_calibrating_is_deterministic_and_other_texts_give_other_tables(name: str) -> None:
    first = synthetic.tables(name, STREAM)
    again: Tables = codecs.get(name).calibrate(synthetic.calibration(STREAM))  # type: ignore[attr-defined]
    assert again.digest == first.digest
    assert synthetic.tables(name, STREAM, seed=1_000).digest != first.digest


@every_profiled_codec
def test_tables_come_back_from_the_profile_file(name: str, tmp_path: Path) -> None:
    tables, path = synthetic.tables(name, STREAM), tmp_path / "profile.safetensors"
    profiles.save(Profile(model="synthetic", tables={name: tables}), path)
    loaded = CodecSet(STREAM, profiles.load(path))
    assert loaded.digest(name) == tables.digest
    case = Case(name, STREAM.dtype, codecs.get(name).levels[0])
    atom = natural(case, 70)
    assert bytes(loaded.get(name).encode(atom, case.level)) == encode(case, atom)


@every_profiled_codec
def test_tables_of_another_stream_are_refused(name: str) -> None:
    """A model with more layers, heads or channels than the tables are for."""
    tables = synthetic.tables(name, STREAM)
    for other in (replace(STREAM, layers=3), replace(STREAM, heads=2), replace(STREAM, head_dim=32)):
        with pytest.raises(InvalidArgument):
            CodecSet(other, Profile(model="synthetic", tables={name: tables}))
