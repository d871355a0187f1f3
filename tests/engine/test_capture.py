"""Capture: KV that goes on where it was cut, gradients that predict what an error costs, rotation that is measured."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engine.capture import Floats, Subject, Window, windows_of
from engine.quality import Judge
from tests.engine.tiny_models import FAMILIES, HEAD_DIM, KV_HEADS, LAYERS, prompt_of, tiny_config, tiny_model

WINDOW = Window(tuple(prompt_of(40)), tuple(prompt_of(24, salt=5)))
DENSE = ("llama", "qwen2", "qwen3", "phi3", "olmo2", "gemma2", "gemma3", "mistral")


def subject_of(family: str = "llama", **overrides: Any) -> Subject:
    return Subject(tiny_model(tiny_config(family, **overrides)))


@pytest.mark.parametrize("family", DENSE)
def test_taking_kv_out_and_putting_it_back_changes_nothing(family: str) -> None:
    """Also where a window is shorter than the prefix, or attention is capped."""
    model = tiny_model(tiny_config(family))
    with torch.inference_mode():
        whole = model(torch.tensor([[*WINDOW.prefix, *WINDOW.scored]]), use_cache=False).logits[0].log_softmax(-1)
    subject = Subject(model)
    kv_LHPTD = subject.kv(WINDOW.prefix, "float32")
    assert kv_LHPTD.shape == (LAYERS, KV_HEADS, 2, 40, HEAD_DIM)
    torch.testing.assert_close(subject.log_probs(kv_LHPTD, WINDOW.scored), whole[40:], atol=2e-4, rtol=0)


def test_kv_is_rounded_as_a_worker_stores_it() -> None:
    kv_LHPTD = subject_of().kv(WINDOW.prefix, "bfloat16")
    assert not (kv_LHPTD.view(np.uint32) & 0xFFFF).any()


def test_keys_come_before_values() -> None:
    subject = subject_of()
    kv_LHPTD, at_3 = subject.kv(WINDOW.prefix, "float32"), subject.kv((5, 5, 5, 5), "float32")
    assert kv_LHPTD.shape[2] == 2
    values_TD, keys_TD = at_3[0, 0, 1], at_3[0, 0, 0]
    assert np.allclose(values_TD, values_TD[0], atol=1e-6), "values of one token do not know where they are"
    assert not np.allclose(keys_TD, keys_TD[0], atol=1e-2), "keys do"


# -- gradients ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_gradients_predict_the_kl_of_a_small_error(layer: int, part: int) -> None:
    """An error that is equally large everywhere in a part: its expected (g . e)^2 is its variance times |g|^2."""
    subject = subject_of()
    kv_LHPTD = subject.kv(WINDOW.prefix, "float32")
    draws = [subject.gradients(kv_LHPTD, WINDOW.scored, seed)[layer, :, part] for seed in range(40)]
    sigma = 0.01 * float(kv_LHPTD[layer, :, part].std())
    predicted = sigma**2 / 2 * np.mean([np.square(gradients).sum() for gradients in draws]) / len(WINDOW.scored)
    judge, rng = Judge(subject, WINDOW, kv_LHPTD), np.random.default_rng(0)
    measured = np.mean([judge.loss(disturbed(kv_LHPTD, layer, part, sigma, rng)).kl for _ in range(40)])
    assert measured == pytest.approx(predicted, rel=0.35)


def disturbed(kv_LHPTD: Floats, layer: int, part: int, sigma: float, rng: np.random.Generator) -> Floats:
    copy_LHPTD = kv_LHPTD.copy()
    copy_LHPTD[layer, :, part] += sigma * rng.standard_normal(copy_LHPTD[layer, :, part].shape).astype(np.float32)
    return copy_LHPTD


def test_the_same_seed_draws_the_same_tokens() -> None:
    subject = subject_of()
    kv_LHPTD = subject.kv(WINDOW.prefix, "bfloat16")
    one, again, other = (subject.gradients(kv_LHPTD, WINDOW.scored, seed) for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


# -- rotation ----------------------------------------------------------------------------------------------------------
def inv_freq(model: Any, layer: int) -> torch.Tensor:
    """As the module itself has it; Gemma-3 has one table per layer type."""
    rotary = model.model.rotary_emb
    kinds = getattr(model.config, "layer_types", None) or [""] * LAYERS
    own = getattr(rotary, f"{kinds[layer]}_inv_freq", None)
    table: torch.Tensor = own if own is not None else rotary.inv_freq
    return table


@pytest.mark.parametrize("family", DENSE)
def test_rotation_is_found(family: str) -> None:
    model = tiny_model(tiny_config(family))
    frequencies_LF = Subject(model).rope_frequencies()
    for layer in range(LAYERS):
        np.testing.assert_allclose(frequencies_LF[layer], inv_freq(model, layer), rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_turning_back_recovers_what_the_projection_gave(family: str) -> None:
    model = tiny_model(tiny_config(family))
    layer = LAYERS - 1
    attention = model.model.layers[layer].self_attn
    last: nn.Module = attention.k_norm if hasattr(attention, "k_norm") else attention.k_proj
    projected: list[torch.Tensor] = []
    subject = Subject(model)
    last.register_forward_hook(lambda module, args, output: projected.append(output))
    keys_HTD = subject.kv(WINDOW.prefix, "float32")[layer, :, 0]
    frequencies_F = subject.rope_frequencies()[layer]
    angles_TF = np.arange(keys_HTD.shape[1])[:, None] * frequencies_F
    first, second = np.split(keys_HTD, 2, axis=-1)
    turned_back = [first * np.cos(angles_TF) + second * np.sin(angles_TF)]
    turned_back += [second * np.cos(angles_TF) - first * np.sin(angles_TF)]
    expected = projected[0].squeeze(0).numpy()
    expected_HTD = expected if expected.ndim == 3 else expected.reshape(-1, KV_HEADS, HEAD_DIM).transpose(1, 0, 2)
    np.testing.assert_allclose(np.concatenate(turned_back, axis=-1), expected_HTD, atol=1e-4)


def test_a_constant_factor_on_the_angles_does_no_harm() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 128}
    subject = subject_of(rope_parameters=yarn)
    assert subject.rope_frequencies().shape == (LAYERS, HEAD_DIM // 2)


def test_part_of_a_head_may_turn() -> None:
    half = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    subject = subject_of("phi3", rope_parameters=half)
    assert subject.rope_frequencies().shape == (LAYERS, HEAD_DIM // 4)


def test_layers_that_do_not_turn_have_frequency_zero() -> None:
    from transformers import SmolLM3Config

    shape = {key: value for key, value in tiny_config().to_dict().items() if key not in {"model_type", "architectures"}}
    config = SmolLM3Config(**shape | {"no_rope_layers": [1, 0, 1], "layer_types": None, "use_sliding_window": False})
    frequencies_LF = Subject(tiny_model(config)).rope_frequencies()
    assert frequencies_LF[0].any() and not frequencies_LF[1].any() and frequencies_LF[2].any()


def test_what_turns_otherwise_is_left_alone() -> None:
    """Neighbouring channels instead of halves: nothing that the frequencies would explain."""
    from transformers import CohereConfig

    shape = {key: value for key, value in tiny_config().to_dict().items() if key not in {"model_type", "architectures"}}
    subject = Subject(tiny_model(CohereConfig(**shape)))
    assert subject.rope_frequencies().shape == (LAYERS, 0)


# -- windows -----------------------------------------------------------------------------------------------------------
def test_windows_are_whole_and_begin_as_prompts_do() -> None:
    windows = windows_of(range(100, 125), lead=(1,), prefix_tokens=6, scored_tokens=3)
    assert [window.prefix for window in windows] == [
        (1, 100, 101, 102, 103, 104),
        (1, 108, 109, 110, 111, 112),
        (1, 116, 117, 118, 119, 120),
    ]
    assert windows[1].scored == (113, 114, 115)
    assert windows_of(range(7), lead=(1,), prefix_tokens=6, scored_tokens=3) == []


def test_families_are_known() -> None:
    assert set(DENSE) <= set(FAMILIES)


# -- the real model ----------------------------------------------------------------------------------------------------
@pytest.mark.model
@pytest.mark.timeout(120)
def test_gradients_predict_the_default_models_kl(model_dir: Path) -> None:
    """One layer's keys and one layer's values, wrong by 2 % of their spread: what the errors cost is foretold."""
    subject = Subject.load(model_dir)
    window = Window(tuple(range(1_000, 1_200)), tuple(range(2_000, 2_064)))
    kv_LHPTD = subject.kv(window.prefix, "bfloat16")
    gradients_LHPTD = subject.gradients(kv_LHPTD, window.scored, seed=0)
    judge, rng = Judge(subject, window, kv_LHPTD), np.random.default_rng(0)
    for layer, part in ((5, 0), (20, 1)):
        sigma = 0.02 * float(kv_LHPTD[layer, :, part].std())
        predicted = sigma**2 / 2 * np.square(gradients_LHPTD[layer, :, part]).sum() / len(window.scored)
        measured = np.mean([judge.loss(disturbed(kv_LHPTD, layer, part, sigma, rng)).kl for _ in range(4)])
        assert measured == pytest.approx(predicted, rel=0.6)
    assert subject.rope_frequencies().shape == (30, 32)
