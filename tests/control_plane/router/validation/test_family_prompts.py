"""Every family's prompt with images is, token for token, what transformers' own processor makes of it."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from control_plane.router.access.caller import Caller
from control_plane.router.media.decoding import Decoders
from control_plane.router.media.fetch import Fetcher
from control_plane.router.media.reader import ImageMemory, ImageReader
from control_plane.router.metrics import RouterMetrics
from control_plane.router.text.chat_template import ChatTemplate
from control_plane.router.text.vocabulary import ModelCard, TokenizerVocabulary
from control_plane.router.validation import validator as validation
from control_plane.router.validation.image_prompt import Sight
from control_plane.router.validation.validator import Validator
from engine.vision.info import describe_vision
from tests.control_plane.router.seeing import data_url, picture, saved
from tests.engine.vision.tiny_vlms import FAMILIES, load_processor, make_tiny_vlm

SIZES = ((20, 10), (64, 64), (130, 40), (33, 200))
ORDERS = (
    [[0, "what is it?"]],
    [["what is", 1, "?"]],
    [["look", 0, 1, "and", 2]],
    [[3, 2, 1, 0, "which?"]],
    [["first", 2], ["then", 0, "?"]],
)


def validator(folder: Path) -> Validator:
    vision, template = describe_vision(folder), ChatTemplate.from_model_dir(folder)
    assert vision is not None
    metrics = RouterMetrics()
    reader = ImageReader(Decoders(), Fetcher(), ImageMemory(), metrics)
    return Validator(
        validation.Config(),
        card=ModelCard(name="tiny", vocab_size=1_000, max_model_len=1_024, images_max=8),
        vocabulary=TokenizerVocabulary.from_model_dir(folder, 1_000),
        draw_seed=lambda: 1,
        count_unknown=metrics.unknown_fields,
        check_constraint=lambda constraint: None,
        clock_us=lambda: 0,
        chat=template,
        sight=Sight(vision, reader),
    )


def said(order: list[list[Any]], image: Any) -> list[dict[str, Any]]:
    """Turns of a user's with an assistant's between them; numbers are images."""
    messages: list[dict[str, Any]] = []
    for turn in order:
        parts = [{"type": "text", "text": part} if isinstance(part, str) else image(part) for part in turn]
        messages += [{"role": "user", "content": parts}]
        messages += [{"role": "assistant", "content": [{"type": "text", "text": "I see."}]}]
    return messages[:-1]


@pytest.mark.procs
@pytest.mark.timeout(120)
@pytest.mark.parametrize("family", FAMILIES)
async def test_prompts_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    folder = make_tiny_vlm(family, tmp_path / family)
    processor, served = load_processor(folder), validator(folder)
    pictures = [picture(*size, seed=at) for at, size in enumerate(SIZES)]
    for order in ORDERS:
        used: list[Image.Image] = [pictures[part] for turn in order for part in turn if isinstance(part, int)]
        theirs = said(order, lambda _: {"type": "image"})
        text = processor.apply_chat_template(theirs, add_generation_prompt=True)
        expected = processor(text=[text], images=[used], return_tensors="pt", add_special_tokens=False)["input_ids"][
            0
        ].tolist()

        def url(number: int) -> dict[str, Any]:
            return {"type": "image_url", "image_url": {"url": data_url(saved(pictures[number]))}}

        request = await served.validate({"messages": said(order, url)}, Caller())
        assert list(request.token_ids) == expected
        assert sum(one.image.features for one in request.images) == request.image_tokens
        assert [one.picture.pixels for one in request.images] == [image.tobytes() for image in used]
        request.release()
    served.close()
