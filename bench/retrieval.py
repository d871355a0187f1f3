"""What a model can still find in KV that came through a codec: 16-token copies and facts, asked after the fact.

    context   | text with four sentences "NAME moved to CITY last year." somewhere in it, 1,024 tokens |
    copy      12 tokens that stand in the text: does it go on with the 16 that followed?  (share of tokens, fed right)
    facts     "As was said before, NAME moved to": is the right city ahead of the other three?   (share of questions)

The context's KV is made once, goes through the codec before any question is known, and each question is asked by
itself. A small model finds 0.85 and 0.6 to 0.7 of them with exact KV; chance is 0.3 (prose is predictable) and 0.25.

Legend: S scored tokens, V vocabulary; kv_LHPTD as in `engine.capture`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Final

import torch

from engine.capture import Floats, Subject

CONTEXT_TOKENS: Final = 1_024
CUE_TOKENS, COPY_TOKENS = 12, 16
COPIES, FACTS = 6, 4
NAMES: Final = ("Anna", "Peter", "Laura", "Thomas", "Maria", "Robert", "Helen", "Martin", "Alice", "Victor")
CITIES: Final = ("London", "Paris", "Berlin", "Rome", "Madrid", "Vienna", "Moscow", "Boston", "Chicago", "Tokyo")

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Fact:
    """The next token after the question is one of the candidates; the first is right."""

    question: tuple[int, ...]
    candidates: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Context:
    tokens: tuple[int, ...]
    copies: tuple[tuple[int, ...], ...]  # cue and continuation
    facts: tuple[Fact, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """Shares of what was asked for."""

    copy: float
    facts: float


def contexts_of(lines: Sequence[str], encode: Encode, count: int, seed: int = 0) -> list[Context]:
    """`encode` adds no special tokens. One after the other through the text, as many as it has room for."""
    dice, contexts, start = Random(seed), [], 0
    for _ in range(count):
        told = _told(encode, dice)
        end, tokens = start, 0
        while end < len(lines) and tokens < CONTEXT_TOKENS:
            tokens += len(encode(lines[end]))
            end += 1
        if tokens < CONTEXT_TOKENS:
            break
        contexts.append(_context(lines[start:end], told, encode, dice))
        start = end
    return contexts


def found(subject: Subject, contexts: Sequence[Context], kvs: Sequence[Floats]) -> Found:
    copies = [_copied(subject, kv, copy) for context, kv in zip(contexts, kvs, strict=True) for copy in context.copies]
    facts = [_recalled(subject, kv, fact) for context, kv in zip(contexts, kvs, strict=True) for fact in context.facts]
    return Found(sum(copies) / len(copies), sum(facts) / len(facts))


def _copied(subject: Subject, kv_LHPTD: Floats, copy: Sequence[int]) -> float:
    guesses_S = subject.log_probs(kv_LHPTD, copy)[CUE_TOKENS - 1 : -1].argmax(dim=-1)
    return float((guesses_S == torch.tensor(copy[CUE_TOKENS:])).float().mean())


def _recalled(subject: Subject, kv_LHPTD: Floats, fact: Fact) -> float:
    last_V = subject.log_probs(kv_LHPTD, fact.question)[-1]
    return float(last_V[list(fact.candidates)].argmax() == 0)


# -- making contexts ---------------------------------------------------------------------------------------------------
def _told(encode: Encode, dice: Random) -> list[tuple[str, str]]:
    """(name, city); cities that are one token, so that one distribution ranks them."""
    cities = [city for city in CITIES if len(encode(f" {city}")) == 1]
    if len(cities) < FACTS:
        raise ValueError("fewer than four of the cities are single tokens of this model")
    return list(zip(dice.sample(NAMES, FACTS), dice.sample(cities, FACTS), strict=True))


def _context(lines: Sequence[str], told: Sequence[tuple[str, str]], encode: Encode, dice: Random) -> Context:
    stretch = list(lines)
    for name, city in told:
        stretch.insert(dice.randrange(_early(lines, encode)), f"{name} moved to {city} last year.")
    tokens = encode("\n".join(stretch))[:CONTEXT_TOKENS]
    length = CUE_TOKENS + COPY_TOKENS
    starts = (dice.randrange(64, len(tokens) - length) for _ in range(COPIES))
    copies = tuple((*encode("\n\n"), *tokens[start : start + length])[-length:] for start in starts)
    return Context(tuple(tokens), copies, tuple(_facts(told, encode)))


def _early(lines: Sequence[str], encode: Encode) -> int:
    """How many lines begin in the first three quarters of a context: a fact among them is not cut off."""
    starts = accumulate((len(encode(line)) + 1 for line in lines), initial=0)
    return sum(start <= CONTEXT_TOKENS * 3 // 4 for start in starts)


def _facts(told: Sequence[tuple[str, str]], encode: Encode) -> list[Fact]:
    words = {city: encode(f" {city}")[0] for _, city in told}
    return [
        Fact(
            tuple(encode(f"\n\nAs was said before, {name} moved to")),
            (words[city], *(word for other, word in words.items() if other != city)),
        )
        for name, city in told
    ]
