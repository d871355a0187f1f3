"""The edge's half of a request's life: one `Submit`, its tokens, its one ending; for every client protocol alike.

    HTTP or gRPC handler --open--> Edge --Submit, Stop, Cancel--> core
                         <--next-- RequestStream <--PromptScored, TokensReady, Ended-- core

An entry lives from `Submit` until the core's `Ended`, also when its client left long before: only the core knows when
the workers hold nothing more. A client that does not read costs at most `unread_tokens_max` ids; then its request is
cancelled. The core never waits for a client (DESIGN section 2, rule 4; reliability C10).

What does not belong here: parsing (`validation`), reading (`request_stream`), text (`choice`), what times are good
enough (`slo`), protocols (`http`, `grpc`), placement (`core`).
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from control_plane.router.access.tenants import EVERYBODY, Tenant
from control_plane.router.answers.choice import Choice
from control_plane.router.answers.request_stream import RequestStream
from control_plane.router.answers.slo import UNJUDGED, SloVerdict, Times
from control_plane.router.media.reader import HeldImages
from control_plane.router.requests import (
    Cancel,
    Ended,
    PromptScored,
    RequestStats,
    ResetCache,
    Stop,
    Submit,
    SubmitAll,
    TokensReady,
    WorkerView,
)
from control_plane.router.text.stop_strings import StopMatcher, StopStrings
from control_plane.router.text.vocabulary import ModelCard, Vocabulary
from control_plane.router.validation.fields import refuse, word
from control_plane.router.validation.validator import ValidatedRequest
from engine.base import limits
from engine.base.errors import InvalidArgument, ResourceExhausted, Status, TriptychError

log = logging.getLogger("triptych.router")

Deliver = Callable[[Submit | SubmitAll | Stop | Cancel | ResetCache], None]
Labels = tuple[tuple[str, str], ...]
ID_PREFIXES: Final = ("chatcmpl-", "cmpl-")  # of ids in answers over HTTP


class RouterState(Protocol):
    """What /ready, /admin and /metrics read from the core. Nothing here writes."""

    @property
    def ready(self) -> bool:
        """Every role that a request needs has a serving worker."""

    @property
    def in_flight(self) -> int: ...

    @property
    def images_waiting(self) -> int:
        """Requests whose images wait for an encoder."""

    def workers(self) -> Sequence[WorkerView]: ...

    def counters(self) -> Mapping[tuple[str, Labels], float]:
        """Counters by (name, labels), all labels of one name alike, every value from a bounded set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One ended request in figures, for metrics and the log. Times run from `Submit`; None: it never came so far."""

    outcome: str  # "stop", "length", or a Status
    tenant: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_us: int | None = None
    second_us: int | None = None
    per_token_us: float | None = None  # mean after the first token
    total_us: int | None = None
    stats: RequestStats | None = None
    transfer_id: str = ""  # as workers know the last transfer of its KV; told to our log only
    slo: SloVerdict = UNJUDGED


class Observer(Protocol):
    """Who counts. Called once per request, and once per reader that was too slow."""

    def request_ended(self, record: RequestRecord) -> None: ...

    def slow_reader(self) -> None: ...


@dataclass(slots=True)
class _Call:
    """What a client asked for at once: one request, or one for each of its prompts. Its id is that of the first, also
    when that one has ended."""

    id: str
    stop_strings: Mapping[tuple[str, ...], StopStrings]  # by the request's: its prompts have the same
    live: dict[int, RequestStream] = field(default_factory=dict)
    opened: int = 0

    def next_id(self, mint_id: Callable[[], str]) -> str:
        self.opened += 1
        return self.id if self.opened == 1 else mint_id()


@dataclass(frozen=True, slots=True)
class Config:
    requests_max: int = limits.ROUTER_REQUESTS_MAX
    unread_tokens_max: int = limits.UNREAD_TOKENS_MAX
    read_grace_ms: int = limits.READ_GRACE_MS
    retry_after_ms: int = limits.RETRY_AFTER_MS


class Edge:
    """All live requests of this router's clients. Everything here runs on one event loop."""

    def __init__(
        self,
        config: Config,
        *,
        card: ModelCard,
        vocabulary: Vocabulary,
        deliver: Deliver,
        observer: Observer,
        clock_us: Callable[[], int],
        mint_id: Callable[[], str],
    ) -> None:
        self.config = config
        self.card = card
        self.vocabulary = vocabulary
        self._deliver = deliver
        self._observer = observer
        self._clock_us = clock_us
        self._mint_id = mint_id
        self._keys = itertools.count(1)
        self._live: dict[int, RequestStream] = {}
        self._calls: dict[str, _Call] = {}  # by the id that a client was given
        self._call_of: dict[int, _Call] = {}  # by the key of a live request
        self._images: dict[int, HeldImages] = {}  # of live requests that have some
        self._over: TriptychError | None = None  # set: the core says nothing more, whatever is submitted

    @property
    def in_flight(self) -> int:
        return len(self._live)

    @property
    def read_grace_ms(self) -> int:
        return self.config.read_grace_ms

    # -- from handlers -------------------------------------------------------------------------------------------------
    def check_room(self, requests: int = 1) -> None:
        """Raises what `open` would raise. For handlers, before they read a body that nobody will look at."""
        if self._over is not None:
            raise self._over
        if len(self._live) + requests > self.config.requests_max:
            raise ResourceExhausted(
                f"at most {self.config.requests_max} requests at a time", retry_after_ms=self.config.retry_after_ms
            )

    def open(self, request: ValidatedRequest) -> RequestStream:
        """Submit a request. Raises `ResourceExhausted`, or what `end_all` was told, before anything is started."""
        return self.open_all([request])[0]

    def open_all(self, requests: Sequence[ValidatedRequest]) -> list[RequestStream]:
        """Submit the requests of one client's call: there is room for all of them, or none is started."""
        try:
            self.check_room(len(requests))
        except TriptychError:
            for request in requests:
                request.release()
            raise
        call = _Call(self._mint_id(), {stop: StopStrings(stop) for stop in {request.stop for request in requests}})
        streams = [self._stream(request, call) for request in requests]
        submits = tuple(_submit(stream.key, request) for stream, request in zip(streams, requests, strict=True))
        self._deliver(submits[0] if len(submits) == 1 else SubmitAll(submits))
        return streams

    def abort(self, id: str, tenant: Tenant = EVERYBODY) -> None:
        """End a request by the id that its client was given, whichever protocol gave it. Ids that are unknown, or
        another tenant's, and requests that have ended are no error: the answer tells nobody which ids there are."""
        call = self._calls.get(_bare_id(id))
        for stream in tuple(call.live.values()) if call is not None else ():
            if tenant.admin or stream.request.tenant == tenant.name:
                stream.close("aborted by request")

    def refused(self, error: TriptychError, label: str, tenant: str = "") -> None:
        """Account for a request that never reached the core: every client's request is counted and logged once."""
        self._observer.request_ended(RequestRecord(outcome=error.status.value, tenant=tenant))
        field = error.field if isinstance(error, InvalidArgument) else None
        extra = {"status": error.status.value, "field": word(field or ""), "label": word(label), "tenant": tenant}
        log.info("request refused", extra=extra)

    def reset_cache(self) -> None:
        """Every worker forgets the cached KV that no request holds."""
        self._deliver(ResetCache())

    def stop(self, stream: RequestStream, choice: int) -> None:
        """Tell the core that this choice is over, unless the request has ended."""
        if stream.key in self._live:
            self._deliver(Stop(stream.key, choice))

    def cancel(self, stream: RequestStream) -> None:
        """Tell the core, unless it has already ended the request. The entry stays until the core's `Ended`."""
        if stream.key in self._live:
            self._deliver(Cancel(stream.key))

    # -- from the owner ------------------------------------------------------------------------------------------------
    def end_all(self, error: TriptychError) -> None:
        """The core has ended, in order or not: so does every request that it left, and all that still come."""
        self._over = error
        for stream in tuple(self._live.values()):
            self._end(stream, Ended(key=stream.key, error=error, stats=RequestStats()))

    # -- from the core -------------------------------------------------------------------------------------------------
    def on_output(self, output: TokensReady | PromptScored | Ended) -> None:
        """Take one output of the core. Never blocks, and never calls back into the core."""
        stream = self._live.get(output.key)
        if stream is None:  # only a core that broke its promise says more after `Ended`
            log.warning("output for a request that has ended key=%d", output.key)
        elif isinstance(output, TokensReady):
            stream.push(output, self._clock_us())
            if stream.unread_tokens > self.config.unread_tokens_max:
                self._drop_slow_reader(stream)
        elif isinstance(output, PromptScored):
            stream.push_scores(output)
        else:
            self._end(stream, output)

    def _drop_slow_reader(self, stream: RequestStream) -> None:
        self._observer.slow_reader()
        # In the loop's next turn: we are inside the core's step, and `Cancel` is an event of its own.
        asyncio.get_running_loop().call_soon(self.cancel, stream)
        stream.overflow()

    def _stream(self, request: ValidatedRequest, call: "_Call") -> RequestStream:
        """Pixels go to the core and are not kept here: who reads the answer may be long about it."""
        choices = self._choices(request, call.stop_strings[request.stop])
        key, kept = next(self._keys), request.without_pixels()
        stream = RequestStream(self, key, call.next_id(self._mint_id), kept, choices, self._clock_us())
        if request.held is not None:
            self._images[key] = request.held
        self._live[stream.key] = call.live[stream.key] = stream  # before `Submit`: the core may refuse it on the spot
        self._calls[call.id] = self._call_of[stream.key] = call
        return stream

    def _end(self, stream: RequestStream, ended: Ended) -> None:
        del self._live[stream.key]
        if stream.key in self._images:
            self._images.pop(stream.key).release()
        call = self._call_of.pop(stream.key)
        del call.live[stream.key]
        if not call.live:
            del self._calls[call.id]
        stream.ended_us = self._clock_us()
        stream.end(_in_clients_words(ended, stream.request))
        record = _record(stream, ended)
        self._observer.request_ended(record)
        if log.isEnabledFor(logging.INFO):
            log.info("request", extra=_log_line(stream, record))

    def _choices(self, request: ValidatedRequest, strings: StopStrings) -> list[Choice]:
        """One per `n`; they share nothing but the stop strings' automaton."""
        return [
            Choice(
                index,
                request,
                self.vocabulary.detokenizer(
                    self._silent_ids(request), skip_special_tokens=request.skip_special_tokens, prompt=request.token_ids
                ),
                StopMatcher(strings, include=request.include_stop) if request.stop else None,
            )
            for index in range(request.choices)
        ]

    def _silent_ids(self, request: ValidatedRequest) -> frozenset[int]:
        """What ends the text without being part of it; who asks for stop strings in the text gets stop tokens too."""
        if request.include_stop:
            return frozenset()
        eos = () if request.sampling.ignore_eos else self.card.eos_token_ids
        return frozenset((*eos, *request.sampling.stop_token_ids))


