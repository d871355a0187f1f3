"""Greedy answers about images over separate encode, prefill and decode processes equal transformers' own `generate`.

Each family with a tiny model of random weights, in float32; one to four images of mixed sizes, before, between and
after text. The demo model's turn is in `test_images`.
"""

import asyncio
import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from PIL import Image

from control_plane.options import Dtype, EngineOptions
from deploy.local import LocalCluster
from tests.engine.vision.tiny_vlms import FAMILIES, generate, load_model, load_processor, make_tiny_vlm
from tests.procs.harness import cluster

MAX_TOKENS = 12
REQUEST_TIMEOUT_S = 60.0
# "i": an image, "t": text
SHAPES = ("it", "ti", "iti", "tit", "iitit", "tiiti", "itiiti", "i")
SIDES = (17, 28, 40, 56, 64, 90, 128)

Parts = list[Image.Image | str]


@dataclass(frozen=True, slots=True)
class Case:
    parts: Parts
    expected: list[int]


def drawn(draw: Random) -> Image.Image:
    size = draw.choice(SIDES), draw.choice(SIDES)
    return Image.frombytes("RGB", size, draw.randbytes(size[0] * size[1] * 3))


def parts_of(shape: str, draw: Random) -> Parts:
    words = ("what", "is", "this", "and", "that", "here")
    return [drawn(draw) if kind == "i" else " ".join(draw.choices(words, k=draw.randint(1, 6))) for kind in shape]


# -- the reference -----------------------------------------------------------------------------------------------------
def cases(folder: Path) -> list[Case]:
    """What transformers answers."""
    processor, model, draw = load_processor(folder), load_model(folder), Random(7)
    wanted = [parts_of(shape, draw) for shape in SHAPES]
    return [Case(parts, generate(model, _inputs(processor, parts), MAX_TOKENS)) for parts in wanted]


def _inputs(processor: Any, parts: Parts) -> Any:
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [part for part in parts if not isinstance(part, str)]
    return processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)


# -- ours --------------------------------------------------------------------------------------------------------------
def body(parts: Parts) -> dict[str, Any]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else image_part(part) for part in parts]
    return {
        "messages": [{"role": "user", "content": content}],
        "max_completion_tokens": MAX_TOKENS,
        "temperature": 0,
        "return_token_ids": True,
        "triptych": {"codec": "raw"},
    }


def image_part(image: Image.Image) -> dict[str, Any]:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


async def ask_all(running: LocalCluster, wanted: Sequence[Case]) -> list[dict[str, Any]]:
    """All at once: their images share batches of the tower, their prompts share steps."""
    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S) as client:
        address = f"{running.url}/v1/chat/completions"
        responses = await asyncio.gather(*(client.post(address, json=body(case.parts)) for case in wanted))
    assert [response.status_code for response in responses] == [200] * len(wanted), responses[0].text
    return [response.json() for response in responses]


def tokens_of(answer: dict[str, Any]) -> list[int]:
    token_ids: list[int] = answer["choices"][0]["token_ids"]
    return token_ids


@pytest.mark.procs
@pytest.mark.timeout(240)
@pytest.mark.parametrize("family", sorted(FAMILIES))
async def test_answers_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    folder = make_tiny_vlm(family, tmp_path / family)
    wanted = await asyncio.to_thread(cases, folder)
    engine = EngineOptions(model=str(folder), dtype=Dtype.FLOAT32, kv_cache_mib=16, step_tokens=48)
    async with cluster(engine=engine, prefill=1, decode=1, encode=1) as running:
        answers = await ask_all(running, wanted)
        again = await ask_all(running, wanted)
    for case, answer, repeat in zip(wanted, answers, again, strict=True):
        assert tokens_of(answer) == case.expected
        assert tokens_of(repeat) == case.expected
        images = sum(not isinstance(part, str) for part in case.parts)
        stats = answer["triptych"]
        assert len(stats["encode_workers"]) == images
        assert len({*stats["encode_workers"], stats["prefill_worker"], stats["decode_worker"]}) == 3
        assert repeat["triptych"]["image_hits"] == images
        details = repeat["usage"]["prompt_tokens_details"]
        assert details["cached_multimodal_tokens"] == details["multimodal_tokens"]
    assert len({tuple(case.expected) for case in wanted}) > 1, "the model does not look"
