"""Capture: what a model's KV is over a text, how much each number of it matters, and how keys are rotated.

    window    | prefix: its KV is what workers exchange | scored: next-token distributions that the KV is judged by |

The model is transformers' own module in float32, called whole, with KV handed in and out; no arena, no kernels of ours.
Codecs are calibrated from what comes out (`kv_transfer.calibration`), and judged by what they do to the scored tokens
(`engine.quality`). What is decided from that is not decided here.

Legend: L layers, H kv heads, P parts (K, V), T tokens, D head dim, F rotated pairs of a head, S scored tokens,
V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from engine.model_runner import decoder_layers
from engine.models.checkpoint import load_model
from engine.models.info import require_servable

PREFIX_TOKENS: Final = 768
SCORED_TOKENS: Final = 256
WINDOW_TOKENS: Final = PREFIX_TOKENS + SCORED_TOKENS

_PROBE_TOKENS = 24  # prompt of the two questions below: which attention, which rotation
_PROBE_SHIFT = 37
_SAME = 1e-3  # relative to the largest number: rounding in float32 is 1e-5, a wrong rotation or mask 0.1 and more

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of one text, as token ids."""

    prefix: tuple[int, ...]
    scored: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prefix) + len(self.scored)


def windows_of(
    token_ids: Sequence[int],
    lead: Sequence[int] = (),
    prefix_tokens: int = PREFIX_TOKENS,
    scored_tokens: int = SCORED_TOKENS,
) -> list[Window]:
    """A text cut into whole windows, one after the other; each begins with `lead`, as every prompt does."""
    fresh = prefix_tokens + scored_tokens - len(lead)
    starts = range(0, len(token_ids) - fresh + 1, fresh)
    cut = ((*lead, *token_ids[start : start + fresh]) for start in starts)
    return [Window(tokens[:prefix_tokens], tokens[prefix_tokens:]) for tokens in cut]


class Subject:
    """A model whose KV can be taken out and put back. Never trained: weights carry no gradients."""

    def __init__(self, model: Any) -> None:
        require_servable(model.config.to_dict())
        self._model = model.float().requires_grad_(False)
        _use_fastest_attention(self._model)

    @classmethod
    def load(cls, path: Path) -> "Subject":
        return cls(load_model(path, "float32")[0])

    @torch.inference_mode()
    def kv(self, prefix: Sequence[int], dtype: str) -> Floats:
        """kv_LHPTD of a prefix from position 0, rounded to `dtype` as a worker stores it."""
        cache = _cache()
        self._model(_ids(prefix), past_key_values=cache, use_cache=True, logits_to_keep=1)
        kv_LPHTD = torch.stack([torch.cat((layer.keys, layer.values)) for layer in cache.layers])
        rounded_LPHTD = kv_LPHTD.to(getattr(torch, dtype)).float()
        return rounded_LPHTD.transpose(1, 2).contiguous().numpy()

    @torch.inference_mode()
    def log_probs(self, kv_LHPTD: Floats, scored: Sequence[int]) -> torch.Tensor:
        """log_probs_SV of the token after each scored token, given a prefix with this KV."""
        return self._logits(torch.from_numpy(kv_LHPTD), scored).log_softmax(dim=-1)

    def gradients(self, kv_LHPTD: Floats, scored: Sequence[int], seed: int) -> Floats:
        """d log p(next tokens) / d kv, of next tokens drawn from the model's own distributions.

        Drawn, not read from the text: only then is the mean of (g . e)^2 / 2 the second-order KL of an error e, because
        the Fisher matrix is the Hessian of the KL (Amari). Summed over the scored tokens, whose draws are independent.
        """
        leaf_LHPTD = torch.from_numpy(kv_LHPTD).requires_grad_()
        with torch.enable_grad():
            log_probs_SV = self._logits(leaf_LHPTD, scored).log_softmax(dim=-1)
            generator = torch.Generator().manual_seed(seed)
            drawn_S1 = torch.multinomial(log_probs_SV.detach().exp(), 1, generator=generator)
            (gradients_LHPTD,) = torch.autograd.grad(log_probs_SV.gather(1, drawn_S1).sum(), leaf_LHPTD)
        return gradients_LHPTD.numpy()

    @torch.inference_mode()
    def rope_frequencies(self) -> Floats:
        """frequencies_LF: channels i and i + F of a key turn by position * frequency. F = 0: not rotated like that.

        What a family does to its keys (halves or neighbours, part of a head, some layers not at all) is measured, not
        looked up: keys of one prompt at two places must be equal once they are turned back.
        """
        with _position_embeddings(self._model) as seen:
            here = self._probe_keys(0)
        there = self._probe_keys(_PROBE_SHIFT)
        rows = [_turning(seen.get(layer), *keys) for layer, keys in enumerate(zip(here, there, strict=True))]
        known = [row_F for row_F in rows if row_F is not None]
        if len(known) < len(rows) or len({len(row_F) for row_F in known}) != 1:
            return np.zeros((len(rows), 0), np.float32)
        return torch.stack(known).numpy()

    def _logits(self, kv_LHPTD: torch.Tensor, scored: Sequence[int]) -> torch.Tensor:
        cache = _cache()
        for layer, kv_HPTD in enumerate(kv_LHPTD):
            cache.update(kv_HPTD[None, :, 0], kv_HPTD[None, :, 1], layer)
        logits_SV: torch.Tensor = self._model(_ids(scored), past_key_values=cache, use_cache=True).logits[0]
        return logits_SV

    def _probe_keys(self, first_position: int) -> list[torch.Tensor]:
        """keys_HTD of each layer, for the probe's prompt at these positions."""
        cache, tokens = _cache(), _probe(self._model)
        positions = torch.arange(first_position, first_position + len(tokens))
        self._model(_ids(tokens), position_ids=positions[None], past_key_values=cache, use_cache=True)
        return [layer.keys[0] for layer in cache.layers]


