"""The encoder that computes for real: the model's own image processor, vision tower and projector.

    pictures -> processor, one by one -> inputs of equal shape together -> get_image_features -> each image's own rows
                    | "preprocess"                                                                | "features"

Nothing of a family is computed here. Two things are asked of one: along which axis its inputs are put together
(`engine.models.parts`), and that inputs of equal shape make equal numbers of rows, so that rows are divided by shares.
Towers attend within one image (or tile), so company changes an embedding by rounding at most: a product of more rows
adds its numbers up in another order. The language half of the model is never loaded.

Legend: R rows of an embedding (one per placeholder), E hidden size, X bytes of one row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from PIL import Image

from engine.base.errors import FailedPrecondition
from engine.commands import EncodeItem, EncodeOutput, EncodePlan
from engine.executors.torch import claim_threads
from engine.images import Picture
from engine.kv.arena import Arena
from engine.models.loading import load_image_processor
from engine.models.parts import load_tower, parts_of
from engine.vision.info import describe_vision, embedding_schema

PREPROCESS_FAILED: Final = "preprocess"
"""`EncodeOutput.failed`: the model's processor does not take the image."""
WRONG_FEATURES: Final = "features"
"""`EncodeOutput.failed`: the tower makes another number of rows than the prompt has placeholders."""

Inputs = Mapping[str, torch.Tensor]


class _Ready(NamedTuple):
    """An image as the tower takes it."""

    item: EncodeItem
    inputs: Inputs


class TowerEncoder:
    """Writes embeddings to embedding memory. Call `encode` from one thread; with `lazy`, weights are read at its first
    call, on that thread."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        model: Path
        dtype: str = "float32"
        device: str = "cpu"
        threads: int = 1

    def __init__(self, config: Config, arena: Arena, *, lazy: bool = False) -> None:
        _require_schema(config, arena)
        self._config = config
        self._arena = arena
        self._tower = None if lazy else self._load()

    @property
    def loaded(self) -> bool:
        return self._tower is not None

    def encode(self, plan: EncodePlan) -> EncodeOutput:
        claim_threads(self._config.threads)
        self._tower = self._tower or self._load()
        output = EncodeOutput(plan.step_id)
        for batch in self._batches(self._tower, plan, output):
            self._encode_batch(self._tower, batch, output)
        return output

    def _load(self) -> "Tower":
        claim_threads(self._config.threads)
        return Tower(self._config.model, self._config.dtype, self._config.device)

    def _batches(self, tower: "Tower", plan: EncodePlan, output: EncodeOutput) -> list[list[_Ready]]:
        """The plan's images, those together that can be; without those that the processor refuses."""
        batches: dict[Any, list[_Ready]] = {}
        for item in plan.items:
            try:
                inputs = tower.preprocess(item.picture)
            except Exception:  # foreign code raises what it likes
                output.failed[item.seq_id] = PREPROCESS_FAILED
            else:
                batches.setdefault(tower.shape(inputs), []).append(_Ready(item, inputs))
        return list(batches.values())

    def _encode_batch(self, tower: "Tower", batch: Sequence[_Ready], output: EncodeOutput) -> None:
        """Images whose rows do not add up go through alone, so that each answers for itself."""
        embeddings = tower.features([ready.inputs for ready in batch])
        fits = [len(rows_RE) == ready.item.features for ready, rows_RE in zip(batch, embeddings, strict=True)]
        if all(fits):
            for ready, rows_RE in zip(batch, embeddings, strict=True):
                self._write(ready.item, rows_RE)
        elif len(batch) == 1:
            output.failed[batch[0].item.seq_id] = WRONG_FEATURES
        else:
            for ready in batch:
                self._encode_batch(tower, [ready], output)

    def _write(self, item: EncodeItem, rows_RE: torch.Tensor) -> None:
        rows_RX = rows_RE.contiguous().view(torch.uint8).cpu().numpy()
        self._arena.write(item.block_table, (0, 1), (0, item.features), None, rows_RX[None, None, None])


def _require_schema(config: TowerEncoder.Config, arena: Arena) -> None:
    vision = describe_vision(config.model)
    if vision is None or arena.schema.digest != embedding_schema(vision, config.dtype).digest:
        raise FailedPrecondition(f"the arena's schema is not that of {config.model}'s embeddings in {config.dtype}")


class Tower:
    """The half of a model that sees."""

    def __init__(self, model: Path, dtype: str, device: str) -> None:
        self._processor = load_image_processor(model)
        tower, config = load_tower(model, dtype)
        self._tower = tower.to(device)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._axis = parts_of(config).images_axis

    def preprocess(self, picture: Picture) -> Inputs:
        image = Image.frombytes("RGB", (picture.width, picture.height), picture.pixels)
        processed = self._processor(images=[image], return_tensors="pt")
        return {name: value for name, value in processed.items() if isinstance(value, torch.Tensor)}

    def shape(self, inputs: Inputs) -> tuple[int, ...]:
        """Of the pixels, but for how many there are: images with equal ones can go through the tower together."""
        shape = inputs["pixel_values"].shape
        return (*shape[: self._axis], *shape[self._axis + 1 :])

    @torch.inference_mode()
    def features(self, batch: Sequence[Inputs]) -> tuple[torch.Tensor, ...]:
        """embedding_RE of each image. A family's tower makes equally many rows of each tile, or of each patch."""
        together = {name: torch.cat([inputs[name] for inputs in batch], dim=self._axis) for name in batch[0]}
        rows_RE = _flat(self._tower.get_image_features(**dict(self._on_device(together))))
        shares = [inputs["pixel_values"].shape[self._axis] for inputs in batch]
        counts = [len(rows_RE) * share // sum(shares) for share in shares]
        counts[-1] += len(rows_RE) - sum(counts)
        return torch.split(rows_RE, counts)

    def _on_device(self, inputs: Inputs) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in inputs.items():
            yield name, value.to(self._tower.device, self._dtype if value.is_floating_point() else value.dtype)


def _flat(features: Any) -> torch.Tensor:
    """All rows of all images, in order: transformers has had them as one tensor, as a list, and inside an output."""
    pooled = getattr(features, "pooler_output", features)
    parts = [pooled] if isinstance(pooled, torch.Tensor) else list(pooled)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
