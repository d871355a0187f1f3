"""/tokenize, /detokenize, /tokenizer_info: what a client needs to count tokens, or to write prompts as ids.

In a text to tokenize the names of special tokens mean those tokens, as with vLLM: clients that put a chat template
around their messages themselves (lm-eval does) get them in no other way, and whoever sends ids may send any id. That
is not so inside messages, which become what `/v1/chat/completions` would make of them.

What does not belong here: HTTP, and the fields of bodies that are common to all endpoints (`validation`).
"""

from collections.abc import Mapping
from typing import Any, Final

from control_plane.router.text.chat_template import ChatTemplate
from control_plane.router.text.vocabulary import ModelCard, Vocabulary
from control_plane.router.validation import body as bodies
from control_plane.router.validation import chat_fields
from control_plane.router.validation.fields import Fields, boolean, check_token_ids, refuse
from control_plane.router.validation.image_prompt import Sight
from control_plane.router.validation.prompt import CHARACTERS_PER_TOKEN, PromptEncoder
from engine.base import limits

TOKENIZE: Final = frozenset(
    (
        *("model", "prompt", "add_special_tokens", "return_token_strs"),
        *("messages", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"),
    )
)
TOKENIZE_NOT_SERVED: Final[Mapping[str, tuple[Any, ...]]] = {
    "chat_template": (),
    "tools": ([],),
    "mm_processor_kwargs": ({},),
}
DETOKENIZE: Final = frozenset(("model", "tokens"))


class Tokenization:
    def __init__(
        self,
        card: ModelCard,
        vocabulary: Vocabulary,
        prompts: PromptEncoder,
        chat: ChatTemplate | None,
        sight: Sight | None = None,
    ) -> None:
        self._card = card
        self._vocabulary = vocabulary
        self._prompts = prompts
        self._chat = chat
        self._sight = sight

    async def tokenize(self, fields: Fields, *, wait_ms: int, tenant: str) -> dict[str, Any]:
        """{"prompt": ...} or {"messages": ...}. Longer texts than the model takes are no mistake here."""
        with_strings = boolean(fields, "return_token_strs")
        chat_fields.read_settings(fields)  # a prompt has no use for them; a mistake in them is one all the same
        ids = await (self._conversation if fields.get("messages") is not None else self._text)(fields, wait_ms, tenant)
        return {
            "count": len(ids),
            "max_model_len": self._card.max_model_len,
            "tokens": ids,
            "token_strs": await self._names(ids, wait_ms, tenant) if with_strings else None,
        }

    async def detokenize(self, fields: Fields, *, wait_ms: int, tenant: str) -> dict[str, Any]:
        ids = bodies.large_value(fields, "tokens")
        if not isinstance(ids, list):
            raise refuse("tokens", "required" if ids is None else "must be a list of token ids")
        check_token_ids(ids, self._card.vocab_size, field="tokens")

        def decode() -> str:
            detokenizer = self._vocabulary.detokenizer(frozenset(), skip_special_tokens=False)
            return detokenizer.push(ids) + detokenizer.finish()

        weight = CHARACTERS_PER_TOKEN * len(ids)
        return {"prompt": await self._prompts.run(decode, characters=weight, wait_ms=wait_ms, tenant=tenant)}

    def info(self) -> dict[str, Any]:
        """In the words of `tokenizer_config.json`, without what concerns this machine."""
        settings = {**self._vocabulary.settings, "model_max_length": self._card.max_model_len}
        return settings if self._chat is None else {**settings, "chat_template": self._chat.source}

    async def _names(self, ids: list[int], wait_ms: int, tenant: str) -> list[str]:
        def name() -> list[str]:
            return list(map(self._vocabulary.token_name, ids))

        weight = CHARACTERS_PER_TOKEN * len(ids)
        return await self._prompts.run(name, characters=weight, wait_ms=wait_ms, tenant=tenant)

    async def _text(self, fields: Fields, wait_ms: int, tenant: str) -> list[int]:
        with_special = boolean(fields, "add_special_tokens", True)
        text = bodies.large_value(fields, "prompt")
        if not isinstance(text, str):
            raise refuse("prompt", "required" if text is None else "must be a string")
        self._check_characters(len(text), "prompt")
        return await self._prompts.run(
            lambda: self._vocabulary.encode_naming(text, add_special_tokens=with_special),
            characters=len(text),
            wait_ms=wait_ms,
            tenant=tenant,
        )

    async def _conversation(self, fields: Fields, wait_ms: int, tenant: str) -> list[int]:
        template, with_special = require_template(self._chat), boolean(fields, "add_special_tokens")
        conversation = chat_fields.read_conversation(fields, self._card.images_max)
        seen = None
        if self._sight is not None and conversation.images:
            seen = await self._sight.look(conversation.images, wait_ms=wait_ms, tenant=tenant)
            seen.held.release()  # their sizes are all that is asked for
        return await self._prompts.chat_ids(
            conversation,
            template,
            seen=seen,
            add_special_tokens=with_special,
            check=lambda characters: self._check_characters(characters, "messages"),
            wait_ms=wait_ms,
            tenant=tenant,
        )

    def _check_characters(self, characters: int, field: str) -> None:
        """As many ids as a prompt of any model may have; a tokenizer that says nothing of its tokens may make one of
        each character."""
        most = limits.PROMPT_TOKENS_MAX * (self._vocabulary.characters_per_token_max or 1)
        if characters > most:
            raise refuse(field, f"at most {most} characters")


def require_template(chat: ChatTemplate | None) -> ChatTemplate:
    if chat is None:
        raise refuse("messages", "the served model has no chat template; the server can be given one, --chat-template")
    return chat
