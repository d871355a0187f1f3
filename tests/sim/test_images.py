"""Images in a virtual cluster: what is cached and for whom, that nothing is left behind, and what text has to pay.

Exact tokens, faults and planted bugs: in `test_virtual_cluster` and `test_planted_bugs`, half of whose seeds see.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from random import Random
from typing import TypeAlias
from unittest.mock import patch

import pytest

from control_plane.router.dispatch.live_request import LiveRequest, Stage
from control_plane.router.dispatch.register import Register
from control_plane.router.requests import Ended, Submit
from engine.images import Run
from engine.types import Role, SamplingParams
from tests.sim.cluster import VirtualCluster
from tests.sim.history import History
from tests.sim.pictures import PLACEHOLDER, seen_by, submitted, with_images
from tests.sim.processes import ORACLE, Shape, WorkerShape
from tests.sim.traffic import START_US, Outcome, Stream, Traffic, arrivals_of, paced_shape
from tests.sim.weather import Noise, Weather

FEATURES = 64
Enter: TypeAlias = Callable[[Register, LiveRequest, Stage, int], None]


def prompt_with(pictures: Sequence[int], *, tenant: str = "", key: int = 0, max_tokens: int = 4) -> Submit:
    """A word, an image, a word, an image ..."""
    runs = [Run(1 + index * (FEATURES + 1), FEATURES) for index in range(len(pictures))]
    images = tuple(submitted(number, [run], tenant) for number, run in zip(pictures, runs, strict=True))
    token_ids = [11, *([*[PLACEHOLDER] * FEATURES, 12] * len(pictures))]
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return Submit(key=key, token_ids=tuple(token_ids), sampling=sampling, tenant=tenant, images=images)


def sighted(*, encode: int, prefill: int, decode: int, image_us: int = 300_000) -> Shape:
    """Paced workers of a model that sees."""
    shape = paced_shape(prefill=prefill, decode=decode)
    workers = [replace(w, embedding_columns=200 if Role.PREFILL in w.roles else 0) for w in shape.workers]
    encoders = [WorkerShape(name=f"e{i}", roles=frozenset({Role.ENCODE}), embedding_columns=200) for i in range(encode)]
    return replace(shape, workers=(*workers, *encoders), image_us=image_us)


def play(shape: Shape, *submits: Submit, every_us: int = 1_000_000) -> Outcome:
    arrivals = [(index * every_us, submit) for index, submit in enumerate(submits)]
    outcome = Traffic(shape).play(arrivals, until_us=every_us * len(submits))
    assert len(outcome.finished) == len(submits), [visit.error for visit in outcome.visits]
    return outcome


def hits(outcome: Outcome) -> list[int]:
    return [visit.stats.image_hits for visit in outcome.visits if visit.stats is not None]


def forwards(shape: Shape, *submits: Submit) -> int:
    """Images that went through a tower, wherever."""
    traffic = Traffic(shape)
    arrivals = [(index * 1_000_000, submit) for index, submit in enumerate(submits)]
    traffic.play(arrivals, until_us=1_000_000 * len(submits))
    engines = [process.engine for process in traffic.cluster.workers if process.engine is not None]
    return sum(engine.core.load().vision_forwards for engine in engines)


# -- the cache ---------------------------------------------------------------------------------------------------------
def test_a_repeated_image_costs_no_forward_and_is_never_shared_across_tenants() -> None:
    """Paired: a repeat within a tenant is found, so a cache that finds nothing does not pass."""
    red = prompt_with([1, 2], tenant="red")
    elsewhere = replace(red, token_ids=(13, *red.token_ids[1:]))  # another prompt, the same pictures
    blue, shape = seen_by(red, "blue"), sighted(encode=2, prefill=1, decode=1)
    assert hits(play(shape, red, elsewhere, blue, blue)) == [0, 2, 0, 2]
    assert forwards(shape, red, elsewhere) == 2
    assert forwards(shape, red, elsewhere, blue, blue) == 4


def test_a_repeated_image_goes_where_it_was_encoded() -> None:
    one, other = prompt_with([1]), prompt_with([2])
    outcome = play(sighted(encode=2, prefill=1, decode=1), one, other, other, one, every_us=100_000)
    first, second, second_again, first_again = [v.stats.encode_workers for v in outcome.visits if v.stats is not None]
    assert first != second and (first, second) == (first_again, second_again)


@pytest.mark.parametrize("encode", [0, 1])
def test_equal_images_of_one_request_are_encoded_once(encode: int) -> None:
    assert forwards(sighted(encode=encode, prefill=1, decode=1), prompt_with([3, 3, 3])) == 1


def test_a_prefill_worker_encodes_where_nobody_else_does() -> None:
    shape = sighted(encode=0, prefill=1, decode=1)
    outcome = play(shape, prompt_with([1, 2]), prompt_with([1, 2]))
    assert hits(outcome) == [0, 2] and forwards(shape, prompt_with([1, 2])) == 2


def test_a_worker_that_is_not_needed_for_it_never_encodes() -> None:
    traffic = Traffic(sighted(encode=1, prefill=2, decode=1))
    traffic.play([(0, prompt_with([number])) for number in range(8)], until_us=1_000_000)
    loads = {process.name: process.engine.core.load() for process in traffic.cluster.workers if process.engine}
    assert {name for name, load in loads.items() if load.vision_forwards} == {"e0"}
    assert {name for name, load in loads.items() if load.tower_loaded} == {"e0"}


# -- in parallel -------------------------------------------------------------------------------------------------------
def test_two_encoders_take_hardly_more_than_half_the_time_of_one() -> None:
    """4 images on 2 encode workers: encode stage <= 0.65x of one."""
    took_ms = {}
    for encode in (1, 2):
        (visit,) = play(sighted(encode=encode, prefill=1, decode=1), prompt_with([1, 2, 3, 4])).visits
        assert visit.stats is not None
        took_ms[encode] = visit.stats.phase_ms["encode"]
    print(f"\nencode stage of 4 images: {took_ms[1]:.0f} ms at one worker, {took_ms[2]:.0f} ms at two")
    assert took_ms[1] >= 4 * 300 and took_ms[2] <= 0.65 * took_ms[1]


# -- text beside images ------------------------------------------------------------------------------------------------
SPAN_US = 20_000_000
TEXT = Stream(tenant="text", per_second=6, prompt_tokens=(64, 512), output_tokens=(8, 32))


def image_arrivals(per_second: float, *, seed: int) -> Iterable[tuple[int, Submit]]:
    random = Random(f"images {seed}")
    at_us, number = 0.0, 10
    while (at_us := at_us + random.expovariate(per_second) * 1e6) < SPAN_US:
        number += 1
        yield int(at_us), prompt_with([number], tenant="images")


def text_p90_ms(shape: Shape, *, seed: int) -> float:
    arrivals = [*arrivals_of([TEXT], seed=seed, span_us=SPAN_US), *image_arrivals(4, seed=seed)]
    outcome = Traffic(shape, seed).play(sorted(arrivals, key=lambda arrival: arrival[0]), until_us=SPAN_US)
    assert len(outcome.finished) == len(arrivals)
    return outcome.ttft_ms("text", 0.9)


@pytest.mark.timeout(120)
def test_text_does_not_wait_for_images_where_another_worker_encodes() -> None:
    """The same number of workers, 4 images a second of 300 ms each (two towers' worth of them: 0.6 busy each)."""
    without = text_p90_ms(sighted(encode=0, prefill=3, decode=1), seed=1)
    with_encoders = text_p90_ms(sighted(encode=2, prefill=1, decode=1), seed=1)
    print(f"\ntext p90 TTFT beside 4 images/s: 3 P {without:.0f} ms, 2 E + 1 P {with_encoders:.0f} ms")
    assert with_encoders <= 0.6 * without


# -- leaks -------------------------------------------------------------------------------------------------------------
CANCELLED = 500
STAGES = (Stage.ENCODING, Stage.QUEUED, Stage.PREFILL, Stage.RESERVING, Stage.TRANSFER, Stage.DECODE)


@pytest.mark.timeout(120)
def test_after_500_cancels_in_every_stage_nothing_is_left() -> None:
    """0 embeddings, 0 columns lent or held, no attempts: what `check_quiet` looks for, everywhere."""
    pool = Cancelling()
    with patch.object(Register, "enter", pool.noting(Register.enter)):
        pool.run(CANCELLED)
    print(f"\ncancelled in: {dict(pool.stages)}")
    assert min(pool.stages[stage.value] for stage in STAGES) >= 10
    pool.cluster.check_integrity()
    pool.cluster.check_quiet()
    loads = [process.engine.core.load() for process in pool.cluster.workers if process.engine is not None]
    assert all(load.idle and load.free_embedding_columns == load.embedding_columns for load in loads)
    assert sum(load.vision_forwards for load in loads) > 0


class Cancelling:
    """Requests with images, each of which is cancelled in a stage of its own: at its beginning, or a little later."""

    def __init__(self) -> None:
        self.random = Random("cancels")
        workers = (
            WorkerShape(name="p0", roles=frozenset({Role.PREFILL}), columns=30, embedding_columns=24),
            WorkerShape(name="p1", roles=frozenset({Role.PREFILL}), columns=30, embedding_columns=24),
            WorkerShape(name="d0", roles=frozenset({Role.DECODE}), columns=60),
            WorkerShape(name="e0", roles=frozenset({Role.ENCODE}), embedding_columns=20),
            WorkerShape(name="e1", roles=frozenset({Role.ENCODE}), embedding_columns=20),
        )
        shape = Shape(workers=workers, bytes_per_second=400_000, router_options={"prefill_ahead_tokens": 1})
        weather = Weather(Random(0), Noise())
        self.history = History(lambda: self.cluster.world.now_us, ORACLE)
        self.cluster = VirtualCluster(1, shape, weather, self._on_output)
        self.world = self.cluster.world
        self.stages: Counter[str] = Counter()  # of those that were cancelled
        self.open: set[int] = set()
        self.aims: dict[int, Stage] = {}  # where each is to be cancelled

    def noting(self, enter: Enter) -> Enter:
        def note(register: Register, request: LiveRequest, stage: Stage, now_us: int) -> None:
            enter(register, request, stage, now_us)
            key = request.submit.key
            if self.aims.get(key) is stage:
                del self.aims[key]
                self.world.schedule(self.random.choice((0, 0, 3_000, 10_000)), lambda: self._leave(key))

        return note

    def run(self, count: int) -> None:
        self.world.run(until_us=START_US)
        for key in range(1, count + 1):
            self._come(key)
            self.world.run(until_us=self.world.now_us + self.random.randrange(60_000))
        self.world.run(until_us=self.world.now_us + 60_000_000, until=lambda: not self.open)
        self.world.run(until_us=self.world.now_us + 5_000_000)
        assert not self.open
        self.history.check()

    def _come(self, key: int) -> None:
        submit = with_images(self.random, self._text(key))
        self.open.add(key)
        self.history.invoke(submit)
        self.aims[key] = self.random.choice(STAGES)
        self.cluster.submit(submit)

    def _text(self, key: int) -> Submit:
        token_ids = tuple(self.random.choices(range(500), k=self.random.randint(30, 70)))
        return Submit(key=key, token_ids=token_ids, sampling=SamplingParams(temperature=0.0, max_tokens=20))

    def _leave(self, key: int) -> None:
        router = self.cluster.router
        assert router is not None
        submission = router._register.submissions.get(key)
        if submission is not None:
            self.stages.update(request.stage.value for request in submission.requests.values())
        self.history.cancel(key)
        self.cluster.cancel(key)

    def _on_output(self, output: object) -> None:
        self.history.on_output(output)
        if isinstance(output, Ended):
            self.open.discard(output.key)
