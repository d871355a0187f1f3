"""Identities: lossy KV has a name of its own, whatever it came through, and never that of exact KV (DESIGN 4)."""

import pytest

from kv_transfer.codecs import EXACT, RAW, RAW_ENCODING, Encoding, codecs


@pytest.mark.parametrize("name", codecs.names())
def test_only_a_lossless_codec_leaves_kv_exact(name: str) -> None:
    codec = codecs.get(name)
    assert all((Encoding(name, level).identity == EXACT) == codec.lossless for level in codec.levels)


def test_every_lossy_codec_level_and_digest_is_another_identity() -> None:
    lossy = [
        Encoding(name, level, tables) for name in ("a", "b", "a-2") for level in (0, 1, 10) for tables in (0, 1, 16)
    ]
    assert len({each.identity for each in lossy} | {EXACT}) == len(lossy) + 1


def test_an_identity_says_what_it_is_in_words() -> None:
    assert Encoding("transform", 7, 0x1A2B).identity == "transform/7@00001a2b"
    assert Encoding("int8").identity == "int8/0"


def test_what_is_not_installed_may_lose_anything() -> None:
    assert Encoding("unheard_of").identity not in (EXACT, Encoding("unheard_of", 1).identity, Encoding("int8").identity)


@pytest.mark.parametrize("encoding", [Encoding("int8"), Encoding("unheard_of", 3), Encoding("x", 7, 0xFFFF_FFFF)])
def test_an_identity_tells_its_encoding(encoding: Encoding) -> None:
    assert Encoding.of(encoding.identity) == encoding


def test_exact_kv_is_what_raw_brings() -> None:
    assert Encoding.of(Encoding(RAW).identity) == Encoding.of(EXACT) == RAW_ENCODING
