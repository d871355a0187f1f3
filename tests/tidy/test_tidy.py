"""What a linter cannot see about the repository: words, files and habits that must not creep in.

Each test prints every offender with its place. An exception to a rule is a line in a table here, with its reason.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "engine",
    "kv_transfer",
    "encode_worker",
    "prefill_worker",
    "decode_worker",
    "control_plane",
    "deploy",
    "triptych",
)
CODE = (*PACKAGES, "bench", "scripts", "tests")
TEXT_SUFFIXES = {"", ".cfg", ".json", ".md", ".proto", ".py", ".pyi", ".sh", ".toml", ".txt", ".yaml", ".yml"}

# Modules that *are* the clock, the dice or the process (DESIGN 3: hosts and drivers); everything else is handed values.
HOSTS_AND_DRIVERS = (
    "engine/base/asyncio_host.py",
    "engine/models/checkpoint.py",  # converts at installation, waiting for another process that does the same
    "engine/thread.py",
    "kv_transfer/measure.py",  # CPU time is what it measures
    "kv_transfer/transports/grpc.py",
    "control_plane/*/server.py",
    "control_plane/agent/process.py",
    "control_plane/router/text/chat_template.py",  # a template that does not end is found out by the clock
    "control_plane/router/edge.py",
    "control_plane/router/http/app.py",
    "control_plane/router/media/fetch.py",  # gives others their turn between two pieces that came together
    "control_plane/router/metrics.py",
    "control_plane/router/grpc/inference_service.py",
    "deploy/*.py",
    "triptych/*.py",
    "triptych/load/*.py",
)
CLOCKS_AND_DICE = re.compile(
    r"time\.(time|monotonic|perf_counter|process_time|sleep)(_ns)?"
    r"|asyncio\.sleep"
    r"|datetime\.(datetime\.)?(now|utcnow|today)"
    r"|uuid\.uuid[14]"
    r"|secrets\.\w+|os\.urandom"
    r"|random\.(?!Random$)\w+"  # the module's shared generator; a seeded Random is a value
)
# Each of these can run code that the sender chose (DESIGN 2.5).
CODE_FROM_BYTES = re.compile(
    r"(c?pickle|dill|marshal|shelve|joblib)\.\w+|torch\.(load|jit\.load)|numpy\.load|eval|exec|__import__"
)
# Folders whose modules a registry finds by scanning; nothing imports them by name.
PLUGIN_FOLDERS = (
    "engine/batching",
    "kv_transfer/codecs",
    "prefill_worker/retention",
)
# The twins that make virtual time possible: what runs on them is outside the packages.
FOR_TESTS_AND_PLANNING = {
    "engine/virtual.py",
    "kv_transfer/transports/memory.py",
}
PROGRAMS = {"control_plane/router/media/child.py"}  # started by name, in a process of their own


def walk(*folders: str) -> Iterator[Path]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not re.search(r"_pb2(_grpc)?\.py$|__pycache__", str(path)):
                yield path


def texts() -> Iterator[Path]:
    """Every text file that belongs to the repository."""
    skipped = {"build", "dist", "__pycache__"}
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part != ".ci" for part in parts[:-1])
        if not hidden and not skipped & set(parts) and path.is_file() and path.suffix in TEXT_SUFFIXES:
            yield path


def place(path: Path, line: int | None = None) -> str:
    return f"{path.relative_to(ROOT)}" + (f":{line}" if line else "")


def names_used(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Builtins and imported names with aliases resolved: after `from time import sleep as nap`, `nap` is time.sleep."""
    full: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                full |= {alias.asname: alias.name} if alias.asname else {first: first}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            full |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            root, dot, rest = ast.unparse(node).partition(".")
            if root in full or not dot:  # an attribute of a local value is not a module's function
                yield full.get(root, root) + dot + rest, node.lineno


