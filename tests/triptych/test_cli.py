"""triptych.cli: reads well, starts without torch, and never shows a traceback for a mistake at the terminal."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from control_plane.addresses import listen, port_of
from control_plane.options import (
    ControllerOptions,
    Dtype,
    EdgeOptions,
    EngineOptions,
    ExecutorKind,
    LogFormat,
    LogLevel,
    RouterOptions,
    WorkerOptions,
)
from deploy.children import edge_arguments, edge_environment, engine_arguments
from deploy.options import ServeOptions
from engine.base.errors import Unavailable
from engine.batching import batchings
from engine.types import Role
from kv_transfer.codecs import codecs
from triptych import cli
from triptych.access import Certificates
from triptych.chat import ChatOptions
from triptych.load.options import Endpoint, LoadOptions, Slo
from triptych.settings import COMMANDS as CONFIGURED
from triptych.settings import settings_of

HEAVY = ("torch", "transformers", "grpc", "numba", "starlette", "pydantic", "yaml", "httpx")
TIMEOUT_S = 15


@pytest.fixture(autouse=True)
def a_wide_terminal_and_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("TRIPTYCH_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")


def run(*arguments: str) -> tuple[int, str]:
    """The command without `main` around it, in this process; (exit status, everything it printed)."""
    result = CliRunner().invoke(cli.app, arguments)
    return result.exit_code, result.output


def main(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """The command as a person has it, in this process; (exit status, standard error)."""
    monkeypatch.setattr(sys, "argv", ["triptych", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0), capsys.readouterr().err


def instead_of(monkeypatch: pytest.MonkeyPatch, runs: str, function: Callable[[Any], int]) -> None:
    module, _, name = runs.rpartition(".")
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: function}))  # type: ignore[arg-type]


def started(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A shell's `triptych`; what it prints goes where a shell would put it."""
    command = f'triptych() {{ {shlex.quote(sys.executable)} -m triptych "$@"; }}; {script}'
    shell = ("bash", "-c", command)
    return subprocess.run(shell, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, **environment})


