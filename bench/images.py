"""Images beside text: what encode workers are for.

    python -m bench.images

    text beside images    text at a steady rate, and IMAGE_RATE image requests a second beside it: p90 TTFT of the text
                          with encode workers, and with as many workers without one, where prefill workers encode
    parallel encoding     one request of four images: its encode stage on two encode workers, and on one

A vision tower of random weights is timed first, on one core: an image costs what its forward has cost. Workers are
paced, the language model by its fitted step times and the tower by that measurement, so that six of them fit on two
cores; processes, pixels, embeddings on the wire and the router are real. Clusters take turns in one run.
"""

import asyncio
import base64
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from bench.cluster import cluster
from bench.figures import Bar, Figure, figure_of, save
from control_plane.options import EngineOptions, ExecutorKind
from deploy.local import LocalCluster
from triptych.demo.command import png
from triptych.demo.scenes import Space, scene_of
from triptych.load.measurement import measure as measure_load
from triptych.load.options import Endpoint, LoadOptions

IMAGE_MS_MIN = 300.0
IMAGE_RATE = 4.0
TEXT_RATE = 2.0
TEXT_TOKENS = 128
TEXT_EVENNESS = 100.0  # steady: hardly more than the same time between any two
TEXT_SEED = 1_000  # of other arrivals than the images
OUTPUT_TOKENS = 8
PHASE_S = 30.0
ROUNDS = 3
WITH_ENCODERS = {"encode": 1, "prefill": 1, "decode": 1}
WITHOUT = {"encode": 0, "prefill": 2, "decode": 1}
IMAGES = 4
REQUESTS = 5
TIMEOUT_S = 60.0

BESIDE = Bar(
    name="text beside images",
    claim=f"p90 TTFT of text beside {IMAGE_RATE:g} image requests/s: 2 encode workers, 1 prefill, 1 decode, against 3 "
    "prefill and 1 decode",
    unit="x",
    limit=0.6,
)
PARALLEL = Bar(
    name="parallel encoding",
    claim=f"encode stage of a request of {IMAGES} images on two encode workers, against one",
    unit="x",
    limit=0.65,
)


async def measure(rounds: int = ROUNDS, phase_s: float = PHASE_S) -> list[Figure]:
    tower_ms = max(IMAGE_MS_MIN, tower_cpu_ms())
    engine = EngineOptions(
        model="demo-vlm", executor=ExecutorKind.PACED, kv_cache_mib=128, encode_image_ms=round(tower_ms, 1)
    )
    with tempfile.TemporaryDirectory(prefix="triptych-bench-") as folder:
        beside = await text_beside_images(engine, Path(folder), rounds, phase_s)
    return [_beside(beside, tower_ms), await parallel_encoding(engine, rounds, tower_ms)]


