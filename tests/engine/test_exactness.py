"""The whole engine against transformers: scheduler, prefix cache, preemption and forks over the real executor.

What each part does alone is tested beside it. Here one workload makes all of them meet in the same steps, and whatever
that did to a sequence, its tokens and log-probabilities are those of the plain model, run alone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.commands import SequenceSlice
from engine.models.checkpoint import load_model
from engine.types import SamplingParams, TokenLogprobs
from tests.engine.driven_engine import DrivenEngine
from tests.engine.tiny_models import FAMILIES, WINDOW, prompt_of, tiny_config, tiny_model

DATA = Path(__file__).parents[1] / "data"
TIE = 1e-4  # a smaller gap between the two best logits is rounding, and either token is right
SEEDS_MAX = 8
NATS_MAX = 0.3  # how far below float32's best token one of bfloat16 may be, by float32's own account
CHOICES = 3
BLOCK, STEP_TOKENS, COLUMNS = 4, 16, 28

pytestmark = pytest.mark.timeout(180)  # the first executor of a fresh checkout compiles the kernels


def greedy(max_tokens: int, **settings: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=2, ignore_eos=True, **settings)


# -- what transformers says --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Reference:
    """Transformers' own greedy continuation of one prompt. Legend: T rows, V vocabulary."""

    prompt: list[int]
    tokens: list[int]
    logits_TV: torch.Tensor  # that the tokens were picked from

    @classmethod
    def of(cls, model: Any, prompt: Sequence[int], tokens: int) -> "Reference":
        inputs = torch.tensor([list(prompt)])
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return cls(list(prompt), output.sequences[0, len(prompt) :].tolist(), torch.cat(output.logits))

    @property
    def smallest_gap(self) -> float:
        best_T2 = self.logits_TV.topk(2, dim=-1).values
        return float((best_T2[:, 0] - best_T2[:, 1]).min())


def require_logprobs(actual: Sequence[TokenLogprobs | None], tokens: Sequence[int], logits_TV: torch.Tensor) -> None:
    """Of each token, and of the two best, under the model's own distribution."""
    logprobs_TV = logits_TV.float().log_softmax(dim=-1)
    entries = [entry for entry in actual if entry is not None]
    assert len(entries) == len(tokens) == len(logits_TV)
    own_T = torch.tensor([entry.logprob for entry in entries])
    best_TK = torch.tensor([[logprob for _, logprob in entry.top] for entry in entries])
    expected_T = logprobs_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    torch.testing.assert_close(own_T, expected_T, rtol=0, atol=1e-4)
    torch.testing.assert_close(best_TK, logprobs_TV.topk(2, dim=-1).values, rtol=0, atol=1e-4)


# -- every family ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Prompts:
    """All longer than any window and than a step. None fills its last block."""

    first: list[int]  # the most urgent: decodes from early on, and others find its prefix
    beside: list[int]  # shares most of it, and comes when the first is not all computed
    cached: list[int]  # shares most of it
    moved: list[int]  # shares some of it, with the memory that it is handed over to
    scored: list[int]  # shares some of it, and is computed all the same, because its rows are asked for
    group: list[int]  # of several choices
    late: list[int]  # the least urgent

    @classmethod
    def make(cls) -> "Prompts":
        first = prompt_of(41)
        return cls(
            first=first,
            beside=first[:35] + prompt_of(6, salt=6),
            cached=first[:30] + prompt_of(9, salt=1),
            moved=first[:18] + prompt_of(17, salt=2),
            scored=first[:22] + prompt_of(13, salt=3),
            group=prompt_of(27, salt=4),
            late=prompt_of(33, salt=5),
        )


# So many, and so little memory, that each is preempted; but the most urgent one never is.
OUTPUTS = {"first": 33, "beside": 13, "cached": 14, "moved": 19, "scored": 23, "group": 10, "late": 33}


