"""EngineThread: the real driver. Nothing here waits for time; every wait is for an event, with a deadline."""

import os
import queue
import threading

import pytest

from engine.commands import (
    AddPrefill,
    Admitted,
    EngineEvent,
    EngineLoad,
    KVComputed,
    Prefilled,
    Release,
    StepFailed,
    StepOutput,
    StepPlan,
    TokensSampled,
)
from engine.core import EngineCore, assert_quiet
from engine.executors import Executor, LayersComputed
from engine.executors.oracle import OracleExecutor, reference_tokens
from engine.kv.arena import Arena
from engine.scheduler import Scheduler
from engine.thread import EngineThread
from engine.types import SamplingParams

DEADLINE_S = 10.0
ORACLE = OracleExecutor.Config(poison_token=999)
PROMPT = (1, 2, 3, 4, 5)


class Rig:
    """An engine thread and a queue of what it reported."""

    def __init__(self, wrap=lambda executor: executor, **options) -> None:
        arena = Arena(ORACLE.schema, columns=16, block_size=4)
        self.core = EngineCore(Scheduler.Config(block_size=4), ORACLE.schema, arena)
        self.batches: queue.SimpleQueue[tuple[EngineEvent, ...]] = queue.SimpleQueue()
        self.crashed: queue.SimpleQueue[Exception] = queue.SimpleQueue()
        self.built_on: list[threading.Thread] = []

        def factory() -> Executor:
            self.built_on.append(threading.current_thread())
            return wrap(OracleExecutor(arena, ORACLE))

        self.thread = EngineThread(self.core, factory, self.batches.put, on_crash=self.crashed.put, **options)

    def __enter__(self) -> "Rig":
        self.thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        assert self.thread.stop(DEADLINE_S)

    def add(self, seq_id: int, prompt: tuple[int, ...] = PROMPT, *, here: bool = True, max_tokens: int = 4) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        self.thread.post(
            AddPrefill(seq_id=seq_id, token_ids=prompt, prompt_tokens=len(prompt), sampling=sampling, decode_here=here)
        )

    def until(self, wanted) -> list[EngineEvent]:
        """Events up to and including the first that `wanted` accepts."""
        events: list[EngineEvent] = []
        while not (events and wanted(events[-1])):
            batch = self.batches.get(timeout=DEADLINE_S)
            for event in batch:
                events.append(event)
                if wanted(event):
                    break
        return events

    def until_idle(self) -> EngineLoad:
        return self.until(lambda event: isinstance(event, EngineLoad) and event.idle)[-1]


def finished(event: EngineEvent) -> bool:
    return isinstance(event, TokensSampled) and event.tokens[0].finish is not None


def test_generates_the_reference_and_ends_quiet() -> None:
    with Rig() as rig:
        rig.add(1)
        events = rig.until(finished)
        rig.thread.post(Release(seq_id=1))
        rig.until_idle()
    first = [event.tokens[0].token_id for event in events if isinstance(event, Prefilled)]
    rest = [token.token_id for event in events if isinstance(event, TokensSampled) for token in event.tokens]
    sampling = SamplingParams(temperature=0.0)
    assert (*first, *rest) == reference_tokens(PROMPT, "", sampling, 4, ORACLE)
    assert_quiet(rig.core)


def test_the_executor_is_built_on_the_engine_thread() -> None:
    with Rig() as rig:
        rig.add(1, max_tokens=1)
        rig.until(lambda event: isinstance(event, Prefilled))
    assert rig.built_on and rig.built_on[0] is not threading.main_thread()


class Gate:
    """An executor that stops between its first layers and its end until it is opened."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self.opened = threading.Event()

    def execute(self, plan: StepPlan, on_layers: LayersComputed) -> StepOutput:
        output = self.inner.execute(plan, on_layers)
        assert self.opened.wait(DEADLINE_S)
        return output


def test_admission_and_layers_are_reported_while_the_step_runs() -> None:
    gates: list[Gate] = []

    def wrap(inner: Executor) -> Executor:
        gates.append(Gate(inner))
        return gates[0]

    with Rig(wrap) as rig:
        rig.add(1, here=False)
        seen = rig.until(lambda event: isinstance(event, KVComputed))
        assert any(isinstance(event, Admitted) for event in seen)
        rig.add(2)  # waits for the end of the step under way
        gates[0].opened.set()
        after = rig.until(lambda event: isinstance(event, Admitted))
    assert any(isinstance(event, Prefilled) for event in after), "the step ended before the next command was handled"


def test_a_step_that_raises_fails_the_culprit_only(caplog: pytest.LogCaptureFixture) -> None:
    with Rig() as rig:
        rig.add(1, (1, 999))
        rig.add(2)
        events = rig.until(finished)
        assert rig.thread.alive
    failures = [event for event in events if isinstance(event, StepFailed)]
    assert failures == [StepFailed(seq_ids=(1,), reason="step_raised")]
    assert any("raised" in record.message for record in caplog.records)


def test_loads_are_sent_only_when_they_changed() -> None:
    with Rig() as rig:
        rig.add(1)
        events = rig.until(finished)
        rig.thread.post(Release(seq_id=1))
        rig.thread.post(Release(seq_id=1))
        rig.until_idle()
    loads = [event for event in events if isinstance(event, EngineLoad)]
    assert len(loads) == len(set(loads)) > 1


def test_a_bug_ends_the_thread_and_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rig.thread.start()
    rig.add(1)
    rig.add(1)  # ids are never reused: the owner's bug
    assert isinstance(rig.crashed.get(timeout=DEADLINE_S), ValueError)
    assert rig.thread.stop(DEADLINE_S)
    assert "engine thread ends" in caplog.text


def test_an_executor_that_cannot_be_built_is_a_crash() -> None:
    def wrap(inner: Executor) -> Executor:
        raise OSError("no such model")

    rig = Rig(wrap)
    rig.thread.start()
    assert isinstance(rig.crashed.get(timeout=DEADLINE_S), OSError)
    assert rig.thread.stop(DEADLINE_S)


def test_stop_without_work_returns_at_once() -> None:
    rig = Rig()
    rig.thread.start()
    assert rig.thread.stop(DEADLINE_S)
    assert not rig.thread.alive


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
def test_pins_only_its_own_thread() -> None:
    before = os.sched_getaffinity(0)
    core = min(before)
    pinned: list[set[int]] = []

    def wrap(inner: Executor) -> Executor:
        pinned.append(os.sched_getaffinity(0))
        return inner

    with Rig(wrap, cpu_set={core}) as rig:
        rig.add(1, max_tokens=1)
        rig.until(lambda event: isinstance(event, Prefilled))
    assert pinned == [{core}]
    assert os.sched_getaffinity(0) == before
