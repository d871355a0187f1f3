"""Which codec and level: both ends have it, its measured loss is within the budget, and no other sends fewer bits."""

from typing import Any

import pytest

from control_plane.router.dispatch.codec_choice import Wish, choose_encoding
from engine.base import limits
from kv_transfer.codecs import RAW_ENCODING, Encoding
from kv_transfer.offers import LevelCost, Offer, Offers

RAW = Offer("raw", costs=(LevelCost(0, 16.0, 0.0),))
INT4 = Offer("int4", costs=(LevelCost(0, 4.5, 0.0085),))
TRANSFORM = Offer(
    "transform", 0x1A2B, 2, (LevelCost(2, 3.0, 0.002), LevelCost(5, 2.3, 0.0076), LevelCost(7, 1.9, 0.0128))
)
UNMEASURED = Offer("unmeasured", 7, 3)


def offered(*offers: Offer) -> Offers:
    return {offer.codec: offer for offer in (RAW, *offers)}


ALL = offered(INT4, TRANSFORM, UNMEASURED)


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        (Wish("raw"), RAW_ENCODING),
        (Wish("transform"), Encoding("transform", 5, 0x1A2B)),  # the budget is 0.01 where nothing is said
        (Wish("transform", 0.003), Encoding("transform", 2, 0x1A2B)),
        (Wish("transform", 0.0128), Encoding("transform", 7, 0x1A2B)),
        (Wish("transform", 0.001), RAW_ENCODING),
        (Wish("transform", 0.0), RAW_ENCODING),
        (Wish("int4", 1.0), Encoding("int4")),
        (Wish("auto"), Encoding("transform", 5, 0x1A2B)),
        (Wish("auto", 0.0), RAW_ENCODING),
        (Wish("unmeasured"), Encoding("unmeasured", 3, 7)),  # named: its least lossy level
        (Wish("unmeasured", 1.0), RAW_ENCODING),  # a budget that nobody knows to be kept
        (Wish("unheard_of"), RAW_ENCODING),
    ],
)
def test_the_fewest_bits_within_the_budget(wish: Wish, expected: Encoding) -> None:
    assert limits.KL_BUDGET == 0.01
    assert choose_encoding(wish, ALL, ALL) == expected


def test_auto_takes_the_codec_that_both_ends_have() -> None:
    assert choose_encoding(Wish("auto"), ALL, offered(INT4)) == Encoding("int4")
    assert choose_encoding(Wish("auto"), offered(INT4), ALL) == Encoding("int4")
    assert choose_encoding(Wish("auto"), ALL, offered()) == RAW_ENCODING


@pytest.mark.parametrize("name", ["transform", "unmeasured"])
def test_tables_of_another_digest_are_another_codec(name: str) -> None:
    other = offered(Offer(name, 99, 2, ALL[name].costs))
    assert choose_encoding(Wish(name), ALL, other) == RAW_ENCODING
    assert choose_encoding(Wish(name), other, other).tables == 99


def test_a_worker_that_offers_nothing_is_sent_raw() -> None:
    for source, target in (({}, ALL), (ALL, {}), ({}, {})):
        assert choose_encoding(Wish("transform"), source, target) == RAW_ENCODING


def test_what_one_end_has_measured_is_known() -> None:
    unmeasured = offered(Offer("int4"))
    for source, target in ((ALL, unmeasured), (unmeasured, ALL)):
        assert choose_encoding(Wish("int4", 0.01), source, target) == Encoding("int4")
        assert choose_encoding(Wish("int4", 0.001), source, target) == RAW_ENCODING


def test_of_equal_bits_the_smaller_loss() -> None:
    twice = offered(Offer("a", costs=(LevelCost(0, 4.0, 0.009),)), Offer("b", costs=(LevelCost(0, 4.0, 0.001),)))
    assert choose_encoding(Wish("auto"), twice, twice) == Encoding("b")


@pytest.mark.parametrize(
    ("request_says", "expected"),
    [
        ({}, Wish("transform", 0.003)),
        ({"codec": "auto"}, Wish("auto", 0.003)),
        ({"kl_budget": 0.0}, Wish("transform", 0.0)),  # 0 is a budget
    ],
)
def test_what_is_not_said_is_the_deployments(request_says: dict[str, Any], expected: Wish) -> None:
    assert Wish(**request_says).or_else(Wish("transform", 0.003)) == expected