def _bare_id(id: str) -> str:
    """Of the id in an answer: over HTTP it says first what kind of answer it is."""
    for prefix in ID_PREFIXES:
        id = id.removeprefix(prefix)
    return id


def _submit(key: int, request: ValidatedRequest) -> Submit:
    return Submit(
        key=key,
        token_ids=request.token_ids,
        sampling=request.sampling,
        tenant=request.tenant,
        cache_salt=request.cache_salt,
        ttft_slo_ms=request.ttft_slo_ms,
        deadline_ms=request.deadline_ms,
        codec=request.codec,
        kl_budget=request.kl_budget,
        choices=request.choices,
        images=request.images,
        priority=request.priority,
    )


def _in_clients_words(ended: Ended, request: ValidatedRequest) -> Ended:
    """A worker finds a fault in the constraint; only we know in which of the fields for one the client wrote it."""
    error = ended.error
    if not (request.constraint_field and isinstance(error, InvalidArgument) and error.field == "constraint"):
        return ended
    return replace(ended, error=refuse(request.constraint_field, error.message.removeprefix("constraint: ")))


def _record(stream: RequestStream, ended: Ended) -> RequestRecord:
    times = Times.of(stream)
    return RequestRecord(
        outcome=_outcome(ended),
        tenant=stream.request.tenant,
        prompt_tokens=len(stream.request.token_ids),
        output_tokens=sum(stream.tokens),
        first_us=times.first_us,
        second_us=times.second_us,
        per_token_us=times.per_token_us,
        total_us=times.total_us,
        stats=ended.stats,
        transfer_id=ended.transfer_id,
        slo=SloVerdict.of(stream, times, ended.error),
    )


