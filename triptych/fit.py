"""`triptych fit`: measures the real executor in this process, fits the step-time model, shows how well it fits.

What is measured is in `engine.fit`, the model and its file in `engine.step_time`; here they are put together with a
checkpoint and an arena, and the outcome with a terminal: results on standard output, progress on standard error.
"""

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from control_plane.agent.memory import free_bytes
from control_plane.model_choice import ModelChoice, choose_model
from control_plane.options import Device, EngineOptions, OptionError
from engine.base.errors import InvalidArgument
from engine.executors import Executor
from engine.fit import FULL, QUICK, STANDARD, Effort, Grid, Step, measure
from engine.kv.arena import Arena
from engine.step_time import SAMPLES_MIN, FitError, Sample, Setting, StepTimeModel, fit, save
from triptych.options import FitOptions, GridSize

PLANS: dict[GridSize, tuple[Grid, Effort]] = {
    GridSize.QUICK: (QUICK, Effort(rounds=3, limit_us=10_000_000)),
    GridSize.STANDARD: (STANDARD, Effort()),
    GridSize.FULL: (FULL, Effort(rounds=9, limit_us=600_000_000)),
}
MEMORY_SHARE = 0.25  # of what is free: the weights and other programs need the rest
KV_BYTES_MAX = 4 << 30

MEDIAN_ERROR_MAX = 0.1  # beyond, the numbers are still written: they may be the best there are
BUSY = (
    "Half of all steps are off by over 10 %: was the machine busy? Budgets will be as wrong. Fit again when it is idle."
)

