"""`triptych fit`: from a checkpoint folder to a file that a worker of the same setting loads."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from control_plane.model_choice import ModelChoice
from control_plane.options import Device, Dtype, EngineOptions, OptionError
from engine.base.errors import InvalidArgument
from engine.executors import Executor
from engine.executors.oracle import oracle_schema
from engine.kv.arena import Arena
from engine.step_time import Setting, fit, load
from tests.engine.test_fit import MODEL, ModelledExecutor
from triptych import cli
from triptych.fit import Outcome, as_document, print_tables, run
from triptych.options import FitOptions, GridSize

ENGINE = EngineOptions()
CHOICE = ModelChoice(
    name="tiny",
    path=Path("nowhere"),
    dtype="bfloat16",
    schema=oracle_schema(model="f00d"),
    vocab_size=100,
    max_model_len=4_096,
    eos_token_ids=(),
)


def outcome_of(
    folder: Path,
    *,
    grid: GridSize = GridSize.STANDARD,
    choice: ModelChoice = CHOICE,
    engine: EngineOptions = ENGINE,
) -> Outcome:
    executor = ModelledExecutor()

    def build(options: FitOptions, choice: ModelChoice, arena: Arena) -> Executor:
        return executor

    options = FitOptions(engine=engine, threads=2, grid=grid, out=folder / "fitted.json")
    return run(options, choice, build=build, clock_us=executor.clock_us)


def main(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of `triptych fit`."""
    monkeypatch.setattr(sys, "argv", ["triptych", "fit", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    printed = capsys.readouterr()
    return int(caught.value.code or 0), printed.out, printed.err


@pytest.mark.parametrize("grid", GridSize)
def test_finds_the_model_behind_the_times(tmp_path: Path, grid: GridSize) -> None:
    outcome = outcome_of(tmp_path, grid=grid)
    assert list(outcome.model.coefficients) == pytest.approx(list(MODEL.coefficients), rel=1e-3)
    assert outcome.error.all.max < 1e-3


def test_the_report_says_what_was_measured_and_predicted(tmp_path: Path) -> None:
    document = as_document(outcome_of(tmp_path))
    assert json.loads(json.dumps(document)) == document | {
        "steps": json.loads(json.dumps(document["steps"])),
    }
    assert document["setting"] == {"fingerprint": "f00d", "dtype": "bfloat16", "device": "cpu", "threads": 2}
    assert all(abs(step["predicted_us"] - step["step_us"]) <= 2 for step in document["steps"])
    assert {step["kind"] for step in document["steps"]} == {"prefill", "decode", "mixed"}


def test_a_file_that_cannot_be_written_is_said_before_measuring(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    def build(options: FitOptions, choice: ModelChoice, arena: Arena) -> Executor:
        raise AssertionError("too late")

    options = FitOptions(engine=EngineOptions(), out=tmp_path / "file" / "fitted.json")
    with pytest.raises(InvalidArgument, match=r"out: .* cannot be written"):
        run(options, CHOICE, build=build, clock_us=lambda: 0)


def test_a_model_too_short_to_fit_is_said(tmp_path: Path) -> None:
    short = ModelChoice(
        name="tiny",
        path=None,
        dtype="bfloat16",
        schema=CHOICE.schema,
        vocab_size=100,
        max_model_len=20,
        eos_token_ids=(),
    )
    with pytest.raises(InvalidArgument, match="contexts of 20 tokens"):
        outcome_of(tmp_path, choice=short)


def test_a_fit_that_is_far_off_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = outcome_of(tmp_path)
    print_tables(quiet)
    assert "busy" not in capsys.readouterr().out
    times = [replace(sample, step_us=sample.step_us * (1 + index % 3)) for index, sample in enumerate(quiet.samples)]
    model, error = fit(times)
    print_tables(replace(quiet, samples=times, model=model, error=error))
    assert "was the machine busy?" in capsys.readouterr().out


def test_a_device_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(OptionError, match="'cuda': torch sees no such device"):
        outcome_of(tmp_path, engine=EngineOptions(device=Device.CUDA))


# -- the command -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few thousand weights, as a folder."""
    from tests.engine.tiny_models import tiny_config, tiny_model

    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_model(tiny_config(max_position_embeddings=2_048)).save_pretrained(folder)
    return folder


@pytest.mark.slow  # kernels are compiled for the model
@pytest.mark.timeout(180)
def test_fits_a_real_model_and_a_worker_finds_the_file(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    status, out, _ = main(capsys, monkeypatch, "--model", str(checkpoint), "--dtype", "float32", "--quick", "--json")
    assert status == 0
    document = json.loads(out)
    fitted = load(Setting(**document["setting"]), tmp_path)
    assert fitted is not None
    assert document["model_us"] == asdict(fitted)
    assert Path(document["file"]).parent == tmp_path / "step_time"
    assert document["setting"]["dtype"] == Dtype.FLOAT32.value


def test_tables_go_to_standard_output_and_progress_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = ModelledExecutor()
    monkeypatch.setattr("triptych.fit.choose_model", lambda engine, progress: CHOICE)
    monkeypatch.setattr("triptych.fit.build_torch", lambda options, choice, arena: executor)
    monkeypatch.setattr("triptych.fit._monotonic_us", executor.clock_us)
    file = tmp_path / "own" / "fitted.json"
    status, out, err = main(capsys, monkeypatch, "--quick", "--out", str(file))
    assert (status, file.exists()) == (0, True)
    for words in ("measured ms", "32 at 512", "4 x 64", "decode_sequence", "Error on unseen steps", "written to"):
        assert words in out
    assert "measuring" not in out
    assert "measured ms" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quick", "--full"], "--full"),
        (["--model", "oracle"], "no weights"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_a_mistake_is_explained_without_a_traceback(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _, err = main(capsys, monkeypatch, *arguments)
    assert status == 2
    assert words in err
    assert "Traceback" not in err
