from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Refusal(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REFUSAL_UNSPECIFIED: _ClassVar[Refusal]
    FULL: _ClassVar[Refusal]
    WRONG_EPOCH: _ClassVar[Refusal]
    WRONG_SCHEMA: _ClassVar[Refusal]
    NOT_SERVING: _ClassVar[Refusal]
    INVALID: _ClassVar[Refusal]
REFUSAL_UNSPECIFIED: Refusal
FULL: Refusal
WRONG_EPOCH: Refusal
WRONG_SCHEMA: Refusal
NOT_SERVING: Refusal
INVALID: Refusal

class Hello(_message.Message):
    __slots__ = ("wire_version", "kind", "sender")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Hello.Kind]
        ROUTER_TO_WORKER: _ClassVar[Hello.Kind]
        ROUTER_TO_CONTROLLER: _ClassVar[Hello.Kind]
        WORKER_TO_CONTROLLER: _ClassVar[Hello.Kind]
        WORKER_TO_WORKER: _ClassVar[Hello.Kind]
    KIND_UNSPECIFIED: Hello.Kind
    ROUTER_TO_WORKER: Hello.Kind
    ROUTER_TO_CONTROLLER: Hello.Kind
    WORKER_TO_CONTROLLER: Hello.Kind
    WORKER_TO_WORKER: Hello.Kind
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    kind: Hello.Kind
    sender: str
    def __init__(self, wire_version: _Optional[int] = ..., kind: _Optional[_Union[Hello.Kind, str]] = ..., sender: _Optional[str] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_p", "seed", "max_tokens", "stop_token_ids", "ignore_eos", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias_ids", "logit_bias_values", "allowed_token_ids", "bad_words", "constraint_kind", "constraint_text", "min_tokens", "logprobs", "prompt_logprobs")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    CONSTRAINT_KIND_FIELD_NUMBER: _ClassVar[int]
    CONSTRAINT_TEXT_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    seed: int
    max_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias_ids: _containers.RepeatedScalarFieldContainer[int]
    logit_bias_values: _containers.RepeatedScalarFieldContainer[float]
    allowed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    bad_words: _containers.RepeatedCompositeFieldContainer[TokenList]
    constraint_kind: str
    constraint_text: str
    min_tokens: int
    logprobs: int
    prompt_logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: bool = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias_ids: _Optional[_Iterable[int]] = ..., logit_bias_values: _Optional[_Iterable[float]] = ..., allowed_token_ids: _Optional[_Iterable[int]] = ..., bad_words: _Optional[_Iterable[_Union[TokenList, _Mapping]]] = ..., constraint_kind: _Optional[str] = ..., constraint_text: _Optional[str] = ..., min_tokens: _Optional[int] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ...) -> None: ...

