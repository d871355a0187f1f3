"""KV that looks like a model's, for any stream: what codecs that need tables are calibrated to, and tested with.

Keys have channel means and a few loud channels, move slowly from token to token and agree across heads; values are
noise with a little structure; the first tokens are several times as large (sinks).

Legend: L layers, H kv heads, P parts, T tokens, D head dim, F rotated pairs, C = H * D channels.
"""

from functools import cache

import numpy as np

from engine.kv.schema import Stream
from kv_transfer.calibration import Calibration, Rope, Window
from kv_transfer.codecs import Atom, AtomShape, CodecSet, codecs, elements
from kv_transfer.profile import Profile, Tables

KINDS = ("prose", "code")
WINDOWS_EACH = 2
WINDOW_TOKENS = 256
SINKS = 4
SLOPE = np.float32(0.001)  # of gradients: numbers are worth a few bits each, as a model's are


def kv(stream: Stream, tokens: int, *, seed: int) -> np.ndarray:
    """kv_LHPTD of a sequence from its start. The model (means, mixing) is one; the seed is the text."""
    model, text = np.random.default_rng(99), np.random.default_rng(seed)
    channels = stream.heads * stream.head_dim
    layers_LPTC = np.empty((stream.layers, stream.parts, tokens, channels), np.float32)
    for part_TC in layers_LPTC.reshape(-1, tokens, channels):
        mixing_CC = model.standard_normal((channels, channels)) * model.exponential(1, channels) / channels**0.5
        means_C = 2 * model.standard_normal(channels) * (model.random(channels) < 0.2)
        drift_TC = np.cumsum(text.standard_normal((tokens, channels)), axis=0) / (1 + np.arange(tokens)[:, None]) ** 0.5
        part_TC[...] = (drift_TC + text.standard_normal((tokens, channels))) @ mixing_CC + means_C
        part_TC[:SINKS] *= 4
    shape = (stream.layers, stream.parts, tokens, stream.heads, stream.head_dim)
    return np.ascontiguousarray(layers_LPTC.reshape(shape).transpose(0, 3, 1, 2, 4))


def atom(stream: Stream, start: int, tokens: int, *, seed: int = 5) -> Atom:
    """Unseen text, as if it stood at these positions: only the start of a sequence has sinks."""
    shape = AtomShape(stream, (0, stream.layers), (start, start + tokens), (0, stream.heads))
    text_LHPTD = kv(stream, SINKS + tokens, seed=seed)
    first = min(start, SINKS)
    return Atom(shape, elements.from_float32(text_LHPTD[:, :, :, first : first + tokens], stream.dtype))


def calibration(stream: Stream, *, seed: int = 0) -> Calibration:
    pairs = stream.head_dim // 2
    frequencies_LF = np.tile(10_000 ** -(np.arange(pairs, dtype=np.float32) / pairs), (stream.layers, 1))
    return Calibration(
        stream=stream,
        rope=Rope(frequencies_LF.astype(np.float32)),
        windows=[
            _window(stream, kind, seed + 10 * number + text)
            for number, kind in enumerate(KINDS)
            for text in range(WINDOWS_EACH)
        ],
    )


def _window(stream: Stream, kind: str, seed: int) -> Window:
    numbers_LHPTD = kv(stream, WINDOW_TOKENS, seed=100 + seed)
    gradients_LHPTD = np.random.default_rng(seed).standard_normal(numbers_LHPTD.shape).astype(np.float32)
    stored_LHPTD = elements.to_float32(elements.from_float32(numbers_LHPTD, stream.dtype), stream.dtype)
    return Window(kind, stored_LHPTD, SLOPE * gradients_LHPTD, scored_tokens=64)


@cache
def tables(name: str, stream: Stream, seed: int = 0) -> Tables:
    """Once per codec and stream: calibrating may take seconds."""
    return codecs.get(name).calibrate(calibration(stream, seed=seed))  # type: ignore[attr-defined]


@cache
def codec_set(stream: Stream) -> CodecSet:
    """Every codec that takes this stream's dtype, calibrated if it has to be."""
    kinds = {name: codecs.get(name) for name in codecs.names()}
    profiled = [name for name, kind in kinds.items() if kind.profiled and stream.dtype in kind.dtypes]
    return CodecSet(stream, Profile(model="synthetic", tables={name: tables(name, stream) for name in profiled}))
