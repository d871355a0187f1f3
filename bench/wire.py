"""How fast codecs are: megabytes of raw KV per second of CPU time on one thread, over the default model's own KV.

Runs over one chunk of 256 tokens, as a codec thread would see it; several rounds, of which the figure is the median.
"""

from collections.abc import Iterator, Sequence
from typing import Final

from bench.figures import Bar, Figure, figure_of
from bench.quality import TEXTS, World, fewest
from engine.base import limits
from engine.base.blas import use_calling_thread
from engine.capture import Subject
from kv_transfer.calibration import Floats
from kv_transfer.measure import Rates, rates, send
from triptych.curves import Level, read_texts

ROUNDS: Final = 7
TEXT: Final = "whale.txt"
GROUPED: Final = ("int8", "int4")
GROUPED_MB_S: Final = 400.0
BEST_ENCODE_MB_S: Final = 100.0
BEST_DECODE_MB_S: Final = 150.0


def bar_of(name: str, what: str, limit: float) -> Bar:
    return Bar(
        name=f"{name}, {what}", claim="raw bf16 KV per second of one core", unit="MB/s", limit=limit, at_least=True
    )


async def measured() -> list[Figure]:
    use_calling_thread()
    world = World.load()
    text = read_texts([TEXTS / TEXT], world.path, world.info)[0]
    kv_LHPTD = Subject.load(world.path).kv(text.windows[0].prefix, world.codecs.stream.dtype)
    return list(rated(world, kv_LHPTD))


def rated(world: World, kv_LHPTD: Floats) -> Iterator[Figure]:
    """The plain codecs, and the one that the default budget chooses."""
    for name in GROUPED:
        yield from _pair(world, Level(name, 0), name, (GROUPED_MB_S, GROUPED_MB_S), kv_LHPTD)
    if best := fewest(world.profile.curves, limits.KL_BUDGET):
        yield from _pair(world, best[0], "best codec", (BEST_ENCODE_MB_S, BEST_DECODE_MB_S), kv_LHPTD)


def _pair(world: World, level: Level, name: str, bars_mb_s: Sequence[float], kv_LHPTD: Floats) -> tuple[Figure, Figure]:
    sent = send(world.codecs, *level, kv_LHPTD)
    rounds: list[Rates] = [rates(world.codecs, *level, kv_LHPTD) for _ in range(ROUNDS)]
    notes = {"level": f"{level.codec} {level.level}", "bits": round(sent.bits_per_element, 3)}
    encode = figure_of(bar_of(name, "encode", bars_mb_s[0]), [each.encode_mb_s for each in rounds], **notes)
    decode = figure_of(bar_of(name, "decode", bars_mb_s[1]), [each.decode_mb_s for each in rounds], **notes)
    return encode, decode
