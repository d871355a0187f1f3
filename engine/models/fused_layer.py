"""One decoder layer of the common shape as seven calls: four matrix products, and what lies between them.

    x ->  norm -> [q|k|v] -> rotate, store KV -> attention -> o -> + x      Llama, Mistral, Qwen2, SmolLM2 ...
      ->  norm -> [gate|up] -> silu(gate) * up -> down -> + x

A transformers layer does the same in about ninety torch calls. On two cores a decode step of SmolLM2-135M spends 25 of
its 48 ms in calls that compute next to nothing; no kernel can take that away, only fewer calls.

It is no model code: which layers are of this shape is not a list of families but a measurement. `LayerFuser` builds
the successor of any layer that has the parts, runs both on random input over real pages, and keeps it only if hidden
states and stored keys and values are the same. Layers with norms on queries and keys, with another order of norms,
other activations or experts keep transformers' code, with our products and norms in it.

Legend: T packed tokens, E hidden size, X q|k|v together, F width of the MLP, Q query heads, H kv heads, D head dim.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.attention import Attend, Scores, StepAttention
from engine.attention.paged_kv import PagedKV, Span
from engine.attention.paged_numba import Pages
from engine.attention.paged_sdpa import PagedSdpa
from engine.kernels import Array, array_of
from engine.kernels.layer_parts import rotate_and_store, silu_and_multiply
from engine.kv.arena import Arena
from engine.kv.schema import CacheSchema, Stream
from engine.models.packing import FusedNorm, WeightMemory, close, takes

_PROJECTIONS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
_NORMS = ("input_layernorm", "post_attention_layernorm")
_PROBE_TOKENS, _PROBE_BLOCK = 5, 4  # two blocks, one of them not full

Angles = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of each token's rotation, [1, T, D]."""


@dataclass(frozen=True, slots=True)
class _StepArrays:
    """What all layers of one step share, as kernels see it. Legend: R rows of D numbers in the arena."""

    of_step: StepAttention
    pages_RD: Array
    rows_TH: Array
    cos_TD: Array
    sin_TD: Array
    layer_rows: int  # from a row to the same row of the next layer
    slots: int  # from a key to its value

    @classmethod
    def make(cls, paged: StepAttention, angles: Angles) -> "_StepArrays":
        pages = Pages.of(paged.kv)
        return cls(
            of_step=paged,
            pages_RD=pages.rows_RD,
            rows_TH=paged.rows_TH.numpy(),
            cos_TD=array_of(angles[0][0]),
            sin_TD=array_of(angles[1][0]),
            layer_rows=pages.layer_elements // pages.head_dim,
            slots=pages.slots,
        )


class _StepMemory:
    """Keeps the arrays of the step that runs now, which the first layer makes and the others find."""

    def __init__(self) -> None:
        self._step: _StepArrays | None = None

    def arrays(self, paged: StepAttention, angles: Angles) -> _StepArrays:
        if self._step is None or self._step.of_step is not paged:
            self._step = _StepArrays.make(paged, angles)
        return self._step


class FusedLayer(nn.Module):
    """Stands in for a transformers decoder layer: same call, same result, same KV in the arena."""

    def __init__(self, layer: Any, scores: Scores, weights: WeightMemory, step: _StepMemory) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        # Found by name: the runner knows layers by their index, its self-check shortens long windows.
        self.layer_idx: int = attention.layer_idx
        self.sliding_window: int | None = scores.window
        self._scaling, self._softcap = scores.scaling, scores.softcap
        self._queries: int = attention.q_proj.out_features // attention.head_dim
        self._head_dim: int = attention.head_dim
        self._width: int = mlp.gate_proj.out_features
        self._step = step
        self._input_norm = _norm(layer.input_layernorm)
        self._qkv = weights.joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self._o = weights.joined(attention.o_proj)
        self._post_norm = _norm(layer.post_attention_layernorm)
        self._gate_up = weights.joined(mlp.gate_proj, mlp.up_proj)
        self._down = weights.joined(mlp.down_proj)
        self._rotate_and_store = rotate_and_store()
        self._silu_and_multiply = silu_and_multiply()

    def forward(
        self,
        hidden_1TE: torch.Tensor,
        *,
        paged: StepAttention,
        position_embeddings: Angles,
        **_: Any,  # masks and positions: attention knows them from the step, rotation from the angles
    ) -> torch.Tensor:
        x_TE = hidden_1TE[0]
        query_TQD = self._rotate(self._qkv(self._input_norm(x_TE)), paged, position_embeddings)
        scores = Scores(self._scaling, self.sliding_window, self._softcap)
        attended_TQD = paged.attend(query_TQD.transpose(0, 1), self.layer_idx, scores)
        x_TE = self._o.plus(attended_TQD.flatten(1), x_TE)
        activated_TF = self._activate(self._gate_up(self._post_norm(x_TE)))
        return self._down.plus(activated_TF, x_TE)[None]

    def _rotate(self, qkv_TX: torch.Tensor, paged: StepAttention, angles: Angles) -> torch.Tensor:
        """Rotated queries. Keys, rotated, and values go to the arena."""
        query_TQD = torch.empty(len(qkv_TX), self._queries, self._head_dim, dtype=qkv_TX.dtype)
        step = self._step.arrays(paged, angles)
        shift = self.layer_idx * step.layer_rows
        self._rotate_and_store(
            array_of(qkv_TX),
            step.cos_TD,
            step.sin_TD,
            step.rows_TH,
            shift,
            step.slots,
            step.pages_RD,
            array_of(query_TQD),
        )
        return query_TQD

    def _activate(self, gate_up_TX: torch.Tensor) -> torch.Tensor:
        out_TF = torch.empty(len(gate_up_TX), self._width, dtype=gate_up_TX.dtype)
        self._silu_and_multiply(array_of(gate_up_TX), array_of(out_TF))
        return out_TF


