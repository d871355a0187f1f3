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


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureOptions:
    """`triptych measure`."""

    engine: EngineOptions  # with the profile, if another than the packaged one is meant
    texts: tuple[Path, ...]
    codecs: tuple[str, ...] = ()  # none: every one that there is
    levels: tuple[int, ...] = ()  # none: every one that was measured for the profile
    windows: int = 4
    threads: int = 2
    out: Path | None = None

    def __post_init__(self) -> None:
        _require_texts(self.texts)
        require_at_least("windows", self.windows, 1)
        require_at_least("threads", self.threads, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions:
    """`triptych profile`."""

    engine: EngineOptions
    texts: tuple[Path, ...]
    out: Path
    windows: int = 6  # of each text, to calibrate on
    held_out: int = 2  # of each text, to measure on
    threads: int = 2

    def __post_init__(self) -> None:
        _require_texts(self.texts)
        for option, value in (("windows", self.windows), ("held-out", self.held_out), ("threads", self.threads)):
            require_at_least(option, value, 1)


def codec_engine(*, model: str, dtype: Dtype, profile: Path | None = None) -> EngineOptions:
    if model == MODEL_ORACLE:
        raise OptionError("model", "'oracle' has no weights, so there is nothing to measure")
    return EngineOptions(model=model, dtype=dtype, profile=profile)


def split_names(text: str) -> tuple[str, ...]:
    """Of "a,b"; of "all", which is every codec, none."""
    names = tuple(dict.fromkeys(name for name in text.split(",") if name))
    if not names:
        raise OptionError("codecs", "must name a codec, or be 'all'")
    return () if text == "all" else names


def split_levels(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(level) for level in text.split(",") if level))
    except ValueError:
        raise OptionError("levels", f"must be numbers separated by commas, not '{text}'") from None


def _require_texts(texts: tuple[Path, ...]) -> None:
    if not texts:
        raise OptionError("text", "must name a file")
    for file in texts:
        if not file.is_file():
            raise OptionError("text", f"there is no file '{file}'")
