"""Run rungs of the test suite one after another, and end with one line: "N passed, N failed, N skipped".

    units    pure machines, codecs, arena: no process, no weights          (milliseconds each)
    cluster  whole clusters in virtual time, one process
    model    the default model's real weights
    procs    real processes on loopback
    slow     everything marked slow, from all of the above

Cheapest first, so that the first failure is the one that is cheapest to look at. A later rung runs also when an earlier
one failed. A rung without a single test counts as a failure: it means that a marker or a folder was renamed.
"""

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "build" / "tests"
NO_TESTS_COLLECTED = 5  # pytest's exit status

RUNGS = {
    "units": ["-m", "not (slow or model or procs)", "--ignore=tests/sim"],
    "cluster": ["-m", "not (slow or model or procs)", "tests/sim"],
    "model": ["-m", "model and not (slow or procs)"],
    "procs": ["-m", "procs and not slow"],
    "slow": ["-m", "slow"],
}


# Tensors of a few hundred numbers gain nothing from a second thread, and on a busy machine two threads that wait for
# each other at every operation take ten times as long. Where speed is the subject, threads are the test's business.
ENVIRONMENTS = {"units": {"OMP_NUM_THREADS": "1"}, "cluster": {"OMP_NUM_THREADS": "1"}}


@dataclass(frozen=True, slots=True)
class Result:
    rung: str
    passed: int
    failed: int
    skipped: int
    seconds: float


def run(rung: str, extra: list[str]) -> Result:
    """One pytest process. Its report file, not its text, is what is counted."""
    report = REPORTS / f"{rung}.xml"
    report.unlink(missing_ok=True)
    print(f"== {rung}", flush=True)
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *RUNGS[rung], *extra]
    environment = {**os.environ, **ENVIRONMENTS.get(rung, {})}
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    passed, failed, skipped = count(report)
    # With -k and the like an empty rung is expected; without, it is a mistake. Crashes leave no report.
    if failed == 0 and status not in ((0, NO_TESTS_COLLECTED) if extra else (0,)):
        failed = 1
    return Result(rung, passed, failed, skipped, time.monotonic() - started)


def count(report: Path) -> tuple[int, int, int]:
    """(passed, failed, skipped) of a JUnit report; all zero if there is none."""
    if not report.exists():
        return 0, 0, 0
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    tests, failed, skipped = 0, 0, 0
    for suite in suites:
        tests += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0))
    return tests - failed - skipped, failed, skipped


def main(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    rungs, extra = arguments[:split], arguments[split + 1 :]
    unknown = [rung for rung in rungs if rung not in RUNGS]
    if unknown or not rungs:
        print(f"usage: test.py RUNG... [-- PYTEST OPTION...]   rungs: {' '.join(RUNGS)}", file=sys.stderr)
        return 2
    REPORTS.mkdir(parents=True, exist_ok=True)
    results = [run(rung, extra) for rung in rungs]
    print()
    for result in results:
        print(f"{result.rung:<8} {result.seconds:6.1f} s  {result.passed:5} passed {result.failed:3} failed")
    passed, failed, skipped = (sum(getattr(r, name) for r in results) for name in ("passed", "failed", "skipped"))
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
