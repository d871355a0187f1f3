"""The router's Prometheus metrics: what only the router can know, because it alone sees every token of every request.

One registry per `RouterMetrics`, none global. No label is a request id, a tenant, a prompt, or a name that a client
chose. Words that workers choose (codecs, reasons, events) are labels as long as there are few; the rest are "other".
Figures of the core and of the workers are read at scrape time through `RouterState`, so that nothing is counted in two
places.

What does not belong here: the workers' own metrics, and when to scrape.
"""

from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, product
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from control_plane.router import edge
from control_plane.router.edge import RequestRecord, RouterState
from control_plane.router.media.reasons import Reason
from control_plane.router.media.remote_url import Denied
from control_plane.router.requests import RequestStats, WorkerView
from engine.base import limits
from engine.base.errors import Status
from engine.types import FinishReason, Role

PREFIX: Final = "triptych_"
OUTCOMES: Final = (*(reason.value for reason in FinishReason), *(status.value for status in Status))
WORKER_STATES: Final = (  # DESIGN section 7
    *("STARTING", "STANDBY", "SERVING", "QUIESCING", "DRAINING"),
    *("REBINDING", "WARMING", "ROLLING_BACK", "FAILED"),
)
HELP: Final = {  # of what `RouterState.counters` names; vLLM's names where it has one
    "num_preemptions": "Sequences that lost their KV memory to others, at all workers.",
    "prefix_cache_hits": "Context tokens found in the workers' prefix caches.",
    "prefix_cache_queries": "Context tokens looked up in the workers' prefix caches.",
    "images": "Images of requests, by whether their embedding was computed for them or cached.",
    "no_progress": "Placements given up because nothing was heard of them, by stage.",
    "queue_wait_ms": "Milliseconds that prompts waited in the router before a worker was given them, summed.",
    "rejections": "Requests refused before anything was started, by reason.",
    "requests_by_n": "Accepted requests by how many choices they asked for.",
}
MET: Final = {True: "met", False: "missed"}
US_PER_S: Final = 1_000_000
MS_PER_S: Final = 1_000
OTHER: Final = "other"

Labels = tuple[str, ...]  # values, in the order of the metric's label names

FIRST_TOKEN_BUCKETS_S: Final = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 30, 60, 120)
PER_TOKEN_BUCKETS_S: Final = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
REQUEST_BUCKETS_S: Final = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)


@dataclass(frozen=True, slots=True)
class Config:
    label_values_max: int = limits.METRIC_LABEL_VALUES_MAX


class OpenLabels:
    """Label values of one metric from an open set: the first come keep their names, the others share one.

    Once named, always named: a series that moved between two names would go down, which a counter must not.
    """

    def __init__(self, values_max: int, *named: Labels) -> None:
        self._values_max = values_max
        self._named = set(named)

    def __call__(self, values: Labels) -> Labels:
        values = tuple(value[: limits.METRIC_LABEL_CHARACTERS_MAX] for value in values)
        if values not in self._named:
            if len(self._named) >= self._values_max:
                return (OTHER,) * len(values)
            self._named.add(values)
        return values


