"""Compile the CPU kernels once, at install: loading the default model in each dtype runs all of them.

What is compiled lies in the user's cache folder (`engine.kernels`), so that a worker starts in seconds. Skipped work is
no error: a worker compiles what it does not find.
"""

import time

from engine.executors.torch import Config, TorchExecutor
from engine.kv.arena import Arena
from engine.models.checkpoint import ensure_default_model
from engine.models.info import describe, schema_for

DTYPES = ("bfloat16", "float32")


def main() -> None:
    path = ensure_default_model()
    for dtype in DTYPES:
        started_s = time.monotonic()
        arena = Arena(schema_for(describe(path), dtype), columns=1)
        TorchExecutor(Config(model=path, dtype=dtype), arena)
        print(f"{dtype}: {time.monotonic() - started_s:.1f} s")


if __name__ == "__main__":
    main()
