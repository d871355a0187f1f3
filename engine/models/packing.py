"""Makes a loaded model fast on the CPU without changing what it computes, module by module and in place.

    decoder layers      -> FusedLayer     where the layer is of the common shape (`fused_layer`)
    other RMS norms     -> FusedNorm      one pass instead of seven torch calls
    other nn.Linear     -> CpuLinear      few rows: our kernel, at the memory's speed; many rows: oneDNN

oneDNN's own packed layout was measured too. It makes torch's product of one row a third faster (22 -> 15 ms for the
layers of SmolLM2-135M), but our kernel on plain rows is a third faster still, and 512 rows gain nothing; so there is
one copy of the weights, row by row as the checkpoint has them, in huge pages (14.0 -> 11.2 ms a step: a thread that
reads 20 GB/s asks for five million small pages a second). Originals are dropped one layer at a time.

Every successor first proves, on random input, that it gives what its original gives; one that does not, and any module
of another shape, is left alone. `model_runner.verify` afterwards compares the whole model once more.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from engine.attention import use_paged_attention
from engine.kernels import SUPPORTED_DTYPES, Array, array_of, matrix_unit, use_threads
from engine.kernels.few_rows import INPUTS_MULTIPLE, ROWS_MAX, few_rows
from engine.kernels.layer_parts import rms_norm

Kernel = Callable[..., None]

_FEW_ROWS = 2  # up to here reading the weights hides all arithmetic, and the matrix unit's setting up does not pay
# Of the root mean square. A layer's many roundings of bfloat16 make 1e-2; a wrong formula makes much more.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


def prepare_for_cpu(model: Any, *, threads: int) -> None:
    """Replace what can be computed faster. Call it on the thread that will run the model, once that is verified."""
    from engine.models.fused_layer import LayerFuser

    use_threads(threads)
    if model.dtype not in SUPPORTED_DTYPES:
        return
    use_paged_attention(model)
    memory = WeightMemory(model)
    with torch.inference_mode(), torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # the same choices at every start
        for successor_of in (LayerFuser(memory), FusedNorm.of, memory.linear):
            _replace(model, successor_of)


def _replace(model: nn.Module, successor_of: Callable[[nn.Module], nn.Module | None]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (successor := successor_of(child)) is not None:
                setattr(parent, name, successor)


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two results differ by rounding only. NaN and other shapes or types do not pass."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    difference = (actual.float() - expected.float()).norm()
    return bool(difference <= _TOLERANCE[expected.dtype] * expected.float().norm())


# -- matrix products ---------------------------------------------------------------------------------------------------
class CpuLinear(nn.Module):
    """x @ weight.T + bias. Legend: M rows, I inputs, O outputs."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        super().__init__()
        self._weight_OI = weight_OI.detach()
        self._bias_O = None if bias_O is None else bias_O.detach()
        self._weight = array_of(self._weight_OI)
        none_O = self._weight[0, :0]
        self._bias = none_O if self._bias_O is None else array_of(self._bias_O)
        self._nothing_to_add = none_O.reshape(0, 0)
        on_unit = weight_OI.dtype == torch.bfloat16 and matrix_unit.takes(*weight_OI.shape)
        self._few_rows: Kernel = few_rows()
        self._more_rows: Kernel = matrix_unit.tiled_product() if on_unit else self._few_rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_MI = x.reshape(-1, x.shape[-1])
        if len(x_MI) > ROWS_MAX:
            return F.linear(x, self._weight_OI, self._bias_O)
        return self._product(x_MI, self._nothing_to_add).view(*x.shape[:-1], len(self._weight_OI))

    def plus(self, x_MI: torch.Tensor, other_MO: torch.Tensor) -> torch.Tensor:
        """forward(x) + other."""
        if len(x_MI) > ROWS_MAX:
            return F.linear(x_MI, self._weight_OI, self._bias_O).add_(other_MO)
        return self._product(x_MI, array_of(other_MO))

    def _product(self, x_MI: torch.Tensor, other: Array) -> torch.Tensor:
        out_MO = torch.empty(len(x_MI), len(self._weight_OI), dtype=x_MI.dtype)
        kernel = self._few_rows if len(x_MI) <= _FEW_ROWS else self._more_rows
        kernel(array_of(x_MI.contiguous()), self._weight, self._bias, other, array_of(out_MO))
        return out_MO


