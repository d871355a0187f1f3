"""Random models of a few thousand weights, and a driver that feeds a runner as an engine would."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from engine.commands import SequenceSlice, StepPlan
from engine.kv.arena import Arena
from engine.kv.schema import CacheSchema, Stream
from engine.model_runner import ModelRunner
from engine.types import SamplingParams

VOCAB = 97
LAYERS = 3
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
WINDOW = 8  # of the families that have one: shorter than every prompt that tests them
GREEDY = SamplingParams(temperature=0.0)

_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": WINDOW}
# Configuration class and what makes the family special. Large soft caps would change nothing.
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": WINDOW}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "phi3": (Phi3Config, {"sliding_window": WINDOW}),
    "olmo2": (Olmo2Config, {}),
    "gemma2": (
        Gemma2Config,
        {**_ALTERNATING, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
    ),
    "gemma3": (
        Gemma3TextConfig,
        {
            **_ALTERNATING,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
            },
        },
    ),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW}),
    "qwen3_moe": (Qwen3MoeConfig, {"num_experts": 4, **_EXPERTS}),
    "olmoe": (OlmoeConfig, {"num_experts": 4, **_EXPERTS}),
}


def tiny_config(family: str = "llama", **overrides: Any) -> Any:
    """`initializer_range` is large, so that attention is far from uniform and a wrong mask shows in the logits."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": HEADS * HEAD_DIM,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "sliding_window": None,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,  # Gemma's scaled embeddings would predict the token that was fed
    }
    config_class, special = FAMILIES[family]
    return config_class(**(settings | special | overrides))


def tiny_model(config: Any = None, seed: int = 0) -> Any:
    """Same seed, same weights: two calls give a model to run and one to compare with."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config or tiny_config(), attn_implementation="eager").eval()


def tiny_arena(columns: int = 64, block_size: int = 4, config: Any = None, dtype: str = "float32") -> Arena:
    """Every number in it is NaN, so a token that nobody wrote and somebody reads spoils the logits."""
    config = config or tiny_config()
    stream = Stream(
        name="kv",
        layers=config.num_hidden_layers,
        heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        dtype=dtype,
    )
    arena = Arena(CacheSchema("tiny", (stream,)), columns=columns, block_size=block_size)
    arena.poison(range(columns))
    return arena


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [(31 * position + 17 * salt + position * position) % VOCAB for position in range(length)]


def generate(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """Transformers' own greedy tokens."""
    inputs = torch.tensor([list(prompt)])
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=tokens, do_sample=False)
    return list(output[0, len(prompt) :].tolist())


@dataclass
class Running:
    """A sequence: its tokens, how far it is computed, and the columns it owns."""

    seq_id: int
    tokens: list[int]
    table: tuple[int, ...]
    computed: int = 0
    prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_tokens :]

    def slice(self, tokens_max: int) -> SequenceSlice:
        end = min(self.computed + tokens_max, len(self.tokens))
        at = len(self.tokens) - self.prompt_tokens if end == len(self.tokens) else None
        fed = tuple(self.tokens[self.computed : end])
        return SequenceSlice(
            self.seq_id, fed, self.computed, self.table, GREEDY, at, self.computed < self.prompt_tokens
        )

    def fed(self, piece: SequenceSlice) -> None:
        self.computed += len(piece.token_ids)


def scattered_tables(arena: Arena, blocks: int, count: int) -> list[tuple[int, ...]]:
    """Tables whose columns are neither consecutive nor in order, with room to grow."""
    order = [(column * 29 + 7) % arena.columns for column in range(arena.columns)]
    assert len(set(order)) == arena.columns >= blocks * count
    return [tuple(order[index * blocks : (index + 1) * blocks]) for index in range(count)]


def step(runner: ModelRunner, pieces: Sequence[tuple[Running, int]], on_layers: Any = None) -> torch.Tensor:
    """Run (sequence, tokens at most) together; append the greedy tokens; logits of the slices that sampled."""
    slices = [sequence.slice(tokens_max) for sequence, tokens_max in pieces]
    logits_NV = runner.run(StepPlan(0, tuple(slices)), on_layers or (lambda start, end: None)).sampled_NV
    rows = iter(logits_NV)
    for (sequence, _), piece in zip(pieces, slices, strict=True):
        sequence.fed(piece)
        if piece.sample_position is not None:
            sequence.tokens.append(int(next(rows).argmax()))
    return logits_NV
