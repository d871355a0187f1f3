"""Which model an option names, for processes that must not load it. No torch, no transformers.

"oracle"            no weights: oracle_schema, or SmolLM2's KV shape for paced workers
"smollm2"           the default checkpoint, converted at install
anything else       a checkpoint directory, a .gguf file, or an org/name of the hub (`engine.models.resolve`)
"""

from dataclasses import dataclass
from pathlib import Path

from control_plane.options import MODEL_DEFAULT, MODEL_ORACLE, Dtype, EngineOptions, ExecutorKind, OptionError
from engine.base.errors import InvalidArgument
from engine.executors.oracle import OracleExecutor, oracle_schema
from engine.executors.paced import smollm2_schema
from engine.kv.schema import CacheSchema
from engine.models.checkpoint import Progress, ensure_default_model
from engine.models.info import describe, schema_for
from engine.models.resolve import is_hub_id, resolve_model


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """Everything but the weights. `path` is None for the oracle; `dtype` is what KV and weights are computed in."""

    name: str
    path: Path | None
    dtype: str
    schema: CacheSchema
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]


def choose_model(options: EngineOptions, progress: Progress = lambda _: None) -> ModelChoice:
    """Reads files, and may convert or download: not for an event loop. Raises `OptionError` on what is no model."""
    if options.model == MODEL_ORACLE:
        return _oracle(options)
    try:
        is_default = options.model == MODEL_DEFAULT
        path = ensure_default_model(progress=progress) if is_default else resolve_model(options.model, progress)
        info = describe(path)
    except InvalidArgument as error:
        raise OptionError("model", error.message.removeprefix("model: ")) from error
    dtype = info.dtype if options.dtype is Dtype.AUTO else options.dtype.value
    return ModelChoice(
        name=options.model if is_hub_id(options.model) else info.name,  # the cache's folder is named by a revision
        path=path,
        dtype=dtype,
        schema=schema_for(info, dtype),
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