class WeightMemory:
    """Room for the weights of all products of a model, in one piece, so that the system can back it with huge pages."""

    def __init__(self, model: nn.Module) -> None:
        linears = [module for module in model.modules() if type(module) is nn.Linear and takes(module.weight)]
        # numpy asks for huge pages wherever an array is 4 MiB or more, torch nowhere.
        size = sum(linear.weight.nbytes for linear in linears)
        self.room = torch.from_numpy(np.empty(size, np.uint8))  # what is left; whoever built in vain puts it back

    def keep(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """A copy in here."""
        taken, self.room = self.room[: weight_OI.nbytes], self.room[weight_OI.nbytes :]
        return taken.view(weight_OI.dtype).view(weight_OI.shape).copy_(weight_OI)

    def joined(self, *linears: nn.Linear) -> CpuLinear:
        """Several products of one input as one."""
        weight_OI = self.keep(torch.cat([linear.weight.detach() for linear in linears]))
        if all(linear.bias is None for linear in linears):
            return CpuLinear(weight_OI, None)
        return CpuLinear(weight_OI, torch.cat([_bias_of(linear) for linear in linears]))

    def linear(self, module: nn.Module) -> CpuLinear | None:
        """The successor of a product, or None: not an nn.Linear, or a shape that the kernels do not take."""
        if type(module) is not nn.Linear or not takes(module.weight):
            return None
        x = torch.randn(_FEW_ROWS + 1, module.in_features).to(module.weight.dtype)
        linear = CpuLinear(module.weight.detach(), module.bias)
        agrees = close(linear(x), module(x)) and close(linear(x[:1]), module(x[:1]))
        return self.joined(module) if agrees else None


def _bias_of(linear: nn.Linear) -> torch.Tensor:
    weight_OI, bias_O = linear.weight.detach(), linear.bias
    return weight_OI.new_zeros(len(weight_OI)) if bias_O is None else bias_O.detach()


def takes(weight_OI: torch.Tensor) -> bool:
    plain = weight_OI.device.type == "cpu" and weight_OI.is_contiguous()
    return plain and weight_OI.dtype in SUPPORTED_DTYPES and weight_OI.shape[1] % INPUTS_MULTIPLE == 0


# -- norms -------------------------------------------------------------------------------------------------------------
class FusedNorm(nn.Module):
    """x / rms(x) * weight in one pass. The weight is float32 and includes what a family adds to it (Gemma: 1)."""

    def __init__(self, weight_E: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight_E = weight_E.detach().float().numpy()
        self.epsilon = np.float32(epsilon)
        self._kernel = rms_norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(x.shape, dtype=x.dtype)
        x_TE = x.reshape(-1, x.shape[-1])
        self._kernel(array_of(x_TE.contiguous()), self.weight_E, self.epsilon, array_of(out.view(x_TE.shape)))
        return out

    @classmethod
    def of(cls, module: nn.Module) -> "FusedNorm | None":
        """The successor of a module that is called an RMS norm and behaves as one."""
        weight, epsilon = getattr(module, "weight", None), _epsilon(module)
        if "RMSNorm" not in type(module).__name__ or weight is None or weight.ndim != 1 or epsilon is None:
            return None
        if weight.dtype not in SUPPORTED_DTYPES:
            return None
        x = torch.randn(3, len(weight)).to(weight.dtype)
        for offset in (0.0, 1.0):
            norm = cls(weight.float() + offset, epsilon)
            if close(norm(x), module(x)):
                return norm
        return None


def _epsilon(module: nn.Module) -> float | None:
    """Under the names that transformers' families give it."""
    for name in ("variance_epsilon", "eps"):
        if isinstance(value := getattr(module, name, None), float):
            return value
    return None
