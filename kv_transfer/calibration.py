"""Calibration: what a model's KV looks like over texts, as plain arrays that codecs are fitted to.

Made by `engine.capture` from a model; read by every `Profiled.calibrate`. No torch here, and no file format: only a
profile is ever stored.

Legend: L layers, H kv heads, P parts (K, V), T tokens, D head dim, F rotated pairs of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.kv.schema import Stream

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Rope:
    """How keys are rotated: channel i and i + F of a head turn by position * frequencies_LF[layer, i]; channels from
    2 F on stay. F = 0 where nothing is known, and keys are then taken as they are."""

    frequencies_LF: Floats


@dataclass(frozen=True, eq=False)
class Window:
    """A prefix of one text, from position 0: its KV as a worker stores it, and how much each number matters.

    `kv_LHPTD` is rounded to the stream's dtype; keys are rotated. `gradients_LHPTD` is d log p(sampled next tokens) /
    d kv, summed over the tokens scored after the prefix: for a small error e of the KV, KL is about (g . e)^2 / 2 in
    expectation (the Fisher information), per scored window of `scored_tokens`.
    """

    kind: str
    kv_LHPTD: Floats
    gradients_LHPTD: Floats
    scored_tokens: int


@dataclass(frozen=True)
class Calibration:
    """Several windows of each of several kinds of text."""

    stream: Stream
    rope: Rope
    windows: Sequence[Window]
