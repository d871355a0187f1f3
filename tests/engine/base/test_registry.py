"""Registry: one new file is found without an edit; names never win silently; nothing unselected is imported."""

import re
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from engine.base import registry as registry_module
from engine.base.errors import NotFound
from engine.base.registry import Registry

GROUP = "triptych.dish"
HEAD = '''
"""Dishes."""
from engine.base.registry import Registry
dishes = Registry("{package}", kind="dish", group="triptych.dish")
'''
PLUGIN = '''
"""A dish."""
from {package} import dishes
@dishes.register("{name}")
class Dish:
    taste = "{name}"
'''

Kitchen = Callable[..., Registry[Any]]


@pytest.fixture
def kitchen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Kitchen:
    """Build a package of plug-ins on disk, and pretend that some entry points are installed."""
    package = "kitchen_" + re.sub(r"\W", "_", request.node.name)  # sys.modules outlives a test

    def build(*files: tuple[str, str], installed: tuple[EntryPoint, ...] = ()) -> Registry[Any]:
        folder = tmp_path / package
        folder.mkdir()
        (folder / "__init__.py").write_text(HEAD.format(package=package))
        (folder / "helpers.py").write_text('"""Registers nothing."""\n')
        for file, name in files:
            (folder / f"{file}.py").write_text(PLUGIN.format(package=package, name=name))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(
            registry_module, "entry_points", lambda *, group: [point for point in installed if point.group == group]
        )
        return __import__(package).dishes

    return build


def entry_point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name=name, value=value, group=GROUP)


def test_a_new_file_is_found_without_an_edit(kitchen: Kitchen) -> None:
    dishes = kitchen(("soup", "soup"), ("stew", "stew"))
    assert dishes.names() == ("soup", "stew")
    assert dishes.get("stew").taste == "stew"
    assert "soup" in dishes and "cake" not in dishes


def test_nothing_is_imported_before_names_are_asked_for(kitchen: Kitchen) -> None:
    dishes = kitchen(("soup", "soup"))
    module = f"{dishes._package}.soup"
    assert module not in sys.modules
    dishes.names()
    assert module in sys.modules


def test_two_files_with_one_name_are_refused(kitchen: Kitchen) -> None:
    dishes = kitchen(("soup", "soup"), ("broth", "soup"))
    with pytest.raises(ValueError, match=r"two dishs are named 'soup': .*\.broth\.Dish and .*\.soup\.Dish"):
        dishes.names()


def test_an_unknown_name_says_what_is_known_and_what_is_near(kitchen: Kitchen) -> None:
    dishes = kitchen(("soup", "soup"), ("stew", "stew"))
    with pytest.raises(NotFound, match=r"unknown dish 'soop'; did you mean 'soup'\? \(known: soup, stew\)") as caught:
        dishes.get("soop")
    assert caught.value.field == "dish"
    with pytest.raises(NotFound, match=r"unknown dish 'zzz' \(known: soup, stew\)"):
        dishes.get("zzz")


def test_an_entry_point_is_imported_only_when_it_is_selected(kitchen: Kitchen) -> None:
    broken, good = entry_point("broken", "no_such_module:Dish"), entry_point("sum", "builtins:sum")
    foreign = EntryPoint(name="other", value="no_such_module:Other", group="another.group")
    dishes = kitchen(("soup", "soup"), installed=(broken, good, foreign))
    assert dishes.names() == ("broken", "soup", "sum")
    assert dishes.get("sum") is sum
    with pytest.raises(ModuleNotFoundError):
        dishes.get("broken")


def test_an_entry_point_may_register_itself_while_it_is_imported(
    kitchen: Kitchen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dishes = kitchen(("soup", "soup"), installed=(entry_point("cake", "bakery_apart:Dish"),))
    (tmp_path / "bakery_apart.py").write_text(PLUGIN.format(package=dishes._package, name="cake"))
    assert dishes.names() == ("cake", "soup")
    assert dishes.get("cake") is dishes.get("cake")
    assert dishes.get("cake").taste == "cake"


def test_an_entry_point_whose_module_was_imported_earlier_is_the_same_plugin(kitchen: Kitchen, tmp_path: Path) -> None:
    dishes = kitchen(installed=(entry_point("cake", "bakery_early:Dish"),))
    (tmp_path / "bakery_early.py").write_text(PLUGIN.format(package=dishes._package, name="cake"))
    early = __import__("bakery_early").Dish
    assert dishes.get("cake") is early


@pytest.mark.parametrize(
    "installed",
    [
        (entry_point("soup", "builtins:sum"),),
        (entry_point("cake", "builtins:sum"), entry_point("cake", "builtins:max")),
    ],
)
def test_an_entry_point_cannot_take_a_name_that_is_taken(kitchen: Kitchen, installed: tuple[EntryPoint, ...]) -> None:
    with pytest.raises(ValueError, match="two dishs are named"):
        kitchen(("soup", "soup"), installed=installed).names()


def test_an_entry_point_that_two_paths_list_is_one(kitchen: Kitchen) -> None:
    twice = entry_point("sum", "builtins:sum")
    assert kitchen(installed=(twice, twice)).names() == ("sum",)
