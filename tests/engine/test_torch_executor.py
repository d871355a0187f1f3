"""The executor end to end: a folder of weights in, tokens out, one bad sequence at a time."""

import json
import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.base.errors import FailedPrecondition
from engine.commands import SequenceSlice, StepOutput, StepPlan
from engine.executors.torch import CONSTRAINT_FAILED, Config, TorchExecutor
from engine.kv.arena import Arena
from engine.models.info import describe, schema_for
from engine.sampling import Failure
from engine.types import Constraint, ConstraintKind, SamplingParams
from tests.engine import tiny_tokenizers
from tests.engine.tiny_models import GREEDY, generate, prompt_of, tiny_config, tiny_model

DATA = Path(__file__).parents[1] / "data"
pytestmark = pytest.mark.timeout(180)  # the first executor of a fresh checkout compiles the kernels
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


def tokens_of(output: StepOutput) -> dict[int, int]:
    """The token of every sequence, which has one choice."""
    return {seq_id: sampled.token_id for seq_id, (sampled,) in output.tokens.items()}


def prefill(
    seq_id: int, tokens: Sequence[int], table: tuple[int, ...], params: SamplingParams = GREEDY, at: int | None = 0
) -> SequenceSlice:
    return SequenceSlice(
        seq_id, tuple(tokens), 0, table, params, at, is_prefill=True, context=list(tokens), prompt_tokens=len(tokens)
    )


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
        for seq_id, token in tokens_of(execute(executor, *slices)).items():
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
        tokens = [tokens_of(execute(executor, *company, prefill(1, prompt_of(6), (0, 1), params)))[1]]
        for at in range(1, 12):
            piece = decode(1, tokens[-1], 5 + at, (0, 1), params, at)
            tokens.append(tokens_of(execute(executor, piece, *company))[1])
        return tokens

    alone = sampled()
    assert alone == sampled(prefill(2, prompt_of(30), (4, 5)))
    assert len(set(alone)) > 2


def test_nan_fails_one_sequence_and_its_neighbours_go_on(folder: Path) -> None:
    executor, arena = executor_of(folder)
    tables = [(3,), (4,), (5,)]
    first = tokens_of(execute(executor, *(prefill(each, prompt_of(7, each), tables[each]) for each in range(3))))
    decodes = [decode(seq_id, first[seq_id], 7, tables[seq_id]) for seq_id in range(3)]
    sound = execute(executor, *decodes)
    arena.poison([4])
    output = execute(executor, *decodes)
    assert output.failed == {1: Failure.NAN_LOGITS}
    assert output.tokens == {0: sound.tokens[0], 2: sound.tokens[2]}


def test_columns_that_held_nan_are_clean_for_their_next_owner(folder: Path) -> None:
    executor, arena = executor_of(folder)
    before = tokens_of(execute(executor, prefill(1, prompt_of(7), (3,)), prefill(2, prompt_of(19), (4, 5))))
    decodes = [decode(1, before[1], 7, (3,)), decode(2, before[2], 19, (4, 5))]
    expected = execute(executor, *decodes)
    arena.poison(range(arena.columns))
    execute(executor, prefill(1, prompt_of(7), (3,)), prefill(2, prompt_of(19), (4, 5)))
    assert execute(executor, *decodes) == expected


def test_an_arena_of_another_model_or_dtype_is_refused(folder: Path) -> None:
    arena = Arena(schema_for(describe(folder), "bfloat16"), columns=4)
    with pytest.raises(FailedPrecondition, match="schema"):
        TorchExecutor(Config(model=folder, dtype="float32"), arena)


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_a_device_that_is_not_there_is_refused(folder: Path, device: str) -> None:
    """Nor is the host's memory enough for one that is."""
    with pytest.raises(FailedPrecondition, match="device"):
        executor_of(folder, device=device)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_loads_checks_itself_and_runs(dtype: str, folder: Path) -> None:
    executor, _ = executor_of(folder, dtype)
    assert execute(executor, prefill(1, prompt_of(20), (0, 1))).failed == {}


