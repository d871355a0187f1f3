"""Thresholds move with what is left; nobody is shut out; sums are right whatever happens."""

from collections import Counter
from random import Random

import pytest

from control_plane.router.shares import Shares


def fill(shares: Shares, *tenants: str) -> None:
    """Each takes one at a time, in turn, for as long as it may."""
    while any([_take_one(shares, tenant) for tenant in tenants]):
        pass


def _take_one(shares: Shares, tenant: str) -> bool:
    allowed = shares.fits(1) and shares.allows(tenant, 1)
    if allowed:
        shares.take(tenant, 1)
    return allowed


@pytest.mark.parametrize("alpha", [1, 2, 4])
@pytest.mark.parametrize("floods", [1, 2, 5])
def test_floods_leave_what_the_paper_says(alpha: int, floods: int) -> None:
    """Choudhury and Hahne: capacity / (1 + n * alpha) stays free, and each has alpha times that."""
    shares = Shares(10_000, tenants=9, alpha=alpha)
    fill(shares, *(f"flood {index}" for index in range(floods)))
    free = 10_000 / (1 + floods * alpha)
    assert shares.capacity - shares.total == pytest.approx(free, abs=floods)
    assert shares.held("flood 0") == pytest.approx(alpha * free, abs=alpha * floods)


def test_a_newcomer_gets_what_a_flood_had_to_leave() -> None:
    shares = Shares(100, tenants=2, alpha=4)
    fill(shares, "red")
    assert (shares.held("red"), shares.fits(20), shares.allows("blue", 20)) == (80, True, True)
    fill(shares, "blue")
    assert shares.held("blue") > 0 and not shares.allows("red", 1)


def test_one_tenant_may_have_everything() -> None:
    shares = Shares(100, tenants=1)
    fill(shares, "")
    assert shares.total == 100


def test_who_holds_nothing_is_allowed_one_thing_however_large() -> None:
    shares = Shares(10, tenants=3)
    shares.take("red", 10)
    assert shares.allows("blue", 500) and not shares.fits(1)


def test_capacity_that_goes_takes_nothing_away() -> None:
    shares = Shares(100, tenants=2)
    shares.take("red", 60)
    shares.capacity = 20
    assert (shares.held("red"), shares.allows("red", 1), shares.fits(1)) == (60, False, False)
    shares.give("red", 60)
    assert shares.allows("red", 16)


@pytest.mark.parametrize("seed", range(20))
def test_sums_are_right_after_anything(seed: int) -> None:
    random, shares = Random(seed), Shares(1_000, tenants=4)
    held: Counter[str] = Counter()
    for _ in range(500):
        tenant = random.choice("abcd")
        amount = random.randint(0, 50)
        if random.random() < 0.5:
            shares.take(tenant, amount)
            held[tenant] += amount
        else:
            amount = min(amount, held[tenant])
            shares.give(tenant, amount)
            held[tenant] -= amount
        assert shares.total == held.total()
        assert all(shares.held(each) == held[each] for each in "abcd")
    for tenant in "abcd":
        shares.give(tenant, held[tenant])
    assert (shares.total, shares._held) == (0, Counter())
