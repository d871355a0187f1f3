"""What `cachegen` knows about a model: made from calibration texts, kept in a profile, expanded for its kernels.

Every (layer, part, loudness, channel) has a distribution of its own for every level: 46,080 times eight for
SmolLM2-135M. Few of them are really different once they are centred. So a channel has, for all levels, a *mean* (in
units of the row's scale) and one of 16 *classes*, found by clustering (k-means in coding cost) at one middle level. At
a level, the mean falls a whole number of steps from 0 (what is coded is the distance from there) and a rest, which
matters as soon as a distribution is a few steps wide: its quarter is the *phase*. There is one table per level, part,
class and phase. Measured on SmolLM2-135M (12 windows for calibration, 18 others), bits per element above a table for
each channel and loudness: K .027, V .016 at level 32; one class of 64 without phases .035, .031.

Rows whose scale is large hold numbers that are small beside it, so there are tables for four *loudnesses*: the rank of
the row's scale among those of its layer and part. The decoder knows it for nothing, and it saves K .030, V .036.

    class_LPQC, mean_LPQC          uint8, int16 (1 / 2**15 of the scale)
    edges_LPE                      uint16: scale codes; a row is as loud as the number of edges below its code
    base_LP, scales                uint16: the scale code of symbol 0; frequencies of its symbols
    keys_<level>, values_<level>   uint16: frequencies, one row per class and phase

Legend: L layers, H kv heads, P parts, T tokens, D head dim, C = H * D channels, Q loudnesses, E edges; S symbols.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from engine.base.errors import InvalidArgument
from engine.kv.schema import Stream
from kv_transfer.calibration import Calibration, Window
from kv_transfer.codecs import cachegen_kernels, rans
from kv_transfer.codecs.cachegen_kernels import SCALE_CODE_MIN, SCALE_SHIFT, SCALE_SYMBOLS, Level, Scales
from kv_transfer.codecs.row_coded import RAW_TOKENS
from kv_transfer.profile import Tables

BINS: Final = {
    255: (255, 128),
    112: (112, 44),
    64: (64, 24),
    40: (40, 18),
    32: (32, 16),
    28: (28, 14),
    24: (24, 12),
    16: (16, 8),
}
"""Level -> bins of K and of V, least lossy first. As in CacheGen, b bins are the numbers 1 - b // 2 .. b // 2 - 1."""

_PARTS: Final = 2
_CLASSES: Final = 16
_PHASES: Final = 4
_LOUDNESSES: Final = 4
_MEAN_BITS: Final = 15
_CLUSTERED: Final = 64  # the level at which classes are found: steps fine enough to see shapes, coarse enough to count
_CLUSTERING_ROUNDS: Final = 10
_ROWS_OF_WINDOW: Final = 256  # evenly spaced: neighbours say much the same
_WEIGHT_OF_KIND: Final = 1 << 24  # what the rows of each kind of text weigh together

Array = npt.NDArray[Any]
Counts = npt.NDArray[np.int64]


def limits(level: int) -> tuple[int, int]:
    """The largest quantised number of K and of V."""
    keys, values = BINS[level]
    return keys // 2 - 1, values // 2 - 1


