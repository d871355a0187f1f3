"""DecodeGraphs: replayed decode steps give the logits of the plain runner, whoever the rows stand for.

A stand-in for capture calls the recorded computation again over the same tensors, which is what a graph does; that
captured kernels do so is the accelerator's test (bench/gpu.py).
"""

from dataclasses import replace

import pytest
import torch

from engine.attention.paged_varlen import PagedVarlen, TorchVarlen
from engine.commands import StepPlan
from engine.cuda_graphs import DecodeGraphs, Forward
from engine.cuda_runner import CudaRunner
from engine.kv.device_arena import DeviceArena
from engine.model_runner import ModelRunner
from tests.engine.test_paged_varlen import FakeVarlenAttn
from tests.engine.tiny_models import Running, prompt_of, step, tiny_arena, tiny_config, tiny_model

BLOCK_SIZE, BLOCKS = 4, 8


class Recorder:
    """Counts captures; a replay may not see anything but the tensors that were there at the capture."""

    def __init__(self, *, fails: bool = False) -> None:
        self.captures = 0
        self._fails = fails

    def __call__(self, forward: Forward) -> Forward:
        self.captures += 1
        if self._fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        output = forward().clone()

        def replay() -> torch.Tensor:
            return output.copy_(forward())

        return replay


def graphs_of(
    capture: Recorder, page_multiple: int = 1, family: str = "llama"
) -> tuple[ModelRunner, DecodeGraphs, list[Running]]:
    """A runner with five prefilled sequences of different lengths, in columns neither in order nor adjacent."""
    config = tiny_config(family)
    model = tiny_model(config).to(torch.bfloat16)
    schema = tiny_arena(config=config, dtype="bfloat16").schema
    arena = DeviceArena(schema, columns=48, block_size=BLOCK_SIZE, device="cpu")
    arena.poison(range(48))
    runner = ModelRunner(model, arena)
    backend = PagedVarlen.choose(runner.kv, TorchVarlen(FakeVarlenAttn(page_multiple)))
    runner = ModelRunner(model, arena, backend=backend)
    settings = DecodeGraphs.Config(blocks=BLOCKS, spare_column=arena.spare_column, sizes=(1, 2, 4, 8))
    order = [(7 * column) % 48 for column in range(48)]
    running = [Running(n, prompt_of(3 + 4 * n, n), tuple(order[n * BLOCKS : n * BLOCKS + BLOCKS])) for n in range(5)]
    for sequence in running:
        step(runner, [(sequence, 64)])
    return runner, DecodeGraphs(settings, runner, backend, capture), running


def plan_of(running: list[Running]) -> StepPlan:
    return StepPlan(0, tuple(sequence.slice(1) for sequence in running))


def test_equal_to_the_plain_runner_at_every_size() -> None:
    recorder = Recorder()
    runner, graphs, running = graphs_of(recorder)
    for count in (1, 2, 3, 5, 4, 1):
        plan = plan_of(running[:count])
        replayed_NV = graphs.run(plan)
        assert replayed_NV is not None and replayed_NV.isfinite().all()
        got_NV = replayed_NV.clone()
        plain_NV = runner.run(plan, lambda start, end: None).sampled_NV
        torch.testing.assert_close(got_NV, plain_NV)
        for sequence, row_V, piece in zip(running, got_NV, plan.slices, strict=False):
            sequence.fed(piece)
            sequence.tokens.append(int(row_V.argmax()))
    assert recorder.captures == 4


def test_a_position_that_images_moved_is_replayed_there() -> None:
    """And nowhere else: neighbours keep theirs, and so does the same row in the next step."""
    runner, graphs, running = graphs_of(Recorder())
    plain = plan_of(running[:3])
    moved = StepPlan(0, (plain.slices[0], replace(plain.slices[1], rope_delta=-4), plain.slices[2]))
    expected_NV, at_index_NV = (runner.run(plan, lambda start, end: None).sampled_NV for plan in (moved, plain))
    assert not torch.allclose(expected_NV[1], at_index_NV[1], atol=0.1)
    for plan, rows_NV in ((plain, at_index_NV), (moved, expected_NV), (plain, at_index_NV)):
        replayed_NV = graphs.run(plan)
        assert replayed_NV is not None
        torch.testing.assert_close(replayed_NV, rows_NV)


def test_rows_that_stand_for_nobody_touch_no_owned_byte() -> None:
    runner, graphs, running = graphs_of(Recorder())
    owned = [column for sequence in running for column in sequence.table]
    others = sorted(set(range(48)) - set(owned))
    graphs.run(plan_of(running[:3]))
    assert (runner.arena.array[others] == 0xFF).all()


def test_steps_without_a_graph() -> None:
    _, graphs, running = graphs_of(Recorder())
    prefill = Running(9, prompt_of(6), tuple(range(2)))
    assert graphs.run(StepPlan(0, (running[0].slice(1), prefill.slice(4)))) is None
    assert graphs.run(plan_of([*running, *running])) is None  # ten sequences, the largest graph has eight rows


@pytest.mark.parametrize(
    ("fails", "page_multiple", "family", "tries"),
    [(True, 1, "llama", 1), (False, 1, "gemma2", 1), (False, 256, "llama", 0)],
)
def test_a_model_that_cannot_be_captured_is_served_without(
    fails: bool, page_multiple: int, family: str, tries: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Its forward refuses; a layer's soft cap is not the kernel's; its pages must be gathered, which has another size
    in every step."""
    recorder = Recorder(fails=fails)
    _, graphs, running = graphs_of(recorder, page_multiple, family)
    assert [graphs.run(plan_of(running[:2])) for _ in range(2)] == [None, None]
    assert recorder.captures == len(caplog.records) == tries


def test_layers_are_marked_before_they_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A codec thread may read as soon as it hears of a layer: its stream must know by then what to wait for."""
    runner, graphs, _ = graphs_of(Recorder())
    heard: list[str] = []
    assert isinstance(runner.arena, DeviceArena)
    monkeypatch.setattr(runner.arena, "mark_computed", lambda: heard.append("mark"))
    whole = CudaRunner(runner, runner.arena, graphs)
    prompt = Running(9, prompt_of(6), tuple(range(2)))
    whole.run(StepPlan(0, (prompt.slice(4),)), lambda start, end: heard.append(f"layers {start} to {end}"))
    assert heard == ["mark", "layers 0 to 3"]


def test_decodes_are_replayed_and_everything_else_is_run() -> None:
    recorder = Recorder()
    runner, graphs, running = graphs_of(recorder)
    assert isinstance(runner.arena, DeviceArena)
    whole = CudaRunner(runner, runner.arena, graphs)
    plan = plan_of(running[:3])
    logits = whole.run(plan, lambda start, end: None)
    assert recorder.captures == 1 and logits.scored_TV == {}
    torch.testing.assert_close(logits.sampled_NV, runner.run(plan, lambda start, end: None).sampled_NV)
