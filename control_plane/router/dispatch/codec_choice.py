"""CodecChoice: what a request's KV goes through between two workers, as both ends offer it and its budget allows.

A pure function of what was asked for and what was measured. A codec that is missing, or has no level within the budget,
is never an error: KV then travels `raw` (DESIGN 2.6). It does not see bandwidth: of all levels within the budget it
takes the one of fewest bits, though a less lossy one may be just as well hidden behind prefill (DESIGN 8).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.base import limits
from kv_transfer.codecs import RAW_ENCODING, Encoding
from kv_transfer.offers import AUTO, LevelCost, Offer, Offers


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of the way KV travels. `kl_budget` is in nats per token; 0 is exact."""

    codec: str = ""  # a codec's name, AUTO, or nothing said
    kl_budget: float | None = None  # nothing said

    def or_else(self, default: "Wish") -> "Wish":
        """What a request does not say, its deployment does."""
        return Wish(self.codec or default.codec, default.kl_budget if self.kl_budget is None else self.kl_budget)


def choose_encoding(wish: Wish, source: Offers, target: Offers) -> Encoding:
    """
    measured within the budget               the level of fewest bits: of this codec, or with AUTO of all
    not measured, named, and no budget said  its least lossy level: who names a codec knows what it is
    anything else                            raw
    """
    budget = limits.KL_BUDGET if wish.kl_budget is None else wish.kl_budget
    wanted = [offer for offer in _common(source, target) if wish.codec in (offer.codec, AUTO)]
    within = [
        (cost.bits_per_element, cost.kl, offer.codec, cost.level)
        for offer in wanted
        for cost in _costs(offer, target)
        if cost.kl <= budget
    ]
    if within:
        *_, codec, level = min(within)
        return source[codec].at(level)
    named = [offer for offer in wanted if wish.codec == offer.codec and not _costs(offer, target)]
    return named[0].least_lossy if named and wish.kl_budget is None else RAW_ENCODING


def _common(source: Offers, target: Offers) -> Iterator[Offer]:
    """Codecs that one end writes and the other reads: of the same name, made from the same tables."""
    for name, offer in source.items():
        if name in target and target[name].tables == offer.tables:
            yield offer


def _costs(offer: Offer, target: Offers) -> tuple[LevelCost, ...]:
    """What either end knows: a loss is the codec's, whoever has measured it."""
    return offer.costs or target[offer.codec].costs
