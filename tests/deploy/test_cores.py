"""deploy.cores: engines never share a core while there are enough, and never get torch's default thread count."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.cores import CoreShare, share_cores
from deploy.options import ServeOptions, WorkerSpec
from engine.types import Role


def specs(count: int) -> list[WorkerSpec]:
    return [WorkerSpec(name=f"mixed-{i}", roles=frozenset({Role.PREFILL, Role.DECODE})) for i in range(count)]


def test_two_workers_split_two_cores() -> None:
    assert share_cores([0, 1], specs(2)) == [CoreShare((0,), 1), CoreShare((1,), 1)]


def test_what_does_not_divide_is_left_to_the_event_loops() -> None:
    assert share_cores([0, 1, 2, 3, 4], specs(2)) == [CoreShare((0, 1), 2), CoreShare((2, 3), 2)]


def test_one_worker_gets_the_whole_machine() -> None:
    assert share_cores([4, 6, 8], specs(1)) == [CoreShare((4, 6, 8), 3)]


def test_more_workers_than_cores_take_turns() -> None:
    assert [share.engine_cores for share in share_cores([3, 7], specs(5))] == [(3,), (7,), (3,), (7,), (3,)]


def test_an_encode_worker_shares_a_core_with_the_prefill_worker_that_waits_for_it() -> None:
    workers = ServeOptions(encode=1).workers
    cores = {w.name: share.engine_cores for w, share in zip(workers, share_cores([0, 1], workers), strict=True)}
    assert cores == {"prefill-0": (0,), "decode-0": (1,), "encode-0": (0,)}


def test_no_workers_no_shares() -> None:
    assert share_cores([0, 1], []) == []


def test_no_cores_is_an_error() -> None:
    with pytest.raises(ValueError, match="no cores"):
        share_cores([], specs(1))


@given(cores=st.lists(st.integers(0, 255), min_size=1, max_size=64, unique=True), workers=st.integers(1, 80))
def test_shares_are_equal_known_and_disjoint_while_cores_last(cores: list[int], workers: int) -> None:
    shares = share_cores(cores, specs(workers))
    used = [core for share in shares for core in share.engine_cores]

    assert len(shares) == workers
    assert {share.threads for share in shares} == {max(len(cores) // workers, 1)}
    assert all(len(share.engine_cores) == share.threads for share in shares)
    assert set(used) <= set(cores)
    if workers <= len(cores):
        assert len(used) == len(set(used))
    else:
        load = [used.count(core) for core in cores]
        assert max(load) - min(load) <= 1
