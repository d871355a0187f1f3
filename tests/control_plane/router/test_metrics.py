"""What /metrics says after known requests; label sets stay bounded whatever happens."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from control_plane.router import metrics
from control_plane.router.edge import RequestRecord
from control_plane.router.metrics import OUTCOMES, RouterMetrics
from control_plane.router.requests import RequestStats, WorkerView
from engine.base.errors import Status
from tests.control_plane.router.edge_fakes import WORKER, FakeState, Router, answers


async def test_a_scrape_tells_what_happened() -> None:
    router = Router()
    router.metrics.export(router.state)
    router.state.in_flight = 4
    router.state.counted = {
        ("refusals", (("reason", "FULL"),)): 2.0,
        ("refusals", (("reason", "WRONG_EPOCH"),)): 1.0,
        ("kv_transfers", (("codec", "raw"),)): 1.0,
        ("triptych_attempts", ()): 5.0,
    }
    router.core.script = answers([5], [6])
    await router.complete(triptych={"slo": {"ttft_ms": 1_000}})
    await router.complete(temperature=-1)
    scrape = await router.request("GET", "/metrics", admin=True)
    families = [family.name for family in text_string_to_metric_families(scrape.text)]
    assert len(families) == len(set(families))  # Prometheus refuses a scrape that names one twice
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(scrape.text)
        for sample in family.samples
    }
    assert samples["triptych_requests_total", (("outcome", "stop"),)] == 1
    assert samples["triptych_requests_total", (("outcome", "invalid_argument"),)] == 1
    assert samples["triptych_slo_total", (("target", "ttft"), ("verdict", "met"))] == 1
    assert samples["triptych_slo_total", (("target", "ttft"), ("verdict", "missed"))] == 0
    assert samples["triptych_prompt_tokens_total", ()] == 3
    assert samples["triptych_generation_tokens_total", ()] == 2
    assert samples["triptych_kv_transfer_bytes_total", (("codec", "raw"), ("stage", "raw"))] == 4_000
    assert samples["triptych_kv_transfer_bytes_total", (("codec", "raw"), ("stage", "wire"))] == 1_000
    assert samples["triptych_kv_transfers_total", (("codec", "raw"),)] == 1
    assert samples["triptych_refusals_total", (("reason", "FULL"),)] == 2
    assert samples["triptych_attempts_total", ()] == 5
    assert samples["triptych_requests_in_flight", ()] == 4
    assert samples["triptych_ready", ()] == 1
    assert samples["triptych_workers", (("role", "prefill"), ("state", "SERVING"))] == 1
    assert samples["triptych_worker_columns_free", ()] == 7
    assert samples["triptych_time_to_first_token_seconds_count", ()] == 1


async def test_openmetrics_is_served_to_scrapers_that_ask() -> None:
    answer = await Router().request("GET", "/metrics", admin=True, headers={"accept": "application/openmetrics-text"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_every_outcome_has_its_series_from_the_start() -> None:
    registry = RouterMetrics().registry
    values = [registry.get_sample_value("triptych_requests_total", {"outcome": outcome}) for outcome in OUTCOMES]
    assert values == [0.0] * len(OUTCOMES)
    assert {status.value for status in Status} < set(OUTCOMES)


def test_label_sets_are_bounded() -> None:
    router_metrics = RouterMetrics(metrics.Config(label_values_max=3))
    for index in range(50):
        stats = RequestStats(codec=f"codec{index}", kv_bytes_raw=2, kv_bytes_wire=1)
        router_metrics.request_ended(RequestRecord(outcome=f"novel{index}", stats=stats))
    samples = [sample for family in router_metrics.registry.collect() for sample in family.samples]
    codecs = {sample.labels["codec"] for sample in samples if "codec" in sample.labels}
    outcomes = {sample.labels["outcome"] for sample in samples if "outcome" in sample.labels}
    assert codecs == {"raw", "codec0", "codec1", "other"}
    assert outcomes == set(OUTCOMES)
    wire = [s for s in samples if s.labels.get("stage") == "wire" and s.name == "triptych_kv_transfer_bytes_total"]
    assert sum(sample.value for sample in wire) == 50


def test_reuse_is_counted_in_tokens_and_told_under_the_names_others_use() -> None:
    class OneWorker(FakeState):
        def workers(self) -> Sequence[WorkerView]:
            return [replace(WORKER, cached_columns=5), replace(WORKER, cached_columns=6)]

    state, router_metrics = OneWorker(), RouterMetrics()
    state.counted = {("prefix_cache_hits", ()): 48.0, ("prefix_cache_queries", ()): 64.0, ("num_preemptions", ()): 2.0}
    state.counted |= {("requests_by_n", (("n", n),)): 1.0 for n in ("1", "4")}
    router_metrics.export(state)
    for cached, skipped in ((32, 16), (16, 0)):
        stats = RequestStats(cached_tokens=cached, skipped_tokens=skipped)
        router_metrics.request_ended(RequestRecord(outcome="stop", stats=stats))
    value = router_metrics.registry.get_sample_value
    assert value("triptych_prompt_tokens_cached_total") == 48
    assert value("triptych_kv_transfer_skipped_tokens_total") == 16
    assert value("triptych_worker_columns_cached") == 11
    assert (value("triptych_prefix_cache_hits_total"), value("triptych_prefix_cache_queries_total")) == (48, 64)
    assert value("triptych_num_preemptions_total") == 2
    assert value("triptych_requests_by_n_total", {"n": "4"}) == 1


def test_images_are_counted_and_how_long_they_took() -> None:
    class OneWorker(FakeState):
        def workers(self) -> Sequence[WorkerView]:
            return [replace(WORKER, encoding=2, free_embedding_columns=5, embedding_columns=8)] * 2

    state, router_metrics = OneWorker(), RouterMetrics()
    state.counted = {("images", (("result", "cached"),)): 3.0}
    router_metrics.export(state)
    stats = RequestStats(image_tokens=100, phase_ms={"encode": 300.0})
    router_metrics.request_ended(RequestRecord(outcome="stop", first_us=400_000, stats=stats))
    router_metrics.request_ended(RequestRecord(outcome="cancelled", stats=stats))  # before they were encoded, perhaps
    router_metrics.request_ended(RequestRecord(outcome="stop", first_us=400_000, stats=RequestStats()))  # text
    value = router_metrics.registry.get_sample_value
    assert value("triptych_images_total", {"result": "cached"}) == 3
    assert value("triptych_prompt_tokens_image_total") == 200
    assert (value("triptych_encode_seconds_count"), value("triptych_encode_seconds_sum")) == (1, 0.3)
    assert value("triptych_worker_images_waiting") == 4
    assert (value("triptych_worker_embedding_columns_free"), value("triptych_worker_embedding_columns")) == (10, 16)


def test_words_of_workers_become_labels_only_while_there_are_few() -> None:
    state = FakeState()
    router_metrics = RouterMetrics(metrics.Config(label_values_max=2))
    router_metrics.export(state)

    def scrape() -> dict[str, float]:
        samples = (sample for family in router_metrics.registry.collect() for sample in family.samples)
        return {s.labels["reason"]: s.value for s in samples if s.name == "triptych_attempts_failed_total"}

    state.counted = {("attempts_failed", (("reason", name),)): 1.0 for name in ("m", "z" * 500)}
    assert scrape() == {"m": 1, "z" * 64: 1}
    state.counted |= {("attempts_failed", (("reason", name),)): 2.0 for name in ("a", "b")}
    assert scrape() == {"m": 1, "z" * 64: 1, "other": 4}  # who was named first keeps the name, whatever the order


def test_two_routers_in_one_process_do_not_share_metrics() -> None:
    first, second = RouterMetrics(), RouterMetrics()
    first.slow_reader()
    assert first.registry.get_sample_value("triptych_slow_readers_total") == 1
    assert second.registry.get_sample_value("triptych_slow_readers_total") == 0


@pytest.mark.parametrize(("state", "label"), [("serving", "SERVING"), ("DRAINING", "DRAINING"), ("odd", "other")])
def test_worker_states_are_from_the_list(state: str, label: str) -> None:
    class OneWorker(FakeState):
        def workers(self) -> Sequence[WorkerView]:
            return [replace(WORKER, state=state)]

    router_metrics = RouterMetrics()
    router_metrics.export(OneWorker())
    labels = {"role": "prefill", "state": label}
    assert router_metrics.registry.get_sample_value("triptych_workers", labels) == 1


def test_refused_requests_are_in_no_histogram() -> None:
    router_metrics = RouterMetrics()
    router_metrics.request_ended(RequestRecord(outcome="resource_exhausted"))
    for name in ("time_to_first_token", "time_to_second_token", "time_per_output_token", "request_duration"):
        assert router_metrics.registry.get_sample_value(f"triptych_{name}_seconds_count") == 0
