"""How much memory this process may still take: the kernel's estimate, and the limit of its container.

Not here: which share of it a worker takes.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

_AVAILABLE = re.compile(r"^MemAvailable:\s+(\d+) kB$", re.MULTILINE)


def free_bytes(root: Path = Path("/")) -> int:
    """`root` is where /proc and /sys are, for tests."""
    return min((_available_bytes(root), *_cgroup_limits_bytes(root)))


def _available_bytes(root: Path) -> int:
    """What could be had without swapping, caches that would be given up included; free pages alone are far less."""
    found = _AVAILABLE.search(_read(root / "proc/meminfo"))
    if found:
        return int(found[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_limits_bytes(root: Path) -> Iterator[int]:
    """The limits of our own group and of every group around it; inside a container its own looks like the root."""
    cgroup = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # version 2: one tree
            yield from _limits_bytes(cgroup, group, "memory.max")
        elif "memory" in controllers.split(","):  # version 1: a tree of its own
            yield from _limits_bytes(cgroup / "memory", group, "memory.limit_in_bytes")


def _limits_bytes(tree: Path, group: str, file: str) -> Iterator[int]:
    folder = tree / group.lstrip("/")
    for level in (folder, *folder.parents):
        text = _read(level / file).strip()
        if text.isdecimal():  # "max": no limit here
            yield int(text)
        if level == tree:
            return


def _read(path: Path) -> str:
    """Nothing for what this kernel or container does not show."""
    try:
        return path.read_text()
    except OSError:
        return ""
