"""What `prepare_for_cpu` puts in a model's place: the same numbers, the same tokens, and refusal where it cannot."""

import numpy as np
import pytest
import torch
from torch import nn

from engine.attention.paged_numba import PagedNumba
from engine.kernels import array_of, matrix_unit
from engine.kernels.few_rows import few_rows
from engine.model_runner import ModelRunner, verify
from engine.models.fused_layer import FusedLayer, LayerFuser
from engine.models.packing import CpuLinear, FusedNorm, WeightMemory, close, prepare_for_cpu
from tests.engine import tiny_models as tiny

pytestmark = pytest.mark.timeout(120)  # kernels compile once per version, then come from the cache

FUSED = {"llama", "mistral", "qwen2"}  # the families whose layers are of the common shape


def kinds(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules()}


# -- parts -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 16), (64, 96), (160, 64)])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 13, 16, 17])
def test_products(rows: int, shape: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    linear = nn.Linear(shape[1], shape[0], bias=bias).to(dtype)
    x, other = torch.randn(rows, shape[1]).to(dtype), torch.randn(rows, shape[0]).to(dtype)
    with torch.inference_mode():
        fast = CpuLinear(linear.weight, linear.bias)
        exact = linear.double()(x.double())
        torch.testing.assert_close(fast(x).double(), exact, rtol=1e-2, atol=2e-2)
        torch.testing.assert_close(fast.plus(x, other).double(), exact + other.double(), rtol=1e-2, atol=3e-2)


@pytest.mark.skipif(not matrix_unit.takes(32, 32), reason="no AMX")
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_the_matrix_unit_gives_what_the_lanes_give(rows: int) -> None:
    torch.manual_seed(rows)
    x, weight, bias, other = (
        torch.randn(*shape).to(torch.bfloat16) for shape in ((rows, 96), (64, 96), (64,), (rows, 64))
    )
    outs = [torch.empty(rows, 64, dtype=torch.bfloat16) for _ in range(2)]
    for kernel, out in zip((few_rows(), matrix_unit.tiled_product()), outs, strict=True):
        kernel(array_of(x), array_of(weight), array_of(bias), array_of(other), array_of(out))
    torch.testing.assert_close(outs[0], outs[1])


def test_a_norm_is_recognised_by_what_it_computes() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.abs().mean(-1, keepdim=True) * self.weight

    with torch.inference_mode():
        assert FusedNorm.of(OddRMSNorm()) is None
        norm = tiny.tiny_model().model.norm
        assert isinstance(FusedNorm.of(norm), FusedNorm)


def test_a_layer_of_another_shape_is_left_alone() -> None:
    with torch.inference_mode():
        model = tiny.tiny_model(tiny.tiny_config("olmo2"))
        fuse = LayerFuser(WeightMemory(model))
        assert fuse(model.model.layers[0]) is None
        assert fuse(nn.Linear(4, 4)) is None


def test_close_does_not_pass_what_is_no_number_or_of_another_kind() -> None:
    x = torch.ones(4)
    assert close(x, x)
    assert not close(torch.full((4,), torch.nan), x)
    assert not close(x[:3], x)
    assert not close(x.bfloat16(), x)
    assert not close(x * 1.001, x)


def test_kernels_lose_no_nan() -> None:
    """A NaN in the logits is how a broken sequence is found."""
    linear = CpuLinear(torch.randn(64, 32).bfloat16(), None)
    x = torch.randn(4, 32).bfloat16()
    x[2, 5] = torch.nan
    with torch.inference_mode():
        assert np.flatnonzero(linear(x).isnan().all(dim=1)).tolist() == [2]


# -- models ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_prepared_model_gives_transformers_tokens(family: str) -> None:
    """fp32, greedy: three prompts, in chunks and then together, through kernels only."""
    model, reference = (tiny.tiny_model(tiny.tiny_config(family)) for _ in range(2))
    arena = tiny.tiny_arena(config=model.config)
    expected_NV = verify(ModelRunner(model, arena))
    prepare_for_cpu(model, threads=1)
    runner = ModelRunner(model, arena, backend=PagedNumba())
    verify(runner, expected_NV)
    assert (FusedLayer in kinds(model)) == (family in FUSED)

    prompts = [tiny.prompt_of(length, salt) for salt, length in enumerate((5, 13, 22))]
    tables = tiny.scattered_tables(arena, blocks=10, count=len(prompts))
    running = [tiny.Running(*item) for item in zip(range(3), map(list, prompts), tables, strict=True)]
    while len(running[-1].output) < 10:
        tiny.step(runner, [(sequence, 6) for sequence in running])
    for sequence, prompt in zip(running, prompts, strict=True):
        assert sequence.output == tiny.generate(reference, prompt, len(sequence.output))


def test_a_prepared_model_knows_its_layers() -> None:
    """The runner announces layers by hooks on them: fused ones must be found, in order."""
    model = tiny.tiny_model()
    prepare_for_cpu(model, threads=1)
    runner = ModelRunner(model, tiny.tiny_arena(), layers_per_group=2, backend=PagedNumba())
    sequence = tiny.Running(0, tiny.prompt_of(9), tiny.scattered_tables(runner.arena, 4, 1)[0])
    announced: list[tuple[int, int]] = []
    tiny.step(runner, [(sequence, 9)], lambda start, end: announced.append((start, end)))
    assert announced == [(0, 2), (2, 3)]
