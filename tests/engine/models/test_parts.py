"""Halves of models that see: each is the whole model's, and holds nothing of the other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlavaConfig

from engine.base.errors import InvalidArgument
from engine.capture import Subject
from engine.models.checkpoint import load_model
from engine.models.language_model import LanguageModel
from engine.models.parts import FAMILIES, load_language_model, load_tower
from engine.vision.info import FAMILIES as SEEN_FAMILIES
from tests.engine.vision import tiny_vlms


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("halves")
    return {family: tiny_vlms.make_tiny_vlm(family, root / family) for family in FAMILIES}


def tied_folder(path: Path) -> Path:
    """One matrix looks tokens up and scores them, and the file holds it once."""
    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlavaConfig(
        text_config={**text, "num_attention_heads": 2, "vocab_size": 20, "tie_word_embeddings": True},
        vision_config={**vision, "num_attention_heads": 2, "image_size": 32, "patch_size": 16},
        image_token_index=3,
        tie_word_embeddings=True,
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(path)
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    return path


def storages(module: Any) -> dict[int, int]:
    return {tensor.data_ptr(): tensor.numel() for tensor in module.state_dict().values()}


def test_the_families_are_those_that_have_layouts() -> None:
    assert FAMILIES.keys() == SEEN_FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_both_halves_together_are_the_model(folders: dict[str, Path], family: str) -> None:
    whole = tiny_vlms.load_model(folders[family]).state_dict()
    language, _ = load_language_model(folders[family], "float32")
    tower, _ = load_tower(folders[family], "float32")
    seen = tower.state_dict()
    assert all(torch.equal(weight, whole.pop(name)) for name, weight in seen.items())
    read = language.state_dict()
    text = FAMILIES[family].language_model
    for name, weight in whole.items():
        own = name.replace(f"model.{text}.", "decoder.")
        assert torch.equal(read.pop(own), weight), name
    assert read == {}
    assert not any(tensor.is_meta for half in (tower, language) for tensor in (*half.parameters(), *half.buffers()))
    assert not tower.training and not language.training


@pytest.mark.parametrize("family", FAMILIES)
def test_text_runs_as_in_the_whole_model(folders: dict[str, Path], family: str) -> None:
    model, config = load_model(folders[family], "float32")
    assert isinstance(model, LanguageModel)
    assert (model.dtype, model.device.type, config.num_hidden_layers) == (torch.float32, "cpu", 3)
    tokens = torch.tensor([[60, 61, 75, 63, 80]])
    with torch.inference_mode():
        expected = tiny_vlms.load_model(folders[family])(tokens).logits
        assert torch.equal(model(tokens).logits, expected)
        for kept, rows in ((2, [3, 4]), (torch.tensor([3, 0]), [3, 0])):
            torch.testing.assert_close(model(tokens, logits_to_keep=kept).logits, expected[:, rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_its_kv_can_be_captured(folders: dict[str, Path], family: str) -> None:
    """Codecs are calibrated for the language half of any model."""
    subject, tokens = Subject.load(folders[family]), list(range(60, 90))
    with torch.inference_mode():
        whole = tiny_vlms.load_model(folders[family])(torch.tensor([tokens])).logits[0].log_softmax(-1)
    after = subject.log_probs(subject.kv(tokens[:20], "float32"), tokens[20:])
    torch.testing.assert_close(after, whole[20:], atol=2e-4, rtol=0)
    assert subject.rope_frequencies().shape == (3, 8)


def test_a_tied_head_stays_tied_and_a_tower_needs_none(tmp_path: Path) -> None:
    folder = tied_folder(tmp_path)
    language, _ = load_language_model(folder, "float32")
    assert language.lm_head.weight is language.get_input_embeddings().weight
    tower, _ = load_tower(folder, "float32")
    assert storages(tower).keys().isdisjoint(storages(language))
    whole = AutoModelForImageTextToText.from_pretrained(folder)
    assert sum(storages(tower).values()) + sum(storages(language).values()) == sum(storages(whole).values())


def drop(folder: Path, part: str) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if part not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_half_needs_its_own_weights_and_not_the_others(tmp_path: Path) -> None:
    folder = tiny_vlms.make_tiny_vlm("llava", tmp_path)
    drop(folder, "multi_modal_projector.linear_1")
    load_language_model(folder, "float32")
    with pytest.raises(InvalidArgument, match=r"lacks the weights model.multi_modal_projector.linear_1.bias, "):
        load_tower(folder, "float32")
    drop(tiny_vlms.make_tiny_vlm("llava", tmp_path), "layers.1.mlp.down_proj")
    with pytest.raises(InvalidArgument, match=r"lacks the weights model.language_model.layers.1.mlp.down_proj.weight"):
        load_language_model(folder, "float32")


def test_the_other_halfs_weights_are_left_without_a_word(
    folders: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    load_language_model(folders["idefics3"], "float32")
    load_tower(folders["idefics3"], "float32")
    assert capfd.readouterr() == ("", "")


def test_a_family_that_is_not_known_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "paligemma"}')
    with pytest.raises(InvalidArgument, match="paligemma: images of this family are not served"):
        load_model(tmp_path, "float32")


def test_a_dtype_that_no_model_is_served_in_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(InvalidArgument, match="got 'int8'"):
        load_tower(folders["llava"], "int8")
