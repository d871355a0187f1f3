"""The executor that computes for real: torch and transformers, on the host's cores or on an accelerator.

It joins the parts (checkpoint, runner, sampler, grammar) and owns what is global to the process, torch's thread count.
Policy is in the scheduler, memory in the arena.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from engine.base import limits
from engine.base.errors import FailedPrecondition
from engine.commands import SequenceSlice, StepOutput, StepPlan
from engine.executors import LayersComputed
from engine.grammar import FAILED as CONSTRAINT_FAILED
from engine.grammar import ConstraintFailed, Grammars
from engine.kernels import SUPPORTED_DTYPES, use_threads
from engine.kv.arena import Arena
from engine.model_runner import ModelRunner, StepLogits, verify
from engine.models.checkpoint import load_model
from engine.models.info import ModelInfo, describe, schema_for
from engine.sampling import Failure, Row, sample_batch, score
from engine.types import TokenLogprobs
from engine.vision.info import embedding_schema


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """`threads` is the worker's share of the machine's cores, never torch's default, which takes all (DESIGN 3)."""

    model: Path
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    layers_per_group: int = limits.LAYERS_PER_GROUP


class Runner(Protocol):
    """What runs a step's model call: `ModelRunner`, or something faster around one."""

    def run(self, plan: StepPlan, on_layers: LayersComputed) -> StepLogits: ...


class TorchExecutor:
    """Loads, checks and runs a model. Build it on the thread that will call `execute`."""

    def __init__(self, config: Config, arena: Arena, embeddings: Arena | None = None) -> None:
        """`embeddings`: memory of images' embeddings, for a model that sees."""
        self._threads = config.threads
        claim_threads(self._threads)
        info = describe(config.model)
        _require_schemas(config, info, arena, embeddings)
        self._eos_token_ids = info.eos_token_ids
        self._grammars = _grammars_of(config.model, info)
        self._runner = _runner_on(config, info, arena, embeddings)

    def execute(self, plan: StepPlan, on_layers: LayersComputed) -> StepOutput:
        claim_threads(self._threads)
        logits = self._runner.run(plan, on_layers)
        output = StepOutput(plan.step_id)
        self._sample(plan, logits.sampled_NV, output)
        _score_prompts(plan, logits, output)
        return output

    # -- sampling ------------------------------------------------------------------------------------------------------
    def _sample(self, plan: StepPlan, logits_NV: torch.Tensor, output: StepOutput) -> None:
        """Tokens of the slices that sample. One whose constraint gives no mask fails, and its row is not looked at."""
        sampling = [piece for piece in plan.slices if piece.sample_position is not None]
        masks = {piece.seq_id: self._mask(piece) for piece in sampling if piece.sampling.constraint is not None}
        kept = [index for index, piece in enumerate(sampling) if masks.get(piece.seq_id, b"") is not None]
        if len(kept) < len(sampling):
            output.failed.update({seq_id: CONSTRAINT_FAILED for seq_id, mask in masks.items() if mask is None})
            logits_NV = logits_NV[kept]
        rows = [Row.of(sampling[index], masks.get(sampling[index].seq_id)) for index in kept]
        for index, picked in zip(kept, sample_batch(logits_NV, rows, self._eos_token_ids), strict=True):
            if isinstance(picked, Failure):
                output.failed[sampling[index].seq_id] = picked
            else:
                output.tokens[sampling[index].seq_id] = picked

    def _mask(self, piece: SequenceSlice) -> bytes | None:
        constraint = piece.sampling.constraint
        if constraint is None or self._grammars is None:
            return None
        try:
            return self._grammars.mask(constraint, piece.seq_id, piece.context[piece.prompt_tokens :])
        except ConstraintFailed:
            return None


def claim_threads(threads: int) -> None:
    """How many threads the calling thread computes on from here. OpenMP and numba keep the number per calling thread,
    and whoever else computes on it (an encoder) may have set another: so at each step, which costs 2 us."""
    torch.set_num_threads(threads)
    use_threads(threads)


