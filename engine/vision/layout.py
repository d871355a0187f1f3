"""What one image becomes in a prompt, and the limits that hold for every family."""

from dataclasses import dataclass
from typing import Final, Protocol

from engine.base.errors import InvalidArgument
from engine.base.limits import IMAGE_PIXELS_MAX

# Between the file and the tower an image may pass through a larger form: 1 x 16384 pixels, scaled so that the shorter
# side is 336, are 1.8 billion. One image costs an encode worker no more than this, whatever its shape is.
PREPARED_PIXELS_MAX: Final = 2 * IMAGE_PIXELS_MAX


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """`text` replaces one image token of the rendered template and holds the image token `features` times.

    `grid` is the embedding's rows and columns where positions have three dimensions (M-RoPE), or (0, 0).
    """

    text: str
    features: int
    grid: tuple[int, int] = (0, 0)


class LayoutRule(Protocol):
    """How a family lays out an image of some size, under the settings of one checkpoint."""

    def layout(self, width: int, height: int) -> ImageLayout: ...


def require_prepared(pixels: int) -> None:
    """Refuse an image whose largest form on its way to the tower is too large."""
    if pixels > PREPARED_PIXELS_MAX:
        raise InvalidArgument(
            f"image: too far from a square for this model, which would scale it to more than {PREPARED_PIXELS_MAX} "
            "pixels",
            field="image",
        )
