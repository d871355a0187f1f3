"""lm-eval as it is published (`local-completions`), against real processes: one task of log-likelihoods, one of
generations. The same tasks run by its transformers backend in the same precision are what is right.

Its datasets are files of ours: nothing is fetched.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.local import LocalCluster
from engine.models.checkpoint import ensure_default_model
from tests.compat.served import MODEL

pytestmark = [
    pytest.mark.procs,
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.asyncio(loop_scope="module"),
]

CLOSE = 1e-3  # nats per choice
RUN_TIMEOUT_S = 280
QUESTIONS: tuple[tuple[str, list[str]], ...] = (
    ("The capital of France is", ["Paris", "London", "Berlin"]),
    ("Water is made of hydrogen and", ["iron", "oxygen", "gold"]),
    ("Nach Regen kommt", ["Sonnenschein 🌞", "naïveté", "nothing at all"]),
    ("Q: How many legs does a spider have?\nA:", ["eight", "six", "a hundred and four"]),
    ("Once upon a time, in a village at the foot of a mountain, there lived", ["a girl", "an old man", "x = 1;"]),
    ("def add(a, b):\n    return", ["a + b", "a - b", "None"]),
)
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
metadata: {{version: 1}}
"""
LIKELIHOODS = """
task: triptych_likelihoods
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: " "
metric_list: [{metric: acc}]
"""
GENERATIONS = """
task: triptych_generations
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n\\n", "."], max_gen_toks: 24, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
"""


def write_tasks(folder: Path) -> None:
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": q, "choices": c}) + "\n" for q, c in QUESTIONS))
    shared = TASK.format(questions=questions)
    (folder / "likelihoods.yaml").write_text(LIKELIHOODS + shared)
    (folder / "generations.yaml").write_text(GENERATIONS + shared)


async def evaluate(tasks: Path, out: Path, backend: str, **arguments: object) -> dict[str, list[dict[str, Any]]]:
    """One run of its command line; the samples of each task, in the order of the questions."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lm_eval", "--model", backend, "--include_path", str(tasks)),
        *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
        *("--tasks", "triptych_likelihoods,triptych_generations", "--log_samples", "--output_path", str(out)),
        *("--batch_size", "4"),
        env={**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(RUN_TIMEOUT_S):
        printed, _ = await process.communicate()
    assert process.returncode == 0, printed.decode()[-4_000:]
    return {name: samples(out, name) for name in ("triptych_likelihoods", "triptych_generations")}


def samples(out: Path, task: str) -> list[dict[str, Any]]:
    (file,) = out.rglob(f"samples_{task}_*.jsonl")
    return sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def likelihoods(of_task: list[dict[str, Any]]) -> list[tuple[float, bool]]:
    """(log-likelihood, greedy) of every choice of every question."""
    return [
        (float(response[0][0]), str(response[0][1]) == "True") for sample in of_task for response in sample["resps"]
    ]


async def test_both_kinds_of_task(running: LocalCluster, tmp_path: Path) -> None:
    path = ensure_default_model()
    write_tasks(tmp_path)
    ours = await evaluate(
        tmp_path,
        tmp_path / "ours",
        "local-completions",
        model=MODEL,
        base_url=f"{running.url}/v1/completions",
        tokenizer=path,
        tokenizer_backend="huggingface",
        num_concurrent=1,
        max_length=2_048,
    )
    theirs = await evaluate(tmp_path, tmp_path / "theirs", "hf", pretrained=path, dtype="float32", max_length=2_048)
    right = likelihoods(theirs["triptych_likelihoods"])
    told = likelihoods(ours["triptych_likelihoods"])
    assert len(right) == 3 * len(QUESTIONS)
    worst = max(abs(a - b) for (a, _), (b, _) in zip(told, right, strict=True))
    print(f"largest difference of {len(right)} log-likelihoods: {worst:.1e} nats")
    assert worst < CLOSE
    assert [greedy for _, greedy in told] == [greedy for _, greedy in right]
    texts = [[sample["resps"][0][0] for sample in run["triptych_generations"]] for run in (ours, theirs)]
    assert [text.strip() for text in texts[0]] == [text.strip() for text in texts[1]]


async def test_the_remote_tokenizer(running: LocalCluster, tmp_path: Path) -> None:
    """`tokenizer_backend=remote`: everything by /tokenize, /detokenize and /tokenizer_info."""
    write_tasks(tmp_path)
    ours = await evaluate(
        tmp_path,
        tmp_path / "ours",
        "local-completions",
        model=MODEL,
        base_url=f"{running.url}/v1/completions",
        tokenizer_backend="remote",
        num_concurrent=1,
        max_length=2_048,
    )
    assert len(likelihoods(ours["triptych_likelihoods"])) == 3 * len(QUESTIONS)