@dataclass(frozen=True)
class Case:
    """Weights, and what transformers makes of the prompts with them."""

    model: Any
    references: dict[str, Reference]

    @classmethod
    def of(cls, family: str) -> "Case":
        """The first weights under which no token is a tie: then there is one right answer."""
        for seed in range(SEEDS_MAX):
            model = tiny_model(tiny_config(family), seed)
            prompts = vars(Prompts.make())
            references = {name: Reference.of(model, prompt, OUTPUTS[name]) for name, prompt in prompts.items()}
            if min(reference.smallest_gap for reference in references.values()) >= TIE:
                return cls(model, references)
        raise AssertionError(f"{family}: ties with each of {SEEDS_MAX} seeds")

    def prompt_logits(self, name: str) -> torch.Tensor:
        with torch.inference_mode():
            logits_TV: torch.Tensor = self.model(torch.tensor([self.references[name].prompt])).logits[0]
        return logits_TV


@dataclass(frozen=True)
class Work:
    """The sequences of a workload: those whose tokens are to be a reference's, by its name."""

    engine: DrivenEngine
    sequences: dict[str, tuple[int, ...]]
    handed_over_tokens: int
    target_had_tokens: int


def run_workload(engine: DrivenEngine) -> Work:
    """`first` is computed and decodes; beside it come all the others."""
    prompts = Prompts.make()
    first = engine.add(prompts.first, greedy(OUTPUTS["first"]))
    engine.run(until=lambda: len(engine.plans) == 1)
    beside = engine.add(prompts.beside, greedy(OUTPUTS["beside"]))
    engine.run(until=lambda: len(engine.outputs[beside]) > 2)
    target = engine.reserve(prompts.moved, growth_tokens=3)
    source = engine.add(prompts.moved, greedy(OUTPUTS["moved"]), here=False)
    cached = engine.add(prompts.cached, greedy(OUTPUTS["cached"]))
    children = engine.add_group(prompts.group, greedy(OUTPUTS["group"]), CHOICES)
    scored = engine.add(prompts.scored, greedy(OUTPUTS["scored"], prompt_logprobs=2))
    late = engine.add(prompts.late, greedy(OUTPUTS["late"]))
    engine.run(until=lambda: bool(engine.outputs[source]))
    had = engine.hand_over(source, target)
    engine.run_to_the_end()
    single = {"first": first, "beside": beside, "cached": cached, "moved": target, "scored": scored, "late": late}
    sequences = {name: (seq_id,) for name, seq_id in single.items()}
    return Work(engine, {**sequences, "group": children}, len(prompts.moved), had)


def require_all_of_it_happened(work: Work) -> None:
    """The engine met what this file is about: a workload that became harmless must not pass for a proof."""
    engine, load = work.engine, work.engine.core.load()
    computing = [[piece for piece in plan.slices if piece.is_prefill] for plan in engine.plans]
    beside = [len(plan.slices) - len(prompts) for plan, prompts in zip(engine.plans, computing, strict=True)]
    assert max(len(prompts) for prompts in computing) > 1, "prompts packed together"
    assert max(decodes for decodes, prompts in zip(beside, computing, strict=True) if prompts) > 1, "beside decodes"
    for name in ("first", "scored", "late"):
        chunk = chunks_of(engine, *work.sequences[name])[0]
        assert chunk.start + len(chunk.token_ids) < chunk.prompt_tokens, f"{name}: in chunks"
    assert chunks_of(engine, *work.sequences["cached"])[0].start > WINDOW, "found in the cache"
    assert WINDOW < chunks_of(engine, *work.sequences["beside"])[0].start < 35, "found, as far as it was computed"
    assert chunks_of(engine, *work.sequences["scored"])[0].start == 0, "not found, because its rows are asked for"
    assert load.prefix_hit_tokens > 0
    assert load.preemptions > 0
    again = {piece.seq_id for piece in engine.recomputed}
    preempted = {name for name, seq_ids in work.sequences.items() if again & set(seq_ids)}
    assert preempted == set(OUTPUTS) - {"first"}, "preempted, and computed again"
    assert max(len(piece.token_ids) for piece in engine.recomputed) > WINDOW, "not only what did not fill a block"
    assert WINDOW < work.target_had_tokens < work.handed_over_tokens, "handed over, in part"


