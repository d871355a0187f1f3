"""Free memory is what the kernel would give, not what lies idle, and never more than the container may have."""

from pathlib import Path

import pytest

from control_plane.agent.memory import free_bytes

MEMINFO = "MemTotal:       16000 kB\nMemFree:          500 kB\nMemAvailable:    8000 kB\n"
AVAILABLE_BYTES = 8_000 << 10


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, AVAILABLE_BYTES),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "4096\n"}, 4_096),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, AVAILABLE_BYTES),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n"}, AVAILABLE_BYTES),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "4096\n"}, 4_096),
        ({"proc/self/cgroup": "4:memory:/a\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "4096\n"}, 4_096),
        ({"proc/self/cgroup": "9:cpu:/\n1:name=systemd:/x:y\n"}, AVAILABLE_BYTES),
    ],
)
def test_the_smallest_limit_counts(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert free_bytes(write(tmp_path, files)) == expected


def test_a_kernel_that_says_nothing_is_asked_otherwise(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) > 0
