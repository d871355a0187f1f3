"""Loops that torch has no operator for, compiled by numba at first use: the CPU's decode path.

    lanes             bf16 and SIMD lanes as numba sees them
    paged_attention   one query per sequence over pages, in place
    layer_parts       what lies between a decoder layer's matrix products

Kernels take numpy views of torch's memory (`array_of`), never copy, allocate next to nothing and run without the GIL.
Their parallel loops and torch's share one OpenMP pool (numba finds the library that torch has loaded), so the two take
turns on the same threads instead of fighting for cores.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt
import torch

from engine.models.checkpoint import default_cache_dir

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
    """Compile on first call, or load what an earlier process compiled: 3 s or 30 ms for a parallel loop."""
    options = {"nogil": True, "fastmath": set(FLAGS), "parallel": parallel, "error_model": "numpy"}
    with_cache = _config.CACHE_DIR
    _config.CACHE_DIR = with_cache or str(_cache_dir())
    try:
        return _jit(function, cache=True, **options)
    except RuntimeError:  # nowhere to write: a read-only machine compiles at each start
        return _jit(function, **options)
    finally:
        _config.CACHE_DIR = with_cache


def _jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    dispatcher: Callable[..., Any] = numba.njit(**options)(function)
    return dispatcher


@cache
def _cache_dir() -> Path:
    """One folder per version of this package: numba itself would notice a change of the kernel's own file only."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return default_cache_dir() / "kernels" / f"{digest.hexdigest()[:16]}-{np.__version__}"
