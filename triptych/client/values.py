"""What a server says, as values: no message of the wire leaves this package."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from control_plane.wire import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """`top`: (token id, log-probability) of the likeliest tokens, likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """How a request was served."""

    prefill_worker: str = ""
    decode_worker: str = ""
    encode_workers: tuple[str, ...] = ()
    codec: str = ""
    level: int = 0  # of the codec
    kv_bytes_raw: int = 0
    kv_bytes_wire: int = 0
    attempts: int = 0
    cached_tokens: int = 0  # of the prompt, that were not computed
    skipped_tokens: int = 0  # of the prompt, whose KV was where it is needed already
    image_tokens: int = 0  # of the prompt, that stand for images
    image_hits: int = 0  # images that did not have to be looked at again
    cached_image_tokens: int = 0  # of the prompt, that stand for those
    phase_ms: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, message: pb.RequestStats) -> Self:
        return cls(
            prefill_worker=message.prefill_worker,
            decode_worker=message.decode_worker,
            encode_workers=tuple(message.encode_workers),
            codec=message.codec,
            level=message.level,
            kv_bytes_raw=message.kv_bytes_raw,
            kv_bytes_wire=message.kv_bytes_wire,
            attempts=message.attempts,
            cached_tokens=message.cached_tokens,
            skipped_tokens=message.skipped_tokens,
            image_tokens=message.image_tokens,
            image_hits=message.image_hits,
            cached_image_tokens=message.cached_image_tokens,
            phase_ms=dict(message.phase_ms),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What is new of one choice, or of the prompt's log-probabilities.

    With `finish_reason` it is the choice's last, with `stats` the request's. `stop` says which of the caller's own stop
    strings or tokens it was.
    """

    id: str  # what `abort` takes
    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    stop: int | str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0  # of this choice, so far
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # of some; those of the first token are nobody's
    prompt_token_ids: tuple[int, ...] = ()
    stats: Stats | None = None

    @classmethod
    def of(cls, message: pb.GenerateResponse) -> Self:
        stop = message.WhichOneof("matched_stop")
        return cls(
            id=message.id,
            index=message.index,
            text=message.text,
            token_ids=tuple(message.token_ids),
            finish_reason=message.finish_reason or None,
            stop=None if stop is None else getattr(message, stop),
            logprobs=_logprobs(message.output_logprobs) if message.HasField("output_logprobs") else (),
            prompt_tokens=message.prompt_tokens,
            completion_tokens=message.completion_tokens,
            prompt_logprobs=_logprobs(message.input_logprobs) if message.HasField("input_logprobs") else (),
            prompt_token_ids=tuple(message.prompt_token_ids),
            stats=Stats.of(message.stats) if message.HasField("stats") else None,
        )


def _logprobs(lists: pb.OutputLogProbs | pb.InputLogProbs) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(token, logprob, tuple(zip(top.token_ids, top.values, strict=True)))
        for token, logprob, top in zip(lists.token_ids, lists.token_logprobs, lists.top_logprobs, strict=True)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop: int | str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer: its deltas joined."""

    id: str
    choices: tuple[Choice, ...]
    prompt_tokens: int
    completion_tokens: int  # of all choices
    stats: Stats
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # from the second token on: nothing came before the first
    prompt_token_ids: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the first choice."""
        return self.choices[0].token_ids

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Self:
        """All of one request, in order."""
        by_choice: dict[int, list[Delta]] = {}
        for delta in deltas:
            by_choice.setdefault(delta.index, []).append(delta)
        choices = tuple(_choice(index, by_choice[index]) for index in sorted(by_choice))
        return cls(
            id=deltas[0].id,
            choices=choices,
            prompt_tokens=deltas[0].prompt_tokens,
            completion_tokens=sum(len(choice.token_ids) for choice in choices),
            stats=deltas[-1].stats or Stats(),
            prompt_logprobs=_chained(delta.prompt_logprobs for delta in deltas),
            prompt_token_ids=deltas[0].prompt_token_ids,
        )


def _choice(index: int, deltas: Sequence[Delta]) -> Choice:
    return Choice(
        index=index,
        text="".join(delta.text for delta in deltas),
        token_ids=_chained(delta.token_ids for delta in deltas),
        finish_reason=deltas[-1].finish_reason or "",
        stop=deltas[-1].stop,
        logprobs=_chained(delta.logprobs for delta in deltas),
    )


def _chained(parts: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(item for part in parts for item in part)


# -- facts -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    model: str
    max_model_len: int  # tokens of prompt and output together
    max_prompt_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_choices: int
    max_logprobs: int
    model_dtype: str
    max_images: int  # in one conversation; 0: it takes text only

    @classmethod
    def of(cls, message: pb.GetModelInfoResponse) -> Self:
        return cls(
            model=message.model,
            max_model_len=message.max_model_len,
            max_prompt_tokens=message.max_prompt_tokens,
            vocab_size=message.vocab_size,
            eos_token_ids=tuple(message.eos_token_ids),
            max_choices=message.max_choices,
            max_logprobs=message.max_logprobs,
            model_dtype=message.model_dtype,
            max_images=message.max_images,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    version: str
    wire_version: int
    uptime_s: float
    model: str
    block_size: int
    codecs: tuple[str, ...]  # that a request may name
    codec: str  # of requests that name none
    ready: bool
    active_requests: int
    max_requests: int

    @classmethod
    def of(cls, message: pb.GetServerInfoResponse) -> Self:
        return cls(
            version=message.version,
            wire_version=message.wire_version,
            uptime_s=message.uptime_seconds,
            model=message.model,
            block_size=message.block_size,
            codecs=tuple(message.codecs),
            codec=message.codec,
            ready=message.ready,
            active_requests=message.active_requests,
            max_requests=message.max_requests,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """Columns are blocks of KV, of all layers; cached ones are among the free."""

    id: str
    name: str
    roles: tuple[str, ...]
    state: str
    connected: bool
    running: int
    waiting: int
    free_columns: int
    total_columns: int
    cached_columns: int

    @classmethod
    def of(cls, message: pb.WorkerLoad) -> Self:
        return cls(
            id=message.id,
            name=message.name,
            roles=tuple(message.roles),
            state=message.state,
            connected=message.connected,
            running=message.num_running_reqs,
            waiting=message.num_waiting_reqs,
            free_columns=message.free_columns,
            total_columns=message.total_columns,
            cached_columns=message.cached_columns,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """`running`, `waiting` and `kv_usage` (a part of 1) are sums over the workers that serve."""

    workers: tuple[WorkerLoad, ...]
    active_requests: int  # of this router, wherever they are
    running: int
    waiting: int
    kv_usage: float

    @classmethod
    def of(cls, message: pb.GetLoadsResponse) -> Self:
        return cls(
            workers=tuple(map(WorkerLoad.of, message.workers)),
            active_requests=message.active_requests,
            running=message.num_running_reqs,
            waiting=message.num_waiting_reqs,
            kv_usage=message.token_usage,
        )
