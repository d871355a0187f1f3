"""Settings of a worker's process. They are the process's, so each is tried in a process of its own."""

import subprocess
import sys

import pytest

MODULE = "from control_plane.agent.tuning import *; import gc, os, sys, threading, time; "


def run(script: str) -> str:
    ended = subprocess.run([sys.executable, "-c", MODULE + script], capture_output=True, text=True, timeout=20)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted for glibc")
def test_a_freed_frame_is_recycled_without_page_faults() -> None:
    script = (
        "import resource; faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt;"
        "pair = lambda _: len(bytes(800_000) + bytes(800_000)); pair(0);"
        "before = faults(); list(map(pair, range(50))); print(faults() - before)"
    )
    assert (
        int(run("keep_freed_memory(); " + script)) < 400
    )  # less than one pair's pages; without, all of them each time


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_the_loop_leaves_the_engines_core_unless_it_is_the_only_one() -> None:
    assert run("a = os.sched_getaffinity(0); leave_to_engine(a); print(os.sched_getaffinity(0) == a)") == "True\n"
    script = (
        "a = sorted(os.sched_getaffinity(0)); leave_to_engine(a[:1]); print(os.sched_getaffinity(0) == set(a[1:] or a))"
    )
    assert run(script) == "True\n"


def test_what_was_loaded_is_no_longer_searched_for_garbage() -> None:
    assert (
        run("loaded = [[] for _ in range(5000)]; exempt_from_collection(); print(len(gc.get_objects()) < 5000)")
        == "True\n"
    )


def test_threads_take_turns_often() -> None:
    assert float(run("settle_interpreter(); print(sys.getswitchinterval())")) == pytest.approx(SWITCH_INTERVAL_S)


SWITCH_INTERVAL_S = 0.0005