def test_the_thread_count_is_set_on_the_thread_that_executes(folder: Path) -> None:
    executor, _ = executor_of(folder, threads=2)
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
    assert seen == [2]


# -- choices and log-probabilities -------------------------------------------------------------------------------------
def test_each_choice_of_a_slice_draws_its_own_token(folder: Path) -> None:
    executor, _ = executor_of(folder)
    params = SamplingParams(temperature=2.0, seed=3)
    group = replace(prefill(1, prompt_of(9), (0, 1), params), choices=tuple(range(8)))
    together = [sampled.token_id for sampled in execute(executor, group).tokens[1]]
    alone = [tokens_of(execute(executor, replace(group, choices=(choice,))))[1] for choice in range(8)]
    assert together == alone
    assert len(set(together)) > 2


def eager_logprobs(tokens: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.log_softmax(tiny_model()(torch.tensor([list(tokens)])).logits[0].float(), dim=-1)


def test_logprobs_are_the_models_own_and_only_for_those_who_ask(folder: Path) -> None:
    executor, _ = executor_of(folder)
    prompt = prompt_of(11)
    params = SamplingParams(temperature=0.5, seed=1, logprobs=4, logit_bias=((5, 50.0),))
    output = execute(executor, prefill(1, prompt, (0,), params), prefill(2, prompt, (1,)))
    (sampled,) = output.tokens[1]
    expected_V = eager_logprobs(prompt)[-1]
    assert sampled.token_id == 5
    assert sampled.logprobs is not None
    assert sampled.logprobs.logprob == pytest.approx(float(expected_V[5]), abs=1e-3)
    assert sampled.logprobs.rank == 1 + int((expected_V > expected_V[5]).sum())
    assert [token for token, _ in sampled.logprobs.top] == expected_V.topk(4).indices.tolist()
    assert output.tokens[2][0].logprobs is None


@pytest.mark.parametrize("chunk", [4, 7, 30])
def test_prompt_logprobs_cover_the_prompt_but_its_first_token_in_any_chunks(chunk: int, folder: Path) -> None:
    """Beside a neighbour that decodes. The context is longer than the prompt, as after a preemption."""
    executor, _ = executor_of(folder)
    context, prompt_tokens = prompt_of(20), 17
    params = SamplingParams(temperature=0.0, prompt_logprobs=2)
    neighbour = prefill(9, prompt_of(5), (8,))
    start = 0
    scored = []
    while start < len(context):
        fed = tuple(context[start : start + chunk])
        at = len(context) - prompt_tokens if start + len(fed) == len(context) else None
        piece = SequenceSlice(
            1, fed, start, (3, 1), params, at, is_prefill=True, context=context, prompt_tokens=prompt_tokens
        )
        output = execute(executor, neighbour, piece)
        assert set(output.prompt_logprobs) <= {1}
        scored += output.prompt_logprobs.get(1, ())
        start += len(fed)
    expected_TV = eager_logprobs(context)
    assert [entry.logprob for entry in scored] == pytest.approx(
        [float(expected_TV[at - 1, context[at]]) for at in range(1, prompt_tokens)], abs=1e-3
    )
    assert [entry.top[0][0] for entry in scored] == expected_TV[: prompt_tokens - 1].argmax(dim=-1).tolist()


def test_a_prompt_whose_scores_are_nan_fails_before_its_last_chunk(folder: Path) -> None:
    executor, arena = executor_of(folder)
    arena.poison([3])
    prompt, params = prompt_of(40), SamplingParams(temperature=0.0, prompt_logprobs=0)
    piece = SequenceSlice(
        1, tuple(prompt[16:24]), 16, (3, 4), params, None, is_prefill=True, context=prompt, prompt_tokens=40
    )
    output = execute(executor, piece, prefill(2, prompt_of(5), (5,)))
    assert output.failed == {1: Failure.NAN_LOGITS}
    assert output.prompt_logprobs == {}
    assert set(output.tokens) == {2}


# -- constraints and ends ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def spelling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokens spell something, and one of which is an end."""
    path = tmp_path_factory.mktemp("models") / "spelling"
    tiny_model(tiny_config(eos_token_id=tiny_tokenizers.EOS)).save_pretrained(path)
    tiny_tokenizers.save_tokenizer(path)
    return path


def pattern(text: str, **params: Any) -> SamplingParams:
    return SamplingParams(
        **{"temperature": 1.0, "seed": 4, "constraint": Constraint(ConstraintKind.REGEX, text)} | params
    )


def write(executor: TorchExecutor, params: SamplingParams, steps: int) -> list[int]:
    """Prefill and decode one sequence beside a free one; the output up to its end."""
    prompt = prompt_of(6)
    context = list(prompt)
    while len(context) < len(prompt) + steps and context[-1] != tiny_tokenizers.EOS:
        start = 0 if len(context) == len(prompt) else len(context) - 1
        piece = SequenceSlice(
            1, tuple(context[start:]), start, (0, 1, 2), params, len(context) - len(prompt), start == 0,
            context=context, prompt_tokens=len(prompt),
        )  # fmt: skip
        output = execute(executor, prefill(2, prompt_of(5), (5,)), piece)
        assert output.failed == {}
        context.append(tokens_of(output)[1])
    return context[len(prompt) :]


def test_a_constrained_output_is_in_its_language_and_ends(spelling: Path) -> None:
    executor, _ = executor_of(spelling)
    written = write(executor, pattern("[a-f]{4}-(on|off)"), 20)
    assert written[-1] == tiny_tokenizers.EOS
    assert re.fullmatch("[a-f]{4}-(on|off)", tiny_tokenizers.text_of(written))


def test_min_tokens_holds_the_models_end_back(spelling: Path) -> None:
    executor, _ = executor_of(spelling)
    bias = ((tiny_tokenizers.EOS, 100.0),)
    assert len(write(executor, SamplingParams(temperature=0.0, logit_bias=bias), 20)) == 1
    assert len(write(executor, SamplingParams(temperature=0.0, logit_bias=bias, min_tokens=7), 20)) == 8


@pytest.mark.parametrize("text", ["(((", "(?=a)b"])
def test_a_bad_constraint_fails_its_sequence_and_no_other(text: str, spelling: Path) -> None:
    executor, _ = executor_of(spelling)
    neighbours = [prefill(1, prompt_of(7), (0,)), prefill(3, prompt_of(8), (2,), pattern("ab*"))]
    expected = execute(executor, *neighbours)
    assert expected.failed == {}
    output = execute(executor, neighbours[0], prefill(2, prompt_of(7), (1,), pattern(text)), neighbours[1])
    assert output.failed == {2: CONSTRAINT_FAILED}
    assert output.tokens == expected.tokens


def test_parameters_that_forbid_everything_fail_their_sequence(spelling: Path) -> None:
    executor, _ = executor_of(spelling)
    params = pattern("ab*", allowed_token_ids=(50,))
    output = execute(executor, prefill(1, prompt_of(7), (0,)), prefill(2, prompt_of(7), (1,), params))
    assert output.failed == {2: Failure.NOTHING_ALLOWED}
    assert set(output.tokens) == {1}


def test_a_model_whose_tokens_spell_nothing_obeys_no_constraint(folder: Path) -> None:
    executor, _ = executor_of(folder)
    output = execute(executor, prefill(1, prompt_of(7), (0,), pattern("ab*")), prefill(2, prompt_of(7), (1,)))
    assert output.failed == {1: CONSTRAINT_FAILED}
    assert set(output.tokens) == {2}


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
