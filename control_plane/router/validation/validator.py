"""From a client's bytes or fields to `ValidatedRequest`s, or to one fixed sentence that names the field and the limit.

The vocabulary is vLLM's dialect of OpenAI's completions and chat completions. Three kinds of field:

- served: read, checked, used;
- known and not served (`NOT_SERVED`): accepted only where the value changes nothing; anything else is refused, because
  answering as if the field were not there would be a wrong answer;
- unknown: accepted, counted, and named in the log once, because real clients send them. Not so inside our own
  `triptych` object, where an unknown key is a typo.

No error text repeats what the client sent, except the name of a misspelt `triptych` key. Prompts are never logged.

What does not belong here: HTTP, gRPC, whether there is room for the request, and how a group of fields is read
(`prompt`, `chat_fields`, `sampling_fields`, `constraint_fields`, `answer_fields`, `knob_fields`).
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import msgspec

from control_plane.router.access.caller import Caller
from control_plane.router.access.tenants import EVERYBODY, Tenant
from control_plane.router.media.reader import HeldImages
from control_plane.router.requests import SubmittedImage
from control_plane.router.side_thread import SideThread
from control_plane.router.text.chat_template import ChatTemplate
from control_plane.router.text.vocabulary import ModelCard, Vocabulary
from control_plane.router.validation import body as bodies
from control_plane.router.validation import chat_fields, tokenization
from control_plane.router.validation.answer_fields import STREAM_OPTIONS, read_answer
from control_plane.router.validation.body import BodyShape
from control_plane.router.validation.chat_fields import Conversation
from control_plane.router.validation.constraint_fields import NamedConstraint, read_constraint
from control_plane.router.validation.cutouts import Body
from control_plane.router.validation.fields import (
    Fields,
    object_or_empty,
    optional_integer,
    optional_string,
    refuse,
    word,
)
from control_plane.router.validation.image_prompt import Seen, Sight
from control_plane.router.validation.knob_fields import Knobs, read_knobs
from control_plane.router.validation.prompt import Prompt, PromptEncoder, PromptFields, read_sources, weight
from control_plane.router.validation.sampling_fields import encode_bad_words, read_bad_words, read_sampling
from control_plane.router.validation.tokenization import Tokenization, require_template
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
        *("priority", "cache_salt", "request_id", "session_id", "vllm_xargs"),
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
}


class Dialect:
    """The fields of one endpoint; the `large` ones may be larger than all others of a body together."""

    def __init__(self, served: Set[str], not_served: Mapping[str, tuple[Any, ...]], large: Set[str]) -> None:
        self.not_served = not_served
        self.shape = BodyShape(served | not_served.keys(), large)


COMPLETIONS: Final = Dialect(SERVED, NOT_SERVED, {"prompt"})
CHAT: Final = Dialect(SERVED - {"prompt"} | chat_fields.SERVED, {**NOT_SERVED, **chat_fields.NOT_SERVED}, {"messages"})
TOKENIZE: Final = Dialect(tokenization.TOKENIZE, tokenization.TOKENIZE_NOT_SERVED, {"prompt", "messages"})
DETOKENIZE: Final = Dialect(tokenization.DETOKENIZE, {}, {"tokens"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidatedRequest:
    """A request that can be served as it stands. Nothing below the edge checks these values again for clients' sake.

    Whoever has it submits it, or releases its images.
    """

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
    images: tuple[SubmittedImage, ...] = ()
    image_tokens: int = 0  # of `token_ids`
    held: HeldImages | None = None  # what the images' pixels count for, until the request ends

    def release(self) -> None:
        """It is over, or never became one."""
        if self.held is not None:
            self.held.release()

    def without_pixels(self) -> "ValidatedRequest":
        """For who goes on with it when it is submitted."""
        return replace(self, images=(), held=None) if self.images else self


@dataclass(frozen=True, slots=True)
class Config:
    codecs: tuple[str, ...] = ("raw",)  # that a request may ask for
    inline_characters_max: int = limits.INLINE_CHARACTERS_MAX
    encodes_waiting_max: int = limits.ENCODES_WAITING_MAX
    constraint_checks_waiting_max: int = limits.CONSTRAINT_CHECKS_WAITING_MAX
    tenants: int = 1  # that both queues are shared out among
    unknown_names_max: int = limits.UNKNOWN_NAMES_MAX
    deadline_ms_default: int = limits.REQUEST_DEADLINE_MS


CheckConstraint = Callable[[Constraint], None]
"""Raises `InvalidArgument`, in bounded time and memory, for a constraint that the engine could not obey."""


NOBODY: Final = Caller()  # who says nothing of himself


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """All that a request says beside its prompts, read and checked; its prompts share it."""

    arrived_us: int
    deadline_ms: int
    request: Mapping[str, Any]  # arguments of `ValidatedRequest`
    seed: int | None
    sampling: Mapping[str, Any]  # the other arguments of `SamplingParams`
    constraint: NamedConstraint | None
    prompt: PromptFields
    output_tokens: int | None  # None: the client leaves it to us
    output_field: str = "max_tokens"  # by which name it says so

    @property
    def choices(self) -> int:
        return int(self.request["choices"])

    @property
    def tenant(self) -> str:
        return str(self.request["tenant"])


class Validator:
    """Checks in order of cost: small fields first, then the prompt's shape, text to ids, what depends on the number of
    ids, and grammars last."""

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
        chat: ChatTemplate | None = None,
        sight: Sight | None = None,
    ) -> None:
        """`sight`: of a model that sees, whose card says of how many images."""
        assert (sight is not None) == (card.images_max > 0)
        self.clock_us = clock_us or _loop_us  # whoever takes a request in reads it first: deadlines run from then
        self._config = config
        self._card = card
        self._vocabulary = vocabulary
        self._draw_seed = draw_seed
        self._check_constraint = check_constraint
        self._chat = chat
        self._sight = sight
        self._unknown = UnknownFields(count_unknown, config.unknown_names_max)
        self._prompts = PromptEncoder(
            card,
            vocabulary,
            inline_characters_max=config.inline_characters_max,
            waiting_max=config.encodes_waiting_max,
            tenants=config.tenants,
        )
        self._tokenization = Tokenization(card, vocabulary, self._prompts, chat, sight)
        # Not the prompts' thread: a hostile grammar must not stand before other clients' prompts.
        self._checks = SideThread(
            "check", waiting_max=config.constraint_checks_waiting_max, what="constraints", tenants=config.tenants
        )

    def close(self) -> None:
        self._prompts.close()
        self._checks.close()
        if self._sight is not None:
            self._sight.close()

    @property
    def sees(self) -> bool:
        """Conversations may have images: their bodies may be larger."""
        return self._sight is not None

    # -- what clients ask for ------------------------------------------------------------------------------------------
    async def completion(self, body: bytes, caller: Caller = NOBODY) -> list[ValidatedRequest]:
        """The body of `POST /v1/completions`: one request for each of its prompts, in their order."""
        return await self._completions(_decoded(body, COMPLETIONS), caller)

    async def chat(self, body: bytes | Body, caller: Caller = NOBODY) -> ValidatedRequest:
        """The body of `POST /v1/chat/completions`."""
        return await self._conversation(_decoded(body, CHAT), caller)

    async def validate(self, fields: Fields, caller: Caller = NOBODY) -> ValidatedRequest:
        """Fields that came in another way than as JSON: one prompt, or the messages of one conversation."""
        if "messages" in fields:
            return await self._conversation(fields, caller)
        if len(read_sources(fields)) > 1:
            raise refuse("prompt", "only one prompt at a time here")
        (request,) = await self._completions(fields, caller)
        return request

    async def tokenize(self, body: bytes | Body, tenant: Tenant = EVERYBODY) -> dict[str, Any]:
        """`POST /tokenize`"""
        fields = self._known(_decoded(body, TOKENIZE), TOKENIZE)
        return await self._tokenization.tokenize(fields, wait_ms=self._config.deadline_ms_default, tenant=tenant.name)

    async def detokenize(self, body: bytes, tenant: Tenant = EVERYBODY) -> dict[str, Any]:
        """`POST /detokenize`"""
        fields = self._known(_decoded(body, DETOKENIZE), DETOKENIZE)
        return await self._tokenization.detokenize(fields, wait_ms=self._config.deadline_ms_default, tenant=tenant.name)

    def tokenizer_info(self) -> dict[str, Any]:
        """`GET /tokenizer_info`"""
        return self._tokenization.info()

    # -- prompts -------------------------------------------------------------------------------------------------------
    async def _completions(self, fields: Fields, caller: Caller) -> list[ValidatedRequest]:
        terms = await self._terms(
            self._known(fields, COMPLETIONS),
            caller,
            prompt=PromptFields.read(fields),
            output_tokens=optional_integer(fields, "max_tokens", 0, limits.OUTPUT_TOKENS_MAX),
        )
        sources = read_sources(fields)
        if len(sources) * terms.choices > limits.REQUEST_CHOICES_MAX:
            raise refuse("n", f"at most {limits.REQUEST_CHOICES_MAX} choices for all prompts together")
        asked = limits.OUTPUT_TOKENS_DEFAULT if terms.output_tokens is None else terms.output_tokens
        prompts = await self._prompts.encode(
            sources,
            terms.prompt,
            output_tokens=asked,
            wait_ms=self._left_ms(terms.arrived_us, terms.deadline_ms),
            tenant=terms.tenant,
        )
        lengths = [self._length(terms, len(prompt.token_ids), limits.OUTPUT_TOKENS_DEFAULT) for prompt in prompts]
        requests = [self._request(terms, prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
        return await self._finished(terms, requests)

    async def _conversation(self, fields: Fields, caller: Caller) -> ValidatedRequest:
        fields = self._known(fields, CHAT)
        template = require_template(self._chat)
        output_field = chat_fields.output_field(fields)
        terms = await self._terms(
            chat_fields.in_completions_words(fields),
            caller,
            prompt=PromptFields.read(fields, chat=True),
            output_tokens=optional_integer(fields, output_field, 0, limits.OUTPUT_TOKENS_MAX),
            output_field=output_field,
        )
        conversation = chat_fields.read_conversation(fields, self._card.images_max)
        seen = await self._look(conversation, terms)
        if seen is None:
            return await self._chat_request(terms, conversation, template, None)
        try:
            request = await self._chat_request(terms, conversation, template, seen)
        except BaseException:
            seen.held.release()
            raise
        return replace(request, held=seen.held)

    async def _look(self, conversation: Conversation, terms: Terms) -> Seen | None:
        if self._sight is None or not conversation.images:
            return None
        if terms.prompt.keep_tokens is not None:
            raise refuse("truncate_prompt_tokens", "not with images: a part of one is none")
        return await self._sight.look(
            conversation.images,
            cache_salt=terms.request["cache_salt"],
            wait_ms=self._left_ms(terms.arrived_us, terms.deadline_ms),
            tenant=terms.tenant,
        )

    async def _chat_request(
        self, terms: Terms, conversation: Conversation, template: ChatTemplate, seen: Seen | None
    ) -> ValidatedRequest:
        prompt = await self._prompts.encode_chat(
            conversation,
            template,
            terms.prompt,
            seen=seen,
            output_tokens=terms.output_tokens or 0,
            wait_ms=self._left_ms(terms.arrived_us, terms.deadline_ms),
            tenant=terms.tenant,
        )
        length = self._length(terms, len(prompt.token_ids), _longest_chat_answer(terms))
        (request,) = await self._finished(terms, [replace(self._request(terms, prompt, length), chat=True)])
        return request

    def _request(self, terms: Terms, prompt: Prompt, length: int) -> ValidatedRequest:
        seed = self._draw_seed() if terms.seed is None else terms.seed  # a given one is that of all prompts
        return ValidatedRequest(
            token_ids=prompt.token_ids,
            echo_text=prompt.echo_text,
            images=prompt.images,
            image_tokens=sum(one.image.features for one in prompt.images),
            sampling=SamplingParams(max_tokens=length, seed=seed, **terms.sampling),
            **terms.request,
        )

    def _length(self, terms: Terms, prompt_tokens: int, default: int) -> int:
        """The default shrinks to the room that the prompt leaves; an explicit value that does not fit is refused."""
        room = self._card.max_model_len - prompt_tokens
        if terms.output_tokens is None:
            return min(default, room)
        if terms.output_tokens > room:
            text = (
                f"prompt and {terms.output_field} together at most {self._card.max_model_len} tokens, "
                f"got {prompt_tokens} + {terms.output_tokens}"
            )
            raise refuse(terms.output_field, text)
        return terms.output_tokens

    async def _finished(self, terms: Terms, requests: list[ValidatedRequest]) -> list[ValidatedRequest]:
        """Checked as a whole, and told what time is left."""
        for request in requests:
            check_min_tokens(request)
        check_logprobs(requests)
        await self._check(terms.constraint, self._left_ms(terms.arrived_us, terms.deadline_ms), terms.tenant)
        left_ms = self._left_ms(terms.arrived_us, terms.deadline_ms)
        return [replace(request, deadline_ms=left_ms) for request in requests]

    # -- what is the same for all prompts ------------------------------------------------------------------------------
    def _known(self, fields: Fields, dialect: Dialect) -> Fields:
        """Notes what is unknown, refuses what is not served."""
        self._unknown.note(sorted(fields.keys() - dialect.shape.known))
        self._check_model(fields)
        refuse_not_served(fields, dialect.not_served)
        return fields

    async def _terms(self, fields: Fields, caller: Caller, *, prompt: PromptFields, **output: Any) -> Terms:
        arrived_us = self.clock_us() if caller.arrived_us is None else caller.arrived_us
        knobs = self._knobs(fields, caller)
        options = object_or_empty(fields, "stream_options")
        self._unknown.note(f"stream_options.{name}" for name in sorted(options.keys() - set(STREAM_OPTIONS)))
        constraint = read_constraint(fields)
        request = {
            **knobs.travel,
            **read_answer(fields),
            "tenant": caller.tenant.name,
            "label": _label(fields, caller),
            "skip_special_tokens": prompt.skip_special_tokens,
            "constraint_field": constraint.field if constraint is not None else "",
        }
        seed = optional_integer(fields, "seed", 0, limits.SEED_MAX)
        left_ms = self._left_ms(arrived_us, knobs.deadline_ms)
        sampling = {
            **read_sampling(fields, vocab_size=self._card.vocab_size),
            "bad_words": await self._bad_words(fields, left_ms, caller.tenant.name),
            "constraint": constraint.constraint if constraint is not None else None,
        }
        return Terms(
            arrived_us=arrived_us,
            deadline_ms=knobs.deadline_ms,
            request=request,
            seed=seed,
            sampling=sampling,
            constraint=constraint,
            prompt=prompt,
            **output,
        )

    async def _bad_words(self, fields: Fields, wait_ms: int, tenant: str) -> tuple[tuple[int, ...], ...]:
        spellings = read_bad_words(fields)
        encode = partial(encode_bad_words, spellings, self._vocabulary)
        return await self._prompts.run(encode, characters=weight(spellings), wait_ms=wait_ms, tenant=tenant)

    def _knobs(self, fields: Fields, caller: Caller) -> Knobs:
        return read_knobs(
            fields,
            caller,
            codecs=self._config.codecs,
            deadline_ms_default=self._config.deadline_ms_default,
            note_unknown=self._unknown.note,
        )

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

    async def _check(self, constraint: NamedConstraint | None, wait_ms: int, tenant: str) -> None:
        """Compiled once here, so that a grammar which nobody can obey is refused before it costs a worker anything."""
        if constraint is None:
            return
        try:
            check = partial(self._check_constraint, constraint.constraint)
            await self._checks.run(check, wait_ms=wait_ms, tenant=tenant)
        except InvalidArgument as error:
            raise refuse(constraint.field, error.message.removeprefix("constraint: ")) from None


def _loop_us() -> int:
    return int(asyncio.get_running_loop().time() * 1_000_000)


def _decoded(body: bytes | Body, dialect: Dialect) -> dict[str, Any]:
    try:
        return bodies.decode_body_untrusted(body, dialect.shape)
    except FrameError as error:
        raise bodies.refusal(error) from None


def _label(fields: Fields, caller: Caller) -> str:
    """The header's id before the body's. A session is no more than a name yet: nothing is kept for one."""
    said = [optional_string(fields, name, limits.REQUEST_ID_CHARACTERS_MAX) for name in ("request_id", "session_id")]
    return caller.label or word(said[0] or "")


def _longest_chat_answer(terms: Terms) -> int:
    """Unless the client says how long: as long as one may be, and as one piece of JSON can hold the scores of."""
    alternatives: int | None = terms.sampling["logprobs"]
    if alternatives is None or terms.request["stream"]:
        return limits.OUTPUT_TOKENS_MAX
    return limits.LOGPROBS_PER_ANSWER_MAX // (terms.choices * (1 + alternatives))


# -- what depends on several fields at once ----------------------------------------------------------------------------
def check_min_tokens(request: ValidatedRequest) -> None:
    sampling = request.sampling
    if sampling.min_tokens > sampling.max_tokens:
        raise refuse("min_tokens", f"must be at most max_tokens, which is {sampling.max_tokens}")


def check_logprobs(requests: Sequence[ValidatedRequest]) -> None:
    """All that one body asks for is one answer."""
    numbers = sum(map(_logprob_count, requests))
    if numbers > limits.LOGPROBS_PER_ANSWER_MAX:
        field = "logprobs" if requests[0].sampling.logprobs is not None else "prompt_logprobs"
        raise refuse(field, f"at most {limits.LOGPROBS_PER_ANSWER_MAX} log-probabilities in one answer, got {numbers}")


def _logprob_count(request: ValidatedRequest) -> int:
    sampling = request.sampling
    echoed = request.echo_text is not None and not request.chat
    lists_of_prompt = (request.choices if echoed else 0) + (request.prompt_logprobs is not None)
    numbers = 0
    if sampling.prompt_logprobs is not None:
        numbers += lists_of_prompt * len(request.token_ids) * (1 + sampling.prompt_logprobs)
    if sampling.logprobs is not None and not request.stream:
        numbers += request.choices * sampling.max_tokens * (1 + sampling.logprobs)
    return numbers


def refuse_not_served(fields: Fields, not_served: Mapping[str, tuple[Any, ...]] = NOT_SERVED) -> None:
    for name, neutral_values in not_served.items():
        value = fields.get(name)
        if value is not None and not any(_same(value, neutral) for neutral in neutral_values):
            accepted = ", ".join(msgspec.json.encode(neutral).decode() for neutral in (None, *neutral_values))
            raise refuse(name, f"not served; accepted values: {accepted}")


def _same(value: Any, neutral: Any) -> bool:
    """Equal in JSON: true is not 1."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)