def _outcome(ended: Ended) -> str:
    if ended.error is not None:
        return ended.error.status.value
    return (ended.finish or Status.INTERNAL).value


def _log_line(stream: RequestStream, record: RequestRecord) -> dict[str, str | int | float | bool | None]:
    """Everything about a request that may be logged. Neither its prompt nor its output is."""
    stats = record.stats or RequestStats()
    return {
        "request_id": stream.id,
        "label": word(stream.request.label),
        "tenant": record.tenant,
        "status": record.outcome,
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": record.output_tokens,
        "cached_tokens": stats.cached_tokens,
        "image_tokens": stream.request.image_tokens,
        "image_hits": stats.image_hits,
        "first_ms": _ms(record.first_us),
        "second_ms": _ms(record.second_us),
        "total_ms": _ms(record.total_us),
        "slo_met": record.slo.met,
        "attempts": stats.attempts,
        "encode": word(",".join(dict.fromkeys(stats.encode_workers))),
        "prefill": word(stats.prefill_worker),
        "decode": word(stats.decode_worker),
        "transfer_id": record.transfer_id,
        "codec": word(stats.codec),
        "codec_level": stats.level,
        "kv_bytes_raw": stats.kv_bytes_raw,
        "kv_bytes_wire": stats.kv_bytes_wire,
    }


def _ms(duration_us: int | None) -> float | None:
    return None if duration_us is None else round(duration_us / 1000, 1)