def uses(pattern: re.Pattern[str], path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    return [f"{place(path, line)} {name}" for name, line in names_used(tree) if pattern.fullmatch(name)]


def expect_none(offenders: Iterable[str]) -> None:
    if found := list(offenders):
        pytest.fail("\n  ".join(["against the rule:", *found]), pytrace=False)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_only_hosts_and_drivers_know_the_time_or_roll_dice() -> None:
    policy = (path for path in walk(*PACKAGES) if not any(path.match(str(ROOT / glob)) for glob in HOSTS_AND_DRIVERS))
    expect_none(use for path in policy for use in uses(CLOCKS_AND_DICE, path))


def test_nothing_turns_received_bytes_into_code() -> None:
    expect_none(use for path in walk(*PACKAGES) for use in uses(CODE_FROM_BYTES, path))


def test_parsers_of_received_bytes_look_nothing_up_by_a_received_name() -> None:
    offenders = []
    for path in walk(*PACKAGES):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and function.name.endswith("_untrusted"):
                offenders += [
                    f"{place(path, name.lineno)} {name.id}"
                    for name in ast.walk(function)
                    if isinstance(name, ast.Name) and name.id in {"getattr", "globals", "vars", "locals"}
                ]
    expect_none(offenders)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import time\ntime.sleep(1)", "time.sleep"),
        ("from time import monotonic_ns as now\nnow()", "time.monotonic_ns"),
        ("import time as t\nt.perf_counter()", "time.perf_counter"),
        ("import random\nrandom.random()", "random.random"),
        ("from uuid import uuid4\nuuid4()", "uuid.uuid4"),
        ("import random\nrandom.Random(7)", None),
        ("def f(random):\n    return random.random()", None),
        ("def f(now_us):\n    return now_us", None),
    ],
)
def test_the_clock_lint_sees_through_imports(source: str, found: str | None) -> None:
    names = {name for name, _ in names_used(ast.parse(source)) if CLOCKS_AND_DICE.fullmatch(name)}
    assert names == ({found} if found else set())


def test_modules_open_with_what_they_are_for() -> None:
    trees = ((path, ast.parse(path.read_text())) for path in walk(*CODE))
    expect_none(place(path) for path, tree in trees if tree.body and not ast.get_docstring(tree))


def test_every_module_is_used() -> None:
    """Imported by some module that is not a test, found by a registry, or run as a command."""
    imported = {"triptych.cli"}
    for path in walk(*PACKAGES, "bench", "scripts"):
        package = module_name(path if path.name == "__init__.py" else path.parent)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = node.module or package
                imported |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    found_by_scan = {ROOT / folder for folder in PLUGIN_FOLDERS}
    modules = (path for path in walk(*PACKAGES) if path.stem not in {"__init__", "__main__"})
    unused = {place(p) for p in modules if p.parent not in found_by_scan and module_name(p) not in imported}
    expect_none(sorted(unused - FOR_TESTS_AND_PLANNING - PROGRAMS))


@pytest.mark.parametrize("process", ["control_plane.router.server", "control_plane.controller.server", "deploy.local"])
def test_light_processes_start_without_torch_and_without_what_looks_into_images(process: str) -> None:
    """What import-linter cannot tell: whether an import inside a function runs when the process starts."""
    script = f"import sys, {process}; sys.exit(' '.join(sys.modules.keys() & {{'torch', 'PIL'}}))"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=15)
    assert ended.stderr.strip() == "", f"{process} imports {ended.stderr}"


@pytest.mark.parametrize("folder", PLUGIN_FOLDERS)
def test_every_plug_in_has_a_test_of_its_own(folder: str) -> None:
    plug_ins = (path for path in walk(folder) if re.search(r"^@.*\bregister\(", path.read_text(), re.M))
    tests = ROOT / "tests" / folder
    expect_none(place(path) for path in plug_ins if not (tests / f"test_{path.stem}.py").exists())


def test_no_unfinished_business() -> None:
    pattern = re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX)\b")
    expect_none(matches(pattern))


def test_no_registry_is_named() -> None:
    """Where packages come from is the business of the machine's pip, npm or apt configuration."""
    pattern = re.compile(r"pypi\." r"org|python" r"hosted|download\." r"pytorch|npmjs\." r"(org|com)|deb\." r"debian")
    expect_none(matches(pattern))


def matches(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{place(path, number)} {line.strip()}"
        for path in texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]


def test_a_markdown_file_has_one_title() -> None:
    offenders = []
    for path in (path for path in texts() if path.suffix == ".md"):
        prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        if len(re.findall(r"^# ", prose, flags=re.MULTILINE)) != 1:
            offenders.append(place(path))
    expect_none(offenders)
