"""Kernels: compiled from plain functions, kept on disk, and importable without numba."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.base import jit
from engine.base.jit import compiled, inlined


@inlined
def twice(number: int) -> int:
    return number * 2


@inlined
def four_times(number: int) -> int:
    return twice(twice(number))


def total(numbers: np.ndarray) -> int:
    result = 0
    for index in range(numbers.shape[0]):
        result += four_times(numbers[index])
    return result


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    jit._cache_dir.cache_clear()
    yield tmp_path
    jit._cache_dir.cache_clear()


def test_kernels_call_primitives_that_call_primitives_and_python_does_too(cache: Path) -> None:
    assert compiled(total)(np.arange(10)) == 180
    assert four_times(3) == 12


def test_what_was_compiled_is_loaded_again(cache: Path) -> None:
    first, second = compiled(total), compiled(total)
    first(np.arange(3))
    second(np.arange(3))
    assert sum(first.stats.cache_misses.values()) == 1  # type: ignore[attr-defined]
    assert sum(second.stats.cache_hits.values()) == 1  # type: ignore[attr-defined]
    assert list(cache.rglob("*.nbi"))


def test_the_folder_differs_by_package_version(cache: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "primitives.py").write_text("one = 1")
    before = jit._cache_dir(package)
    (package / "primitives.py").write_text("one = 2")
    jit._cache_dir.cache_clear()
    assert jit._cache_dir(package) != before


def test_the_configuration_that_numba_reads_is_left_as_it_was(cache: Path) -> None:
    import numba

    before = numba.config.CACHE_DIR
    compiled(total)
    assert before == numba.config.CACHE_DIR


def test_a_machine_without_a_writable_folder_compiles_anyway(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = jit._jit

    def read_only(function: jit.Kernel, **options: object) -> jit.Kernel:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(function, **options)

    monkeypatch.setattr(jit, "_jit", read_only)
    assert compiled(total)(np.arange(3)) == 12


def test_dividing_by_zero_is_ieee_and_nan_is_not_optimised_away(cache: Path) -> None:
    def ratios(numbers: np.ndarray) -> bool:
        return np.isnan(numbers[0] / numbers[1])

    assert compiled(ratios)(np.zeros(2))


def test_listing_codecs_loads_no_numba() -> None:
    script = "import sys; from kv_transfer.codecs import codecs; codecs.names(); assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
