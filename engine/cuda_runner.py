"""What an accelerator adds to the runner: captured decode steps, and marks that tell copy streams what is computed.

    pure decode step      -> a captured graph, if there is one for its size
    any other             -> ModelRunner, layer groups announced behind a mark on the engine's stream

Every step ends with the stream idle: columns change hands between steps, and no kernel of an earlier owner may then be
under way (`engine.kv.device_arena`).
"""

from pathlib import Path

import torch

from engine.attention.paged_varlen import PagedVarlen
from engine.base.errors import FailedPrecondition
from engine.commands import StepPlan
from engine.cuda_graphs import Capture, CudaCapture, DecodeGraphs
from engine.executors import LayersComputed
from engine.kv.arena import Arena
from engine.kv.device_arena import DeviceArena
from engine.model_runner import ModelRunner, StepLogits, verify
from engine.models.checkpoint import load_model


class CudaRunner:
    """A `ModelRunner` over a `DeviceArena`, with graphs for its decode steps."""

    def __init__(self, runner: ModelRunner, arena: DeviceArena, graphs: DecodeGraphs | None) -> None:
        self.runner = runner
        self._arena = arena
        self._graphs = graphs

    @classmethod
    def load(
        cls,
        model_path: Path,
        dtype: str,
        arena: DeviceArena,
        *,
        layers_per_group: int,
        max_model_len: int,
        embeddings: Arena | None = None,
    ) -> "CudaRunner":
        """The model on the arena's device, checked against its own eager forward with the attention that will run."""
        if not torch.cuda.is_available():
            raise FailedPrecondition("device cuda: torch finds no CUDA device on this machine")
        model, _ = load_model(model_path, dtype)
        model.to(arena.device)
        plain = ModelRunner(model, arena, layers_per_group)
        backend = PagedVarlen.choose(plain.kv)
        runner = ModelRunner(model, arena, layers_per_group, backend, embeddings)
        verify(runner, verify(plain))
        return cls(runner, arena, graphs_of(runner, arena, backend, CudaCapture(), max_model_len))

    def run(self, plan: StepPlan, on_layers: LayersComputed) -> StepLogits:
        logits_NV = None if self._graphs is None else self._graphs.run(plan)
        result = self._run_plain(plan, on_layers) if logits_NV is None else StepLogits(logits_NV, {})
        if self._arena.device.type == "cuda":
            torch.cuda.current_stream(self._arena.device).synchronize()
        return result

    def _run_plain(self, plan: StepPlan, on_layers: LayersComputed) -> StepLogits:
        def mark_and_announce(layer_start: int, layer_end: int) -> None:
            self._arena.mark_computed()
            on_layers(layer_start, layer_end)

        return self.runner.run(plan, mark_and_announce)


def graphs_of(
    runner: ModelRunner, arena: DeviceArena, backend: PagedVarlen, capture: Capture, max_model_len: int
) -> DecodeGraphs:
    """Tables of a graph are as wide as the longest sequence that this arena can hold."""
    blocks = min(-(-max_model_len // arena.block_size), arena.columns)
    config = DecodeGraphs.Config(blocks=blocks, spare_column=arena.spare_column)
    return DecodeGraphs(config, runner, backend, capture)
