"""The frozen language model, asked about pictures that somebody describes to it in vectors."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from triptych.demo.scenes import Question

_USER: Final = "<|im_start|>user\n"
_ASSISTANT: Final = "<|im_end|>\n<|im_start|>assistant\n"
_END: Final = "<|im_end|>"
_PICTURE: Final = -1  # in place of a token
_UNASKED: Final = -100  # label of a token that is not of an answer
_PADDING: Final = -1  # the conversation that padding belongs to


class Order(Enum):
    """How people ask several things about one picture."""

    BESIDE = auto()  # the picture, then each question in a conversation of its own
    IN_TURN = auto()  # the picture, then question and answer, question and answer
    TEXT_FIRST = auto()  # a question, then the picture; the others in turn


@dataclass(frozen=True, slots=True)
class Talk:
    """What is asked about one picture."""

    order: Order
    questions: Sequence[Question]


@dataclass(slots=True)
class _Row:
    """One picture with its questions. Everybody sees conversation 0; the others see themselves besides.

    So conversations can share a picture's tokens, and are still what each would be alone, positions included.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    conversations: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    conversation: int = 0
    position: int = 0

    def add(self, tokens: Sequence[int], *, answer: bool = False) -> None:
        self.tokens += tokens
        self.positions += range(self.position, self.position + len(tokens))
        self.conversations += [self.conversation] * len(tokens)
        self.labels += tokens if answer else [_UNASKED] * len(tokens)
        self.position += len(tokens)

    def branch(self, conversation: int, position: int) -> None:
        """Go on as another conversation, as if nothing had been said since that position."""
        self.conversation, self.position = conversation, position


class Reader:
    """Nothing of it is ever trained."""

    def __init__(self, folder: Path, image_tokens: int) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="eager"
        )
        self._model.requires_grad_(False)
        self._model.train(False)
        self._picture = [_PICTURE] * image_tokens

    @property
    def embeddings(self) -> Tensor:
        weight: Tensor = self._model.get_input_embeddings().weight
        return weight

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def loss(self, said: Tensor, talks: Sequence[Talk]) -> Tensor:
        """Of the right answers' tokens, given what is said of each picture: [pictures, image tokens, hidden]."""
        tokens, positions, conversations, labels = _padded([self._row(talk) for talk in talks])
        pictures = (tokens == _PICTURE)[:, :, None]
        embedded = self._model.get_input_embeddings()(tokens.clamp(min=0))
        hidden = self._model.model(
            inputs_embeds=embedded.masked_scatter(pictures, said.to(embedded.dtype)),
            attention_mask=_mask(conversations),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        answers = labels[:, 1:] != _UNASKED
        logits = self._model.lm_head(hidden[:, :-1][answers]).float()
        return F.cross_entropy(logits, labels[:, 1:][answers])

    def _row(self, talk: Talk) -> _Row:
        row = _Row()
        row.add(self.tokenize(_USER))
        if talk.order is Order.BESIDE:
            self._beside(row, talk.questions)
        else:
            self._in_turn(row, talk.questions, text_first=talk.order is Order.TEXT_FIRST)
        return row

    def _beside(self, row: _Row, questions: Sequence[Question]) -> None:
        row.add(self._picture)
        fork = row.position
        for number, question in enumerate(questions, start=1):
            row.branch(number, fork)
            row.add(self.tokenize(question.text))
            self._answer(row, question)

    def _in_turn(self, row: _Row, questions: Sequence[Question], *, text_first: bool) -> None:
        first, *others = questions
        parts = [self._picture, self.tokenize(first.text)]
        for part in reversed(parts) if text_first else parts:
            row.add(part)
        self._answer(row, first)
        for question in others:
            row.add(self.tokenize(f"\n{_USER}{question.text}"))
            self._answer(row, question)

    def _answer(self, row: _Row, question: Question) -> None:
        row.add(self.tokenize(_ASSISTANT))
        row.add(self.tokenize(question.answer + _END), answer=True)


def _padded(rows: Sequence[_Row]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    longest = max(len(row.tokens) for row in rows)

    def stacked(lists: Sequence[list[int]], padding: int) -> Tensor:
        return torch.tensor([values + [padding] * (longest - len(values)) for values in lists])

    return (
        stacked([row.tokens for row in rows], 0),
        stacked([row.positions for row in rows], 0),
        stacked([row.conversations for row in rows], _PADDING),
        stacked([row.labels for row in rows], _UNASKED),
    )


def _mask(conversations: Tensor) -> Tensor:
    """What is added to attention scores: a token sees what came before in its conversation and in the common one."""
    length = conversations.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    own = conversations[:, :, None] == conversations[:, None, :]
    seen = earlier & (own | (conversations[:, None, :] == 0))
    lowest = torch.finfo(torch.bfloat16).min
    return torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, lowest)[:, None]
