"""A model that sees, without any model: its template, its tokens, its way to lay an image out; and pictures."""

import base64
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from control_plane.router.media.decoding import Decoders
from control_plane.router.media.fetch import Fetcher
from control_plane.router.media.reader import ImageMemory, ImageReader, MediaObserver
from control_plane.router.text.chat_template import ChatTemplate
from control_plane.router.text.vocabulary import ModelCard, TokenizerVocabulary
from control_plane.router.validation.image_prompt import Sight
from engine.base.errors import InvalidArgument
from engine.vision.info import VisionInfo
from engine.vision.layout import ImageLayout
from tests.control_plane.router.edge_fakes import Router, answers

IMAGE, USER, END = "<image>", "<user>", "<end>"
CARD = ModelCard(name="seer", vocab_size=300, max_model_len=4_096, images_max=4, image_token_id=1)
SOURCE = (
    "{% for message in messages %}<{{ message.role }}>{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CELL = 16  # pixels, of one placeholder
WITHOUT_LAYOUT = 13  # pixels wide: what this model does not take


class Cells:
    """One placeholder for each cell, a bar behind each row."""

    def layout(self, width: int, height: int) -> ImageLayout:
        if width == WITHOUT_LAYOUT:
            raise InvalidArgument("image: unlucky", field="image")
        rows, columns = -(-height // CELL), -(-width // CELL)
        return ImageLayout(f"[{(IMAGE * columns + '|') * rows}]", rows * columns, (rows, columns))


@cache
def template(source: str = SOURCE) -> ChatTemplate:
    return ChatTemplate(source)


@cache
def vocabulary() -> TokenizerVocabulary:
    """A token for each printable character; the special ones come first."""
    specials = [END, IMAGE, USER, "<assistant>", "<system>"]
    letters = ["Ġ", "Ċ", *map(chr, range(33, 127))]
    tokenizer = Tokenizer(models.BPE(vocab={name: at for at, name in enumerate([*specials, *letters])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    with TemporaryDirectory() as folder:
        tokenizer.save(str(Path(folder) / "tokenizer.json"))
        return TokenizerVocabulary(Path(folder) / "tokenizer.json", CARD.vocab_size)


VISION = VisionInfo(
    family="cells", image_token=IMAGE, image_token_id=1, hidden_size=8, settings_digest=b"cells", rule=Cells()
)


def sight(
    decoders: Decoders | None = None, fetcher: Fetcher | None = None, memory: ImageMemory | None = None
) -> Callable[[MediaObserver], Sight]:
    def make(observer: MediaObserver) -> Sight:
        reader = ImageReader(decoders or Decoders(), fetcher or Fetcher(), memory or ImageMemory(), observer)
        return Sight(VISION, reader)

    return make


@contextmanager
def seeing(source: str = SOURCE, card: ModelCard = CARD, **media: Any) -> Iterator[Router]:
    """A router whose model sees. Its core answers everything with one token."""
    router = Router(card, vocabulary(), chat=template(source), sight=sight(**media))
    router.core.script = answers([5])
    try:
        yield router
    finally:
        router.validator.close()


# -- pictures ----------------------------------------------------------------------------------------------------------
def picture(width: int = 20, height: int = 10, mode: str = "RGB", seed: int = 1) -> Image.Image:
    """Every pixel another one."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    count = width * height * bands
    return Image.frombytes(
        mode, (width, height), bytes((seed * 31 + at * 7 + at * at // 5) % 256 for at in range(count))
    )


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def data_url(file: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(file).decode()}"


def image_part(source: Any = None) -> dict[str, Any]:
    """Of a small picture, if nothing else is said."""
    return {"type": "image_url", "image_url": {"url": data_url(saved(picture())) if source is None else source}}


def asking(*parts: Any) -> list[dict[str, Any]]:
    """One user's message."""
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]
