"""VirtualEngine: the same engine in virtual time, for tests and planning.

A step begins when there is work and lasts what `cost` says: layers become final evenly over it, tokens come at its
end, and commands that arrive meanwhile wait for that end, all as on the engine thread. The executor itself runs at the
step's beginning, in no virtual time; only what it reports is spread out.

    begin ---------- layers [0, 2) ---------- layers [2, 4) + tokens ---- commands ---- begin ...
          cost * 2/4                cost * 4/4

It dies and freezes with its process (`VirtualProcess`), which is usually its host's.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from engine.base.failpoints import InjectedFault
from engine.base.virtual_host import VirtualProcess, VirtualWorld
from engine.commands import EncodeOutput, EncodePlan, EngineCommand, EngineEvent, EngineLoad, StepOutput, StepPlan
from engine.core import Engine
from engine.executors import StepExecutor

StepCost = Callable[[StepPlan | EncodePlan], int]
"""How long a step takes, in microseconds. A function of the plan, so that a run can be repeated."""


class VirtualEngine:
    """Implements `EnginePort`. `on_events` is usually `VirtualHost.deliver_engine_events`."""

    def __init__(
        self,
        world: VirtualWorld,
        on_events: Callable[[tuple[EngineEvent, ...]], None],
        core: Engine,
        executor: StepExecutor,
        cost: StepCost,
        *,
        process: VirtualProcess | None = None,
    ) -> None:
        self._world = world
        self._process = process or VirtualProcess(world)
        self._on_events = on_events
        self._core = core
        self._executor = executor
        self._cost = cost
        self._commands: deque[EngineCommand] = deque()
        self._awake = False  # a step is under way, or one is about to be planned
        self._last_load: EngineLoad | None = None

    def post(self, command: Any) -> None:
        self._commands.append(command)
        self._wake()

    # -- faults --------------------------------------------------------------------------------------------------------
    def freeze(self) -> None:
        """Nothing happens until `thaw`; commands pile up."""
        self._process.freeze()

    def thaw(self) -> None:
        self._process.thaw()

    def kill(self) -> None:
        """Nothing happens any more. What the step under way would have reported is lost."""
        self._process.kill()

    # -- steps ---------------------------------------------------------------------------------------------------------
    def _wake(self) -> None:
        if not self._awake:
            self._awake = True
            self._process.schedule(0, self._turn)

    def _turn(self) -> None:
        """Between two steps: all commands, then the next step or sleep."""
        events: list[EngineEvent] = []
        while self._commands:
            events.extend(self._core.handle(self._commands.popleft(), self._world.now_us))
        plan = self._core.begin_step(self._world.now_us)
        self._publish([*events, *self._core.take_events()])
        self._publish_load()
        if plan is not None:
            self._begin(plan)
            return
        self._awake = False
        if self._commands:  # posted by whoever heard the events
            self._wake()

    def _begin(self, plan: StepPlan | EncodePlan) -> None:
        ranges: list[tuple[int, int]] = []
        output = self._execute(plan, ranges)
        cost_us = self._cost(plan)
        for layer_start, layer_end in ranges:
            final_us = cost_us * layer_end // ranges[-1][1]
            self._process.schedule(final_us, partial(self._layers_final, layer_start, layer_end))
        self._process.schedule(cost_us, partial(self._end, output))

    def _execute(self, plan: StepPlan | EncodePlan, ranges: list[tuple[int, int]]) -> StepOutput | EncodeOutput | None:
        """None: a fault that the test injected. Anything else that raises is a bug, and must not pass for one."""
        try:
            output: StepOutput | EncodeOutput = self._executor.execute(
                plan, lambda start, end: ranges.append((start, end))
            )
            return output
        except InjectedFault:
            return None

    def _layers_final(self, layer_start: int, layer_end: int) -> None:
        self._publish(self._core.layers_computed(layer_start, layer_end))

    def _end(self, output: StepOutput | EncodeOutput | None) -> None:
        now_us = self._world.now_us
        self._publish(self._core.fail_step(now_us) if output is None else self._core.finish_step(output, now_us))
        self._turn()

    def _publish(self, events: list[EngineEvent]) -> None:
        if events:
            self._on_events(tuple(events))

    def _publish_load(self) -> None:
        load = self._core.load()
        if load != self._last_load:
            self._last_load = load
            self._on_events((load,))
