"""Clients count tokens and write ids as the model's own tokenizer would, and learn nothing of this machine."""

import json
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from control_plane.router.text.chat_template import ChatTemplate
from control_plane.router.text.tokenizer_config import public_settings, special_names
from control_plane.router.text.vocabulary import OracleVocabulary, TokenizerVocabulary, Vocabulary
from control_plane.router.validation import validator as validation
from control_plane.router.validation.validator import Validator
from engine.base import limits
from engine.base.errors import InvalidArgument, NotFound, ResourceExhausted
from engine.models.checkpoint import ensure_default_model
from tests.control_plane.router.edge_fakes import CARD

TALK = [{"role": "user", "content": "hello"}]


@cache
def folder() -> Path:
    return ensure_default_model()


@cache
def default_vocabulary() -> TokenizerVocabulary:
    return TokenizerVocabulary.from_model_dir(folder(), 49_152)


def make_validator(
    vocabulary: Vocabulary | None = None, chat: ChatTemplate | None = None, config: validation.Config | None = None
) -> Validator:
    vocabulary = vocabulary or OracleVocabulary(CARD.vocab_size)
    return Validator(
        config or validation.Config(),
        card=replace(CARD, vocab_size=49_152) if isinstance(vocabulary, TokenizerVocabulary) else CARD,
        vocabulary=vocabulary,
        draw_seed=lambda: 1,
        count_unknown=lambda count: None,
        check_constraint=lambda constraint: None,
        clock_us=lambda: 0,
        chat=chat,
    )


def real() -> Validator:
    return make_validator(default_vocabulary(), ChatTemplate.from_model_dir(folder()))


async def tokenize(validator: Validator, **fields: Any) -> dict[str, Any]:
    return await validator.tokenize(json.dumps(fields).encode())


async def detokenize(validator: Validator, **fields: Any) -> dict[str, Any]:
    return await validator.detokenize(json.dumps(fields).encode())


async def test_a_text_has_these_ids_and_they_this_text() -> None:
    validator = real()
    reference = PreTrainedTokenizerFast.from_pretrained(folder())
    for text in ("", "hello there", "é 😀\n", "<|im_end|>", "a<|im_start|>b", "x" * 5_000):
        answer = await tokenize(validator, prompt=text, return_token_strs=True)
        ids = reference(text)["input_ids"]
        assert answer == {
            "count": len(ids),
            "max_model_len": CARD.max_model_len,
            "tokens": ids,
            "token_strs": reference.convert_ids_to_tokens(ids),
        }
        assert (await detokenize(validator, tokens=ids))["prompt"] == reference.decode(ids) == text
    validator.close()


