"""Offers: what a worker tells others about its codecs. Data: whoever reads one needs neither the codec nor its tables.

    Offer       a codec that a worker reads and writes, and what its levels cost, as far as that was measured
    LevelCost   one measured level

What was measured is in the worker's profile (`kv_transfer.profile`). Which level a request gets is its router's choice.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.base import limits
from kv_transfer.codecs import RAW, CodecSet, Encoding

AUTO = "auto"
"""What may be asked for in place of a codec: whichever sends the fewest bits."""

_BITS_PER_BYTE = 8


@dataclass(frozen=True, slots=True)
class LevelCost:
    """`kl` is in nats per token against full-precision KV, on the kind of text that it is worst for (DESIGN 8)."""

    level: int
    bits_per_element: float
    kl: float


@dataclass(frozen=True, slots=True)
class Offer:
    codec: str
    tables: int = 0  # digest of what it was made from: only workers with the same understand each other
    level: int = 0  # the least lossy one
    costs: tuple[LevelCost, ...] = ()

    @property
    def least_lossy(self) -> Encoding:
        return Encoding(self.codec, self.level, self.tables)

    def at(self, level: int) -> Encoding:
        return Encoding(self.codec, level, self.tables)


Offers = Mapping[str, Offer]
"""By codec."""


def offers_of(codecs: CodecSet) -> tuple[Offer, ...]:
    """In the order of their names, and no more than anybody would read."""
    return tuple(_offer(codecs, name) for name in codecs.names()[: limits.CODEC_OFFERS_MAX])


def _offer(codecs: CodecSet, name: str) -> Offer:
    levels = codecs.get(name).levels
    costs = [cost for cost in _costs(codecs, name) if cost.level in levels]
    return Offer(name, codecs.digest(name), levels[0], tuple(costs[: limits.CODEC_LEVELS_MAX]))


def _costs(codecs: CodecSet, name: str) -> list[LevelCost]:
    if name == RAW:
        return [LevelCost(0, _BITS_PER_BYTE * codecs.stream.item_bytes, 0.0)]
    points = codecs.profile.curves.get(name, ()) if codecs.profile is not None else ()
    return [LevelCost(point.level, point.bits_per_element, point.kl) for point in points]
