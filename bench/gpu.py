"""`python -m bench.gpu`: everything that needs an accelerator, in one call of under 8 minutes.

    1. tests      pytest -m gpu: streams, device memory
    2. kernel     which kernel, and whether it reads pages of 16, 32, 64, 128 and 256 tokens where they are
    3. correct    teacher-forced in bfloat16: how far below float32's best each token of ours is (bar: 0.3 nats),
                  replayed decode steps against plain ones
    4. speed      prefill of 1,024 tokens and decode steps of 1 to 64 sequences, taking turns with transformers

Writes bench/figures/gpu-correctness.json and gpu-speed.json. Where there is no accelerator it says so and ends with 2.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from bench.figures import Bar, Figure, figure_of, save
from engine.attention.paged_kv import PagedKV
from engine.attention.paged_varlen import PagedVarlen
from engine.commands import SequenceSlice, StepPlan
from engine.cuda_runner import CudaRunner
from engine.kv.device_arena import DeviceArena
from engine.models.checkpoint import ensure_default_model, load_model
from engine.models.info import describe, schema_for
from engine.types import SamplingParams

NO_DEVICE = 2
DTYPE = "bfloat16"
COLUMNS = 8_192
PAIRS = 15
TEST_TIMEOUT_S = 120
NATS = Bar(name="gpu nats", claim="bf16 token below fp32's best, teacher-forced", unit="nats", limit=0.3)
GRAPHS = Bar(name="gpu graphs", claim="replayed decode tokens equal to plain ones", unit="", limit=1.0, at_least=True)
_SHAPES = ((1, 200), (8, 200), (8, 1_500), (64, 200))  # (sequences, context tokens)


@dataclass(slots=True)
class Bench:
    """The default model on the device, twice: ours over pages, and transformers' own with its cache."""

    ours: CudaRunner
    theirs: Any
    arena: DeviceArena
    vocab_size: int

    @classmethod
    def load(cls, block_size: int) -> "Bench":
        path = ensure_default_model(progress=print)
        info = describe(path)
        arena = DeviceArena(schema_for(info, DTYPE), columns=COLUMNS * 16 // block_size, block_size=block_size)
        sizes = {"layers_per_group": info.layers, "max_model_len": 2_048}
        ours = CudaRunner.load(path, DTYPE, arena, **sizes)
        theirs, _ = load_model(path, DTYPE)
        theirs.config._attn_implementation = "sdpa"
        return cls(ours, theirs.to(arena.device), arena, info.vocab_size)  # type: ignore[arg-type]

    def tokens(self, length: int, salt: int) -> tuple[int, ...]:
        return tuple((7919 * at + 104_729 * salt + 13) % self.vocab_size for at in range(length))

    def tables(self, sequences: int, tokens: int) -> list[tuple[int, ...]]:
        blocks = -(-tokens // self.arena.block_size)
        free = count()
        return [tuple(next(free) for _ in range(blocks)) for _ in range(sequences)]

    def prefill(self, tokens: Sequence[int], table: tuple[int, ...]) -> torch.Tensor:
        piece = SequenceSlice(0, tuple(tokens), 0, table, SamplingParams(), 0, is_prefill=True)
        return self.ours.run(StepPlan(0, (piece,)), lambda start, end: None).sampled_NV

    def decode(self, tokens: Sequence[int], at: int, tables: Sequence[tuple[int, ...]]) -> torch.Tensor:
        slices = [
            SequenceSlice(n, (token,), at, table, SamplingParams(), 1, is_prefill=False)
            for n, (token, table) in enumerate(zip(tokens, tables, strict=True))
        ]
        return self.ours.run(StepPlan(0, tuple(slices)), lambda start, end: None).sampled_NV


def main() -> int:
    if not torch.cuda.is_available():
        print("torch finds no CUDA device on this machine: nothing was measured")
        return NO_DEVICE
    started_s = time.monotonic()
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"], timeout=TEST_TIMEOUT_S, check=False
    )
    kernel = kernels()
    block_size = next((size for size, in_place in kernel.items() if in_place), 16)
    bench = Bench.load(block_size)
    notes = {"device": torch.cuda.get_device_name(), "reads_pages_of": kernel, "block_size": block_size}
    correct = [nats(bench, notes), graphs(bench, notes)]
    save("gpu-correctness", correct)
    speed = [prefill_ratio(bench, notes), *(decode_ratio(bench, *shape, notes) for shape in _SHAPES)]
    save("gpu-speed", speed)
    for figure in (*correct, *speed):
        print(figure)
    print(f"tests: exit status {tests.returncode}; {time.monotonic() - started_s:.0f} s in all")
    return tests.returncode or int(not all(figure.passed for figure in correct))


# -- what the kernel takes ---------------------------------------------------------------------------------------------
def kernels() -> dict[int, bool]:
    """Page size -> read in place."""
    schema = schema_for(describe(ensure_default_model(progress=print)), DTYPE)
    return {
        size: PagedVarlen.choose(PagedKV(DeviceArena(schema, columns=4, block_size=size))).in_place
        for size in (16, 32, 64, 128, 256)
    }


# -- correctness -------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def nats(bench: Bench, notes: dict[str, Any]) -> Figure:
    """Our greedy tokens, judged by the float32 model given the same tokens before them."""
    judge, _ = load_model(ensure_default_model(progress=print), "float32")
    judge.to(bench.arena.device)  # type: ignore[arg-type]
    prompt = bench.tokens(300, salt=1)
    (table,) = bench.tables(1, 600)
    output = [int(bench.prefill(prompt, table)[0].argmax())]
    while len(output) < 256:
        output.append(int(bench.decode([output[-1]], len(prompt) + len(output) - 1, [table])[0].argmax()))
    whole = torch.tensor([[*prompt, *output]], device=bench.arena.device)
    logprobs_TV = judge(whole, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    chosen_T = logprobs_TV.gather(1, whole[0, len(prompt) :, None])[:, 0]
    below = (logprobs_TV.amax(-1) - chosen_T).tolist()
    return Figure(bar=NATS, value=max(below), interval=(min(below), max(below)), samples=len(below), notes=notes)


def graphs(bench: Bench, notes: dict[str, Any]) -> Figure:
    """Batches of every size that a graph has rows to spare for."""
    plain = CudaRunner(bench.ours.runner, bench.arena, None)
    equal: list[float] = []
    for sequences in (1, 3, 8, 13, 64):
        tables = bench.tables(sequences, 256)
        first = [bench.prefill(bench.tokens(40, n), table)[0] for n, table in enumerate(tables)]
        tokens = [int(row_V.argmax()) for row_V in first]
        replayed = bench.decode(tokens, 40, tables).argmax(-1).tolist()
        captured, bench.ours = bench.ours, plain
        straight = bench.decode(tokens, 40, tables).argmax(-1).tolist()
        bench.ours = captured
        equal += [float(a == b) for a, b in zip(replayed, straight, strict=True)]
    return Figure(bar=GRAPHS, value=min(equal), interval=(min(equal), max(equal)), samples=len(equal), notes=notes)


# -- speed -------------------------------------------------------------------------------------------------------------
def prefill_ratio(bench: Bench, notes: dict[str, Any]) -> Figure:
    tokens = bench.tokens(1_024, salt=2)
    (table,) = bench.tables(1, 1_024)
    inputs = torch.tensor([tokens], device=bench.arena.device)
    bar = Bar(name="gpu prefill", claim="1,024 tokens, transformers / ours", unit="x", limit=1.0, at_least=True)
    return _ratio(
        bar,
        lambda: bench.prefill(tokens, table),
        lambda: bench.theirs(inputs, use_cache=False, logits_to_keep=1),
        notes,
    )


def decode_ratio(bench: Bench, sequences: int, context: int, notes: dict[str, Any]) -> Figure:
    """The same step again and again: what it writes, it wrote before."""
    tables = bench.tables(sequences, context + 1)
    for n, table in enumerate(tables):
        bench.prefill(bench.tokens(context, n), table)
    tokens = [int(at) for at in range(sequences)]
    inputs = torch.tensor([bench.tokens(context, n) for n in range(sequences)], device=bench.arena.device)
    with torch.inference_mode():
        cache = bench.theirs(inputs, use_cache=True, logits_to_keep=1).past_key_values
    fed = torch.tensor(tokens, device=bench.arena.device)[:, None]

    def theirs() -> None:
        bench.theirs(fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(context)

    claim = f"{sequences} sequences of {context} tokens, transformers / ours"
    bar = Bar(name=f"gpu decode {sequences} x {context}", claim=claim, unit="x", limit=1.0, at_least=True)
    return _ratio(bar, lambda: bench.decode(tokens, context, tables), theirs, notes)


def _ratio(bar: Bar, ours: Callable[[], object], theirs: Callable[[], object], notes: dict[str, Any]) -> Figure:
    for _ in range(3):
        _time_ms(ours), _time_ms(theirs)
    pairs = [(_time_ms(ours), _time_ms(theirs)) for _ in range(PAIRS)]
    ours_ms, theirs_ms = (sorted(times)[PAIRS // 2] for times in zip(*pairs, strict=True))
    times = {"ours_ms": round(ours_ms, 3), "theirs_ms": round(theirs_ms, 3)}
    return figure_of(bar, [theirs_ms / ours_ms for ours_ms, theirs_ms in pairs], **notes, **times)


@torch.inference_mode()
def _time_ms(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started_ns = time.perf_counter_ns()
    run()
    torch.cuda.synchronize()
    return (time.perf_counter_ns() - started_ns) / 1e6


if __name__ == "__main__":
    sys.exit(main())
