"""What workers count is summed by the router: sums outlive workers and sessions, and never go down."""

from control_plane.router.dispatch.workers import EncodeLoad, Worker, WorkerPool
from control_plane.wire import session_pb2 as pb
from control_plane.wire.session import Session
from engine.base import limits


def listed(pool: WorkerPool, *ids: str, term: int = 1) -> list[Worker]:
    pool.adopt(pb.WorkerTable(term=term, workers=[pb.WorkerInfo(worker=id) for id in ids]))
    return [worker for worker in pool if worker.id in ids]


def report(pool: WorkerPool, worker: Worker, **counters: int) -> None:
    pool.on_status_untrusted(worker, pb.WorkerStatus(worker=worker.id, counters=counters))


def test_reports_of_all_workers_are_one_sum() -> None:
    pool = WorkerPool()
    first, second = listed(pool, "a", "b")
    report(pool, first, frames=3)
    report(pool, first, frames=5, resends=1)
    report(pool, second, frames=7)
    assert pool.events == {"frames": 12, "resends": 1}


def test_a_worker_that_is_forgotten_stays_in_the_sum() -> None:
    pool = WorkerPool()
    (worker,) = listed(pool, "a")
    report(pool, worker, frames=3)
    listed(pool, "b", term=2)
    assert pool.get("a") is None
    assert pool.events == {"frames": 3}


def test_a_new_session_counts_nothing_twice() -> None:
    pool = WorkerPool()
    (worker,) = listed(pool, "a")
    report(pool, worker, frames=3)
    pool.on_link_up(worker)
    report(pool, worker, frames=4)
    assert pool.events == {"frames": 4}


def test_a_count_that_begins_again_adds_from_zero() -> None:
    pool = WorkerPool()
    (worker,) = listed(pool, "a")
    report(pool, worker, frames=3)
    report(pool, worker, frames=2)
    assert pool.events == {"frames": 5}


def test_names_that_a_worker_invents_are_bounded() -> None:
    pool = WorkerPool()
    (worker,) = listed(pool, "a")
    report(pool, worker, **{f"event{index:03}": 1 for index in range(limits.METRIC_LABEL_VALUES_MAX + 10)})
    assert len(pool.events) == limits.METRIC_LABEL_VALUES_MAX + 1
    assert pool.events["other"] == 10
    report(pool, worker, **{"x" * 1_000: 1})
    assert max(map(len, pool.events)) <= limits.METRIC_LABEL_CHARACTERS_MAX


# -- prefix caches -----------------------------------------------------------------------------------------------------
def test_cache_lookups_of_all_workers_are_one_sum_that_never_goes_down() -> None:
    pool = WorkerPool()
    first, second = listed(pool, "a", "b")
    for worker, hits, queries in ((first, 3, 10), (second, 5, 5), (first, 4, 20), (second, 1, 2)):
        status = pb.WorkerStatus(worker=worker.id, prefix_hit_tokens=hits, prefix_query_tokens=queries)
        pool.on_status_untrusted(worker, status)
    assert pool.prefix_cache == {"hits": 3 + 5 + 1 + 1, "queries": 10 + 5 + 10 + 2}


# -- groups ------------------------------------------------------------------------------------------------------------
def test_a_group_must_fit_into_every_decode_worker() -> None:
    pool = WorkerPool()
    infos = [
        pb.WorkerInfo(worker=name, roles=["decode"], block_size_tokens=16, total_columns=columns)
        for name, columns in (("a", 10), ("b", 9))
    ]
    pool.adopt(pb.WorkerTable(term=1, workers=infos))
    assert pool.holds_group(10_000, 2, 8), "nobody is there yet: nothing is known"
    for worker in pool:
        pool.on_link_up(worker)
        pool.on_status_untrusted(worker, pb.WorkerStatus(worker=worker.id, state="SERVING", roles=["decode"]))
    assert pool.holds_group(9 * 16 - 2 * (16 + 8), 2, 8)
    assert not pool.holds_group(9 * 16 - 2 * (16 + 8) + 1, 2, 8)


def test_how_long_a_request_may_be_is_said_by_those_that_compute_it() -> None:
    pool = WorkerPool()
    lengths = {"e1": ("encode", 10), "p1": ("prefill", 300), "d1": ("decode", 200)}
    infos = [pb.WorkerInfo(worker=id, roles=[role], max_model_len=length) for id, (role, length) in lengths.items()]
    pool.adopt(pb.WorkerTable(term=1, workers=infos))
    for worker in pool:
        worker.session, worker.status = Session(), pb.WorkerStatus(state="SERVING")
    assert pool.max_model_len == 200


def test_images_ahead_and_memory_of_theirs_are_counted_once() -> None:
    load = EncodeLoad()
    load.add(1, 100, 7)
    load.add(2, 50, 4)
    load.encoded(1)
    load.encoded(1)
    assert (load.ahead_tokens, load.held_columns) == (50, 11)
    load.remove(1)
    load.remove(1)
    load.remove(2)
    assert (load.ahead_tokens, load.held_columns, load.ahead, load.held) == (0, 0, {}, {})
