"""How the quality bench judges: levels by the profile, losses by what was measured here."""

import pytest

from bench.quality import BEST, BUDGET_BARS, _budget_kept, _fewest_bits, fewest
from kv_transfer.profile import Kind, Point, Profile


def point(level: int, bits: float, kl: float) -> Point:
    kind = Kind(bits_per_element=bits, kl=kl, ppl_change=0.0)
    return Point(
        level=level, bits_per_element=bits, kl=kl, ppl_change=0.0, encode_mb_s=1.0, decode_mb_s=1.0, kinds={"k": kind}
    )


KNOWN = {"a": [point(0, 4.0, 0.001), point(1, 3.0, 0.008), point(2, 2.0, 0.02)], "b": [point(0, 8.0, 0.0)]}
HERE = {"a": [point(0, 4.1, 0.001), point(1, 3.1, 0.011), point(2, 2.1, 0.02)], "b": [point(0, 8.1, 0.0)]}
HARMLESS = {"a": [point(0, 4.1, 0.001), point(1, 3.1, 0.004), point(2, 2.1, 0.009)], "b": [point(0, 8.1, 0.0)]}
PROFILE = Profile(model="m", curves=KNOWN)


def test_the_profile_chooses_and_this_text_judges() -> None:
    figure = _budget_kept(PROFILE, HERE, 0.01, BUDGET_BARS[1], 3)
    assert figure.notes["level"] == "a 1"
    assert figure.value == pytest.approx(1.1) and figure.passed
    assert figure.notes["caution_bits"] == pytest.approx(3.1 - 4.1), "less than nothing: the budget was not kept"


def test_caution_is_what_the_level_that_just_fits_would_have_saved() -> None:
    figure = _budget_kept(PROFILE, HARMLESS, 0.01, BUDGET_BARS[1], 3)
    assert figure.value == pytest.approx(0.4)
    assert figure.notes["caution_bits"] == pytest.approx(3.1 - 2.1)


def test_a_budget_that_nothing_fits_is_kept_raw() -> None:
    figure = _budget_kept(Profile(model="m"), HERE, 0.01, BUDGET_BARS[1], 3)
    assert figure.value == 0 and figure.notes == {"level": "raw"}


def test_the_fewest_bits_are_those_of_a_level_that_fits() -> None:
    (best,) = [figure for figure in _fewest_bits(HERE, 3) if figure.bar is BEST]
    assert best.value == 4.1 and best.notes["level"] == "a 0"
    assert fewest(HERE, 0.05, {"b"}) is not None
    assert fewest(HERE, 0.0001, {"a"}) is None


def test_a_level_that_breaks_its_budget_is_a_miss_though_no_other_keeps_it() -> None:
    worse = {"a": [point(0, 4.1, 0.02), point(1, 3.1, 0.03), point(2, 2.1, 0.05)]}
    figure = _budget_kept(Profile(model="m", curves={"a": KNOWN["a"]}), worse, 0.01, BUDGET_BARS[1], 3)
    assert figure.value == pytest.approx(3.0) and not figure.passed


def test_a_codec_that_keeps_no_budget_costs_what_raw_costs() -> None:
    figures = _fewest_bits({"a": [point(0, 4.1, 0.02)]}, 3)
    assert [figure.value for figure in figures] == [16.0, 16.0]
    assert not any(figure.passed for figure in figures)
