"""From a client's fields to a `ValidatedRequest`, or to one fixed sentence that names the field and the limit.

The vocabulary is vLLM's dialect of OpenAI's completions. Three kinds of field:

- served: read, checked, used;
- known and not served (`NOT_SERVED`): accepted only where the value changes nothing; anything else is refused, because
  answering as if the field were not there would be a wrong answer;
- unknown: accepted, counted, and named in the log once, because real clients send them. Not so inside our own
  `triptych` object, where an unknown key is a typo.

No error text repeats what the client sent, except the name of a misspelt `triptych` key. Prompts are never logged.

What does not belong here: HTTP, gRPC, whether there is room for the request, and how a group of fields is read
(`prompt`, `sampling_fields`, `constraint_fields`).
"""

import asyncio
import difflib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import msgspec

from control_plane.router import body as bodies
from control_plane.router.constraint_fields import NamedConstraint, read_constraint
from control_plane.router.fields import (
    Fields,
    boolean,
    integer,
    object_or_empty,
    optional_integer,
    optional_number,
    refuse,
    strings,
)
from control_plane.router.prompt import PromptEncoder, PromptFields
from control_plane.router.sampling_fields import read_sampling
from control_plane.router.side_thread import SideThread
from control_plane.router.vocabulary import ModelCard, Vocabulary
from engine.base import limits
from engine.base.errors import DeadlineExceeded, FrameError, InvalidArgument, NotFound
from engine.types import Constraint, SamplingParams

log = logging.getLogger("triptych.router")

