"""Workload: seeded clients. Who asks for what, when, and who changes their mind."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from control_plane.router.requests import Submit
from engine.executors.oracle import OracleExecutor
from engine.types import SamplingParams
from tests.sim.history import expected
from tests.sim.pictures import seen_by, with_images

PROMPT_TOKENS_MAX = 80
OUTPUT_TOKENS_MAX = 30
BORDERS = (1, 7, 8, 9, 23, 24, 25, 48, 80)  # around blocks (8) and steps (24)
TENANTS = ("", "blue", "green")


@dataclass(frozen=True, slots=True)
class Visit:
    """One client: submits, and perhaps leaves before the end, or has read enough of a choice."""

    at_us: int
    submit: Submit
    cancel_us: int | None = None
    stops: tuple[int, ...] = ()  # of each choice: after so many tokens a stop string is found; 0: in none


def draw_workload(random: Random, oracle: OracleExecutor.Config, *, requests: int, span_us: int) -> list[Visit]:
    """`requests` visits over `span_us`, in bursts. Some repeat an earlier prompt, often as another tenant; some go on
    with one, as a conversation does."""
    visits: list[Visit] = []
    burst_us = 0
    for key in range(1, requests + 1):
        if random.random() < 0.25:
            burst_us = random.randrange(span_us)
        submit = _draw_submit(random, key, oracle, earlier=[visit.submit for visit in visits])
        at_us = burst_us + random.randrange(100_000)
        cancel_us = at_us + _draw_patience_us(random) if random.random() < 0.2 else None
        visits.append(Visit(at_us, submit, cancel_us, _draw_stops(random, submit)))
    return visits


def show_pictures(random: Random, visits: Sequence[Visit]) -> list[Visit]:
    """About half of these clients have pictures in their prompts; some show those of an earlier one, with its words."""
    shown: list[Visit] = []
    for visit in visits:
        earlier = [each.submit for each in shown if each.submit.images]
        if random.random() < 0.5:
            submit = visit.submit
        elif earlier and random.random() < 0.4:
            past = seen_by(random.choice(earlier), visit.submit.tenant)
            submit = replace(visit.submit, token_ids=past.token_ids, images=past.images)
        else:
            submit = with_images(random, visit.submit)
        shown.append(replace(visit, submit=submit))
    return shown


def _draw_submit(random: Random, key: int, oracle: OracleExecutor.Config, *, earlier: list[Submit]) -> Submit:
    if earlier and random.random() < 0.2:
        return replace(random.choice(earlier), key=key, tenant=random.choice(TENANTS), codec="")
    continued = random.choice(earlier) if earlier and random.random() < 0.3 else None
    submit = Submit(
        key=key,
        token_ids=_continue(random, continued, oracle) if continued else _draw_prompt(random, _length(random), oracle),
        sampling=_draw_sampling(random),
        tenant=continued.tenant if continued else random.choice(TENANTS),
        deadline_ms=random.randrange(50, 3_000) if random.random() < 0.08 else 0,
        choices=random.randint(2, 4) if random.random() < 0.3 else 1,
        priority=random.choice((-1, 1)) if random.random() < 0.2 else 0,
    )
    return _with_stop(random, submit, oracle) if random.random() < 0.15 else submit


def _draw_sampling(random: Random) -> SamplingParams:
    return SamplingParams(
        temperature=random.choice((0.0, 0.8)),
        seed=random.getrandbits(32),
        max_tokens=_draw_max_tokens(random),
        logprobs=random.randrange(3) if random.random() < 0.15 else None,
        prompt_logprobs=random.randrange(3) if random.random() < 0.1 else None,
    )


def _length(random: Random) -> int:
    return random.choice(BORDERS) if random.random() < 0.6 else random.randint(1, PROMPT_TOKENS_MAX)


def _continue(random: Random, submit: Submit, oracle: OracleExecutor.Config) -> tuple[int, ...]:
    """The next turn: what was said so far, or the beginning of it, and something new."""
    so_far = submit.token_ids + expected(submit, oracle, random.randrange(submit.choices))[0]
    kept = so_far[: random.randint(1, len(so_far))] if random.random() < 0.3 else so_far
    return (*kept[: PROMPT_TOKENS_MAX - 1], *_draw_prompt(random, random.choice((1, 8, 15)), oracle))[
        :PROMPT_TOKENS_MAX
    ]


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


def _draw_stops(random: Random, submit: Submit) -> tuple[int, ...]:
    if random.random() < 0.8:
        return (0,) * submit.choices
    return tuple(random.choice((0, 1, random.randint(1, OUTPUT_TOKENS_MAX))) for _ in range(submit.choices))


def _with_stop(random: Random, submit: Submit, oracle: OracleExecutor.Config) -> Submit:
    """Stop at a token that a right output has, often its first (or, for an empty output, at any)."""
    output = expected(submit, oracle, random.randrange(submit.choices))[0] or (0,)
    stop = output[0] if random.random() < 0.3 else random.choice(output)
    return replace(submit, sampling=replace(submit.sampling, stop_token_ids=(stop,)))
