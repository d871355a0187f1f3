"""Workload: seeded clients. Who asks for what, when, and who changes their mind."""

from dataclasses import dataclass, replace
from random import Random

from control_plane.router.requests import Submit
from engine.executors.oracle import OracleExecutor
from engine.types import SamplingParams
from tests.sim.history import expected

PROMPT_TOKENS_MAX = 80
OUTPUT_TOKENS_MAX = 30
BORDERS = (1, 7, 8, 9, 23, 24, 25, 48, 80)  # around blocks (8) and steps (24)
TENANTS = ("", "blue", "green")


@dataclass(frozen=True, slots=True)
class Visit:
    """One client: submits, and perhaps leaves before the end."""

    at_us: int
    submit: Submit
    cancel_us: int | None = None


def draw_workload(random: Random, oracle: OracleExecutor.Config, *, requests: int, span_us: int) -> list[Visit]:
    """`requests` visits over `span_us`, in bursts. Some repeat an earlier prompt, often as another tenant."""
    visits: list[Visit] = []
    burst_us = 0
    for key in range(1, requests + 1):
        if random.random() < 0.25:
            burst_us = random.randrange(span_us)
        submit = _draw_submit(random, key, oracle, earlier=[visit.submit for visit in visits])
        at_us = burst_us + random.randrange(100_000)
        cancel_us = at_us + _draw_patience_us(random) if random.random() < 0.2 else None
        visits.append(Visit(at_us, submit, cancel_us))
    return visits


def _draw_submit(random: Random, key: int, oracle: OracleExecutor.Config, *, earlier: list[Submit]) -> Submit:
    if earlier and random.random() < 0.2:
        return replace(random.choice(earlier), key=key, tenant=random.choice(TENANTS))
    length = random.choice(BORDERS) if random.random() < 0.6 else random.randint(1, PROMPT_TOKENS_MAX)
    submit = Submit(
        key=key,
        token_ids=_draw_prompt(random, length, oracle),
        sampling=SamplingParams(
            temperature=random.choice((0.0, 0.8)), seed=random.getrandbits(32), max_tokens=_draw_max_tokens(random)
        ),
        tenant=random.choice(TENANTS),
        deadline_ms=random.randrange(50, 3_000) if random.random() < 0.08 else 0,
    )
    return _with_stop(random, submit, oracle) if random.random() < 0.15 else submit


def _draw_prompt(random: Random, length: int, oracle: OracleExecutor.Config) -> tuple[int, ...]:
    """Few are poisoned: a step that is fed such a one raises, and may take nobody else along (I11)."""
    poison = oracle.poison_token
    prompt = [token for token in random.choices(range(oracle.vocab_size), k=2 * length) if token != poison][:length]
    if poison is not None and random.random() < 0.02:
        prompt[random.randrange(length)] = poison
    return tuple(prompt)


def _draw_max_tokens(random: Random) -> int:
    return random.randint(0, 2) if random.random() < 0.15 else random.randint(3, OUTPUT_TOKENS_MAX)


def _draw_patience_us(random: Random) -> int:
    """Mostly while it is worked on, at times before anybody has heard of it."""
    return random.choice((0, random.randrange(100_000), random.randrange(2_000_000)))


def _with_stop(random: Random, submit: Submit, oracle: OracleExecutor.Config) -> Submit:
    """Stop at a token that the right output has (or, for an empty output, at any)."""
    stop = random.choice(expected(submit, oracle)[0] or (0,))
    return replace(submit, sampling=replace(submit.sampling, stop_token_ids=(stop,)))
