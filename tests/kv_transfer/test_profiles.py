"""Packaged profiles: found by the model's fingerprint, and what is packaged is what its name says."""

from pathlib import Path

import numpy as np

from kv_transfer.profile import Profile, Tables, load, save
from kv_transfer.profiles import FOLDER, packaged

FILE_BYTES_MAX = 4 << 20


def test_it_is_found_by_its_model_and_not_by_its_name(tmp_path: Path) -> None:
    for name, model in (("a", "first"), ("b", "second")):
        save(Profile(model=model, tables={"x": Tables({"array": np.arange(3)})}), tmp_path / f"{name}.safetensors")
    found = packaged("second", tmp_path)
    assert found is not None and found.model == "second"
    assert packaged("third", tmp_path) is None


def test_packaged_profiles_are_small_and_whole() -> None:
    for path in FOLDER.glob("*.safetensors"):
        assert path.stat().st_size <= FILE_BYTES_MAX
        profile = load(path)
        assert packaged(profile.model) is not None and profile.tables
