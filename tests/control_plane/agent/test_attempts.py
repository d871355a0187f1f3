"""AttemptTable: three ways to find an attempt, which must agree whatever happens to it."""

import pytest

from control_plane.agent.attempts import Attempt, AttemptTable


@pytest.fixture
def table() -> AttemptTable:
    return AttemptTable()


def add(table: AttemptTable, link: str = "in/1", request: int = 1, attempt: int = 1, deadline_us: int = 100) -> Attempt:
    made = Attempt(link, request, attempt, table.mint(), deadline_us, work=None)
    table.add(made)
    return made


def test_found_by_key_sequence_and_link(table: AttemptTable) -> None:
    one = add(table)
    assert table.find("in/1", 1, 1) is table.of_sequence(one.seq_id) is one
    assert table.of_link("in/1") == [one]
    assert len(table) == 1


def test_the_same_numbers_of_another_router_are_another_attempt(table: AttemptTable) -> None:
    mine, yours = add(table, link="in/1"), add(table, link="in/2")
    table.forget(mine.seq_id)
    assert table.find("in/2", 1, 1) is yours
    assert table.of_link("in/1") == []


def test_forgotten_everywhere_and_idempotently(table: AttemptTable) -> None:
    one, other = add(table), add(table, request=2)
    table.forget(one.seq_id)
    table.forget(one.seq_id)
    assert table.find("in/1", 1, 1) is None
    assert table.of_sequence(one.seq_id) is None
    assert table.of_link("in/1") == [other]


def test_sequence_numbers_are_never_reused(table: AttemptTable) -> None:
    first = add(table)
    table.forget(first.seq_id)
    assert add(table).seq_id != first.seq_id


def test_of_link_is_a_copy_that_may_be_forgotten_from(table: AttemptTable) -> None:
    add(table, request=1)
    add(table, request=2)
    for attempt in table.of_link("in/1"):
        table.forget(attempt.seq_id)
    assert len(table) == 0


def test_renamed_it_goes_on_under_the_new_number_only(table: AttemptTable) -> None:
    one = add(table)
    table.rename(one, 2)
    assert table.find("in/1", 1, 1) is None
    assert table.find("in/1", 1, 2) is table.of_sequence(one.seq_id) is one
    table.forget(one.seq_id)
    assert table.find("in/1", 1, 2) is None


def test_expired_in_order_each_once(table: AttemptTable) -> None:
    late, early, later = (
        add(table, request=1),
        add(table, request=2, deadline_us=50),
        add(table, request=3, deadline_us=101),
    )
    assert table.next_deadline_us == 50
    assert table.expired(49) == []
    assert table.expired(100) == [early, late]
    assert table.expired(100) == []
    assert table.next_deadline_us == later.deadline_us


def test_a_forgotten_attempt_has_no_deadline(table: AttemptTable) -> None:
    early, late = add(table, deadline_us=50), add(table, request=2, deadline_us=60)
    table.forget(early.seq_id)
    assert table.next_deadline_us == 60
    assert table.expired(100) == [late]
    table.forget(late.seq_id)
    assert table.next_deadline_us is None


def test_expired_attempts_stay_until_they_are_forgotten(table: AttemptTable) -> None:
    """Whoever ends them needs them: the table only says that it is time."""
    one = add(table)
    table.expired(100)
    assert table.of_sequence(one.seq_id) is one
