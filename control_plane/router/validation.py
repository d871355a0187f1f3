"""From a client's fields to a `ValidatedRequest`, or to one fixed sentence that names the field and the limit.

The vocabulary is vLLM's dialect of OpenAI's completions. Three kinds of field:

- served: read, checked, used;
- known and not served yet (`NOT_SERVED`): accepted only where the value changes nothing; anything else is refused,
  because answering as if the field were not there would be a wrong answer;
- unknown: accepted, counted, and named in the log once, because real clients send them. Not so inside our own
  `triptych` object, where an unknown key is a typo.

No error text repeats what the client sent, except the name of a misspelt `triptych` key. Prompts are never logged.

What does not belong here: HTTP, gRPC, and whether there is room for the request.
"""

import asyncio
import difflib
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from control_plane.router import body as bodies
from control_plane.router.vocabulary import ModelCard, Vocabulary
from engine.base import limits
from engine.base.errors import DeadlineExceeded, FrameError, InvalidArgument, NotFound, ResourceExhausted
from engine.types import SamplingParams

log = logging.getLogger("triptych.router")

Fields = Mapping[str, Any]

SERVED: Final = frozenset(
    (
        *("model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop_token_ids", "ignore_eos"),
        *("stream", "stream_options", "triptych", "user"),
    )
)

NOT_SERVED: Final[Mapping[str, tuple[Any, ...]]] = {
    # field -> values that ask for nothing; null always does
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (),
    "prompt_logprobs": (),
    "suffix": ("",),
    "stop": ("", []),
    "bad_words": ([],),
    "logit_bias": ({},),
    "allowed_token_ids": (),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # without tools
    "functions": ([],),
    "logits_processors": ([],),
    "prompt_embeds": (),
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "vllm_xargs": ({},),
    "cache_salt": (),  # a promise of isolation: never ignore one
}

