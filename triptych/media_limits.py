"""How vLLM writes limits on media: `--limit-mm-per-prompt`, as JSON or, until 0.9, as `image=4,video=0`.

Its other kinds of media may be named, since nothing of them is taken anyway.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from engine.base import limits

IMAGE: Final = "image"
_OTHERS: Final = frozenset({"audio", "video", "vision_chunk"})


def images_allowed(value: Any) -> Any:
    """The number of images in any of these ways; what is not a text or a mapping is left to whoever reads numbers."""
    if isinstance(value, str) and not value.strip().isdecimal():
        value = _parsed(value.strip())
    return _images_of(value) if isinstance(value, Mapping) else value


def _parsed(text: str) -> Mapping[str, Any]:
    if not text.startswith("{"):
        return dict(_pair(part) for part in text.split(","))
    try:
        parsed: Mapping[str, Any] = json.loads(text)
    except RecursionError:
        raise ValueError("brackets without end") from None
    return parsed


def _pair(text: str) -> tuple[str, int]:
    name, _, count = text.partition("=")
    return name.strip(), int(count)


def _images_of(counts: Mapping[str, Any]) -> int:
    for name, count in counts.items():
        if name not in (IMAGE, *_OTHERS) or type(count) is not int:
            raise ValueError("not a number of some kind of media")
    return int(counts.get(IMAGE, limits.IMAGES_MAX))
