"""The engine beside transformers, in one process: same model, same weights, same threads, taking turns step by step.

Rows: prefill of 1,024 tokens; decode-only steps of one stream and of eight, short and long. And what a decode step
costs over batch and context, against the bytes that it must read: the roofline, from rates measured just before.

    a step must read   all weights once, whoever shares them  +  K and V of every token of every sequence
    a step must do     2 operations per weight and sequence   +  4 * query heads * head dim per token and layer of each

No server, no scheduler: plans go straight to the runner, and both sides pick the likeliest token, so that a step counts
from tokens to tokens. Bars are on ratios of neighbours in time; a busy machine slows both.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.figures import Bar, Figure, figure_of
from engine.attention.paged_numba import PagedNumba
from engine.commands import SequenceSlice, StepPlan
from engine.kv.arena import Arena
from engine.model_runner import ModelRunner
from engine.models.checkpoint import ensure_default_model, load_model
from engine.models.info import describe, schema_for
from engine.models.packing import prepare_for_cpu
from engine.types import SamplingParams

DTYPE = "bfloat16"
THREADS = 2
BLOCK_SIZE = 16
PREFILL_TOKENS = 1_024
PREFILL_PAIRS = 15
DECODES = ((1, 200, 40), (8, 200, 30), (8, 1_500, 20))  # streams, context, pairs
GRID_BATCHES = (1, 2, 4, 8, 16)
GRID_CONTEXTS = (128, 512, 1_024, 2_048, 4_096)
GRID_STEPS = 7
COPY_BYTES = 256 << 20
MATMUL_SIZE = 2_048
RATE_SAMPLES = 25  # of which the best counts: the roofline is what the machine can do

PREFILL = Bar(
    name="prefill of 1,024 tokens",
    claim="as fast as transformers' forward with logits_to_keep=1",
    unit="x",
    limit=1.0,
    at_least=True,
)
DECODE_BARS = tuple(
    Bar(
        name=f"decode, {streams} x {context:,} tokens",
        claim=f"at least {limit} times as fast as transformers' decode loop",
        unit="x",
        limit=limit,
        at_least=True,
    )
    for (streams, context, _), limit in zip(DECODES, (1.5, 1.8, 2.5), strict=True)
)
GROWTH = Bar(
    name="decode step cost",
    claim="grows with sequences and context no faster than the bytes that a step must read",
    unit="x of the growth in bytes",
    limit=1.0,
)


# -- roofline ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Rates:
    """What this machine does now, with as many threads as the model gets."""

    read_gb_per_s: float
    matmul_gflop_per_s: float


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What one step must move and compute. Tokens of context include the new ones."""

    weight_bytes: int
    weights: int
    kv_token_bytes: int
    attention_flops: int  # per query and token of context

    @classmethod
    def of(cls, model: Any, kv_token_bytes: int) -> "ModelCost":
        config = model.config
        weights = sum(parameter.numel() for parameter in model.parameters())  # a tied embedding is read as the head
        attention_flops = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
        return cls(weights * model.dtype.itemsize, weights, kv_token_bytes, attention_flops)

    def step_bytes(self, contexts: Sequence[int]) -> int:
        return self.weight_bytes + self.kv_token_bytes * sum(contexts)

    def roofline(self, rates: Rates, contexts: Sequence[int], new_tokens: int = 1) -> tuple[float, float]:
        """(ms to read, ms to compute) of a step that gives each sequence `new_tokens`; causal halves are counted."""
        flops: float = 2 * self.weights * len(contexts) * new_tokens
        flops += sum(self.attention_flops * new_tokens * (context - (new_tokens - 1) / 2) for context in contexts)
        read_ms = self.step_bytes(contexts) / rates.read_gb_per_s / 1e6
        return read_ms, flops / rates.matmul_gflop_per_s / 1e6