class TokenList(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("logprob", "rank", "top_ids", "top_logprobs")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    rank: int
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprob: _Optional[float] = ..., rank: _Optional[int] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class PromptImage(_message.Message):
    __slots__ = ("key", "run_starts", "run_tokens", "grid_rows", "grid_columns")
    KEY_FIELD_NUMBER: _ClassVar[int]
    RUN_STARTS_FIELD_NUMBER: _ClassVar[int]
    RUN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GRID_ROWS_FIELD_NUMBER: _ClassVar[int]
    GRID_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    run_starts: _containers.RepeatedScalarFieldContainer[int]
    run_tokens: _containers.RepeatedScalarFieldContainer[int]
    grid_rows: int
    grid_columns: int
    def __init__(self, key: _Optional[bytes] = ..., run_starts: _Optional[_Iterable[int]] = ..., run_tokens: _Optional[_Iterable[int]] = ..., grid_rows: _Optional[int] = ..., grid_columns: _Optional[int] = ...) -> None: ...

class Prefill(_message.Message):
    __slots__ = ("request", "attempt", "token_ids", "prompt_tokens", "sampling", "deadline_ms", "tenant", "choices", "priority", "images")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    request: int
    attempt: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_tokens: int
    sampling: Sampling
    deadline_ms: int
    tenant: str
    choices: _containers.RepeatedScalarFieldContainer[int]
    priority: int
    images: _containers.RepeatedCompositeFieldContainer[PromptImage]
    def __init__(self, request: _Optional[int] = ..., attempt: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., deadline_ms: _Optional[int] = ..., tenant: _Optional[str] = ..., choices: _Optional[_Iterable[int]] = ..., priority: _Optional[int] = ..., images: _Optional[_Iterable[_Union[PromptImage, _Mapping]]] = ...) -> None: ...

class Reserve(_message.Message):
    __slots__ = ("request", "attempt", "epoch", "schema_digest", "token_ids", "prompt_tokens", "sampling", "deadline_ms", "tenant", "choices", "codec", "priority", "level", "tables", "images")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    request: int
    attempt: int
    epoch: int
    schema_digest: bytes
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_tokens: int
    sampling: Sampling
    deadline_ms: int
    tenant: str
    choices: _containers.RepeatedCompositeFieldContainer[ChoiceAttempt]
    codec: str
    priority: int
    level: int
    tables: int
    images: _containers.RepeatedCompositeFieldContainer[PromptImage]
    def __init__(self, request: _Optional[int] = ..., attempt: _Optional[int] = ..., epoch: _Optional[int] = ..., schema_digest: _Optional[bytes] = ..., token_ids: _Optional[_Iterable[int]] = ..., prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., deadline_ms: _Optional[int] = ..., tenant: _Optional[str] = ..., choices: _Optional[_Iterable[_Union[ChoiceAttempt, _Mapping]]] = ..., codec: _Optional[str] = ..., priority: _Optional[int] = ..., level: _Optional[int] = ..., tables: _Optional[int] = ..., images: _Optional[_Iterable[_Union[PromptImage, _Mapping]]] = ...) -> None: ...

class ChoiceAttempt(_message.Message):
    __slots__ = ("request", "choice")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    request: int
    choice: int
    def __init__(self, request: _Optional[int] = ..., choice: _Optional[int] = ...) -> None: ...

class Bind(_message.Message):
    __slots__ = ("request", "attempt", "target_attempt", "target", "target_address", "transfer_id", "target_epoch", "skip_tokens", "codec", "choices", "level", "tables")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TARGET_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    TARGET_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    TARGET_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SKIP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    request: int
    attempt: int
    target_attempt: int
    target: str
    target_address: str
    transfer_id: bytes
    target_epoch: int
    skip_tokens: int
    codec: str
    choices: _containers.RepeatedCompositeFieldContainer[ChoiceAttempt]
    level: int
    tables: int
    def __init__(self, request: _Optional[int] = ..., attempt: _Optional[int] = ..., target_attempt: _Optional[int] = ..., target: _Optional[str] = ..., target_address: _Optional[str] = ..., transfer_id: _Optional[bytes] = ..., target_epoch: _Optional[int] = ..., skip_tokens: _Optional[int] = ..., codec: _Optional[str] = ..., choices: _Optional[_Iterable[_Union[ChoiceAttempt, _Mapping]]] = ..., level: _Optional[int] = ..., tables: _Optional[int] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("request", "attempt")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request: int
    attempt: int
    def __init__(self, request: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class Quiesce(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResetCache(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Encode(_message.Message):
    __slots__ = ("request", "attempt", "schema_digest", "key", "features", "width", "height", "deadline_ms", "priority")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_DIGEST_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    request: int
    attempt: int
    schema_digest: bytes
    key: bytes
    features: int
    width: int
    height: int
    deadline_ms: int
    priority: int
    def __init__(self, request: _Optional[int] = ..., attempt: _Optional[int] = ..., schema_digest: _Optional[bytes] = ..., key: _Optional[bytes] = ..., features: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., priority: _Optional[int] = ...) -> None: ...

class Pixels(_message.Message):
    __slots__ = ("request", "attempt", "offset", "data")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    request: int
    attempt: int
    offset: int
    data: bytes
    def __init__(self, request: _Optional[int] = ..., attempt: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class RouterToWorker(_message.Message):
    __slots__ = ("sequence", "prefill", "reserve", "bind", "abort", "quiesce", "reset_cache", "encode", "pixels")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    BIND_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    QUIESCE_FIELD_NUMBER: _ClassVar[int]
    RESET_CACHE_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FIELD_NUMBER: _ClassVar[int]
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    prefill: Prefill
    reserve: Reserve
    bind: Bind
    abort: Abort
    quiesce: Quiesce
    reset_cache: ResetCache
    encode: Encode
    pixels: Pixels
    def __init__(self, sequence: _Optional[int] = ..., prefill: _Optional[_Union[Prefill, _Mapping]] = ..., reserve: _Optional[_Union[Reserve, _Mapping]] = ..., bind: _Optional[_Union[Bind, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., quiesce: _Optional[_Union[Quiesce, _Mapping]] = ..., reset_cache: _Optional[_Union[ResetCache, _Mapping]] = ..., encode: _Optional[_Union[Encode, _Mapping]] = ..., pixels: _Optional[_Union[Pixels, _Mapping]] = ...) -> None: ...

class NearTurn(_message.Message):
    __slots__ = ("request", "attempt", "context_tokens", "cached_tokens")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request: int
    attempt: int
    context_tokens: int
    cached_tokens: int
    def __init__(self, request: _Optional[int] = ..., attempt: _Optional[int] = ..., context_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("request", "attempt", "transfer_id", "epoch", "skip_tokens")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SKIP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request: int
    attempt: int
    transfer_id: bytes
    epoch: int
    skip_tokens: int
    def __init__(self, request: _Optional[int] = ..., attempt: _Optional[int] = ..., transfer_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., skip_tokens: _Optional[int] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("request", "attempt", "reason")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request: int
    attempt: int
    reason: Refusal
    def __init__(self, request: _Optional[int] = ..., attempt: _Optional[int] = ..., reason: _Optional[_Union[Refusal, str]] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("request", "attempt", "position", "token_id", "finish", "choice", "logprobs")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    request: int
    attempt: int
    position: int
    token_id: int
    finish: str
    choice: int
    logprobs: TokenLogprobs
    def __init__(self, request: _Optional[int] = ..., attempt: _Optional[int] = ..., position: _Optional[int] = ..., token_id: _Optional[int] = ..., finish: _Optional[str] = ..., choice: _Optional[int] = ..., logprobs: _Optional[_Union[TokenLogprobs, _Mapping]] = ...) -> None: ...

class PromptScored(_message.Message):
    __slots__ = ("request", "attempt", "start", "logprobs")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    request: int
    attempt: int
    start: int
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    def __init__(self, request: _Optional[int] = ..., attempt: _Optional[int] = ..., start: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ...) -> None: ...

class Committed(_message.Message):
    __slots__ = ("request", "attempt", "codec", "bytes_raw", "bytes_wire", "transfer_us", "level")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    BYTES_RAW_FIELD_NUMBER: _ClassVar[int]
    BYTES_WIRE_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_US_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    request: int
    attempt: int
    codec: str
    bytes_raw: int
    bytes_wire: int
    transfer_us: int
    level: int
    def __init__(self, request: _Optional[int] = ..., attempt: _Optional[int] = ..., codec: _Optional[str] = ..., bytes_raw: _Optional[int] = ..., bytes_wire: _Optional[int] = ..., transfer_us: _Optional[int] = ..., level: _Optional[int] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("requests", "attempts", "positions", "token_ids", "finishes", "logprobs")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISHES_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedScalarFieldContainer[int]
    attempts: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finishes: bytes
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    def __init__(self, requests: _Optional[_Iterable[int]] = ..., attempts: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., finishes: _Optional[bytes] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ...) -> None: ...

class Relocate(_message.Message):
    __slots__ = ("request", "attempt", "reason", "token_ids", "target_attempt")
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        REASON_UNSPECIFIED: _ClassVar[Relocate.Reason]
        QUIESCING: _ClassVar[Relocate.Reason]
        PREEMPTED: _ClassVar[Relocate.Reason]
        TRANSFER_FAILED: _ClassVar[Relocate.Reason]
    REASON_UNSPECIFIED: Relocate.Reason
    QUIESCING: Relocate.Reason
    PREEMPTED: Relocate.Reason
    TRANSFER_FAILED: Relocate.Reason
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TARGET_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request: int
    attempt: int
    reason: Relocate.Reason
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    target_attempt: int
    def __init__(self, request: _Optional[int] = ..., attempt: _Optional[int] = ..., reason: _Optional[_Union[Relocate.Reason, str]] = ..., token_ids: _Optional[_Iterable[int]] = ..., target_attempt: _Optional[int] = ...) -> None: ...

class AttemptFailed(_message.Message):
    __slots__ = ("request", "attempt", "status", "reason")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request: int
    attempt: int
    status: str
    reason: str
    def __init__(self, request: _Optional[int] = ..., attempt: _Optional[int] = ..., status: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker", "epoch", "state", "roles", "free_columns", "total_columns", "running", "waiting", "waiting_tokens", "step_us", "attempts", "counters", "lent_columns", "held", "tasks", "cached_columns", "prefix_hit_tokens", "prefix_query_tokens", "encoding", "free_embedding_columns", "embedding_columns", "encode_us", "tower_loaded")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    WORKER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    FREE_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_US_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    LENT_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    FREE_EMBEDDING_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_US_FIELD_NUMBER: _ClassVar[int]
    TOWER_LOADED_FIELD_NUMBER: _ClassVar[int]
    worker: str
    epoch: int
    state: str
    roles: _containers.RepeatedScalarFieldContainer[str]
    free_columns: int
    total_columns: int
    running: int
    waiting: int
    waiting_tokens: int
    step_us: int
    attempts: int
    counters: _containers.ScalarMap[str, int]
    lent_columns: int
    held: int
    tasks: int
    cached_columns: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    encoding: int
    free_embedding_columns: int
    embedding_columns: int
    encode_us: int
    tower_loaded: bool
    def __init__(self, worker: _Optional[str] = ..., epoch: _Optional[int] = ..., state: _Optional[str] = ..., roles: _Optional[_Iterable[str]] = ..., free_columns: _Optional[int] = ..., total_columns: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., step_us: _Optional[int] = ..., attempts: _Optional[int] = ..., counters: _Optional[_Mapping[str, int]] = ..., lent_columns: _Optional[int] = ..., held: _Optional[int] = ..., tasks: _Optional[int] = ..., cached_columns: _Optional[int] = ..., prefix_hit_tokens: _Optional[int] = ..., prefix_query_tokens: _Optional[int] = ..., encoding: _Optional[int] = ..., free_embedding_columns: _Optional[int] = ..., embedding_columns: _Optional[int] = ..., encode_us: _Optional[int] = ..., tower_loaded: bool = ...) -> None: ...

class PixelsWanted(_message.Message):
    __slots__ = ("request", "attempt", "offset", "length")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    request: int
    attempt: int
    offset: int
    length: int
    def __init__(self, request: _Optional[int] = ..., attempt: _Optional[int] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class Encoded(_message.Message):
    __slots__ = ("request", "attempt", "cached")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    request: int
    attempt: int
    cached: bool
    def __init__(self, request: _Optional[int] = ..., attempt: _Optional[int] = ..., cached: bool = ...) -> None: ...

class ImagesWanted(_message.Message):
    __slots__ = ("request", "attempt", "epoch", "images", "transfer_ids")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_IDS_FIELD_NUMBER: _ClassVar[int]
    request: int
    attempt: int
    epoch: int
    images: _containers.RepeatedScalarFieldContainer[int]
    transfer_ids: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, request: _Optional[int] = ..., attempt: _Optional[int] = ..., epoch: _Optional[int] = ..., images: _Optional[_Iterable[int]] = ..., transfer_ids: _Optional[_Iterable[bytes]] = ...) -> None: ...

class WorkerToRouter(_message.Message):
    __slots__ = ("sequence", "near_turn", "reserved", "refused", "first_token", "committed", "tokens", "relocate", "failed", "status", "prompt_scored", "pixels_wanted", "encoded", "images_wanted")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    NEAR_TURN_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    RELOCATE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_SCORED_FIELD_NUMBER: _ClassVar[int]
    PIXELS_WANTED_FIELD_NUMBER: _ClassVar[int]
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    IMAGES_WANTED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    near_turn: NearTurn
    reserved: Reserved
    refused: Refused
    first_token: FirstToken
    committed: Committed
    tokens: Tokens
    relocate: Relocate
    failed: AttemptFailed
    status: WorkerStatus
    prompt_scored: PromptScored
    pixels_wanted: PixelsWanted
    encoded: Encoded
    images_wanted: ImagesWanted
    def __init__(self, sequence: _Optional[int] = ..., near_turn: _Optional[_Union[NearTurn, _Mapping]] = ..., reserved: _Optional[_Union[Reserved, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., first_token: _Optional[_Union[FirstToken, _Mapping]] = ..., committed: _Optional[_Union[Committed, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., relocate: _Optional[_Union[Relocate, _Mapping]] = ..., failed: _Optional[_Union[AttemptFailed, _Mapping]] = ..., status: _Optional[_Union[WorkerStatus, _Mapping]] = ..., prompt_scored: _Optional[_Union[PromptScored, _Mapping]] = ..., pixels_wanted: _Optional[_Union[PixelsWanted, _Mapping]] = ..., encoded: _Optional[_Union[Encoded, _Mapping]] = ..., images_wanted: _Optional[_Union[ImagesWanted, _Mapping]] = ...) -> None: ...

class WorkerInfo(_message.Message):
    __slots__ = ("worker", "name", "address", "epoch", "state", "roles", "model", "schema_digest", "block_size_tokens", "total_columns", "max_model_len", "wire_version", "offers", "embedding_digest", "embedding_columns")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    OFFERS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    name: str
    address: str
    epoch: int
    state: str
    roles: _containers.RepeatedScalarFieldContainer[str]
    model: str
    schema_digest: bytes
    block_size_tokens: int
    total_columns: int
    max_model_len: int
    wire_version: int
    offers: _containers.RepeatedCompositeFieldContainer[CodecOffer]
    embedding_digest: bytes
    embedding_columns: int
    def __init__(self, worker: _Optional[str] = ..., name: _Optional[str] = ..., address: _Optional[str] = ..., epoch: _Optional[int] = ..., state: _Optional[str] = ..., roles: _Optional[_Iterable[str]] = ..., model: _Optional[str] = ..., schema_digest: _Optional[bytes] = ..., block_size_tokens: _Optional[int] = ..., total_columns: _Optional[int] = ..., max_model_len: _Optional[int] = ..., wire_version: _Optional[int] = ..., offers: _Optional[_Iterable[_Union[CodecOffer, _Mapping]]] = ..., embedding_digest: _Optional[bytes] = ..., embedding_columns: _Optional[int] = ...) -> None: ...

class CodecOffer(_message.Message):
    __slots__ = ("codec", "tables", "level", "costs")
    CODEC_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    codec: str
    tables: int
    level: int
    costs: _containers.RepeatedCompositeFieldContainer[LevelCost]
    def __init__(self, codec: _Optional[str] = ..., tables: _Optional[int] = ..., level: _Optional[int] = ..., costs: _Optional[_Iterable[_Union[LevelCost, _Mapping]]] = ...) -> None: ...

class LevelCost(_message.Message):
    __slots__ = ("level", "bits_per_element", "kl")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    BITS_PER_ELEMENT_FIELD_NUMBER: _ClassVar[int]
    KL_FIELD_NUMBER: _ClassVar[int]
    level: int
    bits_per_element: float
    kl: float
    def __init__(self, level: _Optional[int] = ..., bits_per_element: _Optional[float] = ..., kl: _Optional[float] = ...) -> None: ...

class Register(_message.Message):
    __slots__ = ("info", "highest_term")
    INFO_FIELD_NUMBER: _ClassVar[int]
    HIGHEST_TERM_FIELD_NUMBER: _ClassVar[int]
    info: WorkerInfo
    highest_term: int
    def __init__(self, info: _Optional[_Union[WorkerInfo, _Mapping]] = ..., highest_term: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("info",)
    INFO_FIELD_NUMBER: _ClassVar[int]
    info: WorkerInfo
    def __init__(self, info: _Optional[_Union[WorkerInfo, _Mapping]] = ...) -> None: ...

class WorkerToController(_message.Message):
    __slots__ = ("sequence", "register", "heartbeat")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    REGISTER_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    register: Register
    heartbeat: Heartbeat
    def __init__(self, sequence: _Optional[int] = ..., register: _Optional[_Union[Register, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("term", "lease_ms")
    TERM_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    term: int
    lease_ms: int
    def __init__(self, term: _Optional[int] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class ControllerToWorker(_message.Message):
    __slots__ = ("sequence", "welcome")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    welcome: Welcome
    def __init__(self, sequence: _Optional[int] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ...) -> None: ...

class RegisterRouter(_message.Message):
    __slots__ = ("router", "highest_term")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    HIGHEST_TERM_FIELD_NUMBER: _ClassVar[int]
    router: str
    highest_term: int
    def __init__(self, router: _Optional[str] = ..., highest_term: _Optional[int] = ...) -> None: ...

class RouterToController(_message.Message):
    __slots__ = ("sequence", "register")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    REGISTER_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    register: RegisterRouter
    def __init__(self, sequence: _Optional[int] = ..., register: _Optional[_Union[RegisterRouter, _Mapping]] = ...) -> None: ...

class WorkerTable(_message.Message):
    __slots__ = ("term", "workers")
    TERM_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    term: int
    workers: _containers.RepeatedCompositeFieldContainer[WorkerInfo]
    def __init__(self, term: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[WorkerInfo, _Mapping]]] = ...) -> None: ...

class ControllerToRouter(_message.Message):
    __slots__ = ("sequence", "table")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    table: WorkerTable
    def __init__(self, sequence: _Optional[int] = ..., table: _Optional[_Union[WorkerTable, _Mapping]] = ...) -> None: ...
