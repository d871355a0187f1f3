"""EngineThread: an engine driven by a real executor, on the one thread that owns memory and tensors (DESIGN 3).

    post (any thread) -> queue -> [ commands -> plan -> execute -> outcome ] -> on_events (called on this thread)

The executor is built on the thread: torch's thread settings and a CUDA context belong to whoever made them. Events
leave in batches, as soon as they exist: what planning found before the step runs, layers while it runs, tokens at its
end. An executor that raises fails its step, never the loop; anything else that raises is a bug and ends the thread.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

from engine.commands import EncodePlan, EngineCommand, EngineEvent, EngineLoad, StepPlan
from engine.core import Engine
from engine.executors import StepExecutor

logger = logging.getLogger(__name__)

INTEGRITY_CHECK_INTERVAL_US = 1_000_000  # a check takes milliseconds; a burst of short requests should not pay for many

OnEvents = Callable[[tuple[EngineEvent, ...]], None]


class EngineThread:
    """Implements `EnginePort`. `on_events` and `on_crash` are called on the engine thread and must only hand over."""

    def __init__(
        self,
        core: Engine,
        executor_factory: Callable[[], StepExecutor],
        on_events: OnEvents,
        *,
        on_crash: Callable[[Exception], None] | None = None,
        cpu_set: Collection[int] | None = None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._core = core
        self._executor_factory = executor_factory
        self._on_events = on_events
        self._on_crash = on_crash
        self._cpu_set = cpu_set
        self._clock_ns = clock_ns
        # Unbounded, because `post` may not block: its bound is WORKER_ATTEMPTS_MAX attempts of a few commands each.
        # None asks the thread to end.
        self._commands: queue.SimpleQueue[EngineCommand | None] = queue.SimpleQueue()
        self._stopping = False
        self._next_check_us = 0
        self._last_load: EngineLoad | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, command: Any) -> None:
        self._commands.put(command)

    def stop(self, timeout_s: float) -> bool:
        """End after the step under way. False if that takes longer; the thread is a daemon and dies with us."""
        self._commands.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    # -- the thread ----------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            self._pin()
            self._loop(self._executor_factory())
        except Exception as error:
            logger.exception("the engine thread ends")
            if self._on_crash is not None:
                self._on_crash(error)

    def _pin(self) -> None:
        """Keep the engines of one machine on disjoint cores, while their event loops float over all of them."""
        if self._cpu_set is not None and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self._cpu_set)  # 0: the calling thread, and those it starts

    def _loop(self, executor: StepExecutor) -> None:
        busy = True
        while True:
            self._handle_commands(wait=not busy)
            if self._stopping:
                return
            plan = self._core.begin_step(self._now_us())
            self._publish(self._core.take_events())
            self._publish_load()
            busy = plan is not None
            if plan is not None:
                self._execute(executor, plan)

    def _handle_commands(self, *, wait: bool) -> None:
        """Everything that is in the queue. Without work, waits: only a command, or `stop`, can change that."""
        events: list[EngineEvent] = []
        if wait and self._commands.empty():
            self._check_when_idle()
        try:
            command = self._commands.get(block=wait)
            while command is not None:
                events.extend(self._core.handle(command, self._now_us()))
                command = self._commands.get_nowait()
            self._stopping = True
        except queue.Empty:
            pass
        self._publish(events)

    def _check_when_idle(self) -> None:
        """Conservation of columns (I3) is recomputed from the tables while nobody waits for us; a breach is a bug of
        ours, and ends the worker before it can serve from memory that two requests own."""
        now_us = self._now_us()
        if now_us >= self._next_check_us:
            self._next_check_us = now_us + INTEGRITY_CHECK_INTERVAL_US
            self._core.check_integrity()

    def _execute(self, executor: StepExecutor, plan: StepPlan | EncodePlan) -> None:
        def on_layers(layer_start: int, layer_end: int) -> None:
            self._publish(self._core.layers_computed(layer_start, layer_end))

        try:
            output = executor.execute(plan, on_layers)
        except Exception:
            logger.exception("%s %d raised with %d sequences", type(plan).__name__, plan.step_id, plan.num_sequences)
            self._publish(self._core.fail_step(self._now_us()))
        else:
            self._publish(self._core.finish_step(output, self._now_us()))

    def _publish(self, events: list[EngineEvent]) -> None:
        if events:
            self._on_events(tuple(events))

    def _publish_load(self) -> None:
        load = self._core.load()
        if load != self._last_load:
            self._last_load = load
            self._on_events((load,))

    def _now_us(self) -> int:
        return self._clock_ns() // 1_000
