"""Images in a prompt: what the template's one token for each becomes, and which token ids stand for which image.

    ... <image> ...        rendered: one image token for each image, the template's own (users' text is marked)
    ... <a><image><image><b><image> ...    each replaced by its layout's text
    ids                    tokenised as one text; the placeholders in it, in order, are the images' runs

What does not belong here: reading parts (`chat_fields`), pixels (`media`), layouts and keys (`engine.vision`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from control_plane.router.media.decoding import Decoded
from control_plane.router.media.reader import HeldImages, ImagePart, ImageReader
from control_plane.router.requests import SubmittedImage, cache_scope
from control_plane.router.validation.fields import refuse
from engine.base.errors import InvalidArgument
from engine.images import PromptImage, Run
from engine.vision.info import VisionInfo
from engine.vision.layout import ImageLayout


class Sight:
    """What a model that sees needs beside its text."""

    def __init__(self, vision: VisionInfo, reader: ImageReader) -> None:
        self._vision = vision
        self._reader = reader

    def close(self) -> None:
        self._reader.close()

    async def look(self, parts: Sequence[ImagePart], *, cache_salt: str = "", wait_ms: int, tenant: str) -> "Seen":
        """Pixels and layouts of all images. `held` is the caller's to release."""
        album = await self._reader.read(parts, wait_ms=wait_ms, tenant=tenant)
        try:
            layouts = tuple(map(self._layout, parts, album.images))
        except BaseException:
            album.held.release()
            raise
        return Seen(self._vision, album.images, layouts, cache_scope(tenant, cache_salt), album.held)

    def _layout(self, part: ImagePart, image: Decoded) -> ImageLayout:
        try:
            return self._vision.layout(image.picture.width, image.picture.height)
        except InvalidArgument:
            raise self._reader.layout_refused(part) from None


@dataclass(frozen=True, slots=True)
class Seen:
    """The images of one conversation."""

    vision: VisionInfo
    images: tuple[Decoded, ...]
    layouts: tuple[ImageLayout, ...]
    scope: str
    held: HeldImages

    @property
    def features(self) -> int:
        """Tokens of the prompt that stand for images."""
        return sum(layout.features for layout in self.layouts)

    def expanded(self, text: str) -> str:
        """A rendered conversation with the images' layouts in it."""
        pieces = text.split(self.vision.image_token)
        if len(pieces) != 1 + len(self.layouts):
            raise refuse("messages", "the model's chat template does not have each image once")
        layouts = (layout.text for layout in self.layouts)
        return "".join(chain.from_iterable(zip_longest(pieces, layouts, fillvalue="")))

    def placed(self, token_ids: Sequence[int]) -> tuple[SubmittedImage, ...]:
        """Which of the prompt's tokens are which image's."""
        places = [at for at, token_id in enumerate(token_ids) if token_id == self.vision.image_token_id]
        if len(places) != self.features:
            raise refuse("messages", "hold text that the model's tokenizer takes for an image")
        placed, start = [], 0
        for image, layout in zip(self.images, self.layouts, strict=True):
            end = start + layout.features
            key = self.vision.key(self.scope, image.digest)
            prompt_image = PromptImage(key=key, runs=tuple(runs(places[start:end])), grid=layout.grid)
            placed.append(SubmittedImage(prompt_image, image.picture))
            start = end
        return tuple(placed)


def runs(places: Sequence[int]) -> Iterator[Run]:
    """Stretches of neighbours in an ascending list."""
    start = 0
    for end in range(1, len(places) + 1):
        if end == len(places) or places[end] != places[end - 1] + 1:
            yield Run(places[start], end - start)
            start = end