def measured_rates() -> Rates:
    memory = torch.ones(COPY_BYTES // 4)
    left, right = (torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(torch.bfloat16) for _ in range(2))
    read_ms = min(_timed_ms(memory.sum) for _ in range(RATE_SAMPLES))
    matmul_ms = min(_timed_ms(lambda: left @ right) for _ in range(RATE_SAMPLES))
    return Rates(COPY_BYTES / read_ms / 1e6, 2 * MATMUL_SIZE**3 / matmul_ms / 1e6)


# -- the two sides -----------------------------------------------------------------------------------------------------
class Ours:
    """The product's own runner over an arena, fed with plans."""

    def __init__(self) -> None:
        path = ensure_default_model()
        model, _ = load_model(path, DTYPE)
        schema = schema_for(describe(path), DTYPE)
        tokens = max(GRID_BATCHES) * (max(GRID_CONTEXTS) + BLOCK_SIZE)
        arena = Arena(schema, columns=-(-tokens // BLOCK_SIZE), block_size=BLOCK_SIZE)
        self.cost = ModelCost.of(model, schema.token_bytes)
        prepare_for_cpu(model, threads=THREADS)
        self._runner = ModelRunner(model, arena, backend=PagedNumba())

    def step_ms(self, batch: int, start: int, tokens: int) -> float:
        plan = self._plan(batch, start, tokens)
        # `max`, as the product's sampler has it: torch's `argmax` of bfloat16 takes 0.6 ms longer for eight rows.
        return _timed_ms(lambda: self._runner.run(plan, _ignore).sampled_NV.max(dim=-1).indices.tolist())

    def _plan(self, batch: int, start: int, tokens: int) -> StepPlan:
        """Sequences whose columns are interleaved, as those of sequences that grew together are."""
        blocks = -(-(start + tokens) // BLOCK_SIZE)
        fed = tuple(_prompt(tokens))
        return StepPlan(
            0,
            tuple(
                SequenceSlice(
                    seq_id=sequence,
                    token_ids=fed,
                    start=start,
                    block_table=tuple(range(sequence, sequence + blocks * batch, batch)),
                    sampling=SamplingParams(temperature=0.0),
                    sample_position=0,
                    is_prefill=tokens > 1,
                )
                for sequence in range(batch)
            ),
        )


class Theirs:
    """transformers with its fastest attention (sdpa) and its own cache."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, DTYPE)
        path = ensure_default_model()
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")

    @torch.inference_mode()
    def prefill_ms(self, tokens: int) -> float:
        prompt = torch.tensor([_prompt(tokens)])
        return _timed_ms(
            lambda: self._model(prompt, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
        )

    @torch.inference_mode()
    def decode_loop(self, batch: int, context: int) -> Iterator[float]:
        """Milliseconds of one decode step after the other, as `generate` makes them."""
        output = self._model(torch.tensor([_prompt(context)] * batch), use_cache=True, logits_to_keep=1)
        cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)
        while True:
            started = time.perf_counter()
            output = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens = output.logits[:, -1:].argmax(-1)
            tokens.tolist()
            yield (time.perf_counter() - started) * 1e3


def _prompt(tokens: int) -> list[int]:
    return [(7919 * position + 13) % 49_000 for position in range(tokens)]


def _ignore(start: int, end: int) -> None:
    """Nobody waits for layers."""


def _timed_ms(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3


# -- measuring ---------------------------------------------------------------------------------------------------------
async def measure() -> list[Figure]:
    torch.set_num_threads(THREADS)
    rates = measured_rates()
    ours, theirs = Ours(), Theirs()
    return [*ratios(ours, theirs, rates), growth(ours, rates)]


def ratios(ours: Ours, theirs: Theirs, rates: Rates, share_of_pairs: float = 1.0) -> list[Figure]:
    figures = [_prefill(ours, theirs, rates, round(PREFILL_PAIRS * share_of_pairs))]
    for bar, (streams, context, pairs) in zip(DECODE_BARS, DECODES, strict=True):
        figures.append(_decode(bar, ours, theirs, rates, (streams, context), round(pairs * share_of_pairs)))
    return figures


def _prefill(ours: Ours, theirs: Theirs, rates: Rates, pairs: int) -> Figure:
    both = _in_turns(
        lambda: ours.step_ms(1, 0, PREFILL_TOKENS),
        lambda: theirs.prefill_ms(PREFILL_TOKENS),
        pairs,
    )
    return _ratio(PREFILL, both, ours.cost.roofline(rates, [PREFILL_TOKENS], PREFILL_TOKENS))


def _decode(bar: Bar, ours: Ours, theirs: Theirs, rates: Rates, shape: tuple[int, int], pairs: int) -> Figure:
    """Both sides walk through the same contexts: a step longer each time."""
    streams, context = shape
    their_steps = theirs.decode_loop(streams, context)
    our_contexts = iter(range(context, context + pairs + 1))
    both = _in_turns(lambda: ours.step_ms(streams, next(our_contexts), 1), lambda: next(their_steps), pairs)
    return _ratio(bar, both, ours.cost.roofline(rates, [context] * streams))


def _in_turns(ours: Callable[[], float], theirs: Callable[[], float], pairs: int) -> list[tuple[float, float]]:
    return [(ours(), theirs()) for _ in range(pairs + 1)][1:]  # the first warms both up


def _ratio(bar: Bar, both: Sequence[tuple[float, float]], roofline_ms: tuple[float, float]) -> Figure:
    ours_ms = median(ours for ours, _ in both)
    return figure_of(
        bar,
        [theirs / ours for ours, theirs in both],
        ours_ms=round(ours_ms, 2),
        theirs_ms=round(median(theirs for _, theirs in both), 2),
        roofline_ms=round(max(roofline_ms), 2),
        share_of_roofline=round(max(roofline_ms) / ours_ms, 3),
    )


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid: the fastest of a few steps, since what is asked for is the cost, not the neighbours'."""

    batch: int
    context: int
    step_ms: float
    megabytes: float
    roofline_ms: float


def growth(ours: Ours, rates: Rates) -> Figure:
    """Each cell against the smallest step: how often as long it takes, over how often as much it must read."""
    cells = _cells(ours, rates)
    Console().print(_table(cells))
    first = cells[0]
    samples = [(cell.step_ms / first.step_ms) / (cell.megabytes / first.megabytes) for cell in cells[1:]]
    return figure_of(GROWTH, samples, worst=round(max(samples), 3), cells=[asdict(cell) for cell in cells])


def _cells(ours: Ours, rates: Rates) -> list[Cell]:
    """Rounds over the whole grid, so that a neighbour's burst of work hits one step of many cells, not one cell."""
    shapes = [(batch, context) for batch in GRID_BATCHES for context in GRID_CONTEXTS]
    rounds = [[ours.step_ms(batch, context - 1, 1) for batch, context in shapes] for _ in range(GRID_STEPS)]
    fastest = map(min, zip(*rounds, strict=True))
    return [_cell(ours.cost, rates, shape, step_ms) for shape, step_ms in zip(shapes, fastest, strict=True)]


def _cell(cost: ModelCost, rates: Rates, shape: tuple[int, int], step_ms: float) -> Cell:
    batch, context = shape
    contexts = [context] * batch
    megabytes, roofline_ms = cost.step_bytes(contexts) / 1e6, max(cost.roofline(rates, contexts))
    return Cell(batch, context, round(step_ms, 2), round(megabytes, 1), round(roofline_ms, 2))


def _table(cells: Sequence[Cell]) -> Table:
    table = Table("sequences", "context", "step ms", "MB to read", "GB/s", "of the roofline")
    for cell in cells:
        table.add_row(
            str(cell.batch),
            f"{cell.context:,}",
            f"{cell.step_ms:.1f}",
            f"{cell.megabytes:,.0f}",
            f"{cell.megabytes / cell.step_ms:.1f}",
            f"{cell.roofline_ms / cell.step_ms:.0%}",
        )
    return table
