"""Which codecs a worker has: those of its model's profile, and a mistake is a sentence before anything starts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pytest

from control_plane.codec_choice import choose_codecs, choose_profile, travels_raw
from control_plane.options import EngineOptions, OptionError
from engine.base.errors import InvalidArgument
from engine.kv.schema import CacheSchema, Stream
from kv_transfer.codecs import CodecSet, codecs
from kv_transfer.profile import Point, Profile, Tables, save

SCHEMA = CacheSchema("fingerprint-of-m", (Stream(name="kv", layers=2, heads=1, head_dim=8, dtype="bfloat16"),))
TABLES = Tables({"basis": np.eye(8, dtype=np.float32)}, {"step": 0.5})


class Fitted:
    """A codec as far as a choice looks at it."""

    profiled: ClassVar[bool] = True
    lossless: ClassVar[bool] = False
    dtypes: ClassVar[frozenset[str]] = frozenset({"bfloat16"})
    levels: ClassVar[tuple[int, ...]] = (0, 1)

    def __init__(self, tables: Tables, stream: Stream) -> None:
        if tables.arrays["basis"].shape != (stream.head_dim, stream.head_dim):
            raise InvalidArgument("fitted: its basis is of another shape", field="profile")


class Elsewhere(Fitted):
    profiled = False
    dtypes = frozenset({"float32"})


@pytest.fixture(autouse=True)
def fitted() -> Iterator[None]:
    codecs.names()  # the package's own are found first
    with patch.dict(codecs._registered, {"fitted": Fitted}):
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "m.safetensors")


def written(path: Path, **changes: Any) -> Path:
    save(Profile(**{"model": SCHEMA.model, "tables": {"fitted": TABLES}} | changes), path)
    return path


def refusal(options: EngineOptions) -> tuple[str, str]:
    with pytest.raises(OptionError) as caught:
        choose_codecs(options, SCHEMA)
    return caught.value.option, str(caught.value)


def test_without_a_profile_only_codecs_that_need_none_are_there() -> None:
    names = choose_codecs(EngineOptions(), SCHEMA).names()
    assert {"raw", "int8"} <= set(names) and "fitted" not in names


def test_a_profile_brings_its_codecs(path: Path) -> None:
    chosen = choose_codecs(EngineOptions(codec="fitted", profile=path), SCHEMA)
    assert chosen.digest("fitted") == TABLES.digest
    assert chosen.profile is not None and chosen.profile.model == SCHEMA.model


@pytest.mark.parametrize("tables", [None, {}])
def test_a_codec_without_tables_cannot_be_the_deployments(tmp_path: Path, tables: dict[str, Tables] | None) -> None:
    profile = None if tables is None else written(tmp_path / "empty", tables=tables)
    option, text = refusal(EngineOptions(model="some/model", codec="fitted", profile=profile))
    assert option == "codec" and "`triptych profile some/model`" in text


def test_a_profile_of_another_model_is_refused_and_both_are_named(tmp_path: Path) -> None:
    profile = written(tmp_path / "x", model="fingerprint-of-x")
    option, text = refusal(EngineOptions(profile=profile))
    assert option == "profile" and "fingerprint-of-x" in text and "fingerprint-of-m" in text


def test_a_profile_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    for name in ("text", "missing"):
        option, text = refusal(EngineOptions(profile=tmp_path / name))
        assert option == "profile" and name in text


def test_tables_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    tables = {"fitted": Tables({"basis": np.eye(4, dtype=np.float32)})}
    option, text = refusal(EngineOptions(profile=written(tmp_path / "x", tables=tables)))
    assert (option, text) == ("profile", "fitted: its basis is of another shape")


@pytest.mark.parametrize(
    ("options", "kl", "expected"),
    [
        ({"codec": "raw"}, None, False),
        ({"codec": "auto", "kl_budget": 0.0}, None, False),  # nobody is surprised
        ({"codec": "int8"}, None, False),
        ({"codec": "int8", "kl_budget": 0.5}, None, True),  # not known to be kept
        ({"codec": "int8", "kl_budget": 0.5}, 0.4, False),
        ({"codec": "int8"}, 0.4, True),
        ({"codec": "elsewhere"}, None, True),
    ],
)
def test_a_codec_that_would_never_be_used_is_known_at_start(
    options: dict[str, Any], kl: float | None, expected: bool
) -> None:
    points = [Point(level=0, bits_per_element=8.5, kl=kl or 0.0, ppl_change=0, encode_mb_s=1, decode_mb_s=1)]
    profile = None if kl is None else Profile(model=SCHEMA.model, curves={"int8": points})
    with patch.dict(codecs._registered, {"elsewhere": Elsewhere}):
        assert travels_raw(EngineOptions(**options), CodecSet(SCHEMA.kv, profile)) == expected


def test_auto_needs_no_profile() -> None:
    assert choose_profile(EngineOptions(codec="auto"), SCHEMA) is None
