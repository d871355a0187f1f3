"""`triptych profile`: calibrates every codec that wants it to one model, measures all of them, writes the profile.

    each text   | windows to calibrate on: KV and gradients | windows held out: bits, KL and rates of every level |

Deterministic except for the rates: the same model and texts give the same tables, hence the same digests, and workers
whose profiles were made on different machines understand each other.

Legend: L layers, H kv heads, P parts (K, V), T tokens, D head dim.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast

import numpy as np
from rich.console import Console
from rich.progress import Progress

from control_plane.model_choice import ModelChoice, choose_model
from control_plane.options import MODEL_DEFAULT
from engine.base.errors import InvalidArgument
from engine.base.files import require_writable
from engine.capture import Subject
from engine.capture import Window as TextWindow
from engine.kv.schema import Stream
from engine.models.info import describe
from kv_transfer.calibration import Calibration, Floats, Rope, Window
from kv_transfer.codecs import CodecSet, Profiled, codecs
from kv_transfer.profile import Profile, Tables, save
from triptych.curves import Level, Text, levels_of, measure, read_texts, spread, work_of
from triptych.measure import progress_bar, table_of, use_threads, writing
from triptych.options import ProfileOptions

TEXTS: Final = Path(__file__).parent / "texts"


def default_texts() -> tuple[Path, ...]:
    """The kinds of text that come with the package."""
    return tuple(sorted(TEXTS.glob("*.txt")))


def default_out(model: str) -> Path:
    """Beside the user, named like the model; workers are told of it with --profile."""
    name = "smollm2-135m-instruct" if model == MODEL_DEFAULT else Path(model).name
    return Path(f"{name}.safetensors")


def main(options: ProfileOptions) -> int:
    with progress_bar() as bars:
        choice = choose_model(options.engine, progress=bars.console.print)
        profile = run(options, choice, bars)
    console = Console()
    console.print(table_of(profile.curves))
    console.print(f"worst of {len(profile.texts)} kinds of text; written to {options.out}", soft_wrap=True)
    return 0


def run(options: ProfileOptions, choice: ModelChoice, bars: Progress) -> Profile:
    assert choice.path is not None, "options refuse models without weights"
    texts = read_texts(options.texts, choice.path, describe(choice.path))
    with writing("out", options.out):
        require_writable(options.out)
    parts = [split(text, options.windows, options.held_out) for text in texts]
    use_threads(options.threads)
    subject = Subject.load(choice.path)
    tables = calibrated(subject, choice.schema.kv, [known for known, _ in parts], bars)
    profile = Profile(model=choice.schema.model, tables=tables, texts={text.kind: text.digest for text in texts})
    profile = _with_curves(profile, subject, choice.schema.kv, [held_out for _, held_out in parts], bars)
    with writing("out", options.out):
        save(profile, options.out)
    return profile


def split(text: Text, windows: int, held_out: int) -> tuple[Text, Text]:
    """(to calibrate on, held out). The end of a text is never calibrated on, however few windows there are."""
    if len(text.windows) < 2:
        raise InvalidArgument(f"text: {text.kind}: a profile needs two windows of each text", field="text")
    kept = max(1, min(held_out, len(text.windows) // 3))
    known, held = text.windows[:-kept], text.windows[-kept:]
    return replace(text, windows=spread(known, windows)), replace(text, windows=held)


def _with_curves(profile: Profile, subject: Subject, stream: Stream, texts: Sequence[Text], bars: Progress) -> Profile:
    offered = CodecSet(stream, profile)
    wanted = [level for level in levels_of(offered, offered.names()) if not _is_raw(offered, level)]
    task = bars.add_task("measuring", total=work_of(texts, wanted))
    curves = measure(subject, offered, texts, wanted, lambda what: bars.update(task, description=what, advance=1))
    return replace(profile, curves=curves)


def _is_raw(offered: CodecSet, level: Level) -> bool:
    return offered.get(level.codec).lossless


# -- calibration -------------------------------------------------------------------------------------------------------
def calibrated(subject: Subject, stream: Stream, texts: Sequence[Text], bars: Progress) -> dict[str, Tables]:
    """Tables of every codec that has some and takes this stream."""
    wanting = [name for name in codecs.names() if codecs.get(name).profiled and stream.dtype in codecs.get(name).dtypes]
    if not wanting:
        return {}
    windows = [(text.kind, window) for text in texts for window in text.windows]
    task = bars.add_task("capturing", total=len(windows) + len(wanting))
    with tempfile.TemporaryDirectory(prefix="triptych-") as folder:
        shelf = _Shelf(Path(folder))
        captured = []
        for seed, (kind, window) in enumerate(windows):
            bars.update(task, description=f"capturing {kind}", advance=1)
            captured.append(_captured(subject, stream, kind, window, seed, shelf))
        calibration = Calibration(stream, Rope(subject.rope_frequencies()), captured)
        tables = {}
        for name in wanting:
            bars.update(task, description=f"calibrating {name}", advance=1)
            tables[name] = cast("type[Profiled]", codecs.get(name)).calibrate(calibration)
    return tables


def _captured(subject: Subject, stream: Stream, kind: str, window: TextWindow, seed: int, shelf: "_Shelf") -> Window:
    kv_LHPTD = subject.kv(window.prefix, stream.dtype)
    gradients_LHPTD = subject.gradients(kv_LHPTD, window.scored, seed)
    return Window(kind, shelf.keep(kv_LHPTD), shelf.keep(gradients_LHPTD), len(window.scored))


@dataclass(slots=True)
class _Shelf:
    """Arrays in files: a window of a 135M model is 70 MB, and dozens are needed one at a time, more than once."""

    folder: Path
    kept: int = 0

    def keep(self, array: Floats) -> Floats:
        mapped = np.memmap(self.folder / f"{self.kept}", np.float32, "w+", shape=array.shape)
        mapped[...] = array
        self.kept += 1
        return mapped
