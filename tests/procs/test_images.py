"""Pictures through real processes: what the demo model says over HTTP is what plain transformers' `generate` says.

Greedy, in float32, with and without an encode worker. Whether what it says is right is `bench.demo_vlm`'s to measure.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import httpx
import pytest
from PIL import Image

from control_plane.options import MODEL_DEMO, Dtype, EngineOptions
from deploy.local import LocalCluster
from engine.models.demo_vlm.assemble import ensure_demo_vlm
from tests.procs.harness import REQUEST_TIMEOUT_S, cluster, settle
from triptych.demo.drawing import draw
from triptych.demo.scenes import Space, scene_of

DEMO = EngineOptions(model=MODEL_DEMO, dtype=Dtype.FLOAT32, kv_cache_mib=128, embedding_cache_mib=16)
ANSWER_TOKENS = 16
SEED = 5

Part: TypeAlias = str | Image.Image
"""Of a user's message."""


@dataclass(frozen=True)
class Picture:
    """A held-out picture and what to ask about it."""

    image: Image.Image
    question: str


def picture(number: int, side: int = 192) -> Picture:
    scene, question = scene_of(Space.HELD_OUT, SEED, number)
    return Picture(draw(scene, side), question.text)


ONE, TWO, THREE = picture(0), picture(1, side=64), picture(2, side=320)
MESSAGES: dict[str, tuple[Part, ...]] = {
    "image first": (ONE.image, ONE.question),
    "text first": (TWO.question, TWO.image),
    "between": ("Look at this:", THREE.image, "and at this:", ONE.image, "", TWO.image.resize((200, 90)), ONE.question),
    "four": (TWO.image, "left of", ONE.image, "and above", THREE.image, TWO.image.resize((64, 130)), TWO.question),
    "the same twice": (TWO.image, TWO.image, TWO.question),
    "none": ("The capital of France is",),
}


class Reference:
    """The checkpoint, as anybody would load it."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        folder = ensure_demo_vlm()
        load_processor: Any = AutoProcessor.from_pretrained
        self._processor = load_processor(folder)
        self._model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)

    def answer(self, parts: Sequence[Part]) -> tuple[int, str]:
        """The prompt's tokens, and what follows."""
        content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
        text = self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        images = [part for part in parts if not isinstance(part, str)]
        inputs = self._processor(text=[text], images=[images] if images else None, return_tensors="pt")
        prompt_tokens = inputs["input_ids"].shape[1]
        (tokens,) = self._model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS)
        return prompt_tokens, self._processor.decode(tokens[prompt_tokens:], skip_special_tokens=True)


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[int, str]]:
    reference = Reference()
    return {name: reference.answer(parts) for name, parts in MESSAGES.items()}


def body(parts: Sequence[Part]) -> dict[str, Any]:
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": url(part)}}
        for part in parts
    ]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": ANSWER_TOKENS, "temperature": 0}


def url(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


@dataclass(frozen=True)
class Told:
    """Of one answer: what was said, and how it came about."""

    prompt_tokens: int
    text: str
    encode_workers: set[str]
    image_hits: int

    @property
    def answer(self) -> tuple[int, str]:
        return self.prompt_tokens, self.text


async def ask(client: httpx.AsyncClient, running: LocalCluster, parts: Sequence[Part]) -> Told:
    response = await client.post(f"{running.url}/v1/chat/completions", json=body(parts), timeout=REQUEST_TIMEOUT_S)
    assert response.status_code == httpx.codes.OK, response.text
    told = response.json()
    stats = told["triptych"]
    return Told(
        told["usage"]["prompt_tokens"],
        told["choices"][0]["message"]["content"],
        set(stats["encode_workers"]),
        stats["image_hits"],
    )


def pictures(parts: Sequence[Part]) -> int:
    return sum(not isinstance(part, str) for part in parts)


@pytest.mark.procs
@pytest.mark.model
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("encode", "encoder"), [(1, "encode-0"), (0, "prefill-0")])
async def test_pictures_are_answered_as_by_plain_transformers(
    encode: int, encoder: str, expected: dict[str, tuple[int, str]], model_dir: object
) -> None:
    """Each message twice: the second time no picture goes through a tower."""
    async with cluster(engine=DEMO, encode=encode, ready_timeout_s=120) as running, httpx.AsyncClient() as client:
        first = {name: await ask(client, running, parts) for name, parts in MESSAGES.items()}
        again = {name: await ask(client, running, parts) for name, parts in MESSAGES.items()}
        who = (await settle(client, running))[encoder]["id"]
    assert {name: told.answer for name, told in first.items()} == expected
    assert {name: told.answer for name, told in again.items()} == expected
    assert first["image first"].image_hits == 0
    for name, parts in MESSAGES.items():
        assert again[name].image_hits == pictures(parts), name
        assert first[name].encode_workers == ({who} if pictures(parts) else set()), name
