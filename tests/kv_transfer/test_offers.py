"""Offers: what a worker has and what is known of it, no more than anybody would read."""

import numpy as np
import pytest

from engine.base import limits
from engine.kv.schema import Stream
from kv_transfer.codecs import CodecSet, Encoding
from kv_transfer.offers import LevelCost, Offer, offers_of
from kv_transfer.profile import Point, Profile, Tables

KV = Stream(name="kv", layers=3, heads=2, head_dim=16, dtype="bfloat16")


def point(level: int, bits: float = 8.5, kl: float = 0.0001) -> Point:
    return Point(level=level, bits_per_element=bits, kl=kl, ppl_change=0, encode_mb_s=1, decode_mb_s=1)


def offer(name: str, profile: Profile | None = None, stream: Stream = KV) -> Offer | None:
    return next((each for each in offers_of(CodecSet(stream, profile)) if each.codec == name), None)


def test_raw_costs_what_a_number_has_and_loses_nothing() -> None:
    assert offer("raw") == Offer("raw", 0, 0, (LevelCost(0, 16, 0.0),))
    float32 = Stream(name="kv", layers=3, heads=2, head_dim=16, dtype="float32")
    assert offer("raw", stream=float32) == Offer("raw", 0, 0, (LevelCost(0, 32, 0.0),))


def test_without_a_profile_nothing_is_known_of_a_codec() -> None:
    int8 = offer("int8")
    assert int8 == Offer("int8") and int8.least_lossy == Encoding("int8")


def test_a_profile_says_what_levels_cost_that_there_are() -> None:
    profile = Profile(model="m", curves={"int8": (point(0), point(99)), "raw": (point(0, kl=3.0),)})
    assert offer("int8", profile) == Offer("int8", costs=(LevelCost(0, 8.5, 0.0001),))
    assert offer("raw", profile) == offer("raw")


def test_a_codec_for_other_numbers_is_not_offered() -> None:
    bytes_only = Stream(name="kv", layers=3, heads=2, head_dim=16, dtype="uint8")
    assert offer("int8", stream=bytes_only) is None


def test_as_many_as_anybody_would_read(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = Profile(model="m", curves={"int8": [point(0)] * (limits.CODEC_LEVELS_MAX + 1)})
    int8 = offer("int8", profile)
    assert int8 is not None and len(int8.costs) == limits.CODEC_LEVELS_MAX
    monkeypatch.setattr(limits, "CODEC_OFFERS_MAX", 1)
    assert len(offers_of(CodecSet(KV))) == 1


def test_tables_are_offered_by_their_digest() -> None:
    assert Tables({"a": np.zeros(3)}).digest != Tables({"a": np.ones(3)}).digest
    assert Offer("x", 7, 2).at(5) == Encoding("x", 5, 7)
