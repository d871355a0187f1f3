"""The executor end to end: a folder of weights in, tokens out, one bad sequence at a time."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.base.errors import FailedPrecondition, InvalidArgument
from engine.commands import SequenceSlice, StepOutput, StepPlan
from engine.executors.torch import NAN_LOGITS, Config, TorchExecutor
from engine.kv.arena import Arena
from engine.models.info import describe, schema_for
from engine.types import SamplingParams
from tests.engine.tiny_models import GREEDY, generate, prompt_of, tiny_config, tiny_model

DATA = Path(__file__).parents[1] / "data"
TIE = 1e-4  # a smaller gap between the two best logits is rounding, and either token is right


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(path)
    return path


def executor_of(path: Path, dtype: str = "float32", columns: int = 64, **settings: Any) -> tuple[TorchExecutor, Arena]:
    arena = Arena(schema_for(describe(path), dtype), columns=columns)
    return TorchExecutor(Config(model=path, dtype=dtype, **settings), arena), arena


def execute(executor: TorchExecutor, *slices: SequenceSlice) -> StepOutput:
    return executor.execute(StepPlan(7, slices), lambda start, end: None)


def prefill(
    seq_id: int, tokens: Sequence[int], table: tuple[int, ...], params: SamplingParams = GREEDY, at: int | None = 0
) -> SequenceSlice:
    return SequenceSlice(seq_id, tuple(tokens), 0, table, params, at, is_prefill=True)


def decode(
    seq_id: int, token: int, start: int, table: tuple[int, ...], params: SamplingParams = GREEDY, at: int = 1
) -> SequenceSlice:
    return SequenceSlice(seq_id, (token,), start, table, params, at, is_prefill=False)


def greedy_run(
    executor: TorchExecutor, prompts: Sequence[Sequence[int]], tokens: int, tables: Sequence[tuple[int, ...]]
) -> list[list[int]]:
    """Prefill one prompt per step in chunks of 512 beside the decodes that run, then decode all together."""
    outputs: list[list[int]] = [[] for _ in prompts]

    def running() -> list[SequenceSlice]:
        return [
            decode(seq_id, output[-1], len(prompts[seq_id]) + len(output) - 1, tables[seq_id], at=len(output))
            for seq_id, output in enumerate(outputs)
            if output and len(output) < tokens
        ]

    def run(*slices: SequenceSlice) -> None:
        for seq_id, token in execute(executor, *slices).tokens.items():
            outputs[seq_id].append(token)

    for seq_id, prompt in enumerate(prompts):
        for start in range(0, len(prompt), 512):
            chunk = tuple(prompt[start : start + 512])
            at = 0 if start + len(chunk) == len(prompt) else None
            run(*running(), SequenceSlice(seq_id, chunk, start, tables[seq_id], GREEDY, at, is_prefill=True))
    while slices := running():
        run(*slices)
    return outputs


# -- a tiny model ------------------------------------------------------------------------------------------------------
def test_greedy_tokens_are_those_of_generate(folder: Path) -> None:
    executor, _ = executor_of(folder)
    prompts = [prompt_of(20), prompt_of(3, salt=1), prompt_of(17, salt=2)]
    outputs = greedy_run(executor, prompts, 8, [(1, 2, 3), (9, 8), (30, 20, 10)])
    assert outputs == [generate(tiny_model(), prompt, 8) for prompt in prompts]


def test_a_chunk_that_is_not_the_last_gives_no_token(folder: Path) -> None:
    executor, _ = executor_of(folder)
    output = execute(executor, prefill(1, prompt_of(5), (0,)), prefill(2, prompt_of(9), (1,), at=None))
    assert output.step_id == 7
    assert set(output.tokens) == {1}
    assert execute(executor, prefill(3, prompt_of(5), (2,), at=None)) == StepOutput(7)


def test_a_seed_gives_the_same_tokens_alone_and_in_company(folder: Path) -> None:
    executor, _ = executor_of(folder)
    params = SamplingParams(temperature=1.5, top_p=0.9, seed=5)

    def sampled(*company: SequenceSlice) -> list[int]:
        tokens = [execute(executor, *company, prefill(1, prompt_of(6), (0, 1), params)).tokens[1]]
        for at in range(1, 12):
            piece = decode(1, tokens[-1], 5 + at, (0, 1), params, at)
            tokens.append(execute(executor, piece, *company).tokens[1])
        return tokens

    alone = sampled()
    assert alone == sampled(prefill(2, prompt_of(30), (4, 5)))
    assert len(set(alone)) > 2


def test_nan_fails_one_sequence_and_its_neighbours_go_on(folder: Path) -> None:
    executor, arena = executor_of(folder)
    tables = [(3,), (4,), (5,)]
    first = execute(executor, *(prefill(seq_id, prompt_of(7, seq_id), tables[seq_id]) for seq_id in range(3)))
    decodes = [decode(seq_id, first.tokens[seq_id], 7, tables[seq_id]) for seq_id in range(3)]
    sound = execute(executor, *decodes)
    arena.poison([4])
    output = execute(executor, *decodes)
    assert output.failed == {1: NAN_LOGITS}
    assert output.tokens == {0: sound.tokens[0], 2: sound.tokens[2]}


def test_columns_that_held_nan_are_clean_for_their_next_owner(folder: Path) -> None:
    executor, arena = executor_of(folder)
    before = execute(executor, prefill(1, prompt_of(7), (3,)), prefill(2, prompt_of(19), (4, 5)))
    decodes = [decode(1, before.tokens[1], 7, (3,)), decode(2, before.tokens[2], 19, (4, 5))]
    expected = execute(executor, *decodes)
    arena.poison(range(arena.columns))
    execute(executor, prefill(1, prompt_of(7), (3,)), prefill(2, prompt_of(19), (4, 5)))
    assert execute(executor, *decodes) == expected


def test_an_arena_of_another_model_or_dtype_is_refused(folder: Path) -> None:
    arena = Arena(schema_for(describe(folder), "bfloat16"), columns=4)
    with pytest.raises(FailedPrecondition, match="schema"):
        TorchExecutor(Config(model=folder, dtype="float32"), arena)


def test_a_model_that_needs_more_than_we_have_is_refused_at_load(tmp_path: Path) -> None:
    tiny_model(tiny_config("mistral", sliding_window=8)).save_pretrained(tmp_path / "windowed")
    with pytest.raises(InvalidArgument, match="sliding_window"):
        executor_of(tmp_path / "windowed")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_loads_checks_itself_and_runs(dtype: str, folder: Path) -> None:
    executor, _ = executor_of(folder, dtype)
    assert execute(executor, prefill(1, prompt_of(20), (0, 1))).failed == {}


def test_the_thread_count_is_set_on_the_thread_that_executes(folder: Path) -> None:
    executor, _ = executor_of(folder, threads=3)
    seen: list[int] = []

    def engine_thread() -> None:
        torch.set_num_threads(1)
        execute(executor, prefill(1, prompt_of(4), (0,)))
        seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    thread = threading.Thread(target=engine_thread)
    thread.start()
    thread.join(timeout=10)
    torch.set_num_threads(before)
    assert seen == [3]


# -- the default model -------------------------------------------------------------------------------------------------
def reference(name: str, path: Path) -> list[dict[str, Any]]:
    data = json.loads((DATA / name).read_text())
    assert data["model"] == describe(path).fingerprint, "the checkpoint changed: python -m bench.reference_tokens"
    cases: list[dict[str, Any]] = data["cases"]
    return cases


def until_tie(case: dict[str, Any], tokens: int) -> list[int]:
    """The reference up to the first step that is too close to call."""
    close = [step for step, gap in enumerate(case["gaps"][:tokens]) if gap < TIE]
    expected: list[int] = case["tokens"][: min(close, default=tokens)]
    return expected


@pytest.mark.model
@pytest.mark.timeout(300)
def test_the_default_models_tokens_are_transformers(model_dir: Path) -> None:
    executor, _ = executor_of(model_dir, columns=16)
    cases = reference("reference_tokens.json", model_dir)[:2]
    outputs = greedy_run(executor, [case["prompt"] for case in cases], 24, [(7, 3, 11, 2), (9, 1, 4, 12)])
    assert outputs == [until_tie(case, 24) for case in cases]


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_default_models_tokens_are_transformers_for_prompts_of_any_length(model_dir: Path) -> None:
    cases = reference("reference_tokens_slow.json", model_dir)
    blocks = [-(-(len(case["prompt"]) + 64) // 16) for case in cases]
    starts = [sum(blocks[:index]) for index in range(len(cases))]
    tables = [tuple(reversed(range(start, start + count))) for start, count in zip(starts, blocks, strict=True)]
    executor, _ = executor_of(model_dir, columns=sum(blocks))
    outputs = greedy_run(executor, [case["prompt"] for case in cases], 64, tables)
    for case, output in zip(cases, outputs, strict=True):
        expected = until_tie(case, 64)
        assert output[: len(expected)] == expected
