"""What a bench says: a figure, how sure it is, and the bar it is held to. And where it was measured.

A bar is a count, a ratio of things that took turns in one run, or CPU time per unit of work: what a busy machine
disturbs least. Wall times are printed and never held to anything.
"""

import datetime
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

FOLDER = Path(__file__).parent / "figures"
CONFIDENCE = 0.95
PACKAGES = ("torch", "transformers", "numpy", "grpcio", "protobuf", "xxhash", "uvicorn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A promise about one figure: at most, or at least, `limit`."""

    name: str
    claim: str
    unit: str
    limit: float
    at_least: bool = False

    def holds(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What came out. `interval` is where the median of more runs would lie; `notes` hold nothing to anything."""

    bar: Bar
    value: float
    interval: tuple[float, float]
    samples: int
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.bar.holds(self.value)

    def __str__(self) -> str:
        sign = ">=" if self.bar.at_least else "<="
        low, high = self.interval
        verdict = "ok" if self.passed else "MISSED"
        return (
            f"{self.bar.name}: {self.value:.3g} {self.bar.unit} [{low:.3g}, {high:.3g}] of {self.samples}, "
            f"bar {sign} {self.bar.limit:g}: {verdict}  {dict(self.notes)}"
        )


def figure_of(bar: Bar, samples: Sequence[float], **notes: Any) -> Figure:
    """The samples' median."""
    return Figure(bar=bar, value=median(samples), interval=interval(samples), samples=len(samples), notes=notes)


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """For the median, from order statistics: no assumption about how the samples are distributed.

    [k-th smallest, k-th largest] misses the median with twice the chance that fewer than k of n coins show heads.
    """
    ordered, missed, k = sorted(samples), 0.0, 0
    while k < (len(ordered) - 1) // 2:
        missed += 2 * math.comb(len(ordered), k) / 2 ** len(ordered)
        if missed > 1 - CONFIDENCE:
            break
        k += 1
    k = max(k - 1, 0)
    return ordered[k], ordered[-1 - k]


def save(name: str, figures: Sequence[Figure]) -> Path:
    """Regenerate one file of bench/figures."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    figures_out = [asdict(figure) | {"passed": figure.passed} for figure in figures]
    path.write_text(json.dumps({"machine": machine(), "figures": figures_out}, indent=2) + "\n")
    return path


def machine() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
