"""Loops that torch has no operator for, compiled by numba at first use: the CPU's decode path.

    lanes             bf16 and SIMD lanes as numba sees them
    paged_attention   one query per sequence over pages, in place
    layer_parts       what lies between a decoder layer's matrix products

Kernels take numpy views of torch's memory (`array_of`), never copy, allocate next to nothing and run without the GIL.
Their parallel loops and torch's share one OpenMP pool (numba finds the library that torch has loaded), so the two take
turns on the same threads instead of fighting for cores.
"""

from collections.abc import Callable
from typing import Any, Final

import numba
import numpy.typing as npt
import torch

from engine.base import jit

# Everything of `fastmath` but the licence to ignore NaN and infinity: a NaN must reach the logits, where the sampler
# sees it and fails that one sequence.
FLAGS: Final = frozenset({"reassoc", "contract", "arcp", "nsz", "afn"})

# numba has no bfloat16: kernels see its bits and widen them.
_BITS: Final = {torch.bfloat16: torch.uint16, torch.float32: torch.float32}
SUPPORTED_DTYPES: Final = frozenset(_BITS)

_config: Any = numba.config  # its settings come from the environment, so mypy sees none
Array = npt.NDArray[Any]


def array_of(tensor: torch.Tensor) -> Array:
    """The same memory as numpy sees it: float32, or uint16 that holds the bits of bfloat16."""
    return tensor.view(_BITS[tensor.dtype]).numpy()


def use_threads(threads: int) -> None:
    """How many threads the calling thread's kernels run on: like `torch.set_num_threads`, and to be called with it.

    OpenMP comes first because torch brings it; with another layer the idle pool of one would spin beside the other.
    """
    _config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
    numba.set_num_threads(min(threads, _config.NUMBA_NUM_THREADS))


def compiled(function: Callable[..., Any], *, parallel: bool = False) -> Callable[..., Any]:
    """`engine.base.jit.compiled`, with the liberties that attention and matrix products may take."""
    return jit.compiled(function, parallel=parallel, fastmath=FLAGS)
