"""Executors: what turns a StepPlan into KV bytes and tokens. `torch`, `oracle`, `paced`; `joint` adds an encoder.

An executor owns no policy and no memory: it is handed the arena, it fills the columns that a plan names, and it
answers with tokens.
"""

from collections.abc import Callable
from typing import Any, Protocol

from engine.commands import EncodeOutput, EncodePlan, StepOutput, StepPlan

LayersComputed = Callable[[int, int], None]
"""Called as (layer_start, layer_end) while a step runs, in layer order, covering every layer exactly once."""


class Executor(Protocol):
    """Runs one step at a time. Called from the engine thread only."""

    def execute(self, plan: StepPlan, on_layers: LayersComputed) -> StepOutput:
        """Compute the plan; call `on_layers` as KV becomes final. Raises only for bugs and broken hardware."""


class StepExecutor(Protocol):
    """What drivers call: an `Executor`, or the `JointExecutor` of a worker that also encodes. It understands the plans
    of the engine beside it, and that engine its outputs."""

    def execute(self, plan: Any, on_layers: LayersComputed) -> Any:
        """Run one step of whatever kind."""


class Encoder(Protocol):
    """Turns pixels into embeddings, in embedding memory. Called from the engine thread only."""

    def encode(self, plan: EncodePlan) -> EncodeOutput:
        """Write the embedding of each item, or say why not. Raises only for bugs and broken hardware."""
