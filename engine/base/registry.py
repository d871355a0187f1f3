"""Registry: finds plug-ins by looking into a folder, so that adding one is one file and its test, with no other edit.

    codecs: Registry[type[Codec]] = Registry("kv_transfer.codecs", kind="codec", group="triptych.codec")

    @codecs.register("int8")        in kv_transfer/codecs/int8.py
    class Int8: ...

    codecs.names()                  ("int8", "raw", ...): the package is imported now, not earlier
    codecs.get("int8")              Int8

Plug-ins of other distributions are *entry points* of the group. Their names are listed without importing them; one is
imported when it is asked for by name, so an installed plug-in that nobody selects costs nothing and breaks nothing.

A registry is filled by imports and never emptied: it is a view of what is installed, the same at any time and in any
thread, which is why one per package may live in a module. Whatever has settings or state is made from what `get`
returns, by whoever needs it, and is never kept here.
"""

import pkgutil
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, cast

from engine.base.errors import NotFound

T = TypeVar("T")
Plugin = TypeVar("Plugin")


class Registry(Generic[T]):
    """The plug-ins of one kind, by name. `T` is what `get` returns, usually `type[SomeProtocol]`."""

    def __init__(self, package: str, *, kind: str, group: str) -> None:
        self._package = package
        self._kind = kind
        self._group = group
        self._registered: dict[str, T] = {}
        self._foreign: dict[str, EntryPoint] = {}  # listed here, imported by `get`
        self._scanned = False

    def register(self, name: str) -> Callable[[Plugin], Plugin]:
        """Class decorator. That the class keeps the kind's contract is checked by the contract tests, not here."""

        def add(plugin: Plugin) -> Plugin:
            if name in self._registered:
                raise self._duplicate(name, _origin(self._registered[name]), _origin(plugin))
            self._registered[name] = cast("T", plugin)
            return plugin

        return add

    def names(self) -> tuple[str, ...]:
        """Every known name, sorted: the package's own and the installed entry points'."""
        if not self._scanned:
            self._scan()
        return tuple(sorted({*self._registered, *self._foreign}))

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def get(self, name: str) -> T:
        if name not in self.names():
            raise NotFound(self._unknown(name), field=self._kind)
        if name not in self._registered:
            self._load(self._foreign[name])
        return self._registered[name]

    def _scan(self) -> None:
        """Import the package's modules and list the group's entry points. Twice, in two threads, is harmless."""
        package = import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            import_module(f"{self._package}.{module.name}")
        for entry_point in entry_points(group=self._group):
            self._list(entry_point)
        self._scanned = True

    def _list(self, entry_point: EntryPoint) -> None:
        """A name that two plug-ins claim is an error now: a silent winner would decide what bytes mean."""
        name = entry_point.name
        listed = self._foreign.setdefault(name, entry_point)
        if listed != entry_point:
            raise self._duplicate(name, listed.value, entry_point.value)
        if name in self._registered and not _same_package(self._registered[name], entry_point):
            raise self._duplicate(name, _origin(self._registered[name]), entry_point.value)

    def _load(self, entry_point: EntryPoint) -> None:
        """Its module may register itself with the decorator, or leave that to us."""
        plugin = entry_point.load()
        self._registered.setdefault(entry_point.name, plugin)

    def _duplicate(self, name: str, first: str, second: str) -> ValueError:
        return ValueError(f"two {self._kind}s are named {name!r}: {first} and {second}")

    def _unknown(self, name: str) -> str:
        near = get_close_matches(name, self.names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown {self._kind} {name!r}{hint} (known: {', '.join(self.names()) or 'none'})"


def _origin(plugin: object) -> str:
    return f"{getattr(plugin, '__module__', '?')}.{getattr(plugin, '__qualname__', repr(plugin))}"


def _same_package(plugin: object, entry_point: EntryPoint) -> bool:
    """The entry point's module was imported earlier, by somebody else, and registered itself then."""
    return _origin(plugin).partition(".")[0] == entry_point.module.partition(".")[0]
