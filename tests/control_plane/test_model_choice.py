"""control_plane.model_choice: what a model's name means to processes that do not load it, images included."""

from pathlib import Path

import pytest

from control_plane.model_choice import choose_model
from control_plane.options import MODEL_DEMO, Dtype, EngineOptions, ExecutorKind, OptionError
from tests.engine.vision.tiny_vlms import HIDDEN, make_tiny_vlm

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm")


@pytest.mark.parametrize("executor", [ExecutorKind.ORACLE, ExecutorKind.PACED])
def test_the_oracle_takes_no_images(executor: ExecutorKind) -> None:
    choice = choose_model(EngineOptions(model="oracle", executor=executor))
    assert (choice.path, choice.vision, choice.embedding_schema) == (None, None, None)


@pytest.mark.model
def test_the_default_model_takes_no_images() -> None:
    choice = choose_model(EngineOptions())
    assert (choice.vision, choice.embedding_schema) == (None, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_that_sees_says_what_an_image_becomes(family: str, tmp_path: Path) -> None:
    folder = make_tiny_vlm(family, tmp_path / "it")
    choice = choose_model(EngineOptions(model=str(folder), dtype=Dtype.FLOAT32))
    assert choice.vision is not None and choice.embedding_schema is not None
    assert choice.vision.family == family
    row = choice.embedding_schema.kv
    assert (row.role, row.head_dim, row.dtype) == ("embedding", HIDDEN, "float32")
    assert choice.schema.kv.role == "kv"


@pytest.mark.model
def test_the_demo_model_has_a_name_and_eyes() -> None:
    choice = choose_model(EngineOptions(model=MODEL_DEMO))
    assert choice.name == MODEL_DEMO
    assert choice.vision is not None and choice.embedding_schema is not None
    layout = choice.vision.layout(300, 200)
    assert (layout.features, layout.text) == (36, "<image>" * 36)
    assert choice.embedding_schema.kv.dtype == choice.dtype == "bfloat16"
    default = choose_model(EngineOptions())
    assert choice.schema.kv == default.schema.kv
    assert choice.schema != default.schema, "another model: its KV is not exchanged with the other's"


def test_a_name_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        choose_model(EngineOptions(model=str(tmp_path)))
    assert caught.value.option == "model"
