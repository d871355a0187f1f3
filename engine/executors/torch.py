"""The executor that computes for real: torch and transformers on the host's cores.

It joins the parts (checkpoint, runner, sampler) and owns what is global to the process, torch's thread count. Policy is
in the scheduler, memory in the arena.
"""

import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.base import limits
from engine.base.errors import FailedPrecondition
from engine.commands import StepOutput, StepPlan
from engine.executors import LayersComputed
from engine.kv.arena import Arena
from engine.model_runner import ModelRunner, verify
from engine.models.checkpoint import load_model
from engine.models.family import adapter_for
from engine.models.info import describe, schema_for
from engine.sampling import sample_batch

NAN_LOGITS = "nan_logits"
"""Why a slice failed: its logits hold NaN or infinity (broken weights, or KV that was damaged)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """`threads` is the worker's share of the machine's cores, never torch's default, which takes all (DESIGN 3)."""

    model: Path
    dtype: str = "float32"
    threads: int = 1
    layers_per_group: int = limits.LAYERS_PER_GROUP


class TorchExecutor:
    """Loads, checks and runs a model. Build it on the thread that will call `execute`."""

    def __init__(self, config: Config, arena: Arena) -> None:
        self._threads = config.threads
        self._thread_id: int | None = None
        self._claim_thread()
        expected = schema_for(describe(config.model), config.dtype)
        if arena.schema.digest != expected.digest:
            raise FailedPrecondition(f"the arena's schema is not that of {config.model} in {config.dtype}")
        model, _ = load_model(config.model, config.dtype)
        self._runner = ModelRunner(model, adapter_for(model), arena, config.layers_per_group)
        verify(self._runner)

    def execute(self, plan: StepPlan, on_layers: LayersComputed) -> StepOutput:
        self._claim_thread()
        logits_NV = self._runner.run(plan, on_layers)
        sampled = [(piece, at) for piece in plan.slices if (at := piece.sample_position) is not None]
        tokens = sample_batch(logits_NV, [(piece.sampling, at) for piece, at in sampled])
        output = StepOutput(plan.step_id)
        for (piece, _), token in zip(sampled, tokens, strict=True):
            if token is None:
                output.failed[piece.seq_id] = NAN_LOGITS
            else:
                output.tokens[piece.seq_id] = token
        return output

    def _claim_thread(self) -> None:
        """OpenMP keeps the thread count per calling thread, so setting it elsewhere would not hold here."""
        if self._thread_id != threading.get_ident():
            torch.set_num_threads(self._threads)
            self._thread_id = threading.get_ident()
