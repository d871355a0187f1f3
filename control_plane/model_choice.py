"""Which model an option names, for processes that must not load it. No torch, no transformers.

"oracle"            no weights: oracle_schema, or SmolLM2's KV shape for paced workers
"smollm2"           the default checkpoint, converted at install
"demo-vlm"          the same with eyes (`engine.models.demo_vlm`), put together at first use
anything else       a checkpoint directory, a .gguf file, or an org/name of the hub (`engine.models.resolve`)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from control_plane.options import (
    MODEL_DEFAULT,
    MODEL_DEMO,
    MODEL_ORACLE,
    Dtype,
    EngineOptions,
    ExecutorKind,
    OptionError,
)
from engine.base.errors import InvalidArgument
from engine.executors.oracle import OracleExecutor, oracle_schema
from engine.executors.paced import smollm2_schema
from engine.kv.schema import CacheSchema
from engine.models.checkpoint import Progress, ensure_default_model
from engine.models.demo_vlm.assemble import ensure_demo_vlm
from engine.models.info import describe, schema_for
from engine.models.resolve import is_hub_id, resolve_model
from engine.vision.info import VisionInfo, embedding_schema

_NAMED: Final[Mapping[str, Callable[..., Path]]] = {MODEL_DEFAULT: ensure_default_model, MODEL_DEMO: ensure_demo_vlm}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """Everything but the weights. `path` is None for the oracle; `dtype` is what KV and weights are computed in."""

    name: str
    path: Path | None
    dtype: str
    schema: CacheSchema
    vision: VisionInfo | None = None  # what it makes of images; None: it reads text only
    embedding_schema: CacheSchema | None = None  # what one row of an image's embedding holds
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]


def choose_model(options: EngineOptions, progress: Progress = lambda _: None) -> ModelChoice:
    """Reads files, and may convert or download: not for an event loop. Raises `OptionError` on what is no model."""
    if options.model == MODEL_ORACLE:
        return _oracle(options)
    try:
        ensure = _NAMED.get(options.model)
        path = ensure(progress=progress) if ensure else resolve_model(options.model, progress)
        info = describe(path)
    except InvalidArgument as error:
        raise OptionError("model", error.message.removeprefix("model: ")) from error
    dtype = info.dtype if options.dtype is Dtype.AUTO else options.dtype.value
    return ModelChoice(
        name=options.model if is_hub_id(options.model) else info.name,  # the cache's folder is named by a revision
        path=path,
        dtype=dtype,
        schema=schema_for(info, dtype),
        vision=info.vision,
        embedding_schema=embedding_schema(info.vision, dtype) if info.vision is not None else None,
        vocab_size=info.vocab_size,
        max_model_len=min(options.max_model_len or info.max_model_len, info.max_model_len),
        eos_token_ids=info.eos_token_ids,
    )


def _oracle(options: EngineOptions) -> ModelChoice:
    schema = smollm2_schema() if options.executor is ExecutorKind.PACED else oracle_schema()
    defaults = OracleExecutor.Config()
    return ModelChoice(
        name=MODEL_ORACLE,
        path=None,
        dtype=schema.kv.dtype,
        schema=schema,
        vocab_size=defaults.vocab_size,
        max_model_len=options.max_model_len or 8_192,
        eos_token_ids=(),
    )
