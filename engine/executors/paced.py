"""PacedExecutor: oracle tokens at a real model's pace. Real processes, sockets and KV bytes without real compute.

It sleeps for the modelled time instead of computing, so that eight workers fit on two cores and their steps still take
as long as they would on a core each. The model knows no cache misses and no neighbours; `triptych fit` measures one
for any checkpoint, and `SMOLLM2_ONE_CORE` is there for machines that have none.
"""

from collections.abc import Callable
from itertools import pairwise

from engine.commands import StepOutput, StepPlan
from engine.executors import Executor, LayersComputed
from engine.executors.oracle import oracle_schema
from engine.kv.schema import CacheSchema
from engine.step_time import StepTimeModel

# SmolLM2-135M in bfloat16 on one core with AMX, as `triptych fit --threads 1` found it. Median error 3 %; at most 11 %
# for decodes and 32 % for chunks of 16 tokens, which it takes for slower than they are.
SMOLLM2_ONE_CORE = StepTimeModel(
    step_us=35_080.0,
    prefill_step_us=10_640.0,
    prefill_token_us=427.0,
    prefill_pair_us=0.343,
    decode_context_us=4.33,
    decode_sequence_us=510.0,
)


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