def _norm(module: nn.Module) -> FusedNorm:
    norm = FusedNorm.of(module)
    if norm is None:
        raise TypeError(f"{type(module).__name__} is no RMS norm")
    return norm


# -- choosing ----------------------------------------------------------------------------------------------------------
class LayerFuser:
    """Makes fused successors for the layers of one model."""

    def __init__(self, weights: WeightMemory) -> None:
        self._weights = weights
        self._step = _StepMemory()

    def __call__(self, module: nn.Module) -> FusedLayer | None:
        """The successor, or None where there is none that gives the same."""
        if not _has_the_parts(module):
            return None
        room, fused = self._weights.room, None
        with suppress(Exception):  # foreign modules raise what they like; whatever it is, this one is left as it is
            fused = self._fuse(module)
        if fused is None:
            self._weights.room = room
        return fused

    def _fuse(self, layer: Any) -> FusedLayer | None:
        probe = _Probe(layer)
        expected = probe.run(layer)
        fused = FusedLayer(layer, probe.scores, self._weights, self._step)
        actual = probe.run(fused)
        return fused if all(map(close, actual, expected)) else None


def _has_the_parts(module: nn.Module) -> bool:
    parts = dict(module.named_modules())
    linears = [parts.get(name) for name in _PROJECTIONS]
    return all(type(linear) is nn.Linear and takes(linear.weight) for linear in linears) and all(
        name in parts for name in _NORMS
    )


class _Probe:
    """A few random tokens, run through a layer over pages of its own."""

    def __init__(self, layer: Any) -> None:
        attention, dtype = layer.self_attn, layer.self_attn.q_proj.weight.dtype
        self._dtype = dtype
        self._layers = attention.layer_idx + 1
        self._head_dim = attention.head_dim
        self._kv_heads = attention.k_proj.out_features // attention.head_dim
        self._hidden_1TE = torch.randn(1, _PROBE_TOKENS, attention.q_proj.in_features).to(dtype)
        angle_1TD = torch.randn(1, _PROBE_TOKENS, attention.head_dim // 2).repeat(1, 1, 2)
        self._angles = angle_1TD.cos().to(dtype), angle_1TD.sin().to(dtype)
        self.scores = Scores(scaling=0.0)

    def run(self, layer: nn.Module) -> tuple[torch.Tensor, ...]:
        """(hidden states, stored keys, stored values). Leaves in `scores` what the layer asked attention for."""
        kv = PagedKV(self._arena())
        span = Span(row=0, tokens=_PROBE_TOKENS, start=0, table=(1, 0))
        asked: list[Scores] = []
        paged = StepAttention(kv, kv.rows_of([span]), _recording(PagedSdpa().prepare(kv, [span]), asked))
        hidden_1TE = layer(self._hidden_1TE, attention_mask=None, position_embeddings=self._angles, paged=paged)
        (self.scores,) = asked
        return hidden_1TE, *kv.gather_rows(self._layers - 1, paged.rows_TH)

    def _arena(self) -> Arena:
        stream = Stream(
            name="kv",
            layers=self._layers,
            heads=self._kv_heads,
            head_dim=self._head_dim,
            dtype=str(self._dtype).removeprefix("torch."),
        )
        return Arena(CacheSchema("probe", (stream,)), columns=2, block_size=_PROBE_BLOCK)


def _recording(attend: Attend, asked: list[Scores]) -> Attend:
    def record(query_QTD: torch.Tensor, layer: int, scores: Scores) -> torch.Tensor:
        asked.append(scores)
        return attend(query_QTD, layer, scores)

    return record