# -- prompt log-probabilities ------------------------------------------------------------------------------------------
def _score_prompts(plan: StepPlan, logits: StepLogits, output: StepOutput) -> None:
    for piece in plan.slices:
        if piece.seq_id in logits.scored_TV and piece.seq_id not in output.failed:
            scored = _scored(piece, logits.scored_TV[piece.seq_id])
            if any(math.isnan(entry.logprob) for entry in scored):
                output.failed[piece.seq_id] = Failure.NAN_LOGITS
                output.tokens.pop(piece.seq_id, None)
            elif scored:
                output.prompt_logprobs[piece.seq_id] = tuple(scored)


def _scored(piece: SequenceSlice, logits_TV: torch.Tensor) -> Sequence[TokenLogprobs]:
    """Each fed row says how likely the token after it was.

    fed          start .................... start + len
    scored           start + 1 ................ start + 1 + len, but nothing after the prompt
    """
    followers = piece.context[piece.start + 1 : min(piece.start + 1 + len(piece.token_ids), piece.prompt_tokens)]
    return score(logits_TV[: len(followers)], list(followers), piece.sampling.prompt_logprobs or 0)


# -- building ----------------------------------------------------------------------------------------------------------
def _require_schemas(config: Config, info: ModelInfo, arena: Arena, embeddings: Arena | None) -> None:
    """Bytes in memory mean to us what they mean to whoever wrote them."""
    if arena.schema.digest != schema_for(info, config.dtype).digest:
        raise FailedPrecondition(f"the arena's schema is not that of {config.model} in {config.dtype}")
    if embeddings is None:
        return
    if info.vision is None or embeddings.schema.digest != embedding_schema(info.vision, config.dtype).digest:
        raise FailedPrecondition(f"the embeddings' schema is not that of {config.model} in {config.dtype}")


def _grammars_of(model: Path, info: ModelInfo) -> Grammars | None:
    """None for a model without a tokenizer file: nobody can say what its tokens spell, so constraints fail."""
    tokenizer = model / "tokenizer.json"
    if not tokenizer.exists() or not info.eos_token_ids:
        return None
    config = Grammars.Config(tokenizer=tokenizer, vocab_size=info.vocab_size, eos_token_ids=info.eos_token_ids)
    return Grammars(config)


def _runner_on(config: Config, info: ModelInfo, arena: Arena, embeddings: Arena | None) -> Runner:
    match torch.device(config.device).type:
        case "cpu":
            return _cpu_runner(config, arena, embeddings)
        case "cuda":
            return _cuda_runner(config, info, arena, embeddings)
        case _:
            raise FailedPrecondition(f"device: {config.device} is not supported")


def _cpu_runner(config: Config, arena: Arena, embeddings: Arena | None) -> Runner:
    """The plain modules earn their place first; what makes them fast is then held to the same logits."""
    from engine.attention.paged_numba import PagedNumba
    from engine.models.packing import prepare_for_cpu

    model, _ = load_model(config.model, config.dtype)
    plain = ModelRunner(model, arena, config.layers_per_group, embeddings=embeddings)
    expected_NV = verify(plain)
    if model.dtype not in SUPPORTED_DTYPES:
        return plain
    prepare_for_cpu(model, threads=config.threads)
    fast = ModelRunner(model, arena, config.layers_per_group, PagedNumba(), embeddings)
    verify(fast, expected_NV)
    return fast


def _cuda_runner(config: Config, info: ModelInfo, arena: Arena, embeddings: Arena | None) -> Runner:
    from engine.cuda_runner import CudaRunner
    from engine.kv.device_arena import DeviceArena

    if not isinstance(arena, DeviceArena):
        raise FailedPrecondition("device: cuda needs KV memory on the device")
    sizes = {"layers_per_group": config.layers_per_group, "max_model_len": info.max_model_len}
    return CudaRunner.load(config.model, config.dtype, arena, embeddings=embeddings, **sizes)
