"""StepTimeModel: how long an engine step takes, from what is in it. Fitted by `triptych fit`, used to plan.

    T = step_us                                         reading the weights once, launching kernels
      + prefill_step_us    * (any chunk ? 1 : 0)        kernels for many rows cost more to start than those for a few
      + prefill_token_us   * sum n                      a prompt chunk of n tokens
      + prefill_pair_us    * sum n * (start + n / 2)    ... each of which attends to all tokens before it
      + decode_context_us  * sum context                a decode reads the KV of its context
      + decode_sequence_us * decodes

Linear, with non-negative coefficients, least squares on relative error: the form of DistServe (appendix A), whose
prefills and decodes have constants of their own, in one formula, because steps may hold both. The second constant is
measured, not published: without it the median error for SmolLM2 on one core was 6 %, with it 3 %. The model knows no
cache misses, no neighbours and no further regimes: what it misses is in the error report, a part of the result.

No torch here: the paced executor, virtual engines and planners use it too. Measuring is `engine.fit`.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from enum import StrEnum
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.base import limits
from engine.base.errors import InvalidArgument
from engine.base.files import replace_file
from engine.base.folders import default_cache_dir
from engine.commands import StepPlan

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimeModel:
    """Microseconds of one step. The fields are the coefficients; see the module for what each is multiplied with."""

    step_us: float = 0.0
    prefill_step_us: float = 0.0
    prefill_token_us: float = 0.0
    prefill_pair_us: float = 0.0
    decode_context_us: float = 0.0
    decode_sequence_us: float = 0.0

    def __call__(self, plan: StepPlan) -> int:
        chunks = [(piece.start, len(piece.token_ids)) for piece in plan.slices if piece.is_prefill]
        contexts = [piece.start + len(piece.token_ids) for piece in plan.slices if not piece.is_prefill]
        return self.predict(chunks, contexts)

    def predict(self, prefill: Sequence[tuple[int, int]], decodes: Sequence[int]) -> int:
        """`prefill`: (start, tokens) of each chunk. `decodes`: how many tokens each decode attends to, itself too."""
        terms = zip(self.coefficients, features(prefill, decodes), strict=True)
        return round(sum(coefficient * amount for coefficient, amount in terms))

    @property
    def coefficients(self) -> tuple[float, ...]:
        values: tuple[float, ...] = astuple(self)
        return values


def features(prefill: Sequence[tuple[int, int]], decodes: Sequence[int]) -> tuple[float, ...]:
    """What the coefficients are multiplied with, in the order of the model's fields."""
    return (
        1.0,
        float(bool(prefill)),
        float(sum(tokens for _, tokens in prefill)),
        float(sum(tokens * (start + tokens / 2) for start, tokens in prefill)),
        float(sum(decodes)),
        float(len(decodes)),
    )


# -- fitting -----------------------------------------------------------------------------------------------------------
class Kind(StrEnum):
    """What a step holds."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A measured step, described as for `StepTimeModel.predict`."""

    prefill: tuple[tuple[int, int], ...] = ()
    decodes: tuple[int, ...] = ()
    step_us: float

    @property
    def kind(self) -> Kind:
        if self.prefill and self.decodes:
            return Kind.MIXED
        return Kind.PREFILL if self.prefill else Kind.DECODE


class Spread(NamedTuple):
    """Relative errors of some samples: |predicted - measured| / measured."""

    samples: int
    median: float
    p90: float
    max: float


@dataclass(frozen=True, slots=True)
class FitError:
    """How far off a fit is for steps that it has not seen."""

    all: Spread
    by_kind: dict[Kind, Spread]

    def as_dict(self) -> dict[str, dict[str, float]]:
        return {"all": self.all._asdict()} | {kind.value: spread._asdict() for kind, spread in self.by_kind.items()}


SAMPLES_MIN = len(fields(StepTimeModel)) + 1  # each is predicted from the others


def fit(samples: Sequence[Sample]) -> tuple[StepTimeModel, FitError]:
    """The best model of all samples, and its error by leave-one-out: each sample under the best model of the others."""
    if len(samples) < SAMPLES_MIN:
        raise InvalidArgument(f"samples: at least {SAMPLES_MIN} are needed, got {len(samples)}", field="samples")
    if any(not 0 < sample.step_us < math.inf for sample in samples):
        raise InvalidArgument("samples: every step must have taken some time", field="samples")
    times_N = np.array([sample.step_us for sample in samples])
    rows_NF = np.array([features(sample.prefill, sample.decodes) for sample in samples]) / times_N[:, None]
    errors_N = np.array([_error_of(index, rows_NF) for index in range(len(samples))])
    return _model(non_negative_fit(rows_NF)), _error_report(samples, errors_N)


def _model(coefficients_F: Float64) -> StepTimeModel:
    names = (field.name for field in fields(StepTimeModel))
    return StepTimeModel(**dict(zip(names, coefficients_F.tolist(), strict=True)))