async def test_messages_are_counted_as_a_chat_would_be_computed() -> None:
    validator = make_validator(default_vocabulary(), ChatTemplate("{{ messages[0].content }}<|im_end|>"))
    for content in ("hello", "<|im_end|>"):
        messages = [{"role": "user", "content": content}]
        answer = await tokenize(validator, messages=messages)
        request = await validator.validate({"messages": messages})
        assert answer["tokens"] == list(request.token_ids)
        assert (answer["count"], answer["token_strs"]) == (len(request.token_ids), None)
        assert answer["tokens"].count(2) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": "x" * (10 * limits.PROMPT_TOKENS_MAX + 1)}, "prompt"),
        ({"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ({"prompt": "a", "return_token_strs": "yes"}, "return_token_strs"),
        ({"prompt": "a", "add_generation_prompt": "yes"}, "add_generation_prompt"),
        ({"prompt": "a", "continue_final_message": 1}, "continue_final_message"),
        ({"prompt": "a", "chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"prompt": "a", "chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
        ({"messages": TALK, "add_generation_prompt": "yes"}, "add_generation_prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "x", "content": ""}]}, "messages[0].role"),
        ({"messages": TALK, "add_special_tokens": 1}, "add_special_tokens"),
        ({"messages": TALK, "chat_template": "{{ 1 }}"}, "chat_template"),
        ({"messages": TALK, "tools": [{}]}, "tools"),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_what_cannot_be_tokenized_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    validator = make_validator(chat=ChatTemplate("{{ messages[0].content }}"))
    with pytest.raises(InvalidArgument) as raised:
        await tokenize(validator, **fields)
    assert raised.value.field == param and raised.value.message.startswith(param)


@pytest.mark.parametrize("tokens", [None, 7, "a", [[1]], ["a"], [True], [-1], [1_000], [1.0], [1 << 40]])
async def test_what_is_no_list_of_ids_is_refused(tokens: Any) -> None:
    with pytest.raises(InvalidArgument) as raised:
        await detokenize(make_validator(), tokens=tokens)
    assert raised.value.field == "tokens"


async def test_the_model_and_the_body_are_checked_as_everywhere() -> None:
    validator = make_validator()
    with pytest.raises(NotFound):
        await tokenize(validator, prompt="a", model="other")
    with pytest.raises(NotFound):
        await detokenize(validator, tokens=[1], model="other")
    with pytest.raises(InvalidArgument, match="body: must be one JSON value"):
        await validator.tokenize(b"{")
    with pytest.raises(InvalidArgument, match="messages: the served model has no chat template"):
        await tokenize(validator, messages=TALK)


async def test_oracles_have_text_too() -> None:
    validator = make_validator()
    answer = await tokenize(validator, prompt=" 5 6", return_token_strs=True)
    assert (answer["tokens"], answer["token_strs"]) == ([5, 6], [" 5", " 6"])
    assert await detokenize(validator, tokens=[5, 6]) == {"prompt": " 5 6"}
    assert await detokenize(validator, tokens=[]) == {"prompt": ""}
    assert validator.tokenizer_info()["tokenizer_class"] == "OracleVocabulary"


class NamedWhere(OracleVocabulary):
    """Remembers which threads named tokens."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.threads: set[threading.Thread] = set()

    def token_name(self, token_id: int) -> str:
        self.threads.add(threading.current_thread())
        return super().token_name(token_id)


async def test_many_names_leave_the_loop_too() -> None:
    vocabulary = NamedWhere(CARD.vocab_size)
    validator = make_validator(vocabulary)
    few = await tokenize(validator, prompt=" 5", return_token_strs=True)
    assert (few["token_strs"], vocabulary.threads) == ([" 5"], {threading.current_thread()})
    vocabulary.threads.clear()
    many = await tokenize(validator, prompt=" 5" * 1_100, return_token_strs=True)
    assert many["token_strs"] == [" 5"] * 1_100
    assert threading.current_thread() not in vocabulary.threads
    validator.close()


async def test_long_texts_leave_the_loop() -> None:
    validator = make_validator(config=validation.Config(inline_characters_max=4, encodes_waiting_max=0))
    assert (await tokenize(validator, prompt="abcd"))["count"] == 4
    with pytest.raises(ResourceExhausted):
        await tokenize(validator, prompt="abcde")
    with pytest.raises(ResourceExhausted):
        await detokenize(validator, tokens=[1, 2])


# -- what clients may know of a tokenizer ------------------------------------------------------------------------------
def test_the_default_models_tokenizer_describes_itself() -> None:
    info = real().tokenizer_info()
    assert (info["eos_token"], info["bos_token"], info["pad_token"]) == ("<|im_end|>", "<|im_start|>", "<|im_end|>")
    assert info["chat_template"] == (folder() / "chat_template.jinja").read_text()
    assert info["tokenizer_class"] and info["model_max_length"] == CARD.max_model_len
    assert "is_local" not in info and str(folder()) not in json.dumps(info)


def test_nothing_of_this_machine_is_told() -> None:
    settings = {
        "tokenizer_class": "X",
        "eos_token": {"content": "</s>", "lstrip": False},
        "unk_token": None,
        "add_bos_token": True,
        "name_or_path": "/home/someone/model",
        "tokenizer_file": "/home/someone/model/tokenizer.json",
        "token": "secret",
        "auto_map": {"AutoTokenizer": "x.py"},
        "errors": {"not": "plain"},
    }
    assert public_settings(settings) == {"tokenizer_class": "X", "eos_token": "</s>", "add_bos_token": True}
    assert special_names(settings) == {"eos_token": "</s>"}