# -- help --------------------------------------------------------------------------------------------------------------
def _leaves(group: Any, prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, command in group.commands.items():
        inner = hasattr(command, "commands")
        leaves |= _leaves(command, f"{prefix}{name} ") if inner else {f"{prefix}{name}": command}
    return leaves


COMMANDS = _leaves(typer.main.get_group(cli.app))


def test_what_there_is_to_do() -> None:
    assert set(COMMANDS) == {
        *("serve", "worker", "router", "controller"),
        *("chat", "bench serve", "methods", "config show", "config schema"),
        *("fit", "measure", "profile", "encode-demo"),
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_has_help(command: str) -> None:
    assert COMMANDS[command].help
    assert [option.name for option in COMMANDS[command].params if not getattr(option, "help", None)] == []
    assert run(*command.split(), "-h")[0] == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_narrow_terminal(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, text = run(*command.split(), "--help")
    assert re.findall(r"--\S*…", text) == []


def test_serve_has_the_flags_that_scripts_rely_on() -> None:
    _, text = run("serve", "--help")
    for flag in ("host", "port", "admin-port", "grpc-port", "model", "dtype", "encode", "prefill", "decode", "mixed"):
        assert f"--{flag} " in text


@pytest.mark.parametrize("command", CONFIGURED)
def test_help_shows_every_setting_and_no_older_name(command: str) -> None:
    _, text = run(command, "--help")
    shown = set(re.findall(r"--([a-z][a-z0-9-]*) ", text))
    settings = settings_of(CONFIGURED[command])  # type: ignore[index]
    assert {setting.name for setting in settings} <= shown
    assert not {alias for setting in settings for alias in setting.said.aliases} & shown


def test_help_loads_nothing_heavy() -> None:
    script = f"import sys, triptych.cli; print([name for name in {HEAVY} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=15)
    assert printed.stdout.strip() == "[]"


def test_a_shell_completes_commands_and_flags() -> None:
    def completed(words: str) -> list[str]:
        variables = {"_TRIPTYCH_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        entry = "import sys; sys.argv[0] = 'triptych'; from triptych.cli import main; main()"
        return started(f"{shlex.quote(sys.executable)} -c {shlex.quote(entry)}", **variables).stdout.split()

    assert completed("triptych ser") == ["serve"]
    assert completed("triptych serve --max-num") == ["--max-num-batched-tokens"]
    assert completed("triptych serve --dtype fl") == ["float32"]


# -- options are handed over -------------------------------------------------------------------------------------------
SERVE, WORKER = "deploy.local.serve", "control_plane.agent.process.main"
ROUTER, CONTROLLER = "control_plane.router.server.main", "control_plane.controller.server.main"


@pytest.mark.parametrize(
    ("arguments", "runs", "expected"),
    [
        (
            "serve --mixed 1 --prefill 0 --decode 0 --dtype float32 --block-size 32",
            SERVE,
            ServeOptions(mixed=1, prefill=0, decode=0, engine=EngineOptions(dtype=Dtype.FLOAT32, block_size=32)),
        ),
        ("serve some/model", SERVE, ServeOptions(engine=EngineOptions(model="some/model"))),
        ("serve some/model --model some/model", SERVE, ServeOptions(engine=EngineOptions(model="some/model"))),
        (
            "serve --step-tokens 64 --no-prefix-cache --drain-timeout-s 3",
            SERVE,
            ServeOptions(engine=EngineOptions(step_tokens=64, prefix_cache=False), drain_timeout_s=3.0),
        ),
        (
            "serve --max-num-batched-tokens 64 --no-enable-prefix-caching --drain-timeout 3 --log-format json",
            SERVE,
            ServeOptions(
                engine=EngineOptions(step_tokens=64, prefix_cache=False),
                drain_timeout_s=3.0,
                log_format=LogFormat.JSON,
            ),
        ),
        ("serve --enable-prefix-caching --prefix-cache --no-permit-special-tokens", SERVE, ServeOptions()),
        (
            "serve --api-key a,b --api-key c --permit-special-tokens --served-model-name m --queue-timeout 2",
            SERVE,
            ServeOptions(
                edge=EdgeOptions(
                    api_keys=("a,b", "c"), permit_special_tokens=True, served_model_name="m", queue_timeout_s=2.0
                )
            ),
        ),
        (
            "worker --name w --controller h:1 --role prefill --role decode --cores 2,3",
            WORKER,
            WorkerOptions(name="w", controller="h:1", roles=frozenset({Role.PREFILL, Role.DECODE}), cores=(2, 3)),
        ),
        (
            "router --controller h:1 --port 80 --codec int8",
            ROUTER,
            RouterOptions(controller="h:1", port=80, engine=EngineOptions(codec="int8")),
        ),
        (
            "controller --listen h:1 --log-level debug",
            CONTROLLER,
            ControllerOptions(listen="h:1", log_level=LogLevel.DEBUG),
        ),
    ],
)
def test_a_command_hands_its_options_over_and_ends_with_the_status_it_gets(
    arguments: str,
    runs: str,
    expected: object,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[object] = []
    instead_of(monkeypatch, runs, lambda options: given.append(options) or 7)
    status, _ = main(capsys, monkeypatch, *arguments.split())
    assert (given, status) == ([expected], 7)


def test_chat_and_bench_can_be_told_all_that_their_options_have(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[Any] = []
    prompts = tmp_path / "prompts"
    prompts.touch()
    certificates = f"--cacert {prompts} --cert {prompts} --key {prompts}"
    pem = Certificates(cacert=prompts, cert=prompts, key=prompts)
    monkeypatch.setattr("triptych.chat.run", lambda options: given.append(options) or 0)
    instead_of(monkeypatch, "triptych.load.command.run", lambda options: given.append(options) or 0)
    chat = f"""chat Hi --url http://h --model m --api-key k {certificates} --system s --max-tokens 7
        --temperature 0.5 --timings"""
    bench = f"""bench serve --url http://h --model m --api-key k {certificates} --endpoint chat --num-prompts 7
        --request-rate 2 --burstiness 0.5 --max-concurrency 3 --num-warmups 0 --seed 5 --timeout 9 --duration 8
        --prompts {prompts}
        --random-input-len 64 --random-output-len 8 --random-range-ratio 0.5 --random-prefix-len 4 --ignore-eos
        --temperature 0.5 --goodput ttft:300 --slo-headers --result-filename {tmp_path / "out"}"""
    main(capsys, monkeypatch, *chat.split())
    main(capsys, monkeypatch, *bench.split())
    assert given == [
        ChatOptions(
            url="http://h",
            model="m",
            api_key="k",
            certificates=pem,
            system="s",
            max_tokens=7,
            temperature=0.5,
            prompt="Hi",
            timings=True,
        ),
        LoadOptions(
            url="http://h",
            model="m",
            api_key="k",
            certificates=pem,
            endpoint=Endpoint.CHAT,
            requests=7,
            duration_s=8.0,
            rate=2.0,
            burstiness=0.5,
            concurrency=3,
            seed=5,
            prompts=prompts,
            input_len=64,
            output_len=8,
            range_ratio=0.5,
            prefix_len=4,
            ignore_eos=True,
            temperature=0.5,
            slo=Slo(ttft_ms=300.0),
            slo_headers=True,
            warmup=0,
            timeout_s=9.0,
            out=tmp_path / "out",
        ),
    ]
    for options, untouched in zip(given, (ChatOptions(), LoadOptions()), strict=True):
        same = [f.name for f in dataclasses.fields(options) if getattr(options, f.name) == getattr(untouched, f.name)]
        assert same == []


@pytest.mark.parametrize(
    ("arguments", "runs", "expected"),
    [("chat", "triptych.chat.run", ChatOptions()), ("bench serve", "triptych.load.command.run", LoadOptions())],
)
def test_without_flags_their_options_are_the_defaults_and_the_key_is_a_variables(
    arguments: str,
    runs: str,
    expected: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[object] = []
    monkeypatch.setattr(runs, lambda options: given.append(options) or 0)
    main(capsys, monkeypatch, *arguments.split())
    monkeypatch.setenv("TRIPTYCH_API_KEY", "k")
    main(capsys, monkeypatch, *arguments.split())
    assert given == [expected, dataclasses.replace(expected, api_key="k")]


def test_a_launchers_flags_give_a_child_the_very_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = EngineOptions(
        model="oracle",
        executor=ExecutorKind.PACED,
        dtype=Dtype.FLOAT32,
        block_size=8,
        max_model_len=512,
        kv_cache_mib=7,
        embedding_cache_mib=3,
        encode_image_ms=450.5,
        codec="auto",
        kl_budget=0.003,
        profile=Path("some") / "profile.safetensors",
        layers_per_group=2,
        step_tokens=64,
        batching="prepacking",
        tbt_slo_ms=20.5,
        prefix_cache=False,
    )
    for name in ("template", "keys", "certificate", "key", "authorities"):
        (tmp_path / name).touch()
    edge = EdgeOptions(
        served_model_name="-m",
        chat_template=tmp_path / "template",
        permit_special_tokens=True,
        api_keys=("a,b", '"', "[c"),
        api_key_file=tmp_path / "keys",
        ssl_certfile=tmp_path / "certificate",
        ssl_keyfile=tmp_path / "key",
        ssl_ca_certs=tmp_path / "authorities",
        queue_timeout_s=2.5,
        limit_mm_per_prompt=4,
        allowed_media_domains=("a.example", "b.example"),
    )
    assert _unchanged(engine, EngineOptions()) == {"device"}, "it goes with the torch executor only"
    assert _unchanged(edge, EdgeOptions()) == set()
    for name, value in edge_environment(edge).items():
        monkeypatch.setenv(name, value)
    given: list[RouterOptions] = []
    instead_of(monkeypatch, ROUTER, lambda options: given.append(options) or 0)
    main(capsys, monkeypatch, "router", "--controller", "h:1", *engine_arguments(engine), *edge_arguments(edge))
    assert [(options.engine, options.edge) for options in given] == [(engine, edge)]


def _unchanged(options: Any, untouched: Any) -> set[str]:
    return {name for name, value in asdict(untouched).items() if asdict(options)[name] == value}


# -- mistakes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("serv", "Did you mean 'serve'?"),
        ("config sho", "Did you mean 'show'?"),
        ("serve --prot 1", "--port"),
        ("serve --no-such-flag", "--no-such-flag"),
        ("serve --port", "--port"),
        ("serve --port http", "--port"),
        ("serve --port 99999", "--port: must be a port from 0 to 65535, not 99999"),
        ("serve --port 8001", "--admin-port: port 8001 is already --port"),
        ("serve oracle --executor oracle --encode 1", "--encode: is for images, and this model takes none"),
        ("worker --name w --controller h:1 --role encode --model oracle --executor oracle", "--role: 'encode' is for"),
        ("serve --limit-mm-per-prompt image=many", "--limit-mm-per-prompt: must be a whole number, image=N or"),
        ("serve --allowed-media-domains https://a", "--allowed-media-domains: must be a host's name"),
        ("serve --prefill 0", "--prefill"),
        ("serve --dtype float8", "float8"),
        ("serve --codec int7", "--codec: must be one of"),
        ("serve a b", "unexpected extra argument"),
        ("serve a --model b", "--model: is given twice, with different values"),
        ("serve --step-tokens 1 --max-num-batched-tokens 2", "--max-num-batched-tokens: is given twice"),
        ("serve --prefix-cache --no-enable-prefix-caching", "--enable-prefix-caching: is given twice"),
        ("serve --drain-timeout nan", "--drain-timeout: must be a number of seconds"),
        ("serve --drain-timeout-s soon", "--drain-timeout-s"),
        ("serve --queue-timeout 0", "--queue-timeout"),
        ("serve --ssl-keyfile KEY", "--ssl-keyfile: there is no file 'KEY'"),
        (
            "serve --ssl-certfile FILE --model oracle --executor paced",
            "--ssl-certfile: certificate and key cannot be read",
        ),
        ("serve --ssl-ca-certs FILE", "--ssl-certfile: is needed by"),
        ("serve --chat-template /no/such", "--chat-template: there is no file '/no/such'"),
        ("serve --api-key-file /no/such", "--api-key-file: there is no file '/no/such'"),
        ("serve --api-key-file FILE --port 0 --model oracle --executor paced", "--api-key-file: line 1: must be"),
        ("serve --model /no/such", "--model: "),
        ("serve --port TAKEN --model oracle --executor paced", "--port: cannot listen on 127.0.0.1:TAKEN"),
        ("serve --host no.such.host.invalid --model oracle --executor paced", "--port: cannot listen on"),
        ("serve --config /no/such", "/no/such: cannot be read: No such file or directory"),
        ("serve --config FILE", "FILE:1: unknown setting 'not a setting'"),
        ("config show --config FILE", "FILE:1: unknown setting 'not a setting'"),
        ("config schema nothing", "nothing"),
        ("router", "--controller: is needed"),
        ("router --controller nowhere", "--controller: must be host:port, not 'nowhere'"),
        ("worker --name w --controller h:1 --role decode --cores 0,x", "--cores"),
        ("worker --name w --controller h:1 --role judge", "judge"),
        ("worker --name w --controller h:1", "--role: is needed"),
        ("controller --listen nowhere", "--listen"),
        ("controller --listen 127.0.0.1:TAKEN", "--listen: cannot listen on 127.0.0.1:TAKEN"),
        ("methods int9", "there is no 'int9'; did you mean int8?"),
        ("chat --url ftp://h", "--url: must begin with http:// or https://"),
        ("bench serve --goodput fast", "--goodput: must be"),
        ("bench serve --num-prompts 0", "--num-prompts: must be at least 1"),
        ("bench serve --result-filename FILE/x", "--result-filename"),
        ("fit --quick --full", "--quick: cannot be given together with --full"),
        ("measure", "--text"),
        ("measure --text /no/such", "--text: there is no file '/no/such'"),
        ("measure --text FILE --levels x", "--levels: must be numbers"),
    ],
)
def test_a_mistake_is_explained_without_a_traceback(
    arguments: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("not a setting: 1\n")
    with listen("port", "127.0.0.1", 0) as taken:
        stands_for = {"FILE": str(file), "TAKEN": str(port_of(taken))}
        status, text = main(capsys, monkeypatch, *_with(arguments, stands_for).split())
    assert status == 2
    assert _with(words, stands_for) in text
    assert "Traceback" not in text


def _with(text: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(name, value)
    return text


def test_a_mistake_in_a_shared_variable_is_a_warning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIPTYCH_PROT", "1")
    instead_of(monkeypatch, SERVE, lambda options: 0)
    status, text = main(capsys, monkeypatch, "serve")
    assert status == 0
    assert text == "triptych: warning: TRIPTYCH_PROT is not a setting; did you mean TRIPTYCH_PORT?\n"


@pytest.mark.parametrize(
    ("raised", "status", "told"),
    [
        (Unavailable("nobody is there"), 1, "triptych: nobody is there\n"),
        (PermissionError(13, "Permission denied", "/root/x"), 2, "triptych: /root/x: Permission denied\n"),
    ],
)
def test_what_a_command_raises_is_told_by_its_status(
    raised: BaseException,
    status: int,
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def serve(options: ServeOptions) -> int:
        raise raised

    instead_of(monkeypatch, SERVE, serve)
    assert main(capsys, monkeypatch, "serve") == (status, told)


def test_a_bug_is_not_taken_for_a_mistake(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An OSError that names no file is nobody's who could read its line."""

    def serve(options: ServeOptions) -> int:
        raise OSError(24, "Too many open files")

    instead_of(monkeypatch, SERVE, serve)
    with pytest.raises(OSError, match="Too many"):
        main(capsys, monkeypatch, "serve")


@pytest.mark.parametrize("command", ["methods", "config show", "serve --help"])
def test_nobody_reading_is_no_error(command: str) -> None:
    ended = started(f"triptych {command} | true; exit ${{PIPESTATUS[0]}}")
    assert ended.stderr == ""
    assert ended.returncode in (0, 1)


@pytest.mark.parametrize("command", ["methods", "config schema", "--version", "serve --help"])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_full_disk_is_one_line(command: str, buffered: str) -> None:
    ended = started(f"triptych {command} > /dev/full", PYTHONUNBUFFERED=buffered)
    assert (ended.returncode, ended.stderr) == (1, "triptych: cannot write: No space left on device\n")


def test_nobody_reading_what_is_printed_last_is_no_error_either() -> None:
    """Python writes it at exit, and would complain then."""
    stand_in = (
        "import sys, types; sys.modules['deploy.local'] = types.SimpleNamespace(serve=lambda options: print(1) or 0)"
    )
    script = f"{stand_in}; sys.argv[1:] = ['serve']; import triptych.cli; triptych.cli.main()"
    ended = started(
        f"{shlex.quote(sys.executable)} -c {shlex.quote(script)} | true; exit ${{PIPESTATUS[0]}}", PYTHONUNBUFFERED=""
    )
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("where", ["within a command", "around it"])
def test_ctrl_c_ends_with_the_status_that_shells_know(
    where: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    if where == "around it":
        monkeypatch.setattr(cli, "app", interrupted)
    instead_of(monkeypatch, SERVE, interrupted)
    assert main(capsys, monkeypatch, "serve") == (128 + signal.SIGINT, "")


# -- config ------------------------------------------------------------------------------------------------------------
def test_config_shows_each_value_and_its_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "triptych.yaml"
    file.write_text("host: h\nport: 1\nprefill: 3\napi-key: sk-secret\n")
    monkeypatch.setenv("TRIPTYCH_PORT", "2")
    monkeypatch.setenv("TRIPTYCH_PREFILL", "4")
    status, text = run("config", "show", "--config", str(file), "--prefill", "5")
    lines = text.splitlines()
    assert status == 0
    assert {
        f"host: h  (file {file}:1)",
        "port: 2  (environment TRIPTYCH_PORT)",
        "prefill: 5  (flag)",
        "decode: 1  (default)",
        f"api-key: '***'  (file {file}:4)",
    } <= set(lines)
    assert len(lines) == len(settings_of(ServeOptions))


@pytest.mark.parametrize("form", ["", "--yaml", "--json"])
def test_config_never_shows_a_key(form: str) -> None:
    _, text = run("config", "show", "--api-key", "sk-secret", "--api-key", "sk-other", *form.split())
    assert "sk-" not in text
    assert "***" in text


def test_config_as_yaml_is_a_file_that_says_the_same(tmp_path: Path) -> None:
    template = tmp_path / "a template: #1"
    template.touch()
    flags = (
        *("--model", "yes", "--port", "9000", "--kl-budget", "1e-5", "--no-enable-prefix-caching", "--mixed", "1"),
        *("--chat-template", str(template), "--served-model-name", "été: [x] # 1", "--max-model-len", "128"),
    )
    file = tmp_path / "triptych.yaml"
    file.write_text(run("config", "show", "--yaml", *flags)[1])
    assert _values(run("config", "show", "--json", "--config", str(file))[1]) == _values(
        run("config", "show", "--json", *flags)[1]
    )
    again = run("config", "show", "--yaml", "--config", str(file))[1]
    assert yaml.safe_load(again) == yaml.safe_load(file.read_text())
    assert _values(run("config", "show", "--json", *flags)[1])["served-model-name"] == "été: [x] # 1"


def test_a_mask_does_not_become_a_key(tmp_path: Path) -> None:
    file = tmp_path / "triptych.yaml"
    file.write_text(run("config", "show", "--yaml", "--api-key", "sk-secret")[1])
    assert _values(run("config", "show", "--json", "--config", str(file))[1])["api-key"] == []


def _values(text: str) -> dict[str, Any]:
    return {name: each["value"] for name, each in json.loads(text).items()}


def test_config_schema_is_json() -> None:
    status, text = run("config", "schema", "router")
    assert status == 0
    assert "controller" in json.loads(text)["properties"]


# -- methods -----------------------------------------------------------------------------------------------------------
def test_methods_lists_every_plug_in() -> None:
    names = {("codec", name) for name in codecs.names()} | {("batching", name) for name in batchings.names()}
    listed = json.loads(run("methods", "--json")[1])
    assert {(each["kind"], each["name"]) for each in listed} == names
    assert all(each["loses"] and each["paper"] for each in listed)
    assert {tuple(line.split()[:2]) for line in run("methods")[1].splitlines()} == names


def test_a_methods_own_words_are_told() -> None:
    _, text = run("methods", "sarathi")
    assert "Stall-free" in text or "chunked prefill within a token budget" in text
    assert "arXiv 2403.02310" in text
