"""A request's prompts: from texts, ids or a conversation to the ids that are computed, and to the text that `echo`
repeats.

Short texts are encoded on the event loop, long ones one request at a time on a thread of their own (the encoder drops
the GIL). Text that cannot fit, whatever it says, is not encoded at all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from control_plane.router.requests import SubmittedImage
from control_plane.router.side_thread import SideThread
from control_plane.router.text.chat_template import ChatTemplate
from control_plane.router.text.vocabulary import ModelCard, Vocabulary
from control_plane.router.validation import body as bodies
from control_plane.router.validation.chat_fields import Conversation
from control_plane.router.validation.fields import Fields, boolean, check_token_ids, optional_integer, refuse
from control_plane.router.validation.image_prompt import Seen
from engine.base import limits
from engine.base.errors import InvalidArgument

CHARACTERS_PER_TOKEN: Final = 4  # about, in English: what decoding costs beside encoding
CHARACTERS_PER_TEXT: Final = 48  # 10 us: what one text costs beside its length; more than most words of a list
CHARACTERS_PER_MESSAGE: Final = 128  # rendering one message takes as long as encoding about so much text

Source = str | list[Any]
"""A prompt as the client wrote it: text, or token ids."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: tuple[int, ...]
    echo_text: str | None  # None: the client does not want it back
    images: tuple[SubmittedImage, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFields:
    """What a request says about its prompts beside what they are; read before anything is encoded."""

    keep_tokens: int | None  # `truncate_prompt_tokens`: the last so many; -1: as many as fit
    add_special_tokens: bool
    skip_special_tokens: bool
    echo: bool

    @classmethod
    def read(cls, fields: Fields, *, chat: bool = False) -> "PromptFields":
        return cls(
            keep_tokens=_keep_tokens(fields),
            add_special_tokens=boolean(fields, "add_special_tokens", not chat),  # a chat's are in its template
            skip_special_tokens=boolean(fields, "skip_special_tokens", True),
            echo=boolean(fields, "echo"),
        )


def read_sources(fields: Fields) -> list[Source]:
    """One or several: a list holds ids where it does not hold texts or lists."""
    prompt = bodies.large_value(fields, "prompt")
    if prompt is None:
        raise refuse("prompt", "required")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        sources = list(prompt)
        if len(sources) > limits.PROMPTS_MAX:
            raise InvalidArgument(bodies.ERRORS["prompt_count"], field="prompt")
    else:
        sources = [prompt]
    if not isinstance(sources[0], str | list) or any(type(source) is not type(sources[0]) for source in sources):
        raise InvalidArgument(bodies.ERRORS["prompt_shape"], field="prompt")
    if any(isinstance(source, list) and len(source) > limits.PROMPT_TOKENS_MAX for source in sources):
        raise InvalidArgument(bodies.ERRORS["prompt_tokens"], field="prompt")
    return sources


def weight(texts: Sequence[str]) -> int:
    """What encoding them costs, in characters of one long text."""
    return sum(map(len, texts)) + CHARACTERS_PER_TEXT * max(0, len(texts) - 1)


def _keep_tokens(fields: Fields) -> int | None:
    keep_tokens = optional_integer(fields, "truncate_prompt_tokens", -1, limits.PROMPT_TOKENS_MAX)
    if keep_tokens == 0:
        raise refuse("truncate_prompt_tokens", "0 would leave no prompt; at least 1, or -1 for as many as fit")
    return keep_tokens


class PromptEncoder:
    def __init__(
        self,
        card: ModelCard,
        vocabulary: Vocabulary,
        *,
        inline_characters_max: int,
        waiting_max: int,
        tenants: int = 1,
    ) -> None:
        self._card = card
        self._vocabulary = vocabulary
        self._inline_characters_max = inline_characters_max
        self._thread = SideThread("encode", waiting_max=waiting_max, what="long prompts", tenants=tenants)
        self._tokens_max = min(limits.PROMPT_TOKENS_MAX, card.max_model_len - 1)

    def close(self) -> None:
        self._thread.close()

    async def run(self, work: Callable[[], Result], *, characters: int, wait_ms: int, tenant: str) -> Result:
        """Here and now if it is about so little text, else on the thread."""
        if characters <= self._inline_characters_max:
            return work()
        return await self._thread.run(work, wait_ms=wait_ms, tenant=tenant)

    async def encode(
        self, sources: Sequence[Source], fields: PromptFields, *, output_tokens: int, wait_ms: int, tenant: str
    ) -> list[Prompt]:
        """All of them are one piece of work: a body of many short prompts costs what one long prompt costs."""
        texts = [source for source in sources if isinstance(source, str)]
        for text in texts:
            self._check_characters(len(text), fields)

        def encode() -> list[list[int]]:
            return [self._vocabulary.encode(text, add_special_tokens=fields.add_special_tokens) for text in texts]

        wholes: list[list[Any]] = [source for source in sources if isinstance(source, list)]
        if texts:
            wholes = await self.run(encode, characters=weight(texts), wait_ms=wait_ms, tenant=tenant)
        ids = [self._cut(whole, fields, output_tokens, "prompt") for whole in wholes]
        self._check_placeholders(ids, "prompt")
        if sum(map(len, ids)) > limits.PROMPT_TOKENS_MAX:
            raise refuse("prompt", f"at most {limits.PROMPT_TOKENS_MAX} tokens in all prompts together")
        if not fields.echo:
            return [Prompt(tuple(kept), None) for kept in ids]
        uncut = [len(kept) == len(whole) for kept, whole in zip(ids, wholes, strict=True)]
        echoes = await self._echoes(sources, ids, uncut, fields, wait_ms, tenant)
        return [Prompt(tuple(kept), echo) for kept, echo in zip(ids, echoes, strict=True)]

    async def encode_chat(
        self,
        conversation: Conversation,
        template: ChatTemplate,
        fields: PromptFields,
        *,
        seen: Seen | None = None,
        output_tokens: int,
        wait_ms: int,
        tenant: str,
    ) -> Prompt:
        if seen is not None and seen.features > self._tokens_max:
            raise self._too_long(f"{seen.features} for images", "messages")
        whole = await self.chat_ids(
            conversation,
            template,
            seen=seen,
            add_special_tokens=fields.add_special_tokens,
            check=lambda characters: self._check_characters(characters, fields, "messages"),
            wait_ms=wait_ms,
            tenant=tenant,
        )
        ids = self._cut(whole, fields, output_tokens, "messages")
        if seen is None:
            self._check_placeholders([ids], "messages")
        images = seen.placed(ids) if seen is not None else ()
        return Prompt(tuple(ids), conversation.echo_text() if fields.echo else None, images)

    async def chat_ids(
        self,
        conversation: Conversation,
        template: ChatTemplate,
        *,
        seen: Seen | None = None,
        add_special_tokens: bool,
        check: Callable[[int], None],
        wait_ms: int,
        tenant: str,
    ) -> list[int]:
        """`check` is told how long the rendered text is, without its images, and raises if that is too long."""
        features = 0 if seen is None else seen.features
        if features > limits.PROMPT_TOKENS_MAX:
            raise refuse("messages", f"at most {limits.PROMPT_TOKENS_MAX} tokens, got {features} for images")

        def encode() -> list[int]:
            rendered = template.render(conversation, self._vocabulary.guarded)
            check(len(rendered.text))
            text = rendered.text if seen is None else seen.expanded(rendered.text)
            return self._vocabulary.encode_chat(text, mark=rendered.mark, add_special_tokens=add_special_tokens)

        characters = conversation.characters + CHARACTERS_PER_MESSAGE * len(conversation.messages)
        characters += CHARACTERS_PER_TOKEN * features
        return await self.run(encode, characters=characters, wait_ms=wait_ms, tenant=tenant)

    def _cut(self, whole: list[Any], fields: PromptFields, output_tokens: int, field: str) -> list[int]:
        if not whole:
            raise refuse(field, "must hold at least 1 token")
        ids = whole[-self._kept(fields.keep_tokens, output_tokens) :] if fields.keep_tokens is not None else whole
        if len(ids) > self._tokens_max:
            raise self._too_long(f"{len(ids)}", field)
        check_token_ids(ids, self._card.vocab_size, field=field)
        return ids

    def _check_placeholders(self, prompts: Sequence[Sequence[int]], field: str) -> None:
        """Only we say what is an image (reliability D14)."""
        placeholder = self._card.image_token_id
        if placeholder is not None and any(placeholder in ids for ids in prompts):
            raise refuse(field, "must not hold the token that stands for images; they are parts of a chat's messages")

    def _kept(self, keep_tokens: int, output_tokens: int) -> int:
        if keep_tokens > 0:
            return keep_tokens
        return max(1, min(self._tokens_max, self._card.max_model_len - output_tokens))

    async def _echoes(
        self,
        sources: Sequence[Source],
        ids: list[list[int]],
        uncut: list[bool],
        fields: PromptFields,
        wait_ms: int,
        tenant: str,
    ) -> list[str]:
        """The client's own text where it was used whole; else what the ids say."""

        def text_of(source: Source, kept: list[int], is_whole: bool) -> str:
            if isinstance(source, str) and is_whole:
                return source
            detokenizer = self._vocabulary.detokenizer(frozenset(), skip_special_tokens=fields.skip_special_tokens)
            return detokenizer.push(kept) + detokenizer.finish()

        if all(uncut) and isinstance(sources[0], str):
            return [str(source) for source in sources]
        return await self.run(
            lambda: list(map(text_of, sources, ids, uncut)),
            characters=CHARACTERS_PER_TOKEN * sum(map(len, ids)),
            wait_ms=wait_ms,
            tenant=tenant,
        )

    def _check_characters(self, characters: int, fields: PromptFields, field: str = "prompt") -> None:
        tokens_max = self._tokens_max if fields.keep_tokens is None else limits.PROMPT_TOKENS_MAX
        per_token_max = self._vocabulary.characters_per_token_max
        if per_token_max is not None and characters > tokens_max * per_token_max:
            raise self._too_long(f"{characters} characters of text", field)

    def _too_long(self, got: str, field: str = "prompt") -> InvalidArgument:
        text = (
            f"at most {self._tokens_max} tokens, got {got} "
            f"(the model's context is {self._card.max_model_len} tokens, prompt and output together)"
        )
        return refuse(field, text)
