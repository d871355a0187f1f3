"""Compile the CPU kernels once, at install: the default model and every codec run all of them, in each dtype.

What is compiled lies in the user's cache folder (`engine.base.jit`), so that a worker starts in seconds and no codec
keeps its first transfer waiting. Skipped work is no error: a worker compiles what it does not find.
"""

import time
from pathlib import Path

from engine.executors.torch import Config, TorchExecutor
from engine.kv.arena import Arena
from engine.kv.schema import CacheSchema
from engine.models.checkpoint import ensure_default_model
from engine.models.info import describe, schema_for
from kv_transfer.codecs import CodecSet
from kv_transfer.profiles import packaged
from kv_transfer.warm_up import warm_up

DTYPES = ("bfloat16", "float32")


def main() -> None:
    path = ensure_default_model()
    for dtype in DTYPES:
        schema = schema_for(describe(path), dtype)
        for what, compile_all in (("engine", _compile_engine), ("codecs", _compile_codecs)):
            started_s = time.monotonic()
            compile_all(path, schema)
            print(f"{dtype} {what}: {time.monotonic() - started_s:.1f} s")


def _compile_engine(path: Path, schema: CacheSchema) -> None:
    """A model is verified as it is loaded."""
    TorchExecutor(Config(model=path, dtype=schema.kv.dtype), Arena(schema, columns=1))


def _compile_codecs(_: Path, schema: CacheSchema) -> None:
    codecs = CodecSet(schema.kv, packaged(schema.model))
    for name in codecs.names():
        warm_up(codecs, name)


if __name__ == "__main__":
    main()