# -- the tower ---------------------------------------------------------------------------------------------------------
def tower_cpu_ms() -> float:
    """CPU time of one image in ViT-B/16 at 256 x 256 of random weights, float32, on one core; the best of three."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.set_num_threads(1)
    width: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3_072, "num_attention_heads": 12}
    tower = CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=12, image_size=256, patch_size=16, **width)).eval()
    pixels = torch.randn(1, 3, 256, 256)
    with torch.inference_mode():
        return min(_cpu_ms(lambda: tower(pixels)) for _ in range(3))


def _cpu_ms(work: Any) -> float:
    started_s = time.thread_time()
    work()
    return (time.thread_time() - started_s) * 1e3


# -- text beside images ------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Beside:
    """One phase of one cluster: figures as `triptych bench serve` has them."""

    text: dict[str, Any]
    images: dict[str, Any]


async def text_beside_images(
    engine: EngineOptions, folder: Path, rounds: int, phase_s: float
) -> list[tuple[Beside, Beside]]:
    """Of each round: with encode workers, without."""
    taken = []
    for number in range(rounds):
        phases = [
            await _phase(engine, workers, folder / f"{number}-{workers['encode']}.jsonl", number, phase_s)
            for workers in (WITH_ENCODERS, WITHOUT)
        ]
        taken.append((phases[0], phases[1]))
    return taken


async def _phase(engine: EngineOptions, workers: dict[str, int], file: Path, number: int, phase_s: float) -> Beside:
    _write_requests(file, number, int(IMAGE_RATE * phase_s * 2))
    async with cluster(engine, **workers) as running:
        load = {"url": running.url, "output_len": OUTPUT_TOKENS, "ignore_eos": True, "duration_s": phase_s}
        text = LoadOptions(
            **load, rate=TEXT_RATE, burstiness=TEXT_EVENNESS, input_len=TEXT_TOKENS, seed=number + TEXT_SEED
        )  # type: ignore[arg-type]
        images = LoadOptions(**load, rate=IMAGE_RATE, endpoint=Endpoint.CHAT, prompts=file, seed=number)  # type: ignore[arg-type]
        measured = await asyncio.gather(measure_load(text), measure_load(images))
    return Beside(*(each.values for each in measured))


def _write_requests(file: Path, number: int, count: int) -> None:
    """With one picture each; no two of them the same."""
    lines = [json.dumps({"messages": _messages([(number, at)])}) for at in range(count)]
    file.write_text("\n".join(lines))


def _messages(pictures: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """A question about these of the demo's pictures: (seed, number)."""
    parts: list[dict[str, Any]] = []
    for seed, number in pictures:
        scene, _ = scene_of(Space.HELD_OUT, seed, number)
        url = "data:image/png;base64," + base64.b64encode(png(scene)).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is there to see?"}]}]


def _beside(rounds: Sequence[tuple[Beside, Beside]], tower_ms: float) -> Figure:
    ratios = [with_.text["p90_ttft_ms"] / without.text["p90_ttft_ms"] for with_, without in rounds]
    notes: dict[str, Any] = {"tower_ms": round(tower_ms)}
    for name, phases in (("with", [each[0] for each in rounds]), ("without", [each[1] for each in rounds])):
        notes[f"{name}_text_p90_ttft_ms"] = round(median(phase.text["p90_ttft_ms"] for phase in phases))
        notes[f"{name}_image_p90_ttft_ms"] = round(median(phase.images["p90_ttft_ms"] for phase in phases))
        notes[f"{name}_completed"] = sum(phase.text["completed"] + phase.images["completed"] for phase in phases)
        notes[f"{name}_not_completed"] = sum(
            each["failed"] + each["refused"] for phase in phases for each in (phase.text, phase.images)
        )
    return figure_of(BESIDE, ratios, **notes)


# -- parallel encoding -------------------------------------------------------------------------------------------------
async def parallel_encoding(engine: EngineOptions, rounds: int, tower_ms: float) -> Figure:
    """Two clusters at once, asked in turn."""
    stages: dict[int, list[float]] = {1: [], 2: []}
    async with cluster(engine, encode=1) as one, cluster(engine, encode=2) as two, httpx.AsyncClient() as client:
        for number in range(rounds * REQUESTS):
            pictures = [(1_000 + number, at) for at in range(IMAGES)]
            for count, running in ((1, one), (2, two)):
                stages[count].append(await _encode_ms(client, running, pictures))
    ratios = [both / alone for alone, both in zip(stages[1], stages[2], strict=True)]
    notes = {f"workers_{count}_ms": round(median(times)) for count, times in stages.items()}
    return figure_of(PARALLEL, ratios, tower_ms=round(tower_ms), **notes)


async def _encode_ms(client: httpx.AsyncClient, running: LocalCluster, pictures: Sequence[tuple[int, int]]) -> float:
    body = {"messages": _messages(pictures), "max_completion_tokens": 1, "temperature": 0}
    response = await client.post(f"{running.url}/v1/chat/completions", json=body, timeout=TIMEOUT_S)
    response.raise_for_status()
    encode_ms: float = response.json()["triptych"]["phase_ms"]["encode"]
    return encode_ms


def main() -> None:
    figures = asyncio.run(measure())
    for figure in figures:
        print(figure)
    print(f"wrote {save('images', figures)}")


if __name__ == "__main__":
    main()