KNOWN: Final = SERVED | NOT_SERVED.keys()
STREAM_OPTIONS: Final = ("include_usage", "continuous_usage_stats")
TRIPTYCH_KEYS: Final = ("codec", "deadline_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidatedRequest:
    """A request that can be served as it stands. Nothing below the edge checks these values again for clients' sake."""

    token_ids: tuple[int, ...]
    sampling: SamplingParams
    deadline_ms: int = limits.REQUEST_DEADLINE_MS  # what is left of it: reading and checking have had their share
    codec: str = ""  # "": the router chooses
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    label: str = ""  # the client's own id: printed, never a key


@dataclass(frozen=True, slots=True)
class Config:
    codecs: tuple[str, ...] = ("raw",)  # that a request may ask for
    inline_characters_max: int = limits.INLINE_CHARACTERS_MAX
    encodes_waiting_max: int = limits.ENCODES_WAITING_MAX
    unknown_names_max: int = limits.UNKNOWN_NAMES_MAX
    deadline_ms_default: int = limits.REQUEST_DEADLINE_MS


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
    """Checks in order of cost: shape first, then text to ids, then what depends on the number of ids."""

    def __init__(
        self,
        config: Config,
        *,
        card: ModelCard,
        vocabulary: Vocabulary,
        draw_seed: Callable[[], int],
        count_unknown: Callable[[int], None],
        clock_us: Callable[[], int] | None = None,
    ) -> None:
        self.clock_us = clock_us or _loop_us  # whoever takes a request in reads it first: deadlines run from then
        self._config = config
        self._card = card
        self._vocabulary = vocabulary
        self._draw_seed = draw_seed
        self._unknown = UnknownFields(count_unknown, config.unknown_names_max)
        self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")
        self._encodes_waiting = 0

    def close(self) -> None:
        self._encoder.shutdown(wait=False, cancel_futures=True)

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
        include_usage, continuous_usage = self._stream_options(fields)
        codec, deadline_ms = self._triptych(fields)
        prompt = read_prompt(fields)
        wanted = self._sampling_fields(fields)
        token_ids = await self._token_ids(prompt, self._left_ms(arrived_us, deadline_ms))
        return ValidatedRequest(
            token_ids=token_ids,
            sampling=SamplingParams(max_tokens=self._max_tokens(fields, len(token_ids)), **wanted),
            deadline_ms=self._left_ms(arrived_us, deadline_ms),
            codec=codec,
            stream=boolean(fields, "stream"),
            include_usage=include_usage,
            continuous_usage=include_usage and continuous_usage,
            label=label,
        )

    def _left_ms(self, arrived_us: int, deadline_ms: int) -> int:
        left_ms = deadline_ms - (self.clock_us() - arrived_us) // 1_000
        if left_ms <= 0:
            raise DeadlineExceeded("the request's time ran out before it was started")
        return left_ms

    def _check_model(self, fields: Fields) -> None:
        model = fields.get("model")
        if model is not None and not isinstance(model, str):
            raise InvalidArgument("model: must be a string", field="model")
        if model and model != self._card.name:
            raise NotFound("model: this model is not served here; GET /v1/models lists what is", field="model")

    def _stream_options(self, fields: Fields) -> tuple[bool, bool]:
        options = object_or_empty(fields, "stream_options")
        if options and not boolean(fields, "stream"):
            raise InvalidArgument("stream_options: needs stream to be true", field="stream_options")
        self._unknown.note(f"stream_options.{name}" for name in sorted(options.keys() - set(STREAM_OPTIONS)))
        include_usage, continuous_usage = (boolean(options, name, prefix="stream_options.") for name in STREAM_OPTIONS)
        return include_usage, continuous_usage

    def _triptych(self, fields: Fields) -> tuple[str, int]:
        knobs = object_or_empty(fields, "triptych")
        for name in sorted(knobs.keys() - set(TRIPTYCH_KEYS)):
            raise _misspelt(name)
        codec = knobs.get("codec")
        if codec is not None and codec not in self._config.codecs:
            names = ", ".join(self._config.codecs)
            raise InvalidArgument(f"triptych.codec: must be one of: {names}", field="triptych.codec")
        deadline_ms = integer(
            knobs,
            "deadline_ms",
            self._config.deadline_ms_default,
            1,
            limits.REQUEST_DEADLINE_MS_MAX,
            prefix="triptych.",
        )
        return codec or "", deadline_ms

    def _sampling_fields(self, fields: Fields) -> dict[str, Any]:
        seed_given = fields.get("seed") is not None
        return {
            "temperature": number(fields, "temperature", 1.0, 0.0, limits.TEMPERATURE_MAX),
            "top_p": number(fields, "top_p", 1.0, 0.0, 1.0, low_open=True),
            "seed": integer(fields, "seed", 0, 0, limits.SEED_MAX) if seed_given else self._draw_seed(),
            "stop_token_ids": self._stop_token_ids(fields),
            "ignore_eos": boolean(fields, "ignore_eos"),
        }

    def _stop_token_ids(self, fields: Fields) -> tuple[int, ...]:
        ids = fields.get("stop_token_ids")
        if ids is None:
            return ()
        if not isinstance(ids, list):
            raise InvalidArgument("stop_token_ids: must be a list of token ids", field="stop_token_ids")
        if len(ids) > limits.STOP_TOKEN_IDS_MAX:
            message = f"stop_token_ids: at most {limits.STOP_TOKEN_IDS_MAX} ids"
            raise InvalidArgument(message, field="stop_token_ids")
        check_token_ids(ids, self._card.vocab_size, field="stop_token_ids")
        return tuple(ids)

    async def _token_ids(self, prompt: str | list[Any], wait_ms: int) -> tuple[int, ...]:
        prompt_tokens_max = min(limits.PROMPT_TOKENS_MAX, self._card.max_model_len - 1)
        token_ids = await self._encode(prompt, prompt_tokens_max, wait_ms) if isinstance(prompt, str) else prompt
        if not token_ids:
            raise InvalidArgument("prompt: must hold at least 1 token", field="prompt")
        if len(token_ids) > prompt_tokens_max:
            raise self._prompt_too_long(prompt_tokens_max, f"{len(token_ids)}")
        check_token_ids(token_ids, self._card.vocab_size, field="prompt")
        return tuple(token_ids)

    def _prompt_too_long(self, tokens_max: int, got: str) -> InvalidArgument:
        message = (
            f"prompt: at most {tokens_max} tokens, got {got} "
            f"(the model's context is {self._card.max_model_len} tokens, prompt and output together)"
        )
        return InvalidArgument(message, field="prompt")

    async def _encode(self, text: str, tokens_max: int, wait_ms: int) -> list[int]:
        """Short prompts here and now; long ones one at a time on a thread of their own (the encoder drops the GIL).
        Text that cannot fit, whatever it says, is not encoded at all."""
        per_token_max = self._vocabulary.characters_per_token_max
        if per_token_max is not None and len(text) > tokens_max * per_token_max:
            raise self._prompt_too_long(tokens_max, f"{len(text)} characters of text")
        if len(text) <= self._config.inline_characters_max:
            return self._vocabulary.encode(text)
        if self._encodes_waiting >= self._config.encodes_waiting_max:
            raise ResourceExhausted("too many long prompts at once", retry_after_ms=limits.RETRY_AFTER_MS)
        self._encodes_waiting += 1
        try:
            async with asyncio.timeout(wait_ms / 1000):  # leaving takes a text that still waits out of the queue
                return await asyncio.get_running_loop().run_in_executor(self._encoder, self._vocabulary.encode, text)
        except TimeoutError:
            raise DeadlineExceeded("the request's time ran out while its prompt waited to be encoded") from None
        finally:
            self._encodes_waiting -= 1

    def _max_tokens(self, fields: Fields, prompt_tokens: int) -> int:
        """The default shrinks to the room that the prompt leaves; an explicit value that does not fit is refused."""
        room = self._card.max_model_len - prompt_tokens
        wanted = integer(fields, "max_tokens", min(limits.OUTPUT_TOKENS_DEFAULT, room), 0, limits.OUTPUT_TOKENS_MAX)
        if wanted > room:
            message = (
                f"max_tokens: prompt and max_tokens together at most {self._card.max_model_len} tokens, "
                f"got {prompt_tokens} + {wanted}"
            )
            raise InvalidArgument(message, field="max_tokens")
        return wanted


def _loop_us() -> int:
    return int(asyncio.get_running_loop().time() * 1_000_000)


# -- groups of fields --------------------------------------------------------------------------------------------------
def read_prompt(fields: Fields) -> str | list[Any]:
    prompt = fields.get("prompt")
    if prompt is None:
        raise InvalidArgument("prompt: required", field="prompt")
    if not isinstance(prompt, str | list):
        raise InvalidArgument(bodies.ERRORS["prompt_shape"], field="prompt")
    return prompt


def refuse_not_served(fields: Fields) -> None:
    for name, neutral_values in NOT_SERVED.items():
        value = fields.get(name)
        if value is not None and not any(_same(value, neutral) for neutral in neutral_values):
            accepted = ", ".join(msgspec.json.encode(neutral).decode() for neutral in (None, *neutral_values))
            raise InvalidArgument(f"{name}: not served yet; accepted values: {accepted}", field=name)


def check_token_ids(token_ids: list[Any], vocab_size: int, *, field: str) -> None:
    """Every element an id of the model's. At C speed: a prompt may hold 131072 of them."""
    if not token_ids:
        return
    if set(map(type, token_ids)) != {int} or min(token_ids) < 0 or max(token_ids) >= vocab_size:
        raise InvalidArgument(f"{field}: token ids must be integers in [0, {vocab_size - 1}]", field=field)


# -- single fields; null means the default -----------------------------------------------------------------------------
def number(fields: Fields, name: str, default: float, low: float, high: float, *, low_open: bool = False) -> float:
    value = fields.get(name)
    if value is None:
        return default
    inside = type(value) in (int, float) and low <= value <= high and not (low_open and value == low)
    if not inside:  # NaN is inside nothing
        bracket = "(" if low_open else "["
        raise InvalidArgument(f"{name}: must be a number in {bracket}{low:g}, {high:g}]", field=name)
    return abs(float(value))  # -0.0 is 0.0


def integer(fields: Fields, name: str, default: int, low: int, high: int, *, prefix: str = "") -> int:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        message = f"{prefix}{name}: must be an integer in [{low}, {high}]"
        raise InvalidArgument(message, field=prefix + name)
    return value


def boolean(fields: Fields, name: str, *, prefix: str = "") -> bool:
    value = fields.get(name)
    if value is None:
        return False
    if type(value) is not bool:
        raise InvalidArgument(f"{prefix}{name}: must be true or false", field=prefix + name)
    return value


def object_or_empty(fields: Fields, name: str) -> dict[str, Any]:
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidArgument(f"{name}: must be an object", field=name)
    return value


def _same(value: Any, neutral: Any) -> bool:
    """Equal in JSON: true is not 1."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def _misspelt(name: str) -> InvalidArgument:
    short = name[:64]
    nearest = difflib.get_close_matches(short, TRIPTYCH_KEYS, n=1, cutoff=0.0)[0]
    shown = msgspec.json.encode(short).decode()
    return InvalidArgument(f"triptych: unknown key {shown}; did you mean {nearest!r}?", field=f"triptych.{short}")
