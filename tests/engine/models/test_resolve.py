"""What `--model` may say: a folder, a GGUF file, a model of the hub (whose cache is a folder here, without network)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from control_plane.model_choice import choose_model
from control_plane.options import EngineOptions, OptionError
from engine.base.errors import InvalidArgument
from engine.model_runner import ModelRunner, verify
from engine.models import checkpoint
from engine.models.checkpoint import load_model
from engine.models.info import describe
from engine.models.resolve import is_hub_id, resolve_model
from tests.engine.tiny_models import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    VOCAB,
    Running,
    generate,
    prompt_of,
    scattered_tables,
    step,
    tiny_arena,
    tiny_config,
    tiny_model,
)

HUB_ID = "some-org/Tiny-1.0"


def silent(message: str) -> None:
    """Nobody watches."""


def tiny_weights() -> Any:
    """A llama whose weights bfloat16 holds exactly, in float32."""
    return tiny_model(tiny_config(bos_token_id=1, eos_token_id=2)).to(torch.bfloat16).float()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# -- GGUF --------------------------------------------------------------------------------------------------------------
@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """`tiny_weights` as llama.cpp would write it: other names, rows of rotated heads in another order."""
    (tmp_path / "files").mkdir()
    path = tmp_path / "files" / "tiny-llama.gguf"
    model = tiny_weights()
    writer = gguf.GGUFWriter(str(path), "llama")
    _write_facts(writer, model.config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, weight in model.state_dict().items():
        array = np.ascontiguousarray(_rows_as_in_gguf(name, weight.numpy()))
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_facts(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", '!"', *(chr(33 + index) for index in range(VOCAB - 4))])
    writer.add_token_types([3, 3, 3, *[1] * (VOCAB - 3)])
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _rows_as_in_gguf(name: str, weight: Any) -> Any:
    """Llama.cpp turns neighbouring pairs of a head's rows, transformers the two halves."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.reshape(heads, 2, HEAD_DIM // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("named", ["file", "folder"])
def test_a_gguf_file_is_served_like_the_model_it_was_made_from(named: str, gguf_file: Path, cache: Path) -> None:
    folder = resolve_model(str(gguf_file if named == "file" else gguf_file.parent), silent)
    assert cache in folder.parents
    assert (folder / "tokenizer.json").exists()
    info = describe(folder)
    assert (info.name, info.family, info.dtype, info.eos_token_ids) == ("tiny-llama", "llama", "bfloat16", (2,))
    model, _ = load_model(folder, "float32")
    runner = ModelRunner(model, tiny_arena())
    verify(runner)
    sequence = Running(0, prompt_of(33), scattered_tables(runner.arena, 12, 1)[0])
    for chunk in (20, 64, 1, 1, 1, 1):
        step(runner, [(sequence, chunk)])
    assert sequence.output == generate(tiny_weights(), prompt_of(33), len(sequence.output))


def test_a_gguf_file_is_converted_once_whatever_its_name(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted: list[Path] = []
    monkeypatch.setattr(checkpoint, "_convert", lambda file, folder: converted.append(file))
    first = resolve_model(str(gguf_file), silent)
    elsewhere = gguf_file.parent.parent / "elsewhere"
    elsewhere.mkdir()
    moved = gguf_file.rename(elsewhere / gguf_file.name)
    assert resolve_model(str(moved), silent) == first
    assert len(converted) == 1


@pytest.mark.parametrize("where", [0.5, 1.0])
def test_a_gguf_file_that_was_replaced_is_converted_again(
    where: float, gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_convert", lambda file, folder: None)
    monkeypatch.setattr(checkpoint, "_KEY_SAMPLE_BYTES", 64)  # of a file of 200 KiB: every twelfth byte
    first = resolve_model(str(gguf_file), silent)
    content = bytearray(gguf_file.read_bytes())
    end = int(where * len(content))
    content[end - 2_000 : end] = bytes(2_000)
    gguf_file.write_bytes(content)
    assert resolve_model(str(gguf_file), silent) != first


def test_a_damaged_gguf_file_is_named(gguf_file: Path, cache: Path) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:400])
    with pytest.raises(InvalidArgument, match=r"cannot convert .*tiny-llama.gguf: "):
        resolve_model(str(gguf_file), silent)
    gguf_file.write_bytes(b"PK and so on")
    with pytest.raises(InvalidArgument, match=r"tiny-llama.gguf is not a GGUF file"):
        resolve_model(str(gguf_file), silent)