def places(mean: Array, limit: int) -> tuple[Counts, Counts]:
    """(the mean in steps, counted from -limit; its phase), in integers: both ends must find the same."""
    quarters = (mean.astype(np.int64) * (limit * _PHASES) + (1 << (_MEAN_BITS - 1))) >> _MEAN_BITS
    return np.clip(quarters // _PHASES + limit, 0, 2 * limit), quarters % _PHASES


# -- from a profile ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Model:
    """Tables, expanded: 0.3 MB become 9 MB that kernels look things up in."""

    scales: Scales
    levels: dict[int, Level]


def expand(tables: Tables, stream: Stream) -> Model:
    """Raises InvalidArgument if these are not tables of such a stream."""
    try:
        _check(tables.arrays, stream)
        return Model(_scales(tables.arrays), {level: _level(tables.arrays, level) for level in BINS})
    except (KeyError, ValueError) as error:
        raise InvalidArgument(f"tables of cachegen: {error}", field="profile") from error


def _check(arrays: Any, stream: Stream) -> None:
    if stream.role != "kv" or stream.parts != _PARTS:
        raise ValueError(f"not for the stream {stream.name!r}, which has no keys and values")
    channels = (stream.layers, _PARTS, _LOUDNESSES, stream.heads * stream.head_dim)
    expected = {
        "class_LPQC": (channels, np.uint8),
        "mean_LPQC": (channels, np.int16),
        "edges_LPE": ((stream.layers, _PARTS, _LOUDNESSES - 1), np.uint16),
        "base_LP": ((stream.layers, _PARTS), np.uint16),
        "scales": ((stream.layers * _PARTS, SCALE_SYMBOLS), np.uint16),
    }
    for level in BINS:
        for name, limit in zip((f"keys_{level}", f"values_{level}"), limits(level), strict=True):
            expected[name] = ((_CLASSES * _PHASES, 2 * limit + 1), np.uint16)
    for name, (shape, dtype) in expected.items():
        if arrays[name].shape != shape or arrays[name].dtype != dtype:
            raise ValueError(f"{name} is {arrays[name].dtype}{list(arrays[name].shape)}, not {list(shape)}")
    if (arrays["class_LPQC"] >= _CLASSES).any():
        raise ValueError("a class without tables")


def _scales(arrays: Any) -> Scales:
    expanded = rans.FrequencyTables(arrays["scales"]).expanded
    return Scales(expanded, arrays["base_LP"].copy(), arrays["edges_LPE"].copy())  # a profile's own are read-only


def _level(arrays: Any, level: int) -> Level:
    expanded = rans.expand([rans.FrequencyTables(arrays[f"{part}_{level}"]) for part in ("keys", "values")])
    table_LPQC, usual_LPQC = np.empty_like(arrays["class_LPQC"]), np.empty_like(arrays["class_LPQC"])
    for part, limit in enumerate(limits(level)):
        usual, phase = places(arrays["mean_LPQC"][:, part], limit)
        usual_LPQC[:, part] = usual
        table_LPQC[:, part] = (part * _CLASSES + arrays["class_LPQC"][:, part]) * _PHASES + phase
    return Level(expanded, table_LPQC, usual_LPQC, np.array(limits(level), np.int64))


# -- from texts --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class _Rows:
    """Some tokens of one window. `units` are numbers over their row's scale, in -1 .. 1."""

    kind: str
    codes_LPT: Counts
    units_LPTC: npt.NDArray[np.float32]

    @classmethod
    def of(cls, window: Window) -> "_Rows":
        tokens = window.kv_LHPTD.shape[3]
        chosen = np.linspace(RAW_TOKENS, tokens - 1, min(tokens - RAW_TOKENS, _ROWS_OF_WINDOW)).astype(int)
        numbers_LPTHD = window.kv_LHPTD[:, :, :, chosen].transpose(0, 2, 3, 1, 4)
        numbers_LPTC = numbers_LPTHD.reshape(*numbers_LPTHD.shape[:3], -1)
        codes_LPT = scale_codes(numbers_LPTC)
        scales = (codes_LPT << SCALE_SHIFT).astype(np.uint32).view(np.float32)[..., None]
        units_LPTC = np.divide(numbers_LPTC, scales, out=np.zeros_like(numbers_LPTC), where=scales > 0)
        return cls(window.kind, codes_LPT, units_LPTC)


def scale_codes(numbers_TC: npt.NDArray[np.float32]) -> Counts:
    """As the kernels find them."""
    bits = np.abs(numbers_TC).max(-1, initial=0).view(np.uint32).astype(np.int64)
    codes: Counts = (bits + ((1 << SCALE_SHIFT) - 1)) >> SCALE_SHIFT
    return np.where(codes < SCALE_CODE_MIN, 0, codes)


def calibrate(calibration: Calibration) -> Tables:
    """Every kind of text weighs the same."""
    if calibration.stream.role != "kv" or calibration.stream.parts != _PARTS:
        raise InvalidArgument("cachegen is for keys and values", field="codec")
    rows = [_Rows.of(window) for window in calibration.windows if window.kv_LHPTD.shape[3] > RAW_TOKENS]
    if not rows:
        raise InvalidArgument(f"cachegen: no text is longer than {RAW_TOKENS} tokens", field="texts")
    edges_LPE = np.stack([_quantile(rows, rank / _LOUDNESSES) for rank in range(1, _LOUDNESSES)], -1)
    counted = _Counting(rows, edges_LPE)
    class_LPQC, mean_LPQC = counted.classes()
    base_LP, scales = counted.scales()
    arrays = {"class_LPQC": class_LPQC, "mean_LPQC": mean_LPQC, "edges_LPE": edges_LPE, "base_LP": base_LP}
    arrays["scales"] = scales.frequencies_KS
    for level in BINS:
        for part, (name, limit) in enumerate(zip(("keys", "values"), limits(level), strict=True)):
            counts_KS = counted.level(part, limit, class_LPQC[:, part], mean_LPQC[:, part])
            arrays[f"{name}_{level}"] = rans.FrequencyTables.from_counts(counts_KS).frequencies_KS
    return Tables(arrays)


def _quantile(rows: Sequence[_Rows], share: float) -> npt.NDArray[np.uint16]:
    """Of the scale codes of each layer and part: the mean over kinds of text."""
    of_kind = [
        np.concatenate([some.codes_LPT for some in rows if some.kind == kind], -1)
        for kind in sorted({some.kind for some in rows})
    ]
    means_LP = np.mean([np.quantile(codes_LPT, share, axis=-1) for codes_LPT in of_kind], axis=0)
    quantile_LP: npt.NDArray[np.uint16] = np.rint(means_LP).astype(np.uint16)
    return quantile_LP


class _Counting:
    """Counts of symbols over all rows, in integers, so that their order does not matter."""

    def __init__(self, rows: Sequence[_Rows], edges_LPE: Array) -> None:
        self._rows = rows
        self._edges_LPE = edges_LPE
        of_kind: dict[str, int] = {}
        for some in rows:
            of_kind[some.kind] = of_kind.get(some.kind, 0) + some.codes_LPT.shape[-1]
        self._weights = [_WEIGHT_OF_KIND // of_kind[some.kind] for some in rows]
        layers, _, _, channels = rows[0].units_LPTC.shape
        self._LQC = (layers, _LOUDNESSES, channels)

    def scales(self) -> tuple[Array, rans.FrequencyTables]:
        """(base_LP, tables): symbols lie around the median."""
        median_LP = _quantile(self._rows, 0.5).astype(np.int64)
        base_LP = np.maximum(median_LP - SCALE_SYMBOLS // 2, SCALE_CODE_MIN)
        counts = np.zeros((base_LP.size, SCALE_SYMBOLS), np.int64)
        for some, weight in zip(self._rows, self._weights, strict=True):
            symbols = some.codes_LPT - base_LP[..., None]
            symbols[(symbols < 0) | (symbols >= cachegen_kernels.ESCAPE)] = cachegen_kernels.ESCAPE
            counts += weight * _histogram(symbols.reshape(base_LP.size, -1), SCALE_SYMBOLS)
        return base_LP.astype(np.uint16), rans.FrequencyTables.from_counts(counts)

    def classes(self) -> tuple[Array, Array]:
        """(class_LPQC, mean_LPQC) of every channel at every loudness."""
        classes, means = [], []
        for part, limit in enumerate(limits(_CLUSTERED)):
            counts_NS = self._channels(part, limit)
            total_N = np.maximum(counts_NS.sum(1), 1)
            mean_N = counts_NS @ np.arange(-limit, limit + 1) / total_N / limit
            mean_N = np.clip(np.rint(mean_N * (1 << _MEAN_BITS)), -(2**15) + 1, 2**15 - 1).astype(np.int16)
            usual_N, phase_N = places(mean_N, limit)
            means.append(mean_N.reshape(self._LQC))
            classes.append(_cluster(_centred(counts_NS, usual_N), phase_N).reshape(self._LQC))
        return np.stack(classes, 1).astype(np.uint8), np.stack(means, 1)

    def level(self, part: int, limit: int, class_LQC: Array, mean_LQC: Array) -> Counts:
        """How often each symbol comes, by class and phase."""
        usual_LQC, phase_LQC = places(mean_LQC, limit)
        table_LQC = class_LQC.astype(np.int64) * _PHASES + phase_LQC
        symbols = 2 * limit + 1
        counts = np.zeros(_CLASSES * _PHASES * symbols, np.int64)
        for weight, loud_LT, numbers_LTC in self._quantised(part, limit):
            for numbers_TC, loud_T, usual_QC, table_QC in zip(numbers_LTC, loud_LT, usual_LQC, table_LQC, strict=True):
                symbols_TC = (numbers_TC + 2 * limit - usual_QC[loud_T]) % symbols
                at = table_QC[loud_T] * symbols + symbols_TC
                counts += weight * np.bincount(at.reshape(-1), minlength=counts.size)
        return counts.reshape(_CLASSES * _PHASES, symbols)

    def _channels(self, part: int, limit: int) -> Counts:
        """[L * Q * C, S]: how often each number comes in each channel."""
        layers, loudnesses, channels = self._LQC
        symbols = 2 * limit + 1
        counts = np.zeros((layers, loudnesses * channels * symbols), np.int64)
        for weight, loud_LT, numbers_LTC in self._quantised(part, limit):
            for layer in range(layers):
                channel_TC = loud_LT[layer][:, None] * channels + np.arange(channels)
                at = channel_TC * symbols + numbers_LTC[layer] + limit
                counts[layer] += weight * np.bincount(at.reshape(-1), minlength=counts.shape[1])
        return counts.reshape(-1, symbols)

    def _quantised(self, part: int, limit: int) -> Iterator[tuple[int, Counts, Counts]]:
        """(weight, loudness_LT, numbers_LTC) of each window."""
        for some, weight in zip(self._rows, self._weights, strict=True):
            loud_LT = (some.codes_LPT[:, part, :, None] > self._edges_LPE[:, part, None]).sum(-1)
            yield weight, loud_LT, np.rint(some.units_LPTC[:, part] * np.float32(limit)).astype(np.int64)


def _histogram(symbols_KN: Counts, symbols: int) -> Counts:
    return np.stack([np.bincount(symbols_N, minlength=symbols) for symbols_N in symbols_KN])


def _centred(counts_NS: Counts, usual_N: Counts) -> npt.NDArray[np.float64]:
    """Counts by symbol, as kernels code numbers."""
    symbols = counts_NS.shape[1]
    number_NS = (np.arange(symbols) + usual_N[:, None] - symbols // 2) % symbols
    return np.take_along_axis(counts_NS, number_NS, 1).astype(np.float64)


def _cluster(counts_NS: npt.NDArray[np.float64], phase_N: Counts) -> Counts:
    """k-means, where the distance is what coding with a class's table costs. Starts from classes of equal width."""
    symbols = counts_NS.shape[1]
    width_N = counts_NS @ (np.arange(symbols) - symbols // 2) ** 2 / np.maximum(counts_NS.sum(1), 1)
    class_N = np.empty(len(counts_NS), np.int64)
    class_N[np.argsort(width_N, kind="stable")] = np.arange(len(counts_NS)) * _CLASSES // len(counts_NS)
    for _ in range(_CLUSTERING_ROUNDS):
        counts_KS = np.zeros((_CLASSES * _PHASES, symbols))
        np.add.at(counts_KS, class_N * _PHASES + phase_N, counts_NS)
        bits_KS = rans.FrequencyTables.from_counts(counts_KS.astype(np.int64)).bits_KS
        for phase in range(_PHASES):
            of_phase = phase_N == phase
            class_N[of_phase] = (counts_NS[of_phase] @ bits_KS[phase::_PHASES].T).argmin(1)
    return class_N
