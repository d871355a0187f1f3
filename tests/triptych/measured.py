"""A checkpoint of a few thousand weights with a tokenizer of single characters, texts, and a codec with tables."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np

from engine.base.errors import InvalidArgument
from engine.kv.arena import Bytes
from engine.kv.schema import Stream
from kv_transfer.calibration import Calibration
from kv_transfer.codecs import Atom, AtomShape, Payload, elements
from kv_transfer.profile import Tables
from tests.engine.tiny_models import tiny_config, tiny_model
from tests.engine.tiny_tokenizers import CHARACTERS, save_tokenizer

SENTENCES: dict[str, Callable[[int], str]] = {
    "counting": lambda n: f"{n} and one are {n + 1}.\n",
    "letters": lambda n: CHARACTERS[1 + n % 90 :: 7] + "\n",
}


def tiny_checkpoint(folder: Path) -> Path:
    model = tiny_model(tiny_config(max_position_embeddings=2_048, num_hidden_layers=2, num_attention_heads=2))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def text_file(folder: Path, kind: str = "counting", characters: int = 5_000) -> Path:
    text = "".join(SENTENCES[kind](n) for n in range(characters))[:characters]
    file = folder / f"{kind}.txt"
    file.write_text(text)
    return file


class Clipping:
    """A codec with tables: numbers beyond a measured size, which is smaller at each level, are clipped to it."""

    paper: ClassVar[str] = "none"
    loses: ClassVar[str] = "large numbers"
    needs: ClassVar[tuple[str, ...]] = ()
    composes_with: ClassVar[str] = "anything"
    lossless: ClassVar[bool] = False
    profiled: ClassVar[bool] = True
    dtypes: ClassVar[frozenset[str]] = frozenset({"bfloat16", "float32"})
    levels: ClassVar[tuple[int, ...]] = (0, 1, 2)
    token_multiple: ClassVar[int] = 1
    block_local: ClassVar[bool] = True
    cuts_layers: ClassVar[bool] = True
    cuts_heads: ClassVar[bool] = True

    def __init__(self, tables: Tables, stream: Stream) -> None:
        if stream.layers != tables.settings["layers"]:
            raise InvalidArgument("tables of another model", field="profile")
        self._largest = float(tables.arrays["largest"][0])

    @staticmethod
    def calibrate(calibration: Calibration) -> Tables:
        largest = max(float(np.abs(window.kv_LHPTD).max()) for window in calibration.windows)
        kinds = sorted({window.kind for window in calibration.windows})
        finite = all(np.isfinite(window.gradients_LHPTD).all() for window in calibration.windows)
        assert finite and calibration.rope.frequencies_LF.shape[1] > 0
        settings = {"layers": calibration.stream.layers, "kinds": " ".join(kinds), "windows": len(calibration.windows)}
        return Tables({"largest": np.array([largest], np.float32)}, settings)

    def encode(self, atom: Atom, level: int) -> Payload:
        numbers = elements.to_float32(atom.bytes_LHPTX, atom.shape.stream.dtype)
        limit = self._largest / 4**level
        clipped = elements.from_float32(np.clip(numbers, -limit, limit), atom.shape.stream.dtype)
        return clipped.tobytes()[:-1]  # a byte shorter than raw, which would be sent instead

    def decode_untrusted(self, payload: memoryview, shape: AtomShape, level: int) -> Bytes:
        return np.frombuffer(bytes(payload) + b"\0", np.uint8).reshape(shape.LHPTX)

    def payload_bytes_max(self, shape: AtomShape) -> int:
        return shape.raw_bytes

    def error_bound(self, shape: AtomShape, level: int, largest: float) -> float:
        return largest
