"""LinkKeeper: pings when idle, losses when silent, and no accusation by a host that itself was asleep."""

import pytest

from engine.base.keepalive import LinkKeeper

MS = 1000
CONFIG = LinkKeeper.Config(interval_ms=1000, silence_ms=3000)


def keeper_with(*links: str) -> LinkKeeper:
    keeper = LinkKeeper(CONFIG)
    for link in links:
        keeper.opened(link, 0)
    return keeper


def live(keeper: LinkKeeper, from_us: int, to_us: int, late_us: int = 0) -> list[tuple[int, list[str], list[str]]]:
    """Poll at every deadline in the range, each `late_us` after it; what each poll said."""
    polls = []
    while (deadline_us := keeper.next_deadline_us) is not None and from_us <= deadline_us + late_us <= to_us:
        pings, lost = keeper.poll(deadline_us + late_us)
        polls.append((deadline_us + late_us, pings, lost))
        for link in lost:
            keeper.lost(link)
    return polls


def test_nothing_to_do_without_links() -> None:
    keeper = keeper_with()
    assert keeper.next_deadline_us is None and keeper.poll(10_000 * MS) == ([], [])


def test_an_idle_link_is_pinged_every_interval_until_it_is_silent() -> None:
    polls = live(keeper_with("a"), 0, 10_000 * MS)
    assert polls == [(1000 * MS, ["a"], []), (2000 * MS, ["a"], []), (3000 * MS, [], ["a"])]


def test_a_lost_link_is_declared_once() -> None:
    keeper = keeper_with("a", "b")
    keeper.note_received("b", 2500 * MS)
    live(keeper, 0, 2500 * MS)
    assert keeper.poll(3000 * MS) == (["b"], ["a"])
    assert keeper.poll(3250 * MS) == ([], [])


def test_traffic_sent_replaces_pings() -> None:
    keeper = keeper_with("a")
    keeper.note_sent("a", 900 * MS)
    assert keeper.poll(1000 * MS) == ([], [])
    assert keeper.next_deadline_us == 1900 * MS


def test_anything_received_is_a_sign_of_life() -> None:
    keeper = keeper_with("a")
    for second in range(1, 60):
        keeper.note_received("a", second * 1000 * MS)
        assert live(keeper, 0, second * 1000 * MS + 500 * MS)[-1][2] == []


def test_polls_of_many_links_coalesce() -> None:
    keeper = LinkKeeper(CONFIG)
    for index in range(1000):
        keeper.opened(f"link {index}", index * MS)
    polls = live(keeper, 0, 2999 * MS)
    assert len(polls) <= 9, "four scans a second"
    assert sum(len(pings) for _, pings, _ in polls) >= 1000


def test_a_host_that_overslept_accuses_nobody_before_it_has_read() -> None:
    keeper = keeper_with("alive", "dead")
    woken_us = 30_000 * MS
    assert keeper.poll(woken_us) == (["alive", "dead"], [])
    keeper.note_received("alive", woken_us + MS)
    later = live(keeper, woken_us, woken_us + 2000 * MS)
    assert [lost for _, _, lost in later if lost] == [["dead"]]
    assert later[0][0] == woken_us + 1000 * MS, "one interval of grace, no more"


def test_a_host_that_is_always_late_still_finds_its_dead() -> None:
    polls = live(keeper_with("dead"), 0, 60_000 * MS, late_us=900 * MS)
    lost_at_us = next(at_us for at_us, _, lost in polls if lost)
    assert lost_at_us <= 6000 * MS


@pytest.mark.parametrize("begins_ms", range(5000, 6250, 50))
def test_a_frozen_host_never_loses_a_peer_that_kept_talking(begins_ms: int) -> None:
    """Whenever the freeze begins and however long it lasts, with a peer whose pings are as late as they may be."""
    for lasts_ms in range(100, 8000, 50):
        keeper = keeper_with("a")
        for heard_ms in range(50, begins_ms, 1250):
            live(keeper, 0, heard_ms * MS)
            keeper.note_received("a", heard_ms * MS)
        live(keeper, 0, begins_ms * MS)
        woken_us = max((begins_ms + lasts_ms) * MS, keeper.next_deadline_us or 0)
        assert keeper.poll(woken_us)[1] == [], lasts_ms


def test_a_reopened_name_starts_afresh() -> None:
    keeper = keeper_with("a")
    live(keeper, 0, 2000 * MS)
    keeper.lost("a")
    assert keeper.next_deadline_us is None
    keeper.opened("a", 2900 * MS)
    assert keeper.next_deadline_us == 3900 * MS
    assert live(keeper, 0, 4000 * MS) == [(3900 * MS, ["a"], [])]


@pytest.mark.parametrize(("interval_ms", "silence_ms"), [(0, 3000), (1000, 2999), (-1, 0)])
def test_a_silence_too_short_to_tell_sleep_from_death_is_refused(interval_ms: int, silence_ms: int) -> None:
    with pytest.raises(ValueError, match="silence_ms >= 3"):
        LinkKeeper.Config(interval_ms=interval_ms, silence_ms=silence_ms)