BuildExecutor = Callable[[FitOptions, ModelChoice, Arena], Executor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Everything that there is to show."""

    setting: Setting
    samples: Sequence[Sample]
    model: StepTimeModel
    error: FitError
    file: Path


def main(options: FitOptions) -> int:
    console = Console(stderr=True)
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console) as bars:
        task = bars.add_task("loading", total=None)
        choice = choose_model(options.engine, progress=bars.console.print)

        def progress(done: int, total: int) -> None:
            bars.update(task, description="measuring", completed=done, total=total)

        outcome = run(options, choice, build=build_torch, clock_us=_monotonic_us, progress=progress)
    show = print_json if options.as_json else print_tables
    show(outcome)
    return 0


def run(
    options: FitOptions,
    choice: ModelChoice,
    *,
    build: BuildExecutor,
    clock_us: Callable[[], int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Measure, fit, write the file. Whatever can be refused is refused before the first measurement."""
    setting = Setting(
        fingerprint=choice.schema.model,
        dtype=choice.dtype,
        device=options.engine.device.value,
        threads=options.threads,
    )
    file = options.out or setting.file()
    with _told_as_out(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    grid, effort = PLANS[options.grid]
    steps = _affordable(grid, choice)
    samples = measure(
        build(options, choice, _arena_for(steps, choice, options.engine)),
        steps,
        block_size=options.engine.block_size,
        vocab_size=choice.vocab_size,
        clock_us=clock_us,
        effort=effort,
        progress=progress,
    )
    model, error = fit(samples)
    with _told_as_out(file):
        save(file, setting, model, error)
    return Outcome(setting=setting, samples=samples, model=model, error=error, file=file)


def _affordable(grid: Grid, choice: ModelChoice) -> list[Step]:
    kv_bytes = min(int(free_bytes() * MEMORY_SHARE), KV_BYTES_MAX)
    kv_tokens_max = kv_bytes // choice.schema.token_bytes
    steps = grid.steps(sequence_tokens_max=choice.max_model_len, kv_tokens_max=kv_tokens_max)
    if len(steps) < SAMPLES_MIN:
        raise InvalidArgument(
            f"model: contexts of {choice.max_model_len} tokens and memory for {kv_tokens_max} "
            f"allow {len(steps)} different steps; a fit needs {SAMPLES_MIN}",
            field="model",
        )
    return steps


def _arena_for(steps: Sequence[Step], choice: ModelChoice, engine: EngineOptions) -> Arena:
    columns = max(step.columns(engine.block_size) for step in steps)
    if engine.device is Device.CPU:
        arena = Arena(choice.schema, columns=columns, block_size=engine.block_size)
        arena.zero(range(columns))  # the system gives pages on first touch: not in the middle of a measurement
        return arena
    import torch

    if not torch.cuda.is_available():
        raise OptionError("device", f"'{engine.device.value}': torch sees no such device here")
    from engine.kv.device_arena import DeviceArena

    return DeviceArena(choice.schema, columns=columns, block_size=engine.block_size, device=engine.device.value)


@contextlib.contextmanager
def _told_as_out(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidArgument(f"out: {file} cannot be written: {error.strerror}", field="out") from error


def build_torch(options: FitOptions, choice: ModelChoice, arena: Arena) -> Executor:
    from engine.executors import torch

    assert choice.path is not None, "FitOptions refuse models without weights"
    device = options.engine.device.value
    config = torch.Config(model=choice.path, dtype=choice.dtype, device=device, threads=options.threads)
    return torch.TorchExecutor(config, arena)


def _monotonic_us() -> int:
    return time.monotonic_ns() // 1_000


# -- output ------------------------------------------------------------------------------------------------------------
def print_json(outcome: Outcome) -> None:
    json.dump(as_document(outcome), sys.stdout, indent=2)
    sys.stdout.write("\n")


def as_document(outcome: Outcome) -> dict[str, Any]:
    return {
        "file": str(outcome.file),
        "setting": asdict(outcome.setting),
        "model_us": asdict(outcome.model),
        "relative_error": outcome.error.as_dict(),
        "steps": [
            asdict(sample) | {"kind": sample.kind.value, "predicted_us": _predicted_us(outcome, sample)}
            for sample in outcome.samples
        ],
    }


def print_tables(outcome: Outcome) -> None:
    console = Console()
    console.print(_steps_table(outcome), _coefficients_table(outcome), _errors_table(outcome.error))
    console.print(f"written to {outcome.file}", soft_wrap=True)
    if outcome.error.all.median > MEDIAN_ERROR_MAX:
        console.print(BUSY, soft_wrap=True)


def _steps_table(outcome: Outcome) -> Table:
    table = Table("prompt chunk", "decodes", title="Steps")
    for column in ("measured ms", "predicted ms", "error"):
        table.add_column(column, justify="right")
    for sample in outcome.samples:
        predicted_us = _predicted_us(outcome, sample)
        table.add_row(
            ", ".join(f"{tokens} at {start}" for start, tokens in sample.prefill),
            f"{len(sample.decodes)} x {sample.decodes[0]}" if sample.decodes else "",
            f"{sample.step_us / 1_000:.1f}",
            f"{predicted_us / 1_000:.1f}",
            f"{predicted_us / sample.step_us - 1:+.1%}",
        )
    return table


def _coefficients_table(outcome: Outcome) -> Table:
    table = Table("coefficient", title="Model")
    table.add_column("microseconds", justify="right")
    for name, value in asdict(outcome.model).items():
        table.add_row(name.removesuffix("_us"), f"{value:,.3f}")
    return table


def _errors_table(error: FitError) -> Table:
    """Of steps that the fit has not seen, unlike those above."""
    table = Table("steps", title="Error on unseen steps")
    for column in ("count", "median", "90 %", "largest"):
        table.add_column(column, justify="right")
    for name, spread in [("all", error.all), *((kind.value, of_kind) for kind, of_kind in error.by_kind.items())]:
        table.add_row(name, str(spread.samples), f"{spread.median:.1%}", f"{spread.p90:.1%}", f"{spread.max:.1%}")
    return table


def _predicted_us(outcome: Outcome, sample: Sample) -> int:
    return outcome.model.predict(sample.prefill, sample.decodes)
