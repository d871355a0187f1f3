"""PacedExecutor: oracle tokens at a real model's pace. Real processes, sockets and KV bytes without real compute.

It sleeps for the modelled time instead of computing, so that eight workers fit on two cores and their steps still take
as long as they would on a core each. The model is a straight line through measurements, nothing more: it knows no
cache misses and no neighbours. `StepTimeModel` alone is the step cost of a virtual engine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from engine.commands import StepOutput, StepPlan
from engine.executors import Executor, LayersComputed
from engine.executors.oracle import oracle_schema
from engine.kv.schema import CacheSchema


@dataclass(frozen=True, kw_only=True)
class StepTimeModel:
    """Microseconds of one step. The defaults are SmolLM2-135M in fp32 on one CPU core."""

    step_us: int = 35_000  # reading the weights once, whoever needs them
    prefill_token_us: float = 1_600
    decode_sequence_us: float = 1_000
    kv_token_us: float = 0  # each token of context that attention reads

    def __call__(self, plan: StepPlan) -> int:
        return self.step_us + round(
            sum(self._slice_us(piece.is_prefill, piece.start, len(piece.token_ids)) for piece in plan.slices)
        )

    def _slice_us(self, is_prefill: bool, start: int, tokens: int) -> float:
        compute_us = self.prefill_token_us * tokens if is_prefill else self.decode_sequence_us
        return compute_us + self.kv_token_us * (start + tokens)


def smollm2_schema(model: str = "oracle-smollm2-135m") -> CacheSchema:
    """KV of SmolLM2-135M's shape: 30 layers of 3 heads of 64, 22.5 KiB a token in bfloat16."""
    return oracle_schema(layers=30, heads=3, head_dim=64, dtype="bfloat16", model=model)


class PacedExecutor:
    """Implements `Executor`. `sleep` takes seconds: `time.sleep` in production, a recorder in tests."""

    def __init__(self, inner: Executor, model: StepTimeModel, sleep: Callable[[float], None]) -> None:
        self._inner = inner
        self._model = model
        self._sleep = sleep

    def execute(self, plan: StepPlan, on_layers: LayersComputed) -> StepOutput:
        """Layers become final evenly over the step:  |--sleep--|layers [0, 5)|--sleep--|layers [5, 10)| ... tokens"""
        ends: list[int] = [0]
        output = self._inner.execute(plan, lambda start, end: ends.append(end))
        step_s = self._model(plan) / 1e6
        for start, end in pairwise(ends):
            self._sleep(step_s * (end - start) / ends[-1])
            on_layers(start, end)
        return output
