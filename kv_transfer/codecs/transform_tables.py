"""What `transform` knows about a model: made from calibration texts, kept in a profile, expanded for its kernels.

How much an error matters is measured, not assumed. With g the gradient of the log-probability of tokens that follow
(drawn from the model itself) with respect to one token's K or V of a layer, an error e costs (g . e)^2 / 2 nats in
expectation: the Fisher information. Two facts about g, on SmolLM2-135M, carry this codec:

- *Few tokens matter.* In layer 3, 1 % of the tokens have 99 % of the sum of g^2 over V, 91 % over K; in layer 24 half.
  Which ones they are can be told from K and V alone. So the logarithm of g^2 is predicted, by ridge regression, from
  the un-rotated key and the norms of each head, and a token's step is chosen by it. Such a *fineness* travels for .01
  bits per element. Because a prediction may be wrong, it is trusted by `_TRUST` only.
- *Few directions matter.* What is left after the prediction, E[g g^T / predicted] = R^2, is far from a multiple of 1:
  spending the same on every direction of V of layer 3 costs 3 bits per element more than spending by importance.

So rows are mapped by R, in whose image an error costs what its length is, then turned by the principal axes of what
they are there (Karhunen-Loeve), then cut by one step for all layers, K and V and components: reverse water-filling.
The map is invertible, and orthogonal only up to R; its inverse is taken of the map *as stored*, in eight bits.

    mean_LPC            float16: of rows (keys un-rotated)
    basis_LPCC          int8, with scale_LPC float32 for each coefficient: rows @ basis = coefficients
    importance_LPX      float16: bias | weight of each channel of the key | of log energies of K, of V, by head
    deviation_LPC       int16: of coefficients, in eighths of an octave
    classes_KS          uint16: frequencies of numbers, by spread class (`transform_kernels`)
    fineness_KS         uint16: frequencies of finenesses, by layer and part
    frequencies_LF      float32: radians per position, `calibration.Rope`

Legend: L layers, H kv heads, P parts, T tokens, D head dim, F rotated pairs, C = H * D channels, N rows of all texts,
X = 1 + C + 2 H features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from engine.base.errors import InvalidArgument
from engine.kv.schema import Stream
from kv_transfer.calibration import Calibration, Floats, Window
from kv_transfer.codecs import rans
from kv_transfer.codecs.row_coded import RAW_TOKENS
from kv_transfer.codecs.transform_kernels import (
    CLASSES,
    ESCAPE,
    FINENESS_MAX,
    FINENESS_SYMBOLS,
    NUMBER_MAX,
    OCTAVE,
    SKIPPED,
    SYMBOLS,
    Coding,
    Rotation,
)
from kv_transfer.profile import Array, Tables

LEVELS: Final = tuple(range(12))
"""Least lossy first. Each is a quarter of an octave coarser than the one before."""

LARGEST: Final = 2.0**48
"""Numbers beyond are not coded: whatever is computed from the others is finite."""

_PARTS: Final = 2
_KEYS, _VALUES = 0, 1
_FINEST: Final = 2.0**-2.5  # step of level 0, in units of `_unit`
_STEPS_OF_OCTAVE: Final = 4
_KL_UNIT: Final = 0.01  # nats that `_unit` would cost if every coefficient were a few steps wide
_TRUST: Final = 0.7  # power of the predicted importance that steps follow
_LOG_IMPORTANCE_MAX: Final = 8.0
_LOG_FLOOR: Final = 1e-3  # of the mean: below, how unimportant a token is does not matter
_ENERGY_FLOOR: Final = 1e-6
_RIDGE: Final = 0.5  # per row: features are standardised
_FLOOR: Final = 0.05  # of the mean importance of directions: what texts did not show may still matter
_COUNTED_EVERY: Final = 4  # rows: all layers make the tables together, so a share of each is plenty
_COUNTED_LEVELS: Final = (1, 5, 9)  # whose numbers make the tables: most spread classes occur
_EXPECTED: Final = 4096.0  # numbers that every spread class is taken to have shown, whatever texts did
_FRACTION_MAX: Final = 127
_UNIT_MAX: Final = 2.0**20
_GAIN_MAX: Final = 2.0**76  # of rows up to `LARGEST` and of coefficients up to any number of steps


def step_of(level: int, unit: float) -> float:
    return float(unit * _FINEST * 2.0 ** (level / _STEPS_OF_OCTAVE))


# -- from a profile ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Model:
    """Tables, expanded."""

    mean_LPC: Floats
    basis_LPCC: Floats
    inverse_LPCC: Floats
    importance_LPX: Floats
    frequencies_GF: npt.NDArray[np.float64]  # of groups of layers that turn alike
    group_L: npt.NDArray[np.intp]
    codings: tuple[Coding, ...]  # by level
    gain: float  # no number errs by more than this times the largest error of a coefficient

    def rotations(self, tokens: tuple[int, int]) -> list[Rotation]:
        """By group of layers. Angles in float64: positions are large, and both ends must turn alike."""
        angles_GTF = np.arange(*tokens)[:, None] * self.frequencies_GF[:, None]
        cosines_GTF, sines_GTF = _float32(np.cos(angles_GTF)), _float32(np.sin(angles_GTF))
        return [Rotation(*pair) for pair in zip(cosines_GTF, sines_GTF, strict=True)]

    def fineness(self, rows_PTC: Floats, energy_PTH: Floats, layer: int) -> npt.NDArray[np.int8]:
        """fineness_PT: half octaves by which a row's step is below the level's."""
        return finenesses((_features(rows_PTC, energy_PTH) @ self.importance_LPX[layer].T).T)


def _float32(array: npt.NDArray[np.float64]) -> Floats:
    narrow: Floats = array.astype(np.float32)
    return narrow


def finenesses(log_importance: Floats) -> npt.NDArray[np.int8]:
    """A step falls with the square root of the importance."""
    half_octaves = np.rint(_TRUST * np.clip(log_importance, -_LOG_IMPORTANCE_MAX, _LOG_IMPORTANCE_MAX) / np.log(2))
    return np.ascontiguousarray(np.clip(half_octaves, -FINENESS_MAX, FINENESS_MAX).astype(np.int8))


def _features(rows_PTC: Floats, energy_PTH: Floats) -> Floats:
    """[T, X]."""
    log_energy_PTH = np.log(energy_PTH + np.float32(_ENERGY_FLOOR))
    ones_T1 = np.ones((rows_PTC.shape[1], 1), np.float32)
    return np.concatenate((ones_T1, rows_PTC[_KEYS], log_energy_PTH[_KEYS], log_energy_PTH[_VALUES]), -1)


def expand(tables: Tables, stream: Stream) -> Model:
    """Raises InvalidArgument if these are not tables of such a stream."""
    try:
        arrays = tables.arrays
        _check(arrays, stream)
        unit = float(tables.settings["unit"])
        if not 1 / _UNIT_MAX < unit < _UNIT_MAX:
            raise ValueError(f"unit is {unit}")
        basis_LPCC, inverse_LPCC = _matrices(arrays["basis_LPCC"], arrays["scale_LPC"])
        frequencies_GF, group_L = np.unique(arrays["frequencies_LF"].astype(np.float64), axis=0, return_inverse=True)
        return Model(
            mean_LPC=arrays["mean_LPC"].astype(np.float32),
            basis_LPCC=basis_LPCC,
            inverse_LPCC=inverse_LPCC,
            importance_LPX=arrays["importance_LPX"].astype(np.float32),
            frequencies_GF=frequencies_GF,
            group_L=group_L.reshape(-1),
            codings=tuple(_codings(arrays, unit)),
            gain=2 * _gain(inverse_LPCC),  # a rotation adds two channels
        )
    except (KeyError, TypeError, ValueError, OverflowError, np.linalg.LinAlgError) as error:
        raise InvalidArgument(f"tables of transform: {error}", field="profile") from error


def _matrices(fractions_LPCC: Array, scale_LPC: Array) -> tuple[Floats, Floats]:
    """(basis, inverse)."""
    with np.errstate(over="ignore", invalid="ignore"):
        basis_LPCC = fractions_LPCC.astype(np.float32) * scale_LPC[:, :, None, :]
        inverse_LPCC = np.linalg.inv(basis_LPCC.astype(np.float64)).astype(np.float32)
        if not max(_gain(basis_LPCC), _gain(inverse_LPCC)) < _GAIN_MAX:  # nor is NaN
            raise ValueError("a basis that has no inverse in float32")
    return basis_LPCC, inverse_LPCC


def _gain(matrix_LPCC: Floats) -> float:
    """No number that comes out is more than this times the largest that goes in."""
    return float(np.abs(matrix_LPCC).sum(2, dtype=np.float64).max())


def _codings(arrays: Any, unit: float) -> Iterator[Coding]:
    tables = rans.FrequencyTables(arrays["classes_KS"]).expanded
    fineness_tables = rans.FrequencyTables(arrays["fineness_KS"]).expanded
    deviation_LPC = arrays["deviation_LPC"].copy()  # a profile's own are read-only, another type for kernels
    for level in LEVELS:
        step = step_of(level, unit)
        yield Coding(
            tables=tables,
            fineness_tables=fineness_tables,
            deviation_LPC=deviation_LPC,
            step_eighths=round(OCTAVE * np.log2(step)),
            step=np.float32(step),
        )


def _check(arrays: Any, stream: Stream) -> None:
    _check_stream(stream)
    layers, heads, channels = stream.layers, stream.heads, stream.heads * stream.head_dim
    expected = {
        "mean_LPC": ((layers, _PARTS, channels), np.float16),
        "basis_LPCC": ((layers, _PARTS, channels, channels), np.int8),
        "scale_LPC": ((layers, _PARTS, channels), np.float32),
        "importance_LPX": ((layers, _PARTS, 1 + channels + 2 * heads), np.float16),
        "deviation_LPC": ((layers, _PARTS, channels), np.int16),
        "classes_KS": ((CLASSES, SYMBOLS), np.uint16),
        "fineness_KS": ((layers * _PARTS, FINENESS_SYMBOLS), np.uint16),
    }
    for name, (shape, dtype) in expected.items():
        if arrays[name].shape != shape or arrays[name].dtype != dtype:
            raise ValueError(f"{name} is {arrays[name].dtype}{list(arrays[name].shape)}, not {list(shape)}")
    frequencies_LF = arrays["frequencies_LF"]
    half_heads = [(layers, pairs) for pairs in range(stream.head_dim // 2 + 1)]
    if frequencies_LF.shape not in half_heads or frequencies_LF.dtype != np.float32:
        raise ValueError(f"frequencies_LF is {frequencies_LF.dtype}{list(frequencies_LF.shape)}")
    for name in ("mean_LPC", "scale_LPC", "importance_LPX", "frequencies_LF"):
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name} is not finite")


def _check_stream(stream: Stream) -> None:
    if stream.role != "kv" or stream.parts != _PARTS:
        raise ValueError(f"not for the stream {stream.name!r}, which has no keys and values")


# -- from texts --------------------------------------------------------------------------------------------------------
class _Layer(NamedTuple):
    """Rows of one layer over all texts, without the first tokens of each window; keys un-rotated. Kinds of text weigh
    the same: `weight_N` sums to N."""

    rows_PNC: Floats
    gradients_PNC: Floats  # per square root of scored token, so that (g . e)^2 / 2 is nats per token
    energy_PNH: Floats
    weight_N: npt.NDArray[np.float64]


def calibrate(calibration: Calibration) -> Tables:
    stream = calibration.stream
    try:
        _check_stream(stream)
    except ValueError as error:
        raise InvalidArgument(f"transform: {error}", field="codec") from error
    windows = [window for window in calibration.windows if window.kv_LHPTD.shape[3] > RAW_TOKENS]
    if not windows:
        raise InvalidArgument(f"transform: no text is longer than {RAW_TOKENS} tokens", field="texts")
    frequencies_LF = calibration.rope.frequencies_LF
    if not all(np.isfinite(window.gradients_LHPTD).all() for window in windows):
        raise InvalidArgument("transform: a gradient is infinite or not a number", field="texts")
    unit = _unit(stream, windows)
    fitted = [_fit(_layer(windows, frequencies_LF, layer), unit) for layer in range(stream.layers)]
    counts_KS = np.sum([layer.pop("counts_KS") for layer in fitted], axis=0) + _EXPECTED * _expected()
    arrays = {name: np.stack([layer[name] for layer in fitted]) for name in fitted[0]}
    fineness_LPS = arrays.pop("fineness_LPS")
    arrays["fineness_KS"] = _frequencies(fineness_LPS.reshape(-1, FINENESS_SYMBOLS))
    arrays["classes_KS"] = _frequencies(counts_KS)
    arrays["frequencies_LF"] = frequencies_LF.astype(np.float32)
    return Tables(arrays, {"unit": unit})


def _frequencies(counts_KS: Array) -> Array:
    return rans.FrequencyTables.from_counts(np.rint(counts_KS).astype(np.int64)).frequencies_KS


def _unit(stream: Stream, windows: Sequence[Window]) -> float:
    """The step at which errors of uniform noise, step^2 / 12 each, would cost `_KL_UNIT`. Of the first window's size:
    a level means the same step whatever texts a profile is made from."""
    numbers = windows[0].kv_LHPTD.size
    return float((2 * 12 * _KL_UNIT / numbers) ** 0.5)


def _layer(windows: Sequence[Window], frequencies_LF: Floats, layer: int) -> _Layer:
    kinds = [window.kind for window in windows]
    rows: list[Floats] = []
    gradients: list[Floats] = []
    energies: list[Floats] = []
    weights: list[npt.NDArray[np.float64]] = []
    for window in windows:
        numbers_PTHD = _of_layer(window.kv_LHPTD, layer)
        slopes_PTHD = _of_layer(window.gradients_LHPTD, layer) / np.float32(window.scored_tokens**0.5)
        energies.append((numbers_PTHD**2).sum(-1)[:, RAW_TOKENS:])
        for part_PTHD, collected in ((numbers_PTHD, rows), (slopes_PTHD, gradients)):
            _turn_back(part_PTHD[_KEYS], frequencies_LF[layer])
            collected.append(part_PTHD.reshape(_PARTS, part_PTHD.shape[1], -1)[:, RAW_TOKENS:])
        weights.append(np.full(energies[-1].shape[1], 1 / kinds.count(window.kind)))
    weight_N = np.concatenate(weights)
    return _Layer(
        rows_PNC=np.concatenate(rows, 1),
        gradients_PNC=np.concatenate(gradients, 1),
        energy_PNH=np.concatenate(energies, 1),
        weight_N=weight_N / weight_N.mean(),
    )


def _of_layer(numbers_LHPTD: Floats, layer: int) -> Floats:
    return np.ascontiguousarray(numbers_LHPTD[layer].transpose(1, 2, 0, 3))


def _turn_back(keys_THD: Floats, frequencies_F: Floats) -> None:
    """In place."""
    angles_TF = np.arange(len(keys_THD))[:, None] * frequencies_F.astype(np.float64)
    cosines_T1F, sines_T1F = (angle.astype(np.float32)[:, None] for angle in (np.cos(angles_TF), np.sin(angles_TF)))
    pairs = len(frequencies_F)
    left_THF, right_THF = keys_THD[..., :pairs].copy(), keys_THD[..., pairs : 2 * pairs].copy()
    keys_THD[..., :pairs] = left_THF * cosines_T1F + right_THF * sines_T1F
    keys_THD[..., pairs : 2 * pairs] = right_THF * cosines_T1F - left_THF * sines_T1F


def _fit(layer: _Layer, unit: float) -> dict[str, Array]:
    """This layer's part of every array, and its share of what the common tables count."""
    mean_PC = np.average(layer.rows_PNC, axis=1, weights=layer.weight_N).astype(np.float16)
    rows_PNC = layer.rows_PNC - mean_PC[:, None].astype(np.float32)
    importance_PX = _importance(layer, rows_PNC)
    features_NX = _features(rows_PNC, layer.energy_PNH)
    fineness_PN = finenesses(importance_PX.astype(np.float32) @ features_NX.T)
    parts = [
        _fit_part(rows_PNC[part], layer.gradients_PNC[part], fineness_PN[part], layer.weight_N, unit)
        for part in range(_PARTS)
    ]
    stacked = {name: np.stack([part[name] for part in parts]) for name in parts[0] if name != "counts_KS"}
    counts_KS = parts[_KEYS]["counts_KS"] + parts[_VALUES]["counts_KS"]
    return stacked | {"mean_LPC": mean_PC, "importance_LPX": importance_PX, "counts_KS": counts_KS}


