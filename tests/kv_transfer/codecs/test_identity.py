"""Identities: lossy KV has a name of its own, whatever it came through, and never that of exact KV (DESIGN 4)."""

import pytest

from kv_transfer.codecs import EXACT, RAW, codec_of, codecs, identity_of


@pytest.mark.parametrize("name", codecs.names())
def test_only_a_lossless_codec_leaves_kv_exact(name: str) -> None:
    codec = codecs.get(name)
    assert all((identity_of(name, level) == EXACT) == codec.lossless for level in codec.levels)


def test_every_lossy_codec_and_level_is_another_identity() -> None:
    lossy = [(name, level) for name in ("int8", "int4", "int8-2") for level in (0, 1, 10)]
    assert len({identity_of(*codec) for codec in lossy} | {EXACT}) == len(lossy) + 1


def test_what_is_not_installed_may_lose_anything() -> None:
    assert identity_of("unheard_of", 0) not in (EXACT, identity_of("unheard_of", 1), identity_of("int8", 0))


@pytest.mark.parametrize("codec", [("int8", 0), ("unheard_of", 3)])
def test_an_identity_tells_its_codec(codec: tuple[str, int]) -> None:
    assert codec_of(identity_of(*codec)) == codec


def test_exact_kv_is_what_raw_brings() -> None:
    assert codec_of(identity_of(RAW, 0)) == codec_of(EXACT) == (RAW, 0)
