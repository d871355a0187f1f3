"""Machine code from Python loops, compiled at first use and kept on disk: for kernels of the engine and of codecs.

    @inlined                        a primitive: plain Python for a reader or a test, machine code inside a kernel
    def rotate(bits): ...

    @cache
    def kernel():                   made when it is first needed, so that importing its module costs nothing
        return compiled(_kernel)

numba is imported by the first `compiled`, not by this module: a router that lists codecs never loads it. Kernels run
without the GIL, in one thread unless `parallel`, and by IEEE's rules unless `fastmath` names the exceptions.
"""

import hashlib
import inspect
import threading
from collections.abc import Callable, Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar

from engine.base.folders import default_cache_dir

Function = TypeVar("Function", bound=Callable[..., Any])
Kernel = Callable[..., Any]

_MARK: Final = "__triptych_inlined__"
_setting_the_folder = threading.Lock()  # numba reads it from its configuration, which all threads share


def inlined(function: Function) -> Function:
    """Let kernels call this function, by its global name or as a closure's variable. Unchanged for everyone else."""
    setattr(function, _MARK, True)
    return function


def compiled(
    function: Callable[..., Any], *, parallel: bool = False, fastmath: Collection[str] = frozenset()
) -> Kernel:
    """Compile on first call, or load what an earlier process compiled: 3 s or 30 ms for a parallel loop.

    Integers wrap around, dividing by zero gives what IEEE says, and no index is checked.
    """
    import numba

    for primitive in _primitives(function):
        _let_kernels_call(primitive)
    options = {"nogil": True, "fastmath": set(fastmath) or False, "parallel": parallel, "error_model": "numpy"}
    folder = str(_cache_dir(Path(inspect.getfile(function)).parent))
    config: Any = numba.config  # its settings come from the environment, so mypy sees none
    with _setting_the_folder:
        chosen = config.CACHE_DIR
        config.CACHE_DIR = chosen or folder
        try:
            return _jit(function, cache=True, **options)
        except RuntimeError:  # nowhere to write: a read-only machine compiles at each start
            return _jit(function, **options)
        finally:
            config.CACHE_DIR = chosen


def _jit(function: Kernel, **options: Any) -> Kernel:
    import numba

    dispatcher: Kernel = numba.njit(**options)(function)
    return dispatcher


def _primitives(function: Kernel) -> Iterator[Kernel]:
    """Every `inlined` function that this one names, and those that they name."""
    named = inspect.getclosurevars(function)
    for value in (*named.nonlocals.values(), *named.globals.values()):
        if getattr(value, _MARK, False):
            yield value
            yield from _primitives(value)


@cache
def _let_kernels_call(primitive: Kernel) -> None:
    """Once per function: numba would keep every further copy as a candidate to try."""
    import numba.extending

    numba.extending.register_jitable(error_model="numpy")(primitive)


@cache
def _cache_dir(package: Path) -> Path:
    """One folder per version of a kernel's package: numba itself notices a change of the kernel's own file only."""
    import numpy as np

    digest = hashlib.sha256()
    for file in (Path(__file__), *sorted(package.glob("*.py"))):
        digest.update(file.read_bytes())
    return default_cache_dir() / "kernels" / f"{digest.hexdigest()[:16]}-{np.__version__}"