def _importance(layer: _Layer, rows_PNC: Floats) -> npt.NDArray[np.float16]:
    """Ridge regression of log g^2 of both parts, over standardised features; relative, so around 0."""
    features_NX = _features(rows_PNC, layer.energy_PNH).astype(np.float64)
    centre_X, width_X = features_NX.mean(0), features_NX.std(0) + 1e-6
    centre_X[0], width_X[0] = 0, 1
    standard_NX = (features_NX - centre_X) / width_X
    slopes_PN = (layer.gradients_PNC.astype(np.float64) ** 2).sum(-1)
    logarithms_PN = np.log(slopes_PN + _LOG_FLOOR * slopes_PN.mean(1, keepdims=True) + np.finfo(np.float32).tiny)
    logarithms_PN -= np.average(logarithms_PN, axis=1, weights=layer.weight_N)[:, None]
    gram_XX = (standard_NX * layer.weight_N[:, None]).T @ standard_NX
    gram_XX += _RIDGE * len(standard_NX) * np.eye(len(gram_XX))
    weights_PX = np.linalg.solve(gram_XX, (standard_NX * layer.weight_N[:, None]).T @ logarithms_PN.T).T
    unscaled_PX = weights_PX / width_X
    unscaled_PX[:, 0] = weights_PX[:, 0] - (unscaled_PX[:, 1:] * centre_X[1:]).sum(1)
    importance_PX: npt.NDArray[np.float16] = unscaled_PX.astype(np.float16)
    return importance_PX