class RouterMetrics:
    """Counts requests as they end. Per request, never per token: a token must not pay for its statistics."""

    def __init__(self, config: Config | None = None) -> None:
        self.registry = CollectorRegistry()
        self._config = config or Config()
        self._codecs = OpenLabels(self._config.label_values_max, ("raw",))
        self._define_counters()
        self._define_histograms()

    def export(self, state: RouterState) -> None:
        """Also expose the core's counters and the workers, read at each scrape."""
        self.registry.register(RouterStateCollector(state, self._config.label_values_max))

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The exposition and its content type, in the format that the scraper asked for."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    # -- what the edge reports -----------------------------------------------------------------------------------------
    def request_ended(self, record: RequestRecord) -> None:
        self._requests.labels(record.outcome if record.outcome in OUTCOMES else Status.INTERNAL.value).inc()
        self._prompt_tokens.inc(record.prompt_tokens)
        self._output_tokens.inc(record.output_tokens)
        _observe(self._first_token, record.first_us)
        _observe(self._second_token, record.second_us)
        _observe(self._per_token, record.per_token_us)
        _observe(self._request, record.total_us)
        for target, met in (("ttft", record.slo.ttft_met), ("tpot", record.slo.tpot_met)):
            if met is not None:
                self._slo.labels(target, MET[met]).inc()
        if record.stats is not None:
            self._cached_tokens.inc(record.stats.cached_tokens)
            self._skipped_tokens.inc(record.stats.skipped_tokens)
            self._transferred(record.stats)
            self._saw(record, record.stats)

    def slow_reader(self) -> None:
        self._slow_readers.inc()

    def unknown_fields(self, count: int) -> None:
        self._unknown_fields.inc(count)

    def export_gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read at each scrape."""
        Gauge(PREFIX + name, text, registry=self.registry).set_function(read)

    # -- what the reader of images reports -----------------------------------------------------------------------------
    def bad_image(self, reason: Reason) -> None:
        self._bad_images.labels(reason.value).inc()

    def fetch_denied(self, reason: Denied) -> None:
        self._fetch_denied.labels(reason.value).inc()

    def fetch_failed(self) -> None:
        self._fetch_failed.inc()

    # -- inside --------------------------------------------------------------------------------------------------------
    def _transferred(self, stats: RequestStats) -> None:
        if not stats.kv_bytes_wire:
            return
        (codec,) = self._codecs((stats.codec,))
        self._kv_bytes.labels(codec, "raw").inc(stats.kv_bytes_raw)
        self._kv_bytes.labels(codec, "wire").inc(stats.kv_bytes_wire)

    def _saw(self, record: RequestRecord, stats: RequestStats) -> None:
        """How long its images took, once it is certain that they were all encoded."""
        self._image_tokens.inc(stats.image_tokens)
        if stats.image_tokens and record.first_us is not None:
            self._encode.observe(stats.phase_ms.get("encode", 0.0) / MS_PER_S)

    def _define_counters(self) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=self.registry)

        self._requests = counter("requests", "Requests by how they ended.", "outcome")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that were started.")
        self._output_tokens = counter("generation_tokens", "Output tokens that reached the edge.")
        self._kv_bytes = counter(
            "kv_transfer_bytes", "KV moved between workers: as it lies in memory, and as sent.", "codec", "stage"
        )
        self._cached_tokens = counter("prompt_tokens_cached", "Prompt tokens that no prefill worker had to compute.")
        self._image_tokens = counter("prompt_tokens_image", "Prompt tokens that stand for images.")
        self._skipped_tokens = counter(
            "kv_transfer_skipped_tokens", "Prompt tokens whose KV the decode worker had: they were not sent."
        )
        self._slo = counter(
            "slo", "Requests that named a target, by target and whether it was met.", "target", "verdict"
        )
        self._unknown_fields = counter("unknown_fields", "Request fields that nothing here knows.")
        self._slow_readers = counter("slow_readers", "Requests cancelled because the client did not read.")
        self._bad_images = counter("bad_images", "Images that were refused, by reason.", "reason")
        self._fetch_denied = counter("fetch_denied", "Remote images that nobody went for, by reason.", "reason")
        self._fetch_failed = counter("fetch_failed", "Remote images that were allowed and did not come.")
        for outcome in OUTCOMES:  # a series that starts at its first event has no rate for it
            self._requests.labels(outcome)
        for target, outcome in product(("ttft", "tpot"), MET.values()):
            self._slo.labels(target, outcome)
        for stage in ("raw", "wire"):
            self._kv_bytes.labels("raw", stage)

    def _define_histograms(self) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, registry=self.registry, buckets=buckets)

        self._first_token = histogram("time_to_first_token_seconds", "From submit.", FIRST_TOKEN_BUCKETS_S)
        self._second_token = histogram(
            "time_to_second_token_seconds", "From submit: the first token must not hide a stall.", FIRST_TOKEN_BUCKETS_S
        )
        self._per_token = histogram(
            "time_per_output_token_seconds", "Mean of one request, after its first token.", PER_TOKEN_BUCKETS_S
        )
        self._encode = histogram(
            "encode_seconds", "From submit until all images of a request are encoded.", FIRST_TOKEN_BUCKETS_S
        )
        self._request = histogram("request_duration_seconds", "From submit to the ending.", REQUEST_BUCKETS_S)


class RouterStateCollector(Collector):
    """Reads the core at scrape time."""

    def __init__(self, state: RouterState, label_values_max: int = limits.METRIC_LABEL_VALUES_MAX) -> None:
        self._state = state
        self._labels: defaultdict[str, OpenLabels] = defaultdict(lambda: OpenLabels(label_values_max))

    def collect(self) -> Iterator[Metric]:
        yield _gauge("requests_in_flight", "Submitted and not ended.", self._state.in_flight)
        yield _gauge("images_waiting", "Requests whose images wait for an encoder.", self._state.images_waiting)
        yield _gauge("ready", "1 while every needed role has a serving worker.", int(self._state.ready))
        yield from _worker_families(self._state.workers())
        yield from self._counter_families()

    def _counter_families(self) -> Iterator[Metric]:
        samples = sorted(self._state.counters().items())
        for name, group in groupby(samples, key=lambda sample: sample[0][0]):
            series = list(group)
            label_names = [label for label, _ in series[0][0][1]]
            text = HELP.get(name, f"Counted by the core: {name}.")
            family = CounterMetricFamily(_metric_name(name), text, labels=label_names)
            for labels, value in self._named(name, series).items():
                family.add_metric(labels, value)
            yield family

    def _named(self, name: str, series: Iterable[tuple[tuple[str, edge.Labels], float]]) -> Tally[Labels]:
        sums: Tally[Labels] = Tally()
        for (_, labels), value in series:
            sums[self._labels[name](tuple(text for _, text in labels))] += value  # type: ignore[assignment]  # float
        return sums


def _worker_families(workers: Iterable[WorkerView]) -> Iterator[Metric]:
    """Summed over workers: their ids change with every restart and would grow the label sets without end."""
    workers = list(workers)
    by_role_and_state = Tally((role, _state_label(worker)) for worker in workers for role in worker.roles)
    family = GaugeMetricFamily(PREFIX + "workers", "Workers by role and state.", labels=["role", "state"])
    for role in Role:
        for state in (*WORKER_STATES, OTHER):
            family.add_metric([role.value, state], by_role_and_state[role.value, state])
    yield family
    sums: dict[str, Callable[[WorkerView], int]] = {
        "workers_connected": lambda worker: int(worker.connected),
        "worker_requests_running": lambda worker: worker.running,
        "worker_requests_waiting": lambda worker: worker.waiting,
        "worker_columns_free": lambda worker: worker.free_columns,
        "worker_columns": lambda worker: worker.total_columns,
        "worker_columns_cached": lambda worker: worker.cached_columns,
        "worker_images_waiting": lambda worker: worker.encoding,
        "worker_embedding_columns_free": lambda worker: worker.free_embedding_columns,
        "worker_embedding_columns": lambda worker: worker.embedding_columns,
    }
    for name, read in sums.items():
        yield _gauge(name, "Summed over the workers in the router's table.", sum(map(read, workers)))


def _state_label(worker: WorkerView) -> str:
    state = worker.state.upper()
    return state if state in WORKER_STATES else OTHER


def _metric_name(name: str) -> str:
    return name if name.startswith(PREFIX) else PREFIX + name


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _observe(histogram: Histogram, duration_us: float | None) -> None:
    if duration_us is not None:
        histogram.observe(duration_us / US_PER_S)
