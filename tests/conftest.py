"""What every test may use or is held to: no task outlives its test, hypothesis has no clock, real weights load once.

Helpers for one package live beside its tests, not here.
"""

import asyncio
import contextlib
import inspect
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from control_plane.addresses import hold, port_of

GRPC_ENDS_CALLS_WITHIN_S = 2.0  # its own tasks wait for its own thread, on a busy machine for more than some turns
LOOP_TURNS_TO_END = 8  # a cancelled task needs a few turns of the loop for its `finally` blocks

# A deadline would make a test depend on how busy the machine is. CI repeats the same examples on each run; at home new
# ones are tried, and failing ones are remembered in .hypothesis.
hypothesis.settings.register_profile("home", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "home")


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Commands that a test runs in this process set up its log; nobody after them shall pay for lines that he does not
    want: a refusal costs a tenth of its line."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests on a machine without one; torch is imported only if there is such a test."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_accelerator():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no accelerator"))


def _has_accelerator() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _tasks_have_owners(request: pytest.FixtureRequest) -> None:
    """Every task an owner (DESIGN 2.4): an asyncio test that leaves one running fails, and names it."""
    if inspect.iscoroutinefunction(getattr(request, "function", None)):
        request.getfixturevalue("no_task_left")


@pytest.fixture(autouse=True)
def _columns_are_conserved(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Promise I3, after every test: whatever engine it made, no column is lost and none has two owners."""
    from engine.core import EngineCore

    made: list[EngineCore] = []
    initialise = EngineCore.__init__

    def remember(core: EngineCore, *args: Any, **kwargs: Any) -> None:
        initialise(core, *args, **kwargs)
        made.append(core)

    monkeypatch.setattr(EngineCore, "__init__", remember)
    yield
    for core in made:
        core.check_integrity()


@pytest.fixture
async def no_task_left() -> AsyncIterator[None]:
    """Set up before the test's own fixtures, so checked after they are gone."""
    before = asyncio.all_tasks()
    yield
    for _ in range(LOOP_TURNS_TO_END):
        await asyncio.sleep(0)
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    of_grpc = {task for task in left if type(task.get_coro()).__module__.startswith("_cython")}
    if of_grpc:
        await asyncio.wait(of_grpc, timeout=GRPC_ENDS_CALLS_WITHIN_S)
        left = {task for task in left if not task.done()}
    if left:
        pytest.fail(f"tasks left running: {sorted(str(task.get_coro()) for task in left)}")


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The default model as a checkpoint directory. For tests marked `model`."""
    from engine.models.checkpoint import ensure_default_model

    return Path(ensure_default_model())


@pytest.fixture
def free_port() -> Iterator[Callable[[], int]]:
    """A function that gives TCP ports on loopback which nobody uses now, a different one at each call: they are held
    until the test ends, and the server under test can bind them all the same."""
    with contextlib.ExitStack() as held:
        yield lambda: port_of(held.enter_context(hold("port", "127.0.0.1", 0)))