def _fit_part(
    rows_NC: Floats, gradients_NC: Floats, fineness_N: npt.NDArray[np.int8], weight_N: Array, unit: float
) -> dict[str, Array]:
    scale_N = np.exp2(fineness_N.astype(np.float64) / 2)  # a row's coefficients are cut this much finer
    root_CC = _root((gradients_NC / scale_N[:, None]).astype(np.float32), weight_N)
    mapped_NC = (rows_NC @ root_CC).astype(np.float64) * (scale_N * weight_N**0.5)[:, None]
    _, axes_CC = np.linalg.eigh(mapped_NC.T @ mapped_NC)
    fractions_CC, scale_C = _stored(root_CC @ axes_CC[:, ::-1].astype(np.float32))
    coefficients_NC = rows_NC @ (fractions_CC.astype(np.float32) * scale_C)
    deviation_C = _deviations(coefficients_NC, weight_N)
    few = slice(None, None, _COUNTED_EVERY)
    return {
        "basis_LPCC": fractions_CC,
        "scale_LPC": scale_C,
        "deviation_LPC": deviation_C,
        "fineness_LPS": np.bincount(fineness_N + FINENESS_MAX, weight_N, FINENESS_SYMBOLS),
        "counts_KS": _counts(coefficients_NC[few], fineness_N[few], weight_N[few], deviation_C, unit),
    }


