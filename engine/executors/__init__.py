"""Executors: what turns a StepPlan into KV bytes and tokens. `torch`, `oracle`, `paced`.

An executor owns no policy and no memory: it is handed the arena, it fills the columns that a plan names, and it
answers with tokens.
"""

from collections.abc import Callable
from typing import Protocol

from engine.commands import StepOutput, StepPlan

LayersComputed = Callable[[int, int], None]
"""Called as (layer_start, layer_end) while a step runs, in layer order, covering every layer exactly once."""


class Executor(Protocol):
    """Runs one step at a time. Called from the engine thread only."""

    def execute(self, plan: StepPlan, on_layers: LayersComputed) -> StepOutput:
        """Compute the plan; call `on_layers` as KV becomes final. Raises only for bugs and broken hardware."""
