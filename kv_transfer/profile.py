"""Profile: what was measured once for one model. Each codec's tables, and what each of its levels costs in bits and KL.

    profile file    safetensors: one JSON text (model, settings, curves) and arrays named "<codec>.<array>"

A profile is an operator's file, read at start; no frame ever carries one. Frames carry the *digest* of the tables that
they were encoded with (`Tables.digest`), so that two workers with different profiles refuse each other's frames
instead of decoding them to something else. Curves and rates are not in the digest: they change no byte.

Without a profile only codecs that need none are offered (`codecs.CodecSet`). Writing one is `triptych profile`.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from engine.base.errors import InvalidArgument
from engine.base.files import replace_file

FORMAT: Final = "triptych-profile-1"
FILE_BYTES_MAX: Final = 256 << 20

Array = npt.NDArray[Any]
Setting = int | float | str


@dataclass(frozen=True, eq=False)
class Tables:
    """What one codec was calibrated to. Not to be written to."""

    arrays: Mapping[str, Array]
    settings: Mapping[str, Setting] = field(default_factory=dict)

    @cached_property
    def digest(self) -> int:
        """32 bits, never 0 (a frame's 0 is "no tables"), that differ whenever encoder and decoder must not meet."""
        state = hashlib.blake2b(json.dumps(dict(self.settings), sort_keys=True).encode(), digest_size=4)
        for name, array in sorted(self.arrays.items()):
            state.update(json.dumps([name, array.dtype.str, list(array.shape)]).encode())
            state.update(np.ascontiguousarray(array).tobytes())
        return int.from_bytes(state.digest(), "little") or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One level on one kind of text."""

    bits_per_element: float
    kl: float
    ppl_change: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One level of one codec, as measured: bits of everything that is sent, over the numbers of K and V.

    `kl` is nats per token against full-precision KV, of the worst kind of text; so is `bits_per_element`.
    `ppl_change` is a ratio: 0.01 is 1 % more. Rates are of raw KV in the model's dtype, on one core.
    """

    level: int
    bits_per_element: float
    kl: float
    ppl_change: float
    encode_mb_s: float
    decode_mb_s: float
    kinds: Mapping[str, Kind] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """`model` is the checkpoint's fingerprint (`CacheSchema.model`): tables of one model are noise for another."""

    model: str
    tables: Mapping[str, Tables] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Point]] = field(default_factory=dict)  # by codec; least lossy first
    texts: Mapping[str, str] = field(default_factory=dict)  # kind -> digest of the text that it was measured on


def save(profile: Profile, path: Path) -> None:
    """Deterministic for the same profile. Replaces `path` at once or not at all."""
    from safetensors.numpy import save as serialize

    arrays = {
        f"{codec}.{name}": np.ascontiguousarray(array)
        for codec, tables in profile.tables.items()
        for name, array in tables.arrays.items()
    }
    document = {
        "format": FORMAT,
        "model": profile.model,
        "texts": dict(profile.texts),
        "settings": {codec: dict(tables.settings) for codec, tables in profile.tables.items()},
        "curves": {codec: [asdict(point) for point in points] for codec, points in profile.curves.items()},
    }
    replace_file(path, serialize(arrays, metadata={"triptych": json.dumps(document, sort_keys=True)}))


def load(path: Path) -> Profile:
    """Raises InvalidArgument, naming the file and what is wrong with it."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise ValueError(f"larger than {FILE_BYTES_MAX >> 20} MiB")
        document, arrays = _read(path)
        return _profile_of(document, arrays)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidArgument(f"profile {path}: {error or type(error).__name__}", field="profile") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            document = json.loads((file.metadata() or {})["triptych"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if document["format"] != FORMAT:
        raise ValueError(f"format {document['format']!r}, not {FORMAT!r}")
    return document, arrays


def _profile_of(document: dict[str, Any], arrays: Mapping[str, Array]) -> Profile:
    for array in arrays.values():
        array.flags.writeable = False
    return Profile(
        model=str(document["model"]),
        texts={str(kind): str(digest) for kind, digest in document["texts"].items()},
        tables={
            codec: Tables(_arrays_of(codec, arrays), dict(settings)) for codec, settings in document["settings"].items()
        },
        curves={codec: tuple(_point_of(point) for point in points) for codec, points in document["curves"].items()},
    )


def _arrays_of(codec: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    prefix = f"{codec}."
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _point_of(fields: Mapping[str, Any]) -> Point:
    """Of numbers that a worker may tell others: it would not be registered with any other."""
    point = Point(**{**fields, "kinds": {kind: Kind(**values) for kind, values in fields["kinds"].items()}})
    numbers = all(type(number) in (int, float) for number in (point.bits_per_element, point.kl))
    plausible = numbers and 0 < point.bits_per_element < math.inf and 0 <= point.kl < math.inf
    if not (plausible and type(point.level) is int and point.level >= 0):
        raise ValueError(f"a level of {point.bits_per_element} bits at KL {point.kl}: {point.level}")
    return point
