"""The oracle executor: right tokens if and only if every KV byte is right."""

import numpy as np
import pytest

from engine.base.failpoints import InjectedFault
from engine.commands import SequenceSlice, StepOutput, StepPlan
from engine.executors.oracle import (
    OracleExecutor,
    oracle_schema,
    reference_output,
    reference_prompt_logprobs,
    reference_tokens,
)
from engine.kv.arena import Arena
from engine.types import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
PROMPT = tuple(range(10, 21))
BLOCK = 4


class Rig:
    """One sequence on an arena of its own; `table` is out of order on purpose."""

    def __init__(self, config: OracleExecutor.Config | None = None, *, tenant: str = "", sampling=GREEDY) -> None:
        self.config = config or OracleExecutor.Config()
        self.arena = Arena(self.config.schema, columns=8, block_size=BLOCK)
        self.executor = OracleExecutor(self.arena, self.config)
        self.table = (5, 2, 7, 0, 3)
        self.tenant = tenant
        self.sampling = sampling

    def run(self, token_ids: tuple[int, ...], start: int, sample_position: int | None = None) -> int | None:
        (pick,) = self.execute(token_ids, start, sample_position).tokens.get(1, (None,))
        return pick and pick.token_id

    def execute(
        self,
        token_ids: tuple[int, ...],
        start: int,
        sample_position: int | None = None,
        choices: tuple[int, ...] = (0,),
    ) -> StepOutput:
        piece = SequenceSlice(
            1,
            token_ids,
            start,
            self.table,
            self.sampling,
            sample_position,
            len(token_ids) > 1,
            self.tenant,
            choices,
            PROMPT,
            len(PROMPT),
        )
        return self.executor.execute(StepPlan(1, (piece,)), lambda start, end: None)

    def generate(self, count: int) -> tuple[int, ...]:
        tokens = [self.run(PROMPT, 0, 0)]
        while len(tokens) < count:
            tokens.append(self.run((tokens[-1],), len(PROMPT) + len(tokens) - 1, len(tokens)))
        return tuple(tokens)


def expected(count: int, config: OracleExecutor.Config, *, tenant: str = "", sampling=GREEDY) -> tuple[int, ...]:
    return reference_tokens(PROMPT, tenant, sampling, count, config)