def _root(gradients_NC: Floats, weight_N: Array) -> Floats:
    """R of E[g g^T] = R^2, where no direction is less than `_FLOOR` of the mean."""
    fisher_CC = (gradients_NC * weight_N[:, None]).T.astype(np.float64) @ gradients_NC / len(gradients_NC)
    mean = max(float(np.trace(fisher_CC)) / len(fisher_CC), float(np.finfo(np.float32).tiny))
    values_C, axes_CC = np.linalg.eigh(fisher_CC + _FLOOR * mean * np.eye(len(fisher_CC)))
    root_CC: Floats = ((axes_CC * np.sqrt(values_C)) @ axes_CC.T).astype(np.float32)
    return root_CC


def _stored(basis_CC: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    scale_C = np.abs(basis_CC).max(0) / np.float32(_FRACTION_MAX)
    return np.rint(basis_CC / scale_C).astype(np.int8), scale_C.astype(np.float32)


def _deviations(coefficients_NC: Floats, weight_N: Array) -> npt.NDArray[np.int16]:
    variance_C = np.average(coefficients_NC.astype(np.float64) ** 2, axis=0, weights=weight_N)
    return np.rint(OCTAVE / 2 * np.log2(variance_C + 1e-30)).astype(np.int16)


def _counts(
    coefficients_NC: Floats, fineness_N: npt.NDArray[np.int8], weight_N: Array, deviation_C: Array, unit: float
) -> npt.NDArray[np.float64]:
    """How often each number occurs in each spread class, at a few levels."""
    counts_KS = np.zeros(CLASSES * SYMBOLS)
    for level in _COUNTED_LEVELS:
        step = step_of(level, unit)
        step_N = step * np.exp2(-fineness_N.astype(np.float32) / 2)
        numbers_NC = np.rint(coefficients_NC / step_N[:, None])
        symbols_NC = np.where(np.abs(numbers_NC) <= NUMBER_MAX, numbers_NC + NUMBER_MAX, ESCAPE).astype(np.int64)
        eighths_N = round(OCTAVE * np.log2(step)) - fineness_N.astype(np.int64) * (OCTAVE // 2)
        classes_NC = np.minimum((deviation_C - eighths_N[:, None] - SKIPPED) >> 1, CLASSES - 1)
        coded_NC = classes_NC >= 0
        places = (classes_NC * SYMBOLS + symbols_NC)[coded_NC]
        weights_NC = np.broadcast_to(weight_N[:, None], coded_NC.shape)
        counts_KS += np.bincount(places, weights_NC[coded_NC], CLASSES * SYMBOLS)
    return counts_KS.reshape(CLASSES, SYMBOLS)


def _expected() -> npt.NDArray[np.float64]:
    """Shares of numbers by spread class, if they follow Laplace. Else a class that no text shows would have a table
    for which every number but 0 is an accident."""
    spread_K = np.exp2((2 * np.arange(CLASSES) + 1 + SKIPPED) / OCTAVE)
    edges_KE = (np.arange(-NUMBER_MAX, NUMBER_MAX + 2) - 0.5) * 2**0.5 / spread_K[:, None]
    below_KE = 0.5 + 0.5 * np.sign(edges_KE) * -np.expm1(-np.abs(edges_KE))
    inside_KS = np.diff(below_KE, axis=1)
    return np.concatenate((inside_KS, 1 - inside_KS.sum(1, keepdims=True)), 1)
