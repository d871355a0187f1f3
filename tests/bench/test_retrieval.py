"""Retrieval: questions about a context can be answered from exactly that context."""

import numpy as np

from bench.retrieval import CITIES, CONTEXT_TOKENS, COPIES, COPY_TOKENS, CUE_TOKENS, FACTS, contexts_of, found
from engine.capture import Subject
from tests.engine.tiny_models import tiny_config, tiny_model

WORDS: dict[str, int] = {}


def encode(text: str) -> list[int]:
    """A token for each word and line end, numbered as they are met."""
    words = text.replace("\n", " \n ").split(" ")
    return [WORDS.setdefault(word, len(WORDS)) for word in words if word]


LINES = [f"line {n} says that {n % 7} follows {n % 5} and {n % 3}" for n in range(600)]


def test_contexts_hold_the_facts_and_the_copies() -> None:
    contexts = contexts_of(LINES, encode, count=3)
    assert len(contexts) == 3
    for context in contexts:
        assert len(context.tokens) == CONTEXT_TOKENS
        text = " ".join(map(str, context.tokens))
        assert len(context.copies) == COPIES and len(context.facts) == FACTS
        assert all(" ".join(map(str, copy[-COPY_TOKENS:])) in text for copy in context.copies)
        assert all(len(copy) == CUE_TOKENS + COPY_TOKENS for copy in context.copies)
        assert all(len(set(fact.candidates)) == FACTS for fact in context.facts)
        assert all(fact.candidates[0] in context.tokens for fact in context.facts)
    assert contexts == contexts_of(LINES, encode, count=3), "the same seed, the same questions"


def test_a_short_text_gives_fewer_contexts() -> None:
    assert len(contexts_of(LINES[:150], encode, count=3)) == 1


def test_shares_are_shares() -> None:
    contexts = contexts_of(LINES, encode, count=1)
    model = tiny_model(tiny_config(vocab_size=len(WORDS) + 1, max_position_embeddings=2_048))
    subject = Subject(model)
    kv_LHPTD = subject.kv(contexts[0].tokens, "bfloat16")
    exact = found(subject, contexts, [kv_LHPTD])
    blank = found(subject, contexts, [np.zeros_like(kv_LHPTD)])
    assert 0 <= exact.copy <= 1 and exact.facts in {0, 0.25, 0.5, 0.75, 1}
    assert exact == found(subject, contexts, [kv_LHPTD.copy()])
    assert 0 <= blank.copy <= 1
    assert len(CITIES) >= FACTS
