"""Weather: what the network does to messages. A `Faults` hook for the memory network, seeded, and it keeps count.

Bulk frames may be dropped, doubled, overtaken, delayed and damaged: a frame's own checks are to find all of that. A
control session runs over an ordered, reliable link, so there a doubled or overtaken message is a broken promise; it
happens once at a time, when a plan asks for it, and must cost no more than the session.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from control_plane.wire import session_pb2 as pb
from kv_transfer.transports.memory import Delivery


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Probabilities for each message, while the weather is bad."""

    drop: float = 0.0
    duplicate: float = 0.0
    overtake: float = 0.0
    delay: float = 0.0
    damage: float = 0.0
    control_delay: float = 0.0

    bulk_delay_us: int = 300_000
    control_delay_us: int = 400_000


class Weather:
    """`sealed` and `damaged` are what the watchers compare arriving and placed frames with."""

    def __init__(self, random: Random, noise: Noise) -> None:
        self._random = random
        self._noise = noise
        self._mishaps: dict[frozenset[str], str] = {}
        self.sealed: set[bytes] = set()
        self.damaged: set[bytes] = set()
        self.injected: Counter[str] = Counter()
        self.messages = 0

    def calm(self) -> None:
        self._noise = Noise()
        self._mishaps.clear()

    def arm(self, kind: str, one: str, other: str) -> None:
        """Let the next control message between the two be doubled or overtaken."""
        self._mishaps[frozenset((one, other))] = kind

    def on_message(self, now_us: int, source: str, target: str, hello: bytes, message: bytes) -> Sequence[Delivery]:
        self.messages += 1
        if not message:
            return ((0, message),)
        return self._bulk(message) if _is_bulk(hello) else self._control(source, target, message)

    def _control(self, source: str, target: str, message: bytes) -> Sequence[Delivery]:
        mishap = self._mishaps.pop(frozenset((source, target)), None) if self._mishaps else None
        if mishap is not None:
            self.injected[f"control {mishap}"] += 1
            return ((0, message), (0, message)) if mishap == "double" else ((50_000, message, True),)
        if self._noise.control_delay and self._random.random() < self._noise.control_delay:
            self.injected["control delay"] += 1
            return ((self._random.randrange(self._noise.control_delay_us), message),)
        return ((0, message),)

    def _bulk(self, message: bytes) -> Sequence[Delivery]:
        self.sealed.add(message)
        kind = self._draw()
        if kind is None:
            return ((0, message),)
        self.injected[f"frame {kind}"] += 1
        delay_us = self._random.randrange(self._noise.bulk_delay_us)
        match kind:
            case "drop":
                return ()
            case "duplicate":
                return ((0, message), (delay_us, message, True))
            case "overtake":
                return ((delay_us, message, True),)
            case "delay":
                return ((delay_us, message),)
            case _:
                return ((0, self._damage(message)),)

    def _draw(self) -> str | None:
        noise, point = self._noise, self._random.random()
        for kind in ("drop", "duplicate", "overtake", "delay", "damage"):
            point -= getattr(noise, kind)
            if point < 0:
                return kind
        return None

    def _damage(self, message: bytes) -> bytes:
        """Flipped bits, a cut, a tail of rubbish, or a stretch of zeros; never the message itself."""
        data = bytearray(message)
        match self._random.randrange(6):
            case 0:
                del data[self._random.randrange(1, len(data)) :]
            case 1:
                data += self._random.randbytes(self._random.randrange(1, 64))
            case 2:
                start = self._random.randrange(len(data))
                data[start : start + 8] = bytes(len(data[start : start + 8]))
            case _:
                for _ in range(self._random.randrange(1, 9)):
                    data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
        damaged = bytes(data)
        if damaged == message:
            return self._damage(message)
        self.damaged.add(damaged)
        return damaged


@lru_cache
def _is_bulk(hello: bytes) -> bool:
    return pb.Hello.FromString(hello).kind == pb.Hello.WORKER_TO_WORKER
