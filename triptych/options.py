"""What a person asks of commands that run in this process: frozen, checked values, as in `control_plane.options`."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from control_plane.options import (
    MODEL_ORACLE,
    Device,
    Dtype,
    EngineOptions,
    OptionError,
    require_at_least,
)


class GridSize(StrEnum):
    """How many different steps are measured, and how often."""

    QUICK = "quick"
    STANDARD = "standard"
    FULL = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """`triptych fit`."""

    engine: EngineOptions
    threads: int = 1
    grid: GridSize = GridSize.STANDARD
    out: Path | None = None  # None: where workers of this machine look
    as_json: bool = False

    def __post_init__(self) -> None:
        require_at_least("threads", self.threads, 1)


def fit_engine(*, model: str, dtype: Dtype, device: Device, block_size: int) -> EngineOptions:
    if model == MODEL_ORACLE:
        raise OptionError("model", "'oracle' has no weights, so there is nothing to measure")
    return EngineOptions(model=model, dtype=dtype, device=device, block_size=block_size)


def grid_of(*, quick: bool, full: bool) -> GridSize:
    if quick and full:
        raise OptionError("quick", "cannot be given together with --full")
    if quick:
        return GridSize.QUICK
    return GridSize.FULL if full else GridSize.STANDARD
