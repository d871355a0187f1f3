"""Plays every scenario file and compares. TRIPTYCH_REWRITE=1 writes what happened instead: then read the difference."""

import os
from pathlib import Path

import pytest

from tests.scenarios.control_scripts import ControllerScript, RouterScript
from tests.scenarios.runner import Script, play
from tests.scenarios.transfer_scripts import SourceScript, TargetScript
from tests.scenarios.worker_script import WorkerScript

FOLDER = Path(__file__).parent
SCENARIOS = sorted(FOLDER.glob("*/*.txt"))
SCRIPTS: dict[str, type[Script]] = {
    "agent": WorkerScript,
    "controller": ControllerScript,
    "router": RouterScript,
    "source": SourceScript,
    "target": TargetScript,
}


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_scenario(path: Path) -> None:
    expected = path.read_text()
    happened = play(expected, SCRIPTS[path.parent.name]())
    if os.environ.get("TRIPTYCH_REWRITE"):
        path.write_text(happened)
    assert happened == path.read_text()