def chunks_of(engine: DrivenEngine, *seq_ids: int) -> list[SequenceSlice]:
    return [piece for piece in engine.slices(*seq_ids) if piece.is_prefill]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_chunked_cached_preempted_forked_and_handed_over_is_transformers(family: str, tmp_path: Path) -> None:
    case = Case.of(family)
    case.model.save_pretrained(tmp_path)
    engine = DrivenEngine(
        tmp_path, columns=COLUMNS, block_size=BLOCK, step_tokens=STEP_TOKENS, growth_tokens=0, dtype="float32"
    )
    work = run_workload(engine)
    require_all_of_it_happened(work)
    for name, seq_ids in work.sequences.items():
        reference = case.references[name]
        for seq_id in seq_ids:
            assert engine.tokens(seq_id) == reference.tokens, f"{name}, sequence {seq_id}"
            logprobs = [token.logprobs for token in engine.outputs[seq_id]]
            require_logprobs(logprobs, reference.tokens, reference.logits_TV)
    (scored,) = work.sequences["scored"]
    require_logprobs(engine.scores[scored], Prompts.make().scored[1:], case.prompt_logits("scored")[:-1])


# -- the default model -------------------------------------------------------------------------------------------------
def texts(name: str, *lengths: int) -> list[list[int]]:
    """Prompts of real words: a random one would be no test of a model that has learnt something."""
    cases = {len(case["prompt"]): case["prompt"] for case in json.loads((DATA / name).read_text())["cases"]}
    return [cases[length] for length in lengths]


@pytest.mark.slow
@pytest.mark.model
def test_float32_tokens_of_the_default_model_are_transformers_also_from_its_cache(model_dir: Path) -> None:
    """First the prompts; then the same again, and beside them their second turns, which find what decoding has left."""
    cases = json.loads((DATA / "reference_tokens.json").read_text())["cases"]
    assert min(min(case["gaps"]) for case in cases) >= TIE
    engine = DrivenEngine(model_dir, columns=64, block_size=16, step_tokens=48, growth_tokens=64, dtype="float32")
    first = [engine.add(case["prompt"], greedy(32)) for case in cases]
    engine.run_to_the_end()
    assert [engine.tokens(seq_id) for seq_id in first] == [case["tokens"] for case in cases]
    again = [engine.add(case["prompt"], greedy(16)) for case in cases]
    turns = [engine.add(case["prompt"] + case["tokens"][:16], greedy(16)) for case in cases]
    engine.run_to_the_end()
    assert all(chunks_of(engine, seq_id)[0].start >= 16 for seq_id in turns)
    assert sum(chunks_of(engine, seq_id)[0].start > 0 for seq_id in again) >= 2
    assert [engine.tokens(seq_id) for seq_id in again] == [case["tokens"][:16] for case in cases]
    assert [engine.tokens(seq_id) for seq_id in turns] == [case["tokens"][16:] for case in cases]


@torch.inference_mode()
def nats_below_best(judge: Any, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
    """Of each token of an output, given those before it (teacher-forced)."""
    whole = torch.tensor([[*prompt, *output]])
    logprobs_TV = judge(whole, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
    own_T = logprobs_TV.gather(1, whole[0, len(prompt) :, None])[:, 0]
    below_T: torch.Tensor = logprobs_TV.amax(dim=-1) - own_T
    return below_T


@pytest.mark.model
def test_bfloat16_tokens_of_eight_streams_are_float32s_best_or_nearly_so(model_dir: Path) -> None:
    """Three of the eight share a prefix, and memory is too small for all."""
    long, *others = texts("reference_tokens_slow.json", 200, 31, 48, 64, 100, 129)
    prompts = [long, long[:130] + others[0][:20], long[:70], *others]
    engine = DrivenEngine(model_dir, columns=44, block_size=16, step_tokens=64, growth_tokens=16, dtype="bfloat16")
    seq_ids = [engine.add(prompts[0], greedy(32))]
    engine.run(until=lambda: bool(engine.outputs[seq_ids[0]]))
    seq_ids += [engine.add(prompt, greedy(28)) for prompt in prompts[1:]]
    engine.run_to_the_end()
    assert [chunks_of(engine, seq_id)[0].start for seq_id in seq_ids[:3]] == [0, 128, 64]
    assert engine.core.load().preemptions > 0
    assert max(len(plan.slices) for plan in engine.plans) >= 6
    judge, _ = load_model(model_dir, "float32")
    below = torch.cat(
        [nats_below_best(judge, *pair) for pair in zip(prompts, map(engine.tokens, seq_ids), strict=True)]
    )
    assert len(below) >= 200
    assert float(below.max()) <= NATS_MAX
