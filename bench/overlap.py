"""How much of a transfer hides behind prefill, and how soon decode goes on: the hand-over of real prompts.

    P   |-- step: layers 0-5 | 5-10 | ... | 25-30 |-sample-|
    D          placed   placed  ...   placed      |placed| activated |-- decode step --| second token
                                                  ^ last layer computed

Real weights, one process each with a core of its own, one request at a time. Times come from the workers' traces
(`control_plane.agent.trace`) and from the client, all on one clock. Not measured here: a network, or a busy decode
worker.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bench.cluster import Heard, cluster, generate, read_trace, stub, trace_folder
from bench.figures import Bar, Figure, figure_of, save
from control_plane.options import Dtype, EngineOptions

PROMPT_TOKENS = 1_024
OUTPUT_TOKENS = 8
REQUESTS = 20
WARM_UP = 1
VOCABULARY = 49_152
STEP_TOKENS = 512
ENGINE = EngineOptions(dtype=Dtype.BFLOAT16, kv_cache_mib=512, step_tokens=STEP_TOKENS)

OVERLAP = Bar(
    name="overlap",
    claim=f"KV bytes of a {PROMPT_TOKENS}-token prompt that are on D before prefill has computed its last layer",
    unit="of all",
    limit=0.8,
    at_least=True,
)
SECOND_TOKEN = Bar(
    name="second token",
    claim="from the last computed layer to the second token, on an idle D",
    unit="decode steps",
    limit=1.5,
)


@dataclass(frozen=True, slots=True)
class HandOver:
    """One request, as its workers and its client saw it."""

    last_layer_us: int
    first_token_us: int  # sampled on P
    placed: tuple[tuple[int, int], ...]  # (when, bytes) on D
    activated_us: int
    decoded_us: tuple[int, ...]  # end of each of D's steps
    heard: Heard

    @property
    def overlap(self) -> float:
        hidden = sum(size for at_us, size in self.placed if at_us <= self.last_layer_us)
        return hidden / sum(size for _, size in self.placed)

    @property
    def steps_us(self) -> list[int]:
        return [end - start for start, end in pairwise(self.decoded_us)]

    def second_token_us(self) -> int:
        """As the client had it: the way over the router is part of the wait."""
        return self.heard.tokens_us[1] - self.last_layer_us


async def measure(requests: int = REQUESTS) -> list[Figure]:
    with trace_folder() as folder:
        heard = await _ask(Path(folder), requests)
        hand_overs = _hand_overs(read_trace(Path(folder), "prefill-0"), read_trace(Path(folder), "decode-0"), heard)
    return _figures(hand_overs[WARM_UP:])


async def _ask(folder: Path, requests: int) -> list[Heard]:
    draw = random.Random(1)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(WARM_UP + requests)]
    async with cluster(ENGINE, trace=folder) as running, stub(running) as inference:
        return [await generate(inference, prompt, OUTPUT_TOKENS) for prompt in prompts]


def _hand_overs(prefill: list[dict[str, Any]], decode: list[dict[str, Any]], heard: Sequence[Heard]) -> list[HandOver]:
    """Requests came one after the other, so each owns what was noted between its start and its end."""
    return [
        _hand_over(_during(prefill, client), _during(decode, client), client)  #
        for client in heard
    ]


def _during(events: list[dict[str, Any]], client: Heard) -> list[dict[str, Any]]:
    return [event for event in events if client.sent_us <= event["us"] <= client.tokens_us[-1]]


def _hand_over(prefill: list[dict[str, Any]], decode: list[dict[str, Any]], heard: Heard) -> HandOver:
    def at(events: list[dict[str, Any]], name: str) -> list[int]:
        return [event["us"] for event in events if event["event"] == name]

    return HandOver(
        last_layer_us=at(prefill, "computed")[-1],
        first_token_us=at(prefill, "prefilled")[-1],
        placed=tuple((event["us"], event["bytes"]) for event in decode if event["event"] == "placed"),
        activated_us=at(decode, "activated")[0],
        decoded_us=tuple(at(decode, "tokens")),
        heard=heard,
    )


def _figures(hand_overs: Sequence[HandOver]) -> list[Figure]:
    step_us = median(step for one in hand_overs for step in one.steps_us)

    def after_last_layer_ms(name: str) -> float:
        return round(median(getattr(one, name) - one.last_layer_us for one in hand_overs) / 1e3, 1)

    overlap = figure_of(
        OVERLAP,
        [one.overlap for one in hand_overs],
        kv_mib=round(sum(size for _, size in hand_overs[0].placed) / 2**20, 1),
        prefill_ms=round(median(one.last_layer_us - one.heard.sent_us for one in hand_overs) / 1e3),
    )
    second = figure_of(
        SECOND_TOKEN,
        [one.second_token_us() / step_us for one in hand_overs],
        step_ms=round(step_us / 1e3, 1),
        first_token_ms=after_last_layer_ms("first_token_us"),
        activated_ms=after_last_layer_ms("activated_us"),
        sampled_ms=round(median(one.decoded_us[0] - one.last_layer_us for one in hand_overs) / 1e3, 1),
        heard_ms=round(median(one.second_token_us() for one in hand_overs) / 1e3, 1),
    )
    return [overlap, second]


if __name__ == "__main__":
    measured = asyncio.run(measure())
    save("overlap", measured)
    print(*measured, sep="\n")
