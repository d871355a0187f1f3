"""`triptych measure` and the curves below it."""

import json
import sys
from pathlib import Path

import pytest

from engine.base.errors import InvalidArgument
from engine.capture import Window, windows_of
from kv_transfer.codecs import codecs
from tests.triptych.measured import Clipping, text_file, tiny_checkpoint
from triptych import cli
from triptych.curves import some_of, spread

KEYS = ["codec", "level", "bits_per_element", "kl", "ppl_change", "encode_mb_s", "decode_mb_s"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def main(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    """(exit status, standard output and error) of `triptych measure`."""
    monkeypatch.setattr(sys, "argv", ["triptych", "measure", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    printed = capsys.readouterr()
    return int(caught.value.code or 0), printed.out + printed.err


def test_writes_what_scripts_rely_on(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, text = tmp_path / "new" / "out.json", text_file(tmp_path)
    asked = ("--model", checkpoint, "--text", text, "--codecs", "raw,int8", "--windows", 1, "--json", out)
    status, printed = main(capsys, monkeypatch, *asked, "--threads", 1)
    assert status == 0, printed
    raw, int8 = json.loads(out.read_text())
    assert list(raw) == list(int8) == KEYS
    assert (raw["codec"], raw["level"], raw["kl"], raw["ppl_change"]) == ("raw", 0, 0, 0)
    assert (int8["codec"], int8["level"]) == ("int8", 0)
    assert 16 < raw["bits_per_element"] < 33, "headers count"
    assert 8 < int8["bits_per_element"] < raw["bits_per_element"]
    assert 0 < int8["kl"] < 0.01
    assert int8["encode_mb_s"] > 0 and int8["decode_mb_s"] > 0
    assert "int8" in printed and "KL" in printed


def test_all_means_every_codec_that_needs_no_profile(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, text = tmp_path / "out.json", text_file(tmp_path, characters=1_100)
    status, printed = main(capsys, monkeypatch, "--model", checkpoint, "--text", text, "--json", out, "--threads", 1)
    assert status == 0, printed
    offered = {name for name in codecs.names() if not codecs.get(name).profiled}
    assert {entry["codec"] for entry in json.loads(out.read_text())} == offered


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--codecs", "int88"), "did you mean 'int8'"),
        (("--codecs", "clipping"), "needs a profile"),
        (("--codecs", "raw,int8", "--levels", "17"), "17: not each is a level"),
        (("--levels", "x"), "numbers separated by commas"),
        (("--windows", "0"), "at least 1"),
        (("--model", "oracle"), "no weights"),
        (("--profile", "nowhere.safetensors"), "nowhere.safetensors"),
    ],
)
def test_mistakes_are_one_line(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.setitem(codecs._registered, "clipping", Clipping)
    asked = ("--model", checkpoint, "--text", text_file(tmp_path, characters=1_100), *arguments)
    status, printed = main(capsys, monkeypatch, *asked)
    assert status == 2
    assert said in printed and len(printed.strip().splitlines()) == 1


def test_a_short_text_is_told_how_many_tokens_it_lacks(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_file(tmp_path, characters=500)
    status, printed = main(capsys, monkeypatch, "--model", checkpoint, "--text", text)
    assert status == 1
    assert "has 500 tokens of this model; at least 1,024 are needed" in printed


def test_a_file_that_is_no_text_is_told(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "noise.txt"
    text.write_bytes(bytes(range(128, 256)) * 20)
    status, printed = main(capsys, monkeypatch, "--model", checkpoint, "--text", text)
    assert status == 1 and "noise.txt" in printed and "decode" in printed


def test_windows_come_from_all_over_the_text() -> None:
    windows = windows_of(range(100), prefix_tokens=6, scored_tokens=4)
    assert [window.prefix[0] for window in spread(windows, 3)] == [0, 30, 60]
    assert spread(windows, 11) == windows


def test_of_many_levels_the_first_and_the_last_are_measured() -> None:
    assert list(some_of(range(100), most=4)) == [0, 33, 66, 99]
    assert list(some_of((3, 5, 9), most=4)) == [3, 5, 9]


def test_two_texts_of_one_name_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    from engine.models.info import describe
    from triptych.curves import read_texts

    (tmp_path / "other").mkdir()
    files = [text_file(tmp_path), text_file(tmp_path / "other")]
    with pytest.raises(InvalidArgument, match="same name"):
        read_texts(files, checkpoint, describe(checkpoint))


def test_a_window_counts_both_of_its_parts() -> None:
    assert len(Window((1, 2, 3), (4, 5))) == 5
