"""Sarathi-Serve: chunked prefill within a token budget, so that no prompt stalls the decodes beside it.

Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024 (arXiv 2403.02310).
A step holds every running decode and as many prompt tokens as fit in a budget of tau tokens, first come first served.
Tau is the largest that keeps a step within the bound on time between tokens (TBT), by the measured step-time model:

    tau = max { t, a multiple of the tile : slowness * T(chunk of t - B tokens, B decodes) <= 0.95 * TBT bound }

- The paper chooses one tau per deployment, for the longest context. Here each step has its own, for the decodes and the
  deepest prompt that it really has: early chunks of a prompt cost less attention, so they may be larger.
- Without decodes nobody waits for the step, and tau is `step_tokens`: larger chunks read the weights less often. So it
  is on a worker that only prefills, where tau is no more than the time until a command is heard.
- Closed loop: every 200 steps `slowness` follows the 99th percentile of observed over predicted time, by a factor of
  1.5 at most. For steps that fill their budget this is tau * 0.95 * bound / T_p99; the ratio also learns from others.
- Without a model or a bound tau is `step_tokens`, the same in every step: what token-exact comparisons want, since
  tau decides which tokens share a step.
- The published code counts the budget down past zero when decodes outnumber tau, and shares it among all running
  prefills where the paper describes one. See `prefill_budget` for the former; the latter is done here too.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar

from engine.batching import (
    Batch,
    BatchingConfig,
    Chunk,
    batchings,
    first_come_first_served,
    prefill_budget,
)
from engine.commands import StepPlan
from engine.step_time import StepTimeModel

HEADROOM = 0.95  # of the bound: what is left to the steps that the 99th percentile does not see


@batchings.register("sarathi")
class Sarathi:
    """Stall-free batching."""

    paper: ClassVar[str] = "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve (arXiv 2403.02310)"
    loses: ClassVar[str] = "a long prompt's own first token comes later: its chunks share steps with decodes"
    needs: ClassVar[tuple[str, ...]] = ("step-time model", "tbt_slo_ms")
    composes_with: ClassVar[str] = "everything"

    @dataclass(frozen=True, kw_only=True)
    class Config(BatchingConfig):
        retune_steps: int = 200
        retune_factor_max: float = 1.5

    def __init__(self, config: Config) -> None:
        self._config = config
        self._tuner = None
        if config.model is not None and config.tbt_slo_ms is not None:
            self._tuner = Tuner(config.model, config.retune_steps, config.retune_factor_max)

    def chunks(self, batch: Batch) -> list[Chunk]:
        if not batch.prompts:
            return []
        budget = prefill_budget(self._step_tokens(batch), len(batch.decode_contexts))
        return first_come_first_served(batch.prompts, budget, batch.sequences_left, self._config.align_tokens)

    def observe(self, plan: StepPlan, step_us: int) -> None:
        if self._tuner is not None:
            self._tuner.observe(plan, step_us)

    def _step_tokens(self, batch: Batch) -> int:
        """Tau of this step."""
        config = self._config
        if self._tuner is None or config.tbt_slo_ms is None or not batch.decode_contexts:
            return config.step_tokens
        bound_us = HEADROOM * config.tbt_slo_ms * 1_000 / self._tuner.slowness
        return largest_budget(self._tuner.model, batch, bound_us, config.tile_tokens, config.step_tokens)


def largest_budget(model: StepTimeModel, batch: Batch, bound_us: float, tile_tokens: int, tokens_max: int) -> int:
    """The largest multiple of the tile, `tokens_max` at most, whose step the model expects to stay within the bound.

    Where none does, the smallest that holds the decodes and anything more: they alone break the bound, or nearly, and
    prompts must advance all the same.
    """
    decodes = len(batch.decode_contexts)
    deepest = max(prompt.computed_tokens for prompt in batch.prompts)

    def breaks_bound(tiles: int) -> bool:
        tokens = prefill_budget(tiles * tile_tokens, decodes)
        return model.predict([(deepest, tokens)], batch.decode_contexts) > bound_us

    tiles_min = decodes // tile_tokens + 1
    larger = range(tiles_min + 1, tokens_max // tile_tokens + 1)
    tiles = tiles_min + bisect_left(larger, True, key=breaks_bound)
    return min(tiles * tile_tokens, tokens_max)


class Tuner:
    """How much slower steps are than the model says: other programs, other clocks, a model fitted elsewhere."""

    def __init__(self, model: StepTimeModel, every_steps: int, factor_max: float) -> None:
        self.model = model
        self.slowness = 1.0
        self._ratios: list[float] = []
        self._every_steps = every_steps
        self._factor_max = factor_max

    def observe(self, plan: StepPlan, step_us: int) -> None:
        """Only steps that hold both kinds: they are what tau decides about."""
        if len({piece.is_prefill for piece in plan.slices}) < 2:
            return
        self._ratios.append(step_us / max(self.model(plan), 1))
        if len(self._ratios) >= self._every_steps:
            self._retune()

    def _retune(self) -> None:
        wanted = sorted(self._ratios)[math.ceil(0.99 * len(self._ratios)) - 1]
        low, high = self.slowness / self._factor_max, self.slowness * self._factor_max
        self.slowness = min(max(wanted, low), high)
        self._ratios.clear()
