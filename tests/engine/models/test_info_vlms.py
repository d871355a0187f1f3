"""What a folder says about a model that sees; of models that only read, see `tests/engine/test_checkpoint.py`."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from engine.base.errors import InvalidArgument
from engine.models.info import describe, require_servable, schema_for, window_of
from engine.models.text_config import DEFAULTS, SEEING, text_config
from tests.engine.vision.folders import DROPPED, Changes, Settings, edit, with_settings
from tests.engine.vision.tiny_vlms import FAMILIES, HIDDEN, make_tiny_vlm


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vlms")
    return {family: make_tiny_vlm(family, root / family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_model_of_every_family(family: str, folders: dict[str, Path]) -> None:
    info = describe(folders[family])
    text = AutoConfig.from_pretrained(folders[family]).text_config
    assert (info.family, info.layers, info.kv_heads, info.head_dim) == (family, 3, 2, 16)
    assert (info.vocab_size, info.max_model_len) == (text.vocab_size, text.max_position_embeddings)
    assert (info.eos_token_ids, info.dtype, info.window_tokens, info.experts) == ((0,), "float32", None, 0)
    assert schema_for(info, "bfloat16").token_bytes == 3 * 2 * 2 * 16 * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_its_eyes(family: str, folders: dict[str, Path]) -> None:
    vision = describe(folders[family]).vision
    config = AutoConfig.from_pretrained(folders[family])
    assert vision is not None
    assert (vision.family, vision.hidden_size, vision.image_token_id) == (family, HIDDEN, config.image_token_id)


def test_eyes_that_are_not_served_are_refused_with_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    changed = Settings(config={"vision_config": {"model_type": "pixtral"}})
    with pytest.raises(InvalidArgument, match="llava: a vision tower of type pixtral: not supported"):
        describe(with_settings(folders["llava"], changed, tmp_path / "other"))


# -- configurations as they were published -----------------------------------------------------------------------------
def flat(folder: Path) -> None:
    """Qwen2-VL's first form: the language model's numbers beside vision_config."""
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    (folder / "config.json").write_text(json.dumps({**text, **config, "rope_theta": rope["rope_theta"]}))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_flat_configuration_says_the_same(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = with_settings(folders[family], Settings(), tmp_path / "flat")
    flat(folder)
    ours, was = describe(folder), describe(folders[family])
    assert (ours.layers, ours.kv_heads, ours.head_dim, ours.vocab_size) == (3, 2, 16, was.vocab_size)
    assert (ours.max_model_len, ours.eos_token_ids, ours.window_tokens) == (1024, (0,), None)
    assert ours.fingerprint != was.fingerprint


def test_a_flat_configuration_may_leave_out_what_its_family_takes_for_granted() -> None:
    whole = {"model_type": "qwen2_vl", "vision_config": {}, "num_hidden_layers": 28}
    theirs = CONFIG_MAPPING["qwen2_vl"](**{key: whole[key] for key in ("vision_config", "num_hidden_layers")})
    text = text_config(whole)
    assert (text["model_type"], text["num_hidden_layers"]) == (theirs.text_config.model_type, 28)
    assert text["max_position_embeddings"] == theirs.text_config.max_position_embeddings


def test_a_text_config_that_says_no_more_than_its_family(folders: dict[str, Path], tmp_path: Path) -> None:
    """LLaVA-1.5's, as published: vicuna is a llama of 7 billion weights, with 4096 positions."""
    vicuna = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32_064, "torch_dtype": "float16"}
    folder = with_settings(folders["llava"], Settings(config={"dtype": DROPPED}), tmp_path / "llava-1.5")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "text_config": vicuna}))
    info = describe(folder)
    assert (info.layers, info.kv_heads, info.head_dim) == (32, 32, 128)
    assert (info.vocab_size, info.max_model_len) == (32_064, 4096)
    assert info.dtype == "float16"
    assert info.vision is not None
    assert info.vision.hidden_size == 4096


@pytest.mark.parametrize("family", DEFAULTS)
def test_what_is_taken_for_granted_is_what_transformers_takes_for_granted(family: str) -> None:
    defaults, theirs = DEFAULTS[family], CONFIG_MAPPING[family]()
    same = {key: value for key, value in defaults.items() if key != "sliding_window"}
    assert same == {key: getattr(theirs, key) for key in same}
    assert window_of(defaults) == getattr(theirs, "sliding_window", None)
    assert defaults.get("num_key_value_heads", defaults["num_attention_heads"]) == theirs.num_key_value_heads


@pytest.mark.parametrize("family", SEEING)
def test_a_family_whose_language_model_has_no_name(family: str) -> None:
    theirs = CONFIG_MAPPING[family]().text_config
    ours = text_config({"model_type": family, "text_config": {}})
    assert ours["model_type"] == theirs.model_type
    assert ours["num_hidden_layers"] == theirs.num_hidden_layers


def test_a_model_that_only_reads_is_its_own_text_config() -> None:
    config = {"model_type": "llama", "hidden_size": 8}
    assert text_config(config) is config


@pytest.mark.parametrize(
    ("generation", "whole", "text", "ids"),
    [
        ({"eos_token_id": [3, 4]}, {"eos_token_id": 5}, {"eos_token_id": 6}, (3, 4)),
        ({"eos_token_id": DROPPED}, {"eos_token_id": 5}, {"eos_token_id": 6}, (5,)),
        ({"eos_token_id": DROPPED}, {"eos_token_id": DROPPED}, {"eos_token_id": 6}, (6,)),
        ({"eos_token_id": DROPPED}, {"eos_token_id": DROPPED}, {"eos_token_id": DROPPED}, (2,)),
        ({"eos_token_id": None}, {"eos_token_id": 5}, {"eos_token_id": 6}, ()),
    ],
)
def test_where_an_answer_ends(
    generation: Changes, whole: Changes, text: Changes, ids: tuple[int, ...], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = with_settings(folders["llava"], Settings(config={**whole, "text_config": text}), tmp_path / "other")
    edit(folder / "generation_config.json", generation)
    assert describe(folder).eos_token_ids == ids


# -- what is not served ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "paligemma", "vision_config": {}, "text_config": {}}, "paligemma: a model of images or sound"),
        ({"model_type": "llava_next", "vision_config": {}, "text_config": {}}, "llava_next: a model of images"),
        ({"model_type": "qwen2_audio", "audio_config": {}, "text_config": {}}, "qwen2_audio: a model of images"),
        ({"model_type": "llava", "text_config": {"layer_types": ["linear_attention"]}}, "layers of type 'linear"),
        ({"model_type": "llava", "text_config": {"num_key_value_heads": [1, 2]}}, "its layers differ in KV heads"),
        ({"model_type": "llava", "text_config": {"rope_scaling": {"type": "dynamic"}}}, "rope type 'dynamic'"),
        ({"model_type": "qwen2_vl", "rope_scaling": {"type": "longrope"}}, "rope type 'longrope'"),
    ],
)
def test_what_a_configuration_rules_out_is_refused_with_the_reason(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason):
        require_servable(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_configuration_is_servable_whole_or_by_its_language_model(
    family: str, folders: dict[str, Path]
) -> None:
    config = AutoConfig.from_pretrained(folders[family])
    require_servable(config.to_dict())
    require_servable(config.text_config.to_dict())


@pytest.mark.parametrize("kind", ["mrope", "default"])
def test_positions_in_three_dimensions_are_servable(kind: str) -> None:
    require_servable({"model_type": "qwen2_vl_text", "rope_scaling": {"type": kind, "mrope_section": [2, 3, 3]}})
