"""A request's prompt: from text or ids to the ids that are computed, and to the text that `echo` repeats.

Short texts are encoded on the event loop, long ones one at a time on a thread of their own (the encoder drops the GIL).
Text that cannot fit, whatever it says, is not encoded at all.
"""

from dataclasses import dataclass
from typing import Any, Final

from control_plane.router import body as bodies
from control_plane.router.fields import Fields, boolean, check_token_ids, optional_integer, refuse
from control_plane.router.side_thread import SideThread
from control_plane.router.vocabulary import ModelCard, Vocabulary
from engine.base import limits
from engine.base.errors import InvalidArgument

CHARACTERS_PER_TOKEN: Final = 4  # about, in English: what decoding costs beside encoding


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: tuple[int, ...]
    echo_text: str | None  # None: the client does not want it back


@dataclass(frozen=True, slots=True)
class PromptFields:
    """What a request says about its prompt; read before anything is encoded."""

    prompt: str | list[Any]
    keep_tokens: int | None  # `truncate_prompt_tokens`: the last so many; -1: as many as fit
    add_special_tokens: bool
    skip_special_tokens: bool
    echo: bool

    @classmethod
    def read(cls, fields: Fields) -> "PromptFields":
        prompt = fields.get("prompt")
        if prompt is None:
            raise refuse("prompt", "required")
        if not isinstance(prompt, str | list):
            raise InvalidArgument(bodies.ERRORS["prompt_shape"], field="prompt")
        return cls(
            prompt=prompt,
            keep_tokens=_keep_tokens(fields),
            add_special_tokens=boolean(fields, "add_special_tokens", True),
            skip_special_tokens=boolean(fields, "skip_special_tokens", True),
            echo=boolean(fields, "echo"),
        )


def _keep_tokens(fields: Fields) -> int | None:
    if fields.get("truncate_prompt_tokens") == 0:
        raise refuse("truncate_prompt_tokens", "0 would leave no prompt; at least 1, or -1 for as many as fit")
    return optional_integer(fields, "truncate_prompt_tokens", -1, limits.PROMPT_TOKENS_MAX)


class PromptEncoder:
    def __init__(
        self, card: ModelCard, vocabulary: Vocabulary, *, inline_characters_max: int, waiting_max: int
    ) -> None:
        self._card = card
        self._vocabulary = vocabulary
        self._inline_characters_max = inline_characters_max
        self._thread = SideThread("encode", waiting_max=waiting_max, what="long prompts")
        self._tokens_max = min(limits.PROMPT_TOKENS_MAX, card.max_model_len - 1)

    def close(self) -> None:
        self._thread.close()

    async def encode(self, fields: PromptFields, *, output_tokens: int, wait_ms: int) -> Prompt:
        whole = await self._ids(fields, wait_ms)
        if not whole:
            raise refuse("prompt", "must hold at least 1 token")
        ids = whole[-self._kept(fields.keep_tokens, output_tokens) :] if fields.keep_tokens is not None else whole
        if len(ids) > self._tokens_max:
            raise self._too_long(f"{len(ids)}")
        check_token_ids(ids, self._card.vocab_size, field="prompt")
        echo_text = await self._echo_text(fields, ids, cut=len(ids) < len(whole), wait_ms=wait_ms)
        return Prompt(tuple(ids), echo_text)

    def _kept(self, keep_tokens: int, output_tokens: int) -> int:
        if keep_tokens > 0:
            return keep_tokens
        return max(1, min(self._tokens_max, self._card.max_model_len - output_tokens))

    async def _ids(self, fields: PromptFields, wait_ms: int) -> list[int]:
        text = fields.prompt
        if not isinstance(text, str):
            return text
        tokens_max = self._tokens_max if fields.keep_tokens is None else limits.PROMPT_TOKENS_MAX
        per_token_max = self._vocabulary.characters_per_token_max
        if per_token_max is not None and len(text) > tokens_max * per_token_max:
            raise self._too_long(f"{len(text)} characters of text")

        def encode() -> list[int]:
            return self._vocabulary.encode(text, add_special_tokens=fields.add_special_tokens)

        if len(text) <= self._inline_characters_max:
            return encode()
        return await self._thread.run(encode, wait_ms=wait_ms)

    async def _echo_text(self, fields: PromptFields, ids: list[int], *, cut: bool, wait_ms: int) -> str | None:
        """The client's own text where it was used whole; else what the ids say."""
        if not fields.echo:
            return None
        if isinstance(fields.prompt, str) and not cut:
            return fields.prompt

        def decode() -> str:
            detokenizer = self._vocabulary.detokenizer(frozenset(), skip_special_tokens=fields.skip_special_tokens)
            return detokenizer.push(ids) + detokenizer.finish()

        if CHARACTERS_PER_TOKEN * len(ids) <= self._inline_characters_max:
            return decode()
        return await self._thread.run(decode, wait_ms=wait_ms)

    def _too_long(self, got: str) -> InvalidArgument:
        text = (
            f"at most {self._tokens_max} tokens, got {got} "
            f"(the model's context is {self._card.max_model_len} tokens, prompt and output together)"
        )
        return refuse("prompt", text)
