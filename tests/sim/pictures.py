"""Pictures: seeded images for prompts of virtual clusters, and where in a prompt they are.

Small pictures, few sizes of embeddings: what is mixed up shows only where sizes agree. One picture is longer than one
message of pixels.
"""

import struct
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from random import Random

from control_plane.router.media.pictures import digest_of
from control_plane.router.requests import Submit, SubmittedImage
from engine.images import Picture, PromptImage, Run
from engine.vision.info import VisionInfo
from engine.vision.layout import ImageLayout

PLACEHOLDER = 7
FEATURES = (1, 8, 9, 20)  # around blocks (8)
SIZES = ((1, 1), (5, 3), (3, 5), (64, 2), (300, 300))
SIDES = {8: (2, 4), 9: (3, 3), 20: (4, 5)}  # of a grid of so many
IMAGES_MAX = 3


class _OneToken:
    """A rule that nobody asks: clients here decide how many features an image has."""

    def layout(self, width: int, height: int) -> ImageLayout:
        return ImageLayout(text="<image>", features=1, grid=(0, 0))


VISION = VisionInfo(
    family="virtual",
    image_token="<image>",
    image_token_id=PLACEHOLDER,
    hidden_size=16,
    settings_digest=b"settings",
    rule=_OneToken(),
)


@cache
def picture(number: int) -> Picture:
    width, height = SIZES[number % len(SIZES)]
    return Picture(width, height, Random(f"picture {number}").randbytes(3 * width * height))


def submitted(number: int, runs: Sequence[Run], scope: str, grid: tuple[int, int] = (0, 0)) -> SubmittedImage:
    return _keyed(PromptImage(key=b"", runs=tuple(runs), grid=grid), picture(number), scope)


def _keyed(image: PromptImage, picture: Picture, scope: str) -> SubmittedImage:
    """As the edge does it. In production pixels and settings decide how many features there are, and in which grid;
    here clients do, so that it is in the key too."""
    digest = digest_of((picture.width, picture.height), picture.pixels)
    layout = struct.pack("<3I", image.features, *image.grid)
    return SubmittedImage(replace(image, key=VISION.key(scope, digest + layout)), picture)


def with_images(random: Random, submit: Submit) -> Submit:
    """Some tokens of this prompt become placeholders: of up to IMAGES_MAX images, with text between them or none."""
    token_ids = list(submit.token_ids)
    images: list[SubmittedImage] = []
    start = random.randrange(4)
    for _ in range(random.randint(1, IMAGES_MAX)):
        features = random.choice(FEATURES)
        runs = _runs(random, start, features)
        end = sum(runs[-1])
        if end > len(token_ids):
            break
        for run in runs:
            token_ids[run.token_start : sum(run)] = [PLACEHOLDER] * run.tokens
        grid = random.choice((SIDES.get(features, (0, 0)), (0, 0))) if len(runs) == 1 else (0, 0)
        images.append(submitted(random.randrange(8), runs, submit.cache_scope, grid))
        start = end + random.randrange(3)
    return replace(submit, token_ids=tuple(token_ids), images=tuple(images)) if images else submit


def _runs(random: Random, start: int, features: int) -> list[Run]:
    """One, or two with a token of text between them."""
    first = random.randint(1, features - 1) if features > 1 and random.random() < 0.3 else features
    rest = [Run(start + first + 1, features - first)] if first < features else []
    return [Run(start, first), *rest]


def seen_by(submit: Submit, tenant: str) -> Submit:
    """The same prompt and pictures, asked for by somebody else: keys are theirs."""
    other = replace(submit, tenant=tenant)
    return replace(other, images=tuple(_keyed(each.image, each.picture, other.cache_scope) for each in submit.images))
