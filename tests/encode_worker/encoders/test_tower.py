"""The real encoder against transformers: every row is the model's own, and one bad image is nobody else's problem."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from encode_worker.encoders import tower
from encode_worker.encoders.tower import PREPROCESS_FAILED, WRONG_FEATURES, Tower, TowerEncoder
from engine.base.errors import FailedPrecondition, InvalidArgument
from engine.commands import EncodeItem, EncodePlan
from engine.images import Picture
from engine.kv.arena import Arena
from engine.vision.info import describe_vision
from tests.engine.image_prompts import BLOCK_SIZE, SIZES, bare_embedding_arena, embedding_arena, picture_of
from tests.engine.vision import tiny_vlms

FAMILIES = tuple(tiny_vlms.FAMILIES)
BLOCKS = 6  # of each embedding, at most


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("towers")
    return {family: tiny_vlms.make_tiny_vlm(family, root / family) for family in FAMILIES}


def encoder_of(folder: Path, dtype: str = "float32", *, lazy: bool = False) -> tuple[TowerEncoder, Arena]:
    arena = embedding_arena(folder, dtype)
    return TowerEncoder(TowerEncoder.Config(model=folder, dtype=dtype), arena, lazy=lazy), arena


def items_of(folder: Path, pictures: Sequence[Picture]) -> list[EncodeItem]:
    """Columns are neither consecutive nor in order."""
    vision = describe_vision(folder)
    assert vision is not None
    columns = [(column * 29 + 7) % 64 for column in range(64)]
    return [
        EncodeItem(
            seq_id=index,
            picture=picture,
            features=vision.layout(picture.width, picture.height).features,
            block_table=tuple(columns[index * BLOCKS : (index + 1) * BLOCKS]),
            key=bytes(16),
        )
        for index, picture in enumerate(pictures)
    ]


def rows_of(arena: Arena, item: EncodeItem) -> torch.Tensor:
    dtype = getattr(torch, arena.schema.kv.dtype)
    rows = arena.read(item.block_table, (0, 1), (0, item.features))[0, 0, 0]
    return torch.from_numpy(rows).view(dtype)


PICTURES = [picture_of(index) for index in range(len(SIZES))]


@torch.inference_mode()
def own_features(folder: Path, pictures: Sequence[Picture]) -> torch.Tensor:
    """All rows of all images at once, as the whole model makes them of its whole processor's output."""
    images: Any = [Image.frombytes("RGB", (each.width, each.height), each.pixels) for each in pictures]
    processor = tiny_vlms.load_processor(folder).image_processor
    nested = "pixel_attention_mask" in processor.model_input_names
    inputs = processor(images=[images] if nested else images, return_tensors="pt")
    pooled = tiny_vlms.load_model(folder).get_image_features(**inputs).pooler_output
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in pooled])


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_get_image_features(folders: dict[str, Path], family: str) -> None:
    encoder, arena = encoder_of(folders[family])
    items = items_of(folders[family], PICTURES)
    output = encoder.encode(EncodePlan(7, tuple(items)))
    assert (output.step_id, output.failed) == (7, {})
    rows = torch.cat([rows_of(arena, item) for item in items])
    torch.testing.assert_close(rows, own_features(folders[family], PICTURES), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_company_changes_rounding_only(folders: dict[str, Path], family: str) -> None:
    encoder, arena = encoder_of(folders[family])
    items = items_of(folders[family], PICTURES)
    alone = []
    for item in items:
        encoder.encode(EncodePlan(0, (item,)))
        alone.append(rows_of(arena, item))
    encoder.encode(EncodePlan(1, tuple(reversed(items))))
    for item, rows in zip(items, alone, strict=True):
        torch.testing.assert_close(rows_of(arena, item), rows, rtol=1e-5, atol=1e-5 * float(rows.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_goes_through_the_tower_together(
    folders: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    features = Tower.features

    def counting(self: Tower, batch: Any) -> Any:
        batches.append(len(batch))
        return features(self, batch)

    monkeypatch.setattr(Tower, "features", counting)
    encoder, _ = encoder_of(folders[family])
    encoder.encode(EncodePlan(0, tuple(items_of(folders[family], PICTURES))))
    assert batches == [len(PICTURES)]


def test_only_what_an_embedding_owns_is_written(folders: dict[str, Path]) -> None:
    encoder, arena = encoder_of(folders["llava"])
    (item,) = items_of(folders["llava"], PICTURES[:1])
    encoder.encode(EncodePlan(0, (item,)))
    owned = item.block_table[: -(-item.features // BLOCK_SIZE)]
    others = [column for column in range(arena.columns) if column not in owned]
    assert (arena.array[others] == 0xFF).all()
    assert arena.array[owned[-1], ..., item.features % BLOCK_SIZE :, :].min() == 0xFF


def test_bfloat16_is_stored_as_it_is_computed(folders: dict[str, Path]) -> None:
    encoder, arena = encoder_of(folders["qwen2_5_vl"], "bfloat16")
    items = items_of(folders["qwen2_5_vl"], PICTURES)
    assert encoder.encode(EncodePlan(0, tuple(items))).failed == {}
    rows = torch.cat([rows_of(arena, item) for item in items]).float()
    expected = own_features(folders["qwen2_5_vl"], PICTURES)
    assert (rows - expected).norm() < 0.05 * expected.norm()


# -- one bad image -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_with_other_features_than_promised_fails_alone(folders: dict[str, Path], family: str) -> None:
    encoder, arena = encoder_of(folders[family])
    items = items_of(folders[family], PICTURES)
    items[1] = replace(items[1], features=items[1].features + 1)
    assert encoder.encode(EncodePlan(0, tuple(items))).failed == {1: WRONG_FEATURES}
    good = [item for index, item in enumerate(items) if index != 1]
    expected = own_features(folders[family], [item.picture for item in good])
    rows = torch.cat([rows_of(arena, item) for item in good])
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=2e-5)
    assert (arena.array[list(items[1].block_table)] == 0xFF).all()


def test_errors_that_cancel_out_are_seen(folders: dict[str, Path]) -> None:
    encoder, _ = encoder_of(folders["qwen2_vl"])
    items = items_of(folders["qwen2_vl"], PICTURES)
    items[0] = replace(items[0], features=items[0].features - 1)
    items[2] = replace(items[2], features=items[2].features + 1)
    assert encoder.encode(EncodePlan(0, tuple(items))).failed == {0: WRONG_FEATURES, 2: WRONG_FEATURES}


def test_an_image_that_the_processor_refuses_fails_alone(folders: dict[str, Path]) -> None:
    """Qwen2-VL's takes no side that is more than 200 times the other."""
    encoder, _ = encoder_of(folders["qwen2_vl"])
    items = items_of(folders["qwen2_vl"], PICTURES)
    items[0] = replace(items[0], picture=Picture(300, 1, bytes(900)))
    assert encoder.encode(EncodePlan(0, tuple(items))).failed == {0: PREPROCESS_FAILED}


# -- loading -----------------------------------------------------------------------------------------------------------
def test_a_lazy_encoder_reads_weights_at_its_first_image(folders: dict[str, Path]) -> None:
    encoder, _ = encoder_of(folders["llava"], lazy=True)
    assert not encoder.loaded
    assert encoder.encode(EncodePlan(0, tuple(items_of(folders["llava"], PICTURES)))).failed == {}
    assert encoder.loaded
    assert encoder_of(folders["llava"])[0].loaded


def test_memory_of_another_model_is_refused(folders: dict[str, Path]) -> None:
    config = TowerEncoder.Config(model=folders["llava"])
    for arena in (bare_embedding_arena(tiny_vlms.HIDDEN), embedding_arena(folders["llava"], "bfloat16")):
        with pytest.raises(FailedPrecondition, match="schema is not that of"):
            TowerEncoder(config, arena, lazy=True)


def test_a_folder_without_an_image_processor_is_refused(tmp_path: Path) -> None:
    folder = tiny_vlms.make_tiny_vlm("llava", tmp_path)
    encoder, _ = encoder_of(folder, lazy=True)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink()
    with pytest.raises(InvalidArgument, match="cannot load the image processor"):
        encoder.encode(EncodePlan(0, ()))


def test_threads_are_the_workers_share(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    claimed: list[int] = []
    monkeypatch.setattr(tower, "claim_threads", claimed.append)
    config = TowerEncoder.Config(model=folders["llava"], threads=3)
    encoder = TowerEncoder(config, embedding_arena(folders["llava"]))
    encoder.encode(EncodePlan(0, ()))
    assert claimed == [3, 3]