def test_of_several_gguf_files_one_must_be_named(tmp_path: Path) -> None:
    for name in ("q4.gguf", "q8.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(InvalidArgument, match=r"several GGUF files, name one of them: q4.gguf, q8.gguf"):
        resolve_model(str(tmp_path), silent)


def test_a_folder_of_safetensors_is_itself_even_with_a_gguf_file_in_it(tmp_path: Path) -> None:
    for name in ("model.safetensors", "q4.gguf"):
        (tmp_path / name).write_bytes(b"")
    assert resolve_model(str(tmp_path), silent) == tmp_path


# -- the hub -----------------------------------------------------------------------------------------------------------
class Hub:
    """Stands in for `snapshot_download`: what is cached, what could be downloaded, and what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cached = False
        self.online = True
        self.calls: list[dict[str, Any]] = []

    def __call__(self, hub_id: str, **options: Any) -> str:
        self.calls.append({"hub_id": hub_id, **options})
        if not self.cached and (options["local_files_only"] or not self.online):
            raise LocalEntryNotFoundError("cannot reach the hub\nand more advice")
        self.cached = True
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "snapshots" / "0123abcd"
    tiny_weights().to(torch.bfloat16).save_pretrained(folder)
    stand_in = Hub(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
    return stand_in


def test_a_hub_model_is_downloaded_once_as_data_only(hub: Hub) -> None:
    said: list[str] = []
    assert resolve_model(HUB_ID, said.append) == hub.folder
    assert resolve_model(HUB_ID, said.append) == hub.folder
    assert said == [f"downloading {HUB_ID}"]
    assert [call["local_files_only"] for call in hub.calls] == [True, False, True]
    assert all(call["hub_id"] == HUB_ID for call in hub.calls)
    for pattern in hub.calls[1]["allow_patterns"]:
        assert not any(file.endswith(pattern.strip("*")) for file in ("code.py", "pytorch_model.bin", "model.pt"))


def test_a_hub_model_is_known_by_its_name_on_the_hub(hub: Hub) -> None:
    choice = choose_model(EngineOptions(model=HUB_ID))
    assert (choice.name, choice.path, choice.vocab_size) == (HUB_ID, hub.folder, VOCAB)


def test_without_network_and_cache_the_option_is_named(hub: Hub) -> None:
    hub.online = False
    with pytest.raises(InvalidArgument, match=r"not in the hub's local cache .*\(cannot reach the hub\).* --model$"):
        resolve_model(HUB_ID, silent)
    with pytest.raises(OptionError, match=r"some-org/Tiny-1.0"):
        choose_model(EngineOptions(model=HUB_ID))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "model-00002.safetensors"])
def test_an_interrupted_download_is_taken_up_again(missing: str, hub: Hub) -> None:
    if missing == "model-00002.safetensors":
        shards = {"a": "model.safetensors", "b": missing}
        (hub.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    else:
        (hub.folder / missing).unlink()
    hub.cached = True
    with pytest.raises(InvalidArgument, match=r"no config.json, or not all"):
        resolve_model(HUB_ID, silent)
    assert [call["local_files_only"] for call in hub.calls] == [True, False]


@pytest.mark.parametrize("reference", ["no-such-name", "/no/such/folder", "a/b/c", "no/such.gguf", "-/"])
def test_what_names_no_model_is_refused(reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidArgument, match=r"is neither a directory, a .gguf file, an org/name"):
        resolve_model(reference, silent)


def test_a_path_that_is_here_is_not_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("models/tiny")
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert not is_hub_id("models/tiny")


def test_resolving_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import engine.models.resolve as r, pathlib, sys\n"
        "r.resolve_model('/', print)\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=15, check=True)
    assert result.stdout.strip() == "set()"
