"""`triptych profile`: from texts to a file that workers load, measured on what it was not calibrated on."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from control_plane.codec_choice import choose_codecs
from control_plane.model_choice import choose_model
from control_plane.options import Dtype
from engine.base.errors import InvalidArgument
from engine.capture import windows_of
from kv_transfer.codecs import codecs
from kv_transfer.profile import Profile, load
from tests.triptych.measured import Clipping, text_file, tiny_checkpoint
from triptych import cli
from triptych.curves import Text
from triptych.measure import progress_bar
from triptych.options import ProfileOptions, codec_engine
from triptych.profile import default_texts, run, split


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def options(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ProfileOptions:
    """A world with two codecs, one of them with tables."""
    known = {"raw": codecs.get("raw"), "int8": codecs.get("int8"), "clipping": Clipping}
    monkeypatch.setattr(codecs, "_registered", known)
    return ProfileOptions(
        engine=codec_engine(model=str(checkpoint), dtype=Dtype.BFLOAT16),
        texts=(text_file(tmp_path, "counting"), text_file(tmp_path, "letters", 3_000)),
        out=tmp_path / "tiny.safetensors",
        windows=2,
        held_out=1,
        threads=1,
    )


def profiled(options: ProfileOptions) -> Profile:
    with progress_bar() as bars:
        return run(options, choose_model(options.engine), bars)


@pytest.mark.timeout(60)
def test_a_worker_can_use_what_was_written(options: ProfileOptions) -> None:
    made = profiled(options)
    profile = load(options.out)
    assert profile.model == made.model
    assert profile.tables["clipping"].digest == made.tables["clipping"].digest
    assert profile.tables["clipping"].settings == {"layers": 2, "kinds": "counting letters", "windows": 3}
    assert set(profile.curves) == {"int8", "clipping"}, "raw is exact and has a fixed price"
    assert [point.level for point in profile.curves["clipping"]] == [0, 1, 2]
    assert set(profile.texts) == {"counting", "letters"}
    engine = replace(options.engine, profile=options.out, codec="clipping")
    assert "clipping" in choose_codecs(engine, choose_model(engine).schema).names()


@pytest.mark.timeout(60)
def test_the_worst_kind_is_what_a_point_says(options: ProfileOptions) -> None:
    for point in profiled(options).curves["clipping"]:
        assert set(point.kinds) == {"counting", "letters"}
        assert point.kl == max(kind.kl for kind in point.kinds.values())
        assert point.bits_per_element == max(kind.bits_per_element for kind in point.kinds.values())
    assert point.kl > 0.001, "a sixteenth of the largest number is a loss"
    assert len({kind.kl for kind in point.kinds.values()}) == 2


@pytest.mark.timeout(60)
def test_two_runs_differ_in_nothing_but_rates(options: ProfileOptions) -> None:
    one, other = profiled(options), profiled(options)
    assert one.tables["clipping"].digest == other.tables["clipping"].digest
    for name, points in one.curves.items():
        assert [still(point) for point in points] == [still(point) for point in other.curves[name]]


def still(point: object) -> object:
    return replace(point, encode_mb_s=0.0, decode_mb_s=0.0)  # type: ignore[type-var]


def test_nothing_is_measured_on_what_it_was_calibrated_on() -> None:
    text = Text("kind", "digest", windows_of(np.arange(90).tolist(), prefix_tokens=6, scored_tokens=4))
    known, held_out = split(text, windows=3, held_out=2)
    assert [window.prefix[0] for window in known.windows] == [0, 20, 40]
    assert [window.prefix[0] for window in held_out.windows] == [70, 80]


@pytest.mark.parametrize(("count", "known", "held_out"), [(2, 1, 1), (3, 2, 1), (5, 4, 1), (6, 4, 2), (20, 6, 2)])
def test_short_texts_keep_something_for_both(count: int, known: int, held_out: int) -> None:
    text = Text("kind", "digest", windows_of(range(10 * count), prefix_tokens=6, scored_tokens=4))
    assert [len(part.windows) for part in split(text, windows=6, held_out=2)] == [known, held_out]


def test_one_window_is_too_few() -> None:
    text = Text("kind", "digest", windows_of(range(10), prefix_tokens=6, scored_tokens=4))
    with pytest.raises(InvalidArgument, match="two windows"):
        split(text, windows=6, held_out=2)


def test_an_unwritable_file_is_said_before_measuring(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    asked = [str(checkpoint), "--text", str(text_file(tmp_path)), "--out", str(tmp_path / "file" / "x")]
    monkeypatch.setattr(sys, "argv", ["triptych", "profile", *asked])
    monkeypatch.setattr("triptych.profile.Subject", None)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2 and "cannot be written" in capsys.readouterr().err


def test_the_packages_own_texts_are_of_five_kinds_and_small() -> None:
    texts = default_texts()
    assert len(texts) >= 5
    assert all(8_000 < file.stat().st_size <= 60_000 for file in texts)
    assert all(file.read_text(encoding="utf-8").endswith("\n") for file in texts)
