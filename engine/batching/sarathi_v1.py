"""SARATHI: one prompt chunk in each step, of a size that fills the tiles beside it, and decodes ride along.

Agrawal et al., "SARATHI: Efficient LLM Inference by Piggybacking Decodes with Chunked Prefills", arXiv 2308.16369.
A *decode-maximal* batch is one chunk of C tokens and up to B - 1 decodes, with C + B - 1 a multiple of the GEMM tile:
the chunk makes the step compute-bound, so the weights it reads serve the decodes almost for free. It is a method for
throughput of requests that are all there: no bound on latency, one prompt at a time.

    step      d d d d | chunk ............ |        B - 1 + C = `step_tokens`, rounded down to tiles

The paper fixes C and lets the number of decodes vary, which breaks the alignment that it asks for (one token more than
256 costs it 32 %); here the total is fixed and C is what the decodes of this step leave. With B - 1 decodes they agree.
Its successor, with a bound on latency and any number of prompts, is `sarathi`.
"""

from dataclasses import dataclass
from typing import ClassVar

from engine.batching import Batch, BatchingConfig, Chunk, batchings, oldest_chunk, prefill_budget
from engine.commands import StepPlan


@batchings.register("sarathi-v1")
class SarathiV1:
    """Decode-maximal batching."""

    paper: ClassVar[str] = "SARATHI: Efficient LLM Inference by Piggybacking Decodes (arXiv 2308.16369)"
    loses: ClassVar[str] = "short prompts wait for every chunk of a long one; no bound on the time between tokens"
    needs: ClassVar[tuple[str, ...]] = ()
    composes_with: ClassVar[str] = "everything"

    @dataclass(frozen=True, kw_only=True)
    class Config(BatchingConfig):
        """Nothing beyond what every method is told. The bound and the model are ignored."""

    def __init__(self, config: Config) -> None:
        tile_tokens = min(config.tile_tokens, config.step_tokens)
        self._step_tokens = config.step_tokens - config.step_tokens % tile_tokens
        self._align_tokens = config.align_tokens

    def chunks(self, batch: Batch) -> list[Chunk]:
        budget = prefill_budget(self._step_tokens, len(batch.decode_contexts))
        return oldest_chunk(batch, budget, self._align_tokens)

    def observe(self, plan: StepPlan, step_us: int) -> None:
        """Nothing to learn: the budget is fixed."""
