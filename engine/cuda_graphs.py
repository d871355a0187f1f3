"""Decode steps as captured CUDA graphs: one launch instead of thousands, for batches of a few fixed sizes.

    plan of 5 decodes -> the graph for 8 rows:   | 5 sequences | 3 rows that stand for nobody |
                         inputs copied into its tensors -> replay -> logits of the first 5 rows

A row that stands for nobody is a sequence of one token in the arena's spare column, so the kernels run over valid
memory and no owned byte is touched. What a step must vary is data in tensors (tokens, positions, tables, lengths, rows
to write); everything else is baked in, which is why the runner has no hooks in a pure decode step (DESIGN 6).

A graph is captured when a batch of its size first comes. A model that cannot be captured (experts chosen by Python) is
served without graphs. Prefill and mixed steps never come here.

Legend: T rows of a graph, B blocks of the longest sequence it can hold, H kv heads, V vocabulary.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from engine.attention import StepAttention
from engine.attention.paged_kv import PagedKV, Span
from engine.attention.paged_varlen import Batch, PagedVarlen
from engine.commands import StepPlan
from engine.model_runner import ModelRunner

logger = logging.getLogger(__name__)

SIZES: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
WARM_UPS: Final = 3  # cuBLAS and the allocator settle in the first calls; a capture may not allocate workspaces

Forward = Callable[[], torch.Tensor]


class Capture(Protocol):
    """Records a computation over fixed tensors; the result runs it again and returns the same output tensor."""

    def __call__(self, forward: Forward) -> Forward: ...


class CudaCapture:
    """CUDA graphs that share one memory pool: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, forward: Forward) -> Forward:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = forward()
        self._pool = self._pool or graph.pool()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay


@dataclass(frozen=True, slots=True)
class Inputs:
    """The tensors that a graph reads, on the device and never replaced."""

    tokens_1T: torch.Tensor
    positions_1T: torch.Tensor
    rows_TH: torch.Tensor
    batch: Batch

    @classmethod
    def of_size(cls, size: int, kv: PagedKV, blocks: int, spare: Span) -> "Inputs":
        """Every row stands for nobody."""
        device = kv.device
        return cls(
            tokens_1T=torch.zeros((1, size), dtype=torch.long, device=device),
            positions_1T=torch.zeros((1, size), dtype=torch.long, device=device),
            rows_TH=kv.rows_of([spare] * size),
            batch=Batch(
                query_starts_N=torch.arange(size + 1, dtype=torch.int32, device=device),
                lengths_N=torch.ones(size, dtype=torch.int32, device=device),
                table_NB=torch.full((size, blocks), spare.table[0], dtype=torch.int32, device=device),
                longest_query=1,
                longest_key=blocks * kv.block_size,
            ),
        )

    def fill(self, kv: PagedKV, tokens: Sequence[int], positions: Sequence[int], spans: Sequence[Span]) -> None:
        """One row per span; every span is one token. After images its position is not its index."""
        columns = self.batch.table_NB.shape[1]
        table = [[*span.table[:columns], *[span.table[0]] * (columns - len(span.table))] for span in spans]
        for target, values in (
            (self.tokens_1T[0], tokens),
            (self.positions_1T[0], positions),
            (self.batch.lengths_N, [span.length for span in spans]),
            (self.batch.table_NB, table),
        ):
            target.copy_(torch.tensor(values, dtype=target.dtype), non_blocking=True)
        self.rows_TH.copy_(kv.rows_of(spans), non_blocking=True)


class DecodeGraphs:
    """The graphs of one runner. `blocks` bounds a sequence's table: the model's length, in blocks."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        blocks: int
        spare_column: int
        sizes: tuple[int, ...] = SIZES

    def __init__(self, config: Config, runner: ModelRunner, backend: PagedVarlen, capture: Capture) -> None:
        self._config = config
        self._runner = runner
        self._backend = backend
        self._capture = capture
        self._graphs: dict[int, tuple[Inputs, Forward]] = {}
        self._usable = backend.in_place  # a gather has another size in every step

    def run(self, plan: StepPlan) -> torch.Tensor | None:
        """logits_NV of a pure decode step, valid until the next call; None for a step that has no graph."""
        if not self._usable or not self._is_decode(plan):
            return None
        size = next((size for size in self._config.sizes if size >= len(plan.slices)), None)
        graph = None if size is None else self._graph(size)
        if graph is None:
            return None
        inputs, forward = graph
        self._fill(inputs, plan)
        with torch.inference_mode():
            return forward()[: len(plan.slices)]

    @staticmethod
    def _is_decode(plan: StepPlan) -> bool:
        return all(len(piece.token_ids) == 1 and not piece.is_prefill for piece in plan.slices)

    def _fill(self, inputs: Inputs, plan: StepPlan) -> None:
        size = inputs.tokens_1T.shape[1]
        spans = [Span(row, 1, piece.start, piece.block_table) for row, piece in enumerate(plan.slices)]
        nobody = [self._spare(row) for row in range(len(spans), size)]
        tokens = [piece.token_ids[0] for piece in plan.slices] + [0] * len(nobody)
        positions = [piece.start + piece.rope_delta for piece in plan.slices] + [0] * len(nobody)
        inputs.fill(self._runner.kv, tokens, positions, [*spans, *nobody])

    def _spare(self, row: int) -> Span:
        return Span(row=row, tokens=1, start=0, table=(self._config.spare_column,))

    def _graph(self, size: int) -> tuple[Inputs, Forward] | None:
        if size not in self._graphs:
            try:
                self._graphs[size] = self._captured(size)
            except RuntimeError:
                logger.warning("decode steps of this model cannot be captured as CUDA graphs", exc_info=True)
                self._usable = False
        return self._graphs.get(size)

    def _captured(self, size: int) -> tuple[Inputs, Forward]:
        kv = self._runner.kv
        inputs = Inputs.of_size(size, kv, self._config.blocks, self._spare(0))
        paged = StepAttention(kv, inputs.rows_TH, self._backend.over(kv, inputs.batch))
        kept_rows_N = torch.arange(size, device=kv.device)

        def forward() -> torch.Tensor:
            return self._runner.forward(inputs.tokens_1T, inputs.positions_1T, kept_rows_N, paged)

        with torch.inference_mode():
            return inputs, self._capture(forward)