SERVED: Final = frozenset(
    (
        *("model", "prompt", "max_tokens", "n", "best_of", "stream", "stream_options", "triptych", "user"),
        *("temperature", "top_p", "top_k", "min_p", "seed", "min_tokens", "ignore_eos", "stop_token_ids"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty"),
        *("logit_bias", "allowed_token_ids", "bad_words", "stop", "include_stop_str_in_output"),
        *("echo", "logprobs", "prompt_logprobs", "return_token_ids", "return_tokens_as_token_ids"),
        *("skip_special_tokens", "add_special_tokens", "truncate_prompt_tokens"),
        *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        *("priority", "cache_salt"),
    )
)

NOT_SERVED: Final[Mapping[str, tuple[Any, ...]]] = {
    # field -> values that ask for nothing; null always does
    "suffix": ("",),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "spaces_between_special_tokens": (True,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # without tools
    "functions": ([],),
    "logits_processors": ([],),
    "prompt_embeds": (),
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "vllm_xargs": ({},),
}

KNOWN: Final = SERVED | NOT_SERVED.keys()
STREAM_OPTIONS: Final = ("include_usage", "continuous_usage_stats")
TRIPTYCH_KEYS: Final = ("codec", "deadline_ms", "kl_budget")


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidatedRequest:
    """A request that can be served as it stands. Nothing below the edge checks these values again for clients' sake."""

    token_ids: tuple[int, ...]
    sampling: SamplingParams
    deadline_ms: int = limits.REQUEST_DEADLINE_MS  # what is left of it: reading and checking have had their share
    codec: str = ""  # how its KV travels; "": the deployment's default
    kl_budget: float | None = None  # nats per token that it may lose on the way; None: likewise
    tenant: str = ""  # who asks: capacity is shared out among tenants, cached KV never is
    cache_salt: str = ""  # divides its tenant's cached KV further
    ttft_slo_ms: int | None = None  # the first token is of no use after that
    tpot_slo_ms: int | None = None  # a target for each further one; judged, not enforced
    choices: int = 1
    priority: int = 0  # lower is earlier
    stop: tuple[str, ...] = ()
    include_stop: bool = False  # in the text
    skip_special_tokens: bool = True
    echo_text: str | None = None  # stands before every choice's text; None: no echo
    prompt_logprobs: int | None = None  # as a list of its own, beside what `echo` needs
    return_token_ids: bool = False
    tokens_as_ids: bool = False  # in lists of log-probabilities: "token_id:5" instead of the token's text
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    label: str = ""  # the client's own id: printed, never a key
    chat: bool = False  # it was asked for as a conversation, and is answered as one
    constraint_field: str = ""  # which of the fields for one holds the constraint: for whoever finds a fault in it


@dataclass(frozen=True, slots=True)
class Config:
    codecs: tuple[str, ...] = ("raw",)  # that a request may ask for
    inline_characters_max: int = limits.INLINE_CHARACTERS_MAX
    encodes_waiting_max: int = limits.ENCODES_WAITING_MAX
    constraint_checks_waiting_max: int = limits.CONSTRAINT_CHECKS_WAITING_MAX
    unknown_names_max: int = limits.UNKNOWN_NAMES_MAX
    deadline_ms_default: int = limits.REQUEST_DEADLINE_MS


CheckConstraint = Callable[[Constraint], None]
"""Raises `InvalidArgument`, in bounded time and memory, for a constraint that the engine could not obey."""


class UnknownFields:
    """Counts the fields we do not know and logs each name once. Names are the client's: bounded and escaped."""

    def __init__(self, count: Callable[[int], None], names_max: int) -> None:
        self._count = count
        self._names_max = names_max
        self._logged: set[str] = set()

    def note(self, names: Iterable[str]) -> None:
        names = list(names)
        if names:
            self._count(len(names))
        for name in names:
            short = name[:64]
            if short not in self._logged and len(self._logged) < self._names_max:
                self._logged.add(short)
                log.info("unknown request field accepted and ignored name=%r", short)


class Validator:
    """Checks in order of cost: shape first, then text to ids, then what depends on the number of ids, grammars last."""

    def __init__(
        self,
        config: Config,
        *,
        card: ModelCard,
        vocabulary: Vocabulary,
        draw_seed: Callable[[], int],
        count_unknown: Callable[[int], None],
        check_constraint: CheckConstraint,
        clock_us: Callable[[], int] | None = None,
    ) -> None:
        self.clock_us = clock_us or _loop_us  # whoever takes a request in reads it first: deadlines run from then
        self._config = config
        self._card = card
        self._vocabulary = vocabulary
        self._draw_seed = draw_seed
        self._check_constraint = check_constraint
        self._unknown = UnknownFields(count_unknown, config.unknown_names_max)
        self._prompts = PromptEncoder(
            card,
            vocabulary,
            inline_characters_max=config.inline_characters_max,
            waiting_max=config.encodes_waiting_max,
        )
        # Not the prompts' thread: a hostile grammar must not stand before other clients' prompts.
        self._checks = SideThread("check", waiting_max=config.constraint_checks_waiting_max, what="constraints")

    def close(self) -> None:
        self._prompts.close()
        self._checks.close()

    async def completion(self, body: bytes, *, label: str = "", arrived_us: int | None = None) -> ValidatedRequest:
        """The body of `POST /v1/completions`."""
        try:
            fields = bodies.decode_body_untrusted(body, KNOWN)
        except FrameError as error:
            message = bodies.ERRORS[error.reason]
            raise InvalidArgument(message, field=message.partition(":")[0]) from None
        return await self.validate(fields, label=label, arrived_us=arrived_us)

    async def validate(self, fields: Fields, *, label: str = "", arrived_us: int | None = None) -> ValidatedRequest:
        arrived_us = self.clock_us() if arrived_us is None else arrived_us
        self._unknown.note(sorted(fields.keys() - KNOWN))
        self._check_model(fields)
        refuse_not_served(fields)
        travel, deadline_ms = self._triptych(fields)
        answer = {**self._stream_options(fields), **read_answer(fields), "label": label}
        prompt_fields = PromptFields.read(fields)
        constraint = read_constraint(fields)
        wanted = self._sampling(fields)
        prompt = await self._prompts.encode(
            prompt_fields, output_tokens=_asked_tokens(fields), wait_ms=self._left_ms(arrived_us, deadline_ms)
        )
        request = ValidatedRequest(
            token_ids=prompt.token_ids,
            sampling=SamplingParams(
                max_tokens=self._max_tokens(fields, len(prompt.token_ids)),
                constraint=constraint.constraint if constraint is not None else None,
                **wanted,
            ),
            **travel,
            echo_text=prompt.echo_text,
            skip_special_tokens=prompt_fields.skip_special_tokens,
            constraint_field=constraint.field if constraint is not None else "",
            **answer,
        )
        check_fit(request)
        await self._check(constraint, self._left_ms(arrived_us, deadline_ms))
        return replace(request, deadline_ms=self._left_ms(arrived_us, deadline_ms))

    def _sampling(self, fields: Fields) -> dict[str, Any]:
        card, vocabulary = self._card, self._vocabulary
        return read_sampling(fields, vocabulary=vocabulary, vocab_size=card.vocab_size, draw_seed=self._draw_seed)

    def _left_ms(self, arrived_us: int, deadline_ms: int) -> int:
        left_ms = deadline_ms - (self.clock_us() - arrived_us) // 1_000
        if left_ms <= 0:
            raise DeadlineExceeded("the request's time ran out before it was started")
        return left_ms

    def _check_model(self, fields: Fields) -> None:
        model = fields.get("model")
        if model is not None and not isinstance(model, str):
            raise refuse("model", "must be a string")
        if model and model != self._card.name:
            raise NotFound("model: this model is not served here; GET /v1/models lists what is", field="model")

    def _stream_options(self, fields: Fields) -> dict[str, bool]:
        options = object_or_empty(fields, "stream_options")
        if options and not boolean(fields, "stream"):
            raise refuse("stream_options", "needs stream to be true")
        self._unknown.note(f"stream_options.{name}" for name in sorted(options.keys() - set(STREAM_OPTIONS)))
        include_usage, continuous_usage = (boolean(options, name, prefix="stream_options.") for name in STREAM_OPTIONS)
        return {"include_usage": include_usage, "continuous_usage": include_usage and continuous_usage}

    def _triptych(self, fields: Fields) -> tuple[dict[str, Any], int]:
        """How its KV travels, and how long it may take."""
        knobs = object_or_empty(fields, "triptych")
        for name in sorted(knobs.keys() - set(TRIPTYCH_KEYS)):
            raise _misspelt(name)
        codec = knobs.get("codec")
        if codec is not None and codec not in self._config.codecs:
            raise refuse("triptych.codec", f"must be one of: {', '.join(self._config.codecs)}")
        kl_budget = optional_number(knobs, "kl_budget", 0, limits.KL_BUDGET_MAX, prefix="triptych.")
        default_ms, most_ms = self._config.deadline_ms_default, limits.REQUEST_DEADLINE_MS_MAX
        deadline_ms = integer(knobs, "deadline_ms", default_ms, 1, most_ms, prefix="triptych.")
        return {"codec": codec or "", "kl_budget": kl_budget}, deadline_ms

    def _max_tokens(self, fields: Fields, prompt_tokens: int) -> int:
        """The default shrinks to the room that the prompt leaves; an explicit value that does not fit is refused."""
        room = self._card.max_model_len - prompt_tokens
        wanted = _asked_tokens(fields)
        if fields.get("max_tokens") is None:
            return min(wanted, room)
        if wanted > room:
            text = (
                f"prompt and max_tokens together at most {self._card.max_model_len} tokens, "
                f"got {prompt_tokens} + {wanted}"
            )
            raise refuse("max_tokens", text)
        return wanted

    async def _check(self, constraint: NamedConstraint | None, wait_ms: int) -> None:
        """Compiled once here, so that a grammar which nobody can obey is refused before it costs a worker anything."""
        if constraint is None:
            return
        try:
            await self._checks.run(partial(self._check_constraint, constraint.constraint), wait_ms=wait_ms)
        except InvalidArgument as error:
            raise refuse(constraint.field, error.message.removeprefix("constraint: ")) from None


def _loop_us() -> int:
    return int(asyncio.get_running_loop().time() * 1_000_000)


def _asked_tokens(fields: Fields) -> int:
    return integer(fields, "max_tokens", limits.OUTPUT_TOKENS_DEFAULT, 0, limits.OUTPUT_TOKENS_MAX)


# -- groups of fields --------------------------------------------------------------------------------------------------
def _choices(fields: Fields) -> int:
    choices = integer(fields, "n", 1, 1, limits.CHOICES_MAX)
    best_of = optional_integer(fields, "best_of", 1, limits.CHOICES_MAX)
    if best_of not in (None, choices):
        raise refuse("best_of", "must be the same as n: choices are not ranked here")
    return choices


def read_answer(fields: Fields) -> dict[str, Any]:
    """What the answer looks like, when it is due, and who may share what it costs."""
    return {
        "choices": _choices(fields),
        "stream": boolean(fields, "stream"),
        "stop": _stop(fields),
        "include_stop": boolean(fields, "include_stop_str_in_output"),
        "prompt_logprobs": optional_integer(fields, "prompt_logprobs", 0, limits.LOGPROBS_MAX),
        "return_token_ids": boolean(fields, "return_token_ids"),
        "tokens_as_ids": boolean(fields, "return_tokens_as_token_ids"),
        "priority": integer(fields, "priority", 0, -limits.PRIORITY_MAX, limits.PRIORITY_MAX),
        "cache_salt": _cache_salt(fields),
    }


def _stop(fields: Fields) -> tuple[str, ...]:
    """One string or a list of them; the empty string, alone, is none."""
    stop = fields.get("stop")
    if isinstance(stop, str):
        fields = {"stop": [stop] if stop else None}
    return strings(fields, "stop", limits.STOP_STRINGS_MAX, limits.STOP_STRING_CHARACTERS_MAX)


def _cache_salt(fields: Fields) -> str:
    """A salt parts its users from others of their tenant; `user` is a name in the client's own books and parts none."""
    salt = fields.get("cache_salt")
    if salt is None:
        return ""
    if type(salt) is not str or not 1 <= len(salt) <= limits.CACHE_SALT_CHARACTERS_MAX:
        raise refuse("cache_salt", f"must be a string of 1 to {limits.CACHE_SALT_CHARACTERS_MAX} characters")
    return salt


def check_fit(request: ValidatedRequest) -> None:
    """What depends on several fields at once."""
    sampling = request.sampling
    if sampling.min_tokens > sampling.max_tokens:
        raise refuse("min_tokens", f"must be at most max_tokens, which is {sampling.max_tokens}")
    lists_of_prompt = (request.choices if request.echo_text is not None else 0) + (request.prompt_logprobs is not None)
    numbers = 0
    if sampling.prompt_logprobs is not None:
        numbers += lists_of_prompt * len(request.token_ids) * (1 + sampling.prompt_logprobs)
    if sampling.logprobs is not None and not request.stream:
        numbers += request.choices * sampling.max_tokens * (1 + sampling.logprobs)
    if numbers > limits.LOGPROBS_PER_ANSWER_MAX:
        field = "logprobs" if sampling.logprobs is not None else "prompt_logprobs"
        raise refuse(field, f"at most {limits.LOGPROBS_PER_ANSWER_MAX} log-probabilities in one answer, got {numbers}")


def refuse_not_served(fields: Fields) -> None:
    for name, neutral_values in NOT_SERVED.items():
        value = fields.get(name)
        if value is not None and not any(_same(value, neutral) for neutral in neutral_values):
            accepted = ", ".join(msgspec.json.encode(neutral).decode() for neutral in (None, *neutral_values))
            raise refuse(name, f"not served; accepted values: {accepted}")


def _same(value: Any, neutral: Any) -> bool:
    """Equal in JSON: true is not 1."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def _misspelt(name: str) -> InvalidArgument:
    short = name[:64]
    nearest = difflib.get_close_matches(short, TRIPTYCH_KEYS, n=1, cutoff=0.0)[0]
    shown = msgspec.json.encode(short).decode()
    return InvalidArgument(f"triptych: unknown key {shown}; did you mean {nearest!r}?", field=f"triptych.{short}")
