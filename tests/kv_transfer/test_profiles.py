"""Packaged profiles: found by the model's fingerprint, and what is packaged is what its name says."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save as serialize

from engine.base.errors import InvalidArgument
from kv_transfer.codecs import codecs
from kv_transfer.profile import Point, Profile, Tables, load, save
from kv_transfer.profiles import FOLDER, packaged
from triptych.profile import default_texts

FILE_BYTES_MAX = 4 << 20


def test_it_is_found_by_its_model_and_not_by_its_name(tmp_path: Path) -> None:
    for name, model in (("a", "first"), ("b", "second")):
        save(Profile(model=model, tables={"x": Tables({"array": np.arange(3)})}), tmp_path / f"{name}.safetensors")
    found = packaged("second", tmp_path)
    assert found is not None and found.model == "second"
    assert packaged("third", tmp_path) is None


def test_packaged_profiles_are_small_and_whole() -> None:
    paths = list(FOLDER.glob("*.safetensors"))
    assert paths
    for path in paths:
        assert path.stat().st_size <= FILE_BYTES_MAX
        profile = load(path)
        assert packaged(profile.model) is not None and profile.tables


def test_the_packaged_profile_is_of_the_texts_and_levels_that_are_here() -> None:
    """Else nobody could make it again, and curves would be of levels that no codec has."""
    (profile,) = map(load, FOLDER.glob("*.safetensors"))
    digests = {file.stem: hashlib.sha256(file.read_bytes()).hexdigest()[:32] for file in default_texts()}
    assert dict(profile.texts) == digests
    for name, points in profile.curves.items():
        assert [point.level for point in points] == list(codecs.get(name).levels)


@pytest.mark.parametrize(
    "change",
    [
        {"kl": float("nan")},
        {"kl": "0.1"},
        {"bits_per_element": 0.0},
        {"bits_per_element": float("inf")},
        {"level": -1},
        {"level": "1"},
        {"kinds": None},
    ],
)
def test_a_point_that_no_worker_could_tell_others_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    point = Point(level=0, bits_per_element=4.0, kl=0.01, ppl_change=0.0, encode_mb_s=1.0, decode_mb_s=1.0)
    save(Profile(model="m", curves={"int4": [point]}), good := tmp_path / "good.safetensors")
    assert load(good).curves["int4"] == (point,)
    with safe_open(good, framework="numpy") as file:
        document = json.loads(file.metadata()["triptych"])
    document["curves"]["int4"][0] |= change
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(serialize({}, metadata={"triptych": json.dumps(document)}))
    with pytest.raises(InvalidArgument, match=r"bad\.safetensors"):
        load(bad)