def _error_of(index: int, rows_NF: Float64) -> float:
    """Of the sample `index` under the model of all others. Rows are divided by measured time, so 1 is exact."""
    coefficients_F = non_negative_fit(np.delete(rows_NF, index, axis=0))
    return abs(float(rows_NF[index] @ coefficients_F) - 1.0)


def non_negative_fit(rows_NF: Float64) -> Float64:
    """Coefficients >= 0 with the smallest sum of (rows @ coefficients - 1)^2.

    The best non-negative solution is the plain least-squares solution on *some* set of columns. There are 63 sets of
    six, so all are tried: exact, and shorter than an active-set method.
    """
    best_F, best_loss = np.zeros(rows_NF.shape[1]), float(len(rows_NF))
    scale_F = np.linalg.norm(rows_NF, axis=0)  # columns are of very different sizes, and `lstsq` has one tolerance
    scale_F[scale_F == 0] = 1
    for columns in _subsets(rows_NF.shape[1]):
        chosen_NS = rows_NF[:, columns] / scale_F[columns]
        solution_S = np.linalg.lstsq(chosen_NS, np.ones(len(rows_NF)))[0]
        loss = float(np.square(chosen_NS @ solution_S - 1).sum())
        if solution_S.min() >= 0 and loss < best_loss:
            best_F, best_loss = np.zeros_like(best_F), loss
            best_F[columns] = solution_S / scale_F[columns]
    return best_F


def _subsets(count: int) -> list[list[int]]:
    return [list(chosen) for size in range(1, count + 1) for chosen in combinations(range(count), size)]


def _error_report(samples: Sequence[Sample], errors_N: Float64) -> FitError:
    kinds = np.array([sample.kind for sample in samples])
    by_kind = {kind: _spread(errors_N[kinds == kind]) for kind in Kind if kind in kinds}
    return FitError(_spread(errors_N), by_kind)


def _spread(errors: Float64) -> Spread:
    return Spread(len(errors), float(np.median(errors)), float(np.quantile(errors, 0.9)), float(errors.max()))


# -- files -------------------------------------------------------------------------------------------------------------
FILE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a model is fitted for. Machines are not told apart: each has a cache directory of its own."""

    fingerprint: str  # of the checkpoint
    dtype: str
    device: str
    threads: int

    def file(self, cache_dir: Path | None = None) -> Path:
        """Where `triptych fit` writes and a worker looks."""
        name = f"{self.fingerprint}-{self.dtype}-{self.device}-t{self.threads}.json"
        return (cache_dir or default_cache_dir()) / "step_time" / re.sub(r"[^\w.-]", "_", name)


def load(setting: Setting, cache_dir: Path | None = None) -> StepTimeModel | None:
    """What was fitted for this setting on this machine; None if nothing was. A bad file is an `InvalidArgument`."""
    file = setting.file(cache_dir)
    try:
        with file.open("rb") as stream:
            data = stream.read(limits.STEP_TIME_FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _bad(f"{file} cannot be read: {error.strerror}") from error
    try:
        return parse(data, setting)
    except InvalidArgument as error:
        raise _bad(f"{file}: {error.message.removeprefix('step_time: ')}; `triptych fit` writes it anew") from error


def save(file: Path, setting: Setting, model: StepTimeModel, error: FitError) -> None:
    """Readers see the old file or the new one, never a part."""
    document = {
        "version": FILE_VERSION,
        "setting": asdict(setting),
        "model_us": asdict(model),
        "relative_error": error.as_dict(),
    }
    replace_file(file, json.dumps(document, indent=2).encode())


def parse(data: bytes, setting: Setting) -> StepTimeModel:
    """A file's model, if it is one and was fitted for this setting. Raises only `InvalidArgument`.

    Anybody may have edited it, and what it says decides how large steps are.
    """
    if len(data) > limits.STEP_TIME_FILE_BYTES_MAX:
        raise _bad(f"more than {limits.STEP_TIME_FILE_BYTES_MAX} bytes")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise _bad("not JSON") from None
    if not isinstance(document, dict) or document.get("version") != FILE_VERSION:
        raise _bad(f"not a step-time file of version {FILE_VERSION}")
    if document.get("setting") != asdict(setting):
        raise _bad("fitted for another model, dtype, device or number of threads")
    return StepTimeModel(**_coefficients(document.get("model_us")))


def _coefficients(values: object) -> dict[str, float]:
    names = {field.name for field in fields(StepTimeModel)}
    if not isinstance(values, dict) or values.keys() != names:
        raise _bad(f"model_us: must have the fields {', '.join(sorted(names))}")
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= limits.STEP_TIME_COEFFICIENT_US_MAX:  # NaN is in no range
            raise _bad(f"model_us.{name}: must be in [0, {limits.STEP_TIME_COEFFICIENT_US_MAX:g}]")
    return {name: float(value) for name, value in values.items()}


def _bad(message: str) -> InvalidArgument:
    return InvalidArgument(f"step_time: {message}", field="step_time")