@pytest.mark.parametrize("trust_read_rows", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32"])
def test_generates_the_reference(dtype: str, trust_read_rows: bool) -> None:
    schema = oracle_schema(layers=3, heads=3, head_dim=5, dtype=dtype)  # rows that are no multiple of 8 bytes
    rig = Rig(OracleExecutor.Config(schema=schema, trust_read_rows=trust_read_rows))
    assert rig.generate(8) == expected(8, rig.config)


def test_chunks_do_not_matter() -> None:
    rig = Rig()
    assert rig.run(PROMPT[:3], 0) is None
    assert rig.run(PROMPT[3:8], 3) is None
    assert rig.run(PROMPT[8:], 8, 0) == expected(1, rig.config)[0]


def test_prefilling_prompt_and_output_again_continues_the_sequence() -> None:
    rig = Rig()
    first = expected(4, rig.config)
    assert rig.run(PROMPT + first[:3], 0, 3) == first[3]


def test_tenants_prompts_seeds_and_positions_give_other_tokens() -> None:
    config = OracleExecutor.Config()
    seeded = [SamplingParams(seed=seed) for seed in (1, 2)]
    outputs = {
        expected(6, config),
        expected(6, config, tenant="other"),
        reference_tokens(PROMPT[1:], "", GREEDY, 6, config),
        *(expected(6, config, sampling=sampling) for sampling in seeded),
    }
    assert len(outputs) == 5


def test_each_choice_has_its_own_luck() -> None:
    rig = Rig(sampling=SamplingParams(seed=7))
    picks = rig.execute(PROMPT, 0, 0, choices=(0, 1, 4)).tokens[1]
    right = [reference_tokens(PROMPT, "", rig.sampling, 1, rig.config, choice)[0] for choice in (0, 1, 4)]
    assert [pick.token_id for pick in picks] == right
    assert len(set(right)) == 3


def test_log_probabilities_are_those_of_the_reference() -> None:
    rig = Rig(sampling=SamplingParams(seed=7, logprobs=3))
    (pick,) = rig.execute(PROMPT, 0, 0).tokens[1]
    assert (pick,) == reference_output(PROMPT, "", rig.sampling, 1, rig.config)
    assert pick.logprobs is not None and len(pick.logprobs.top) == 3
    assert rig.execute(PROMPT, 0, 0).prompt_logprobs == {}
    assert reference_output(PROMPT, "", SamplingParams(seed=7), 1, rig.config)[0].logprobs is None


def test_a_log_probability_is_in_its_own_top_or_below_it() -> None:
    sampling = SamplingParams(logprobs=2)
    found = 0
    for pick in reference_output(PROMPT, "", sampling, 40, OracleExecutor.Config()):
        scores = pick.logprobs
        assert scores is not None and [place for _, place in scores.top] == sorted([-0.25, -0.5], reverse=True)
        assert ((pick.token_id, scores.logprob) in scores.top) == (scores.rank <= 2)
        found += scores.rank <= 2
    assert 0 < found < 40


def test_prompt_log_probabilities_do_not_depend_on_chunks() -> None:
    sampling = SamplingParams(temperature=0.0, prompt_logprobs=1)
    rig = Rig(sampling=sampling)
    scores = [rig.execute(PROMPT[start:end], start).prompt_logprobs[1] for start, end in ((0, 3), (3, 8), (8, 11))]
    assert [len(part) for part in scores] == [3, 5, 2]
    assert sum(scores, ()) == reference_prompt_logprobs(PROMPT, "", 1, rig.config)
    assert sum(scores, ()) != reference_prompt_logprobs(PROMPT, "other", 1, rig.config)


def test_greedy_ignores_the_seed() -> None:
    config = OracleExecutor.Config()
    assert expected(4, config, sampling=SamplingParams(temperature=0.0, seed=7)) == expected(4, config)


def test_sampled_tokens_equal_the_reference() -> None:
    sampling = SamplingParams(temperature=0.7, seed=42)
    rig = Rig(tenant="acme", sampling=sampling)
    assert rig.generate(6) == expected(6, rig.config, tenant="acme", sampling=sampling)


def test_every_stored_byte_counts() -> None:
    """Flip one byte anywhere in the context: the next token changes (up to a chance of one in the vocabulary)."""
    config = OracleExecutor.Config(vocab_size=1 << 40)
    schema = config.schema.kv
    shape = (schema.layers, schema.heads, schema.parts, len(PROMPT), schema.head_dim)
    rig = Rig(config)
    rig.run(PROMPT, 0)
    right = rig.run((99,), len(PROMPT), 1)
    data = rig.arena.read(rig.table, (0, schema.layers), (0, len(PROMPT)))
    for index in np.ndindex(*(size if axis == 3 else min(size, 2) for axis, size in enumerate(shape))):
        spoilt = data.copy()
        spoilt[index] ^= 1
        rig.arena.write(rig.table, (0, schema.layers), (0, len(PROMPT)), None, spoilt)
        assert rig.run((99,), len(PROMPT), 1) != right, index


def test_swapped_blocks_change_the_token() -> None:
    rig = Rig(OracleExecutor.Config(vocab_size=1 << 40))
    rig.run(PROMPT, 0)
    right = rig.run((99,), len(PROMPT), 1)
    rig.table = (rig.table[1], rig.table[0], *rig.table[2:])
    assert rig.run((99,), len(PROMPT), 1) != right


def test_never_samples_eos_or_poison_unless_told() -> None:
    config = OracleExecutor.Config(vocab_size=4, eos_token_ids=frozenset({0, 1}), poison_token=2)
    assert set(expected(20, config)) == {3}
    willing = OracleExecutor.Config(vocab_size=4, eos_token_ids=frozenset({0, 1}), poison_token=2, samples_eos=True)
    assert {0, 1} & set(expected(40, willing))


def test_poison_raises_before_anything_is_announced() -> None:
    rig = Rig(OracleExecutor.Config(poison_token=13))
    with pytest.raises(InjectedFault):
        rig.run(PROMPT, 0)


def test_announces_each_layer_once_in_order() -> None:
    rig = Rig(OracleExecutor.Config(schema=oracle_schema(layers=7), layers_per_group=3))
    piece = SequenceSlice(1, PROMPT, 0, rig.table, GREEDY, None, True)
    announced: list[tuple[int, int]] = []
    rig.executor.execute(StepPlan(1, (piece,)), lambda start, end: announced.append((start, end)))
    assert announced == [(0, 3), (3, 6), (6, 7)]


def test_refuses_an_arena_of_another_schema() -> None:
    with pytest.raises(ValueError, match="schema"):
        OracleExecutor(Arena(oracle_schema(layers=2), columns=1, block_size=4), OracleExecutor.Config())


def test_trusted_rows_are_read_again_for_a_sequence_that_is_not_known() -> None:
    rig = Rig(OracleExecutor.Config(vocab_size=1 << 40, trust_read_rows=True))
    rig.run(PROMPT, 0)
    stranger = OracleExecutor(rig.arena, rig.config)
    piece = SequenceSlice(1, (99,), len(PROMPT), rig.table, GREEDY, 1, False)
    (pick,) = stranger.execute(StepPlan(1, (piece,)), lambda start, end: None).tokens[1]
    assert pick.token_id == reference_tokens((*PROMPT, 99), "", GREEDY, 1, rig.config)[0]