def _ids(tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(tokens)])


def _cache() -> Any:
    """Without the configuration, so that it keeps every token, also of layers that look back over a window only."""
    from transformers import DynamicCache

    return DynamicCache()


def _probe(model: Any) -> list[int]:
    return [(7919 * position + 13) % model.config.vocab_size for position in range(_PROBE_TOKENS)]


@torch.inference_mode()
def _use_fastest_attention(model: Any) -> None:
    """torch's fused attention in place of transformers' plain one, 2.5 times as fast, if the logits stay the same."""
    tokens = _ids(_probe(model))
    plain = model(tokens, use_cache=False).logits
    try:
        model.set_attn_implementation("sdpa")
        if _equal(model(tokens, use_cache=False).logits, plain):
            return
    except (ValueError, RuntimeError):  # a family without it
        pass
    model.set_attn_implementation("eager")


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= _SAME * other.abs().max())


# -- rotation ----------------------------------------------------------------------------------------------------------
@contextmanager
def _position_embeddings(model: Any) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """(cos, sin) that each decoder layer is handed, by layer; they may differ by the layer's type (Gemma-3)."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def note(layer: int, keywords: dict[str, Any]) -> None:
        if (pair := keywords.get("position_embeddings")) is not None:
            seen[layer] = pair

    with ExitStack() as hooks:
        for index, module in enumerate(decoder_layers(model)):
            hook = module.register_forward_pre_hook(
                lambda _, args, keywords, index=index: note(index, keywords), with_kwargs=True
            )
            hooks.callback(hook.remove)
        yield seen


def _turning(
    pair: tuple[torch.Tensor, torch.Tensor] | None, here_HTD: torch.Tensor, there_HTD: torch.Tensor
) -> torch.Tensor | None:
    """frequencies_F of one layer's keys, zeros if they do not turn at all; None: not explained."""
    if pair is None:
        return None
    cos_F, sin_F = (table_1TR[0, 1, : table_1TR.shape[-1] // 2] for table_1TR in pair)
    frequencies_F = torch.atan2(sin_F, cos_F)  # at position 1 the angle is the frequency; a common factor drops out
    for candidate_F in (frequencies_F, torch.zeros_like(frequencies_F)):
        if _equal(_turned_back(there_HTD, candidate_F, _PROBE_SHIFT), _turned_back(here_HTD, candidate_F, 0)):
            return candidate_F
    return None


def _turned_back(keys_HTD: torch.Tensor, frequencies_F: torch.Tensor, first_position: int) -> torch.Tensor:
    pairs = len(frequencies_F)
    positions_T = torch.arange(first_position, first_position + keys_HTD.shape[1])
    angles_TF = positions_T[:, None] * frequencies_F
    cos_TF, sin_TF = angles_TF.cos(), angles_TF.sin()
    first, second, rest = keys_HTD[..., :pairs], keys_HTD[..., pairs : 2 * pairs], keys_HTD[..., 2 * pairs :]
    return torch.cat((first * cos_TF + second * sin_TF, second * cos_TF - first * sin_TF, rest), dim=-1)
