"""Writes the greedy tokens of plain transformers, which ours must equal (DESIGN 8: fp32 with `raw` is exact).

    python -m bench.reference_tokens            tests/data/reference_tokens.json        4 prompts x 32 tokens
    python -m bench.reference_tokens --slow     tests/data/reference_tokens_slow.json  23 prompts x 64 tokens

Nothing of our engine takes part: only transformers' own `generate` in float32. With each token goes the gap between its
logit and the runner-up's, so that a test which differs can tell a tie (gap below 1e-4) from an error. Prompts are
stored as token ids; the tests need no tokenizer and do not depend on the Python version whose texts these are.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from engine.models.checkpoint import ensure_default_model
from engine.models.info import describe

DATA = Path(__file__).parents[1] / "tests" / "data"
TIE = 1e-4
QUESTIONS = (
    "What is the capital of France?",
    "Write a Python function that adds two numbers.",
)
TEXTS = (
    "The three parts of a triptych are",
    "def fibonacci(n):\n    ",
)
# Around the borders of blocks and chunks, and well inside them.
SLOW_LENGTHS = (1, 2, 3, 15, 16, 17, 31, 33, 48, 64, 100, 127, 129, 200, 256, 300, 400, 511, 513, 700, 900, 1025, 1500)


def short_prompts(tokenizer: Any) -> list[list[int]]:
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [
        *(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats),
        *(tokenizer(text)["input_ids"] for text in TEXTS),
    ]


def slow_prompts(tokenizer: Any) -> list[list[int]]:
    """Pieces of Python's language reference, each topic cut to length."""
    long_topics = sorted(topics, key=lambda name: (-len(topics[name]), name))
    texts = [topics[name] for name in long_topics[: len(SLOW_LENGTHS)]]
    return [tokenizer(text)["input_ids"][:length] for text, length in zip(texts, SLOW_LENGTHS, strict=True)]


@torch.inference_mode()
def reference(model: Any, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=tokens, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    inputs = torch.tensor([list(prompt)])
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=settings)
    best_two = [logits_1V[0].topk(2).values.tolist() for logits_1V in output.logits]
    return {
        "prompt": list(prompt),
        "tokens": output.sequences[0, len(prompt) :].tolist(),
        "gaps": [round(first - second, 5) for first, second in best_two],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slow", action="store_true", help="the long list")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = ensure_default_model(progress=print)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # as under ignore_eos: every case has all its tokens
    prompts, tokens = (slow_prompts(tokenizer), 64) if options.slow else (short_prompts(tokenizer), 32)
    cases = [reference(model, prompt, tokens) for prompt in prompts]
    write(DATA / f"reference_tokens{'_slow' if options.slow else ''}.json", describe(path).fingerprint, cases)


def write(file: Path, fingerprint: str, cases: Sequence[dict[str, Any]]) -> None:
    """One line per prompt, so that a changed prompt is a changed line."""
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{{"model": "{fingerprint}", "cases": [\n{lines}\n]}}\n')
    ties = sum(gap < TIE for case in cases for gap in case["gaps"])
    print(f"{file}: {len(cases)} prompts, {ties} steps closer than {TIE} to a tie")


if __name__ == "__main__":
    main()
