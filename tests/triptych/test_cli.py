"""triptych.cli: reads well, starts without torch, and never shows a traceback for a mistake at the terminal."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from control_plane.options import (
    ControllerOptions,
    Dtype,
    EngineOptions,
    ExecutorKind,
    LogLevel,
    RouterOptions,
    WorkerOptions,
)
from deploy.local import engine_arguments
from deploy.options import ServeOptions
from engine.types import Role
from triptych import cli

HEAVY = ("torch", "transformers", "grpc", "numba", "starlette")


def run(*arguments: str) -> tuple[int, str]:
    """The command as `main` runs it, in this process; (exit status, everything it printed)."""
    result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, result.output


def main(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["triptych", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0), capsys.readouterr().err


COMMANDS = typer.main.get_group(cli.app).commands


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_has_help(command: str) -> None:
    assert COMMANDS[command].help
    assert [option.name for option in COMMANDS[command].params if not getattr(option, "help", None)] == []


def test_a_cluster_may_be_started_by_parts_and_a_model_prepared_for_it() -> None:
    assert set(COMMANDS) == {"serve", "worker", "router", "controller"} | {"fit", "measure", "profile"}


def test_serve_has_the_flags_that_scripts_rely_on() -> None:
    _, text = run("serve", "--help")
    for flag in ("host", "port", "admin-port", "grpc-port", "model", "dtype", "encode", "prefill", "decode", "mixed"):
        assert f"--{flag} " in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--encode", "1"], "--encode"),
        (["serve", "--prefill", "0"], "--prefill"),
        (["serve", "--dtype", "float8"], "float8"),
        (["serve", "--port", "http"], "--port"),
        (["serve", "--no-such-flag"], "--no-such-flag"),
        (["router"], "--controller"),
        (["worker", "--name", "w", "--controller", "h:1", "--role", "decode", "--cores", "0,x"], "--cores"),
        (["controller", "--listen", "nowhere"], "--listen"),
    ],
)
def test_a_mistake_is_explained_without_a_traceback(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, text = main(capsys, monkeypatch, *arguments)
    assert status == 2
    assert words in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "runs", "expected"),
    [
        (
            ["serve", "--mixed", "1", "--prefill", "0", "--decode", "0", "--dtype", "float32", "--block-size", "32"],
            "deploy.local.serve",
            ServeOptions(mixed=1, prefill=0, decode=0, engine=EngineOptions(dtype=Dtype.FLOAT32, block_size=32)),
        ),
        (
            ["worker", "--name", "w", "--controller", "h:1", "--role", "prefill", "--role", "decode", "--cores", "2,3"],
            "control_plane.agent.process.main",
            WorkerOptions(name="w", controller="h:1", roles=frozenset({Role.PREFILL, Role.DECODE}), cores=(2, 3)),
        ),
        (
            ["router", "--controller", "h:1", "--port", "80", "--codec", "int8"],
            "control_plane.router.server.main",
            RouterOptions(controller="h:1", port=80, engine=EngineOptions(codec="int8")),
        ),
        (
            ["controller", "--listen", "h:1", "--log-level", "debug"],
            "control_plane.controller.server.main",
            ControllerOptions(listen="h:1", log_level=LogLevel.DEBUG),
        ),
    ],
)
def test_a_command_hands_its_options_over_and_ends_with_the_status_it_gets(
    arguments: list[str],
    runs: str,
    expected: object,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[object] = []
    module, _, function = runs.rpartition(".")
    stand_in = SimpleNamespace(**{function: lambda options: given.append(options) or 7})
    monkeypatch.setitem(sys.modules, module, stand_in)  # type: ignore[arg-type]
    status, _ = main(capsys, monkeypatch, *arguments)
    assert (given, status) == ([expected], 7)


def test_a_launchers_flags_give_a_child_the_very_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = EngineOptions(
        model="oracle",
        executor=ExecutorKind.PACED,
        dtype=Dtype.FLOAT32,
        block_size=8,
        max_model_len=512,
        kv_cache_mib=7,
        codec="auto",
        kl_budget=0.003,
        profile=Path("some") / "profile.safetensors",
        layers_per_group=2,
        step_tokens=64,
        batching="prepacking",
        tbt_slo_ms=20.5,
        prefix_cache=False,
    )
    unchanged = {name for name, value in asdict(EngineOptions()).items() if asdict(engine)[name] == value}
    assert unchanged == {"device"}, "it goes with the torch executor only"
    given: list[RouterOptions] = []
    stand_in = SimpleNamespace(main=lambda options: given.append(options) or 0)
    monkeypatch.setitem(sys.modules, "control_plane.router.server", stand_in)  # type: ignore[arg-type]
    main(capsys, monkeypatch, "router", "--controller", "h:1", *engine_arguments(engine))
    assert [options.engine for options in given] == [engine]


def test_help_loads_nothing_heavy() -> None:
    script = f"import sys, triptych.cli; print([name for name in {HEAVY} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=15)
    assert printed.stdout.strip() == "[]"
