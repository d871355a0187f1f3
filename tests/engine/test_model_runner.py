"""The runner against transformers: whatever the packing, chunks, tables and neighbours, the logits are the model's."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import BloomConfig, GptOssConfig

from engine.attention import Attend, Scores
from engine.attention.paged_kv import PagedKV, Span
from engine.attention.paged_sdpa import PagedSdpa, SdpaAttend
from engine.base import limits
from engine.base.errors import InvalidArgument
from engine.commands import StepPlan
from engine.model_runner import ModelRunner, StepLogits, verify
from engine.models.info import experts_of
from engine.types import SamplingParams
from tests.engine.tiny_models import (
    FAMILIES,
    HEADS,
    LAYERS,
    VOCAB,
    WINDOW,
    Running,
    generate,
    prompt_of,
    scattered_tables,
    step,
    tiny_arena,
    tiny_config,
    tiny_model,
)


def runner_of(model: Any = None, **arena: int) -> ModelRunner:
    model = model or tiny_model()
    return ModelRunner(model, tiny_arena(config=model.config, **arena), layers_per_group=2)


def runner_of_family(family: str, **overrides: Any) -> ModelRunner:
    return runner_of(tiny_model(tiny_config(family, **overrides)))


def sequences_of(runner: ModelRunner, *lengths: int, blocks: int = 12) -> list[Running]:
    tables = scattered_tables(runner.arena, blocks, len(lengths))
    return [Running(index, prompt_of(n, index), tables[index]) for index, n in enumerate(lengths)]


@torch.inference_mode()
def own_logits(tokens: list[int], seed: int = 0) -> torch.Tensor:
    logits_TV: torch.Tensor = tiny_model(seed=seed)(torch.tensor([tokens])).logits[0]
    return logits_TV


# -- equality with transformers ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_interleaved_chunks_and_decodes_give_the_tokens_of_generate(family: str) -> None:
    runner = runner_of_family(family)
    sequences = sequences_of(runner, 5, 16, 33)
    chunk_sizes = iter([3, 7, 1, 5, 6, 4, 11, 2, 9, 13, 8])
    for sequence in sequences:
        while sequence.computed < sequence.prompt_tokens:
            running = [(other, 1) for other in sequences if other.output]
            step(runner, [*running, (sequence, next(chunk_sizes))])
    for _ in range(6):
        step(runner, [(sequence, 1) for sequence in sequences])
    assert max(len(sequence.tokens) for sequence in sequences) > 4 * WINDOW
    expected = tiny_model(tiny_config(family))
    for sequence in sequences:
        prompt = sequence.tokens[: sequence.prompt_tokens]
        assert sequence.output == generate(expected, prompt, len(sequence.output))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompts_logits_do_not_depend_on_what_it_is_packed_with(family: str) -> None:
    def logits_beside(neighbour_salt: int | None) -> torch.Tensor:
        runner = runner_of_family(family)
        sequence, neighbour = sequences_of(runner, 29, 21)
        neighbour.tokens = prompt_of(21, neighbour_salt or 0)
        beside = [] if neighbour_salt is None else [(neighbour, 9)]
        rows = [step(runner, [*beside, (sequence, chunk)])[-1:] for chunk in (13, 11, 64, 1, 1)]
        return torch.cat(rows[2:])

    alone_NV, first_NV, second_NV = (logits_beside(salt) for salt in (None, 5, 6))
    torch.testing.assert_close(first_NV, alone_NV, rtol=0, atol=1e-4)
    # Experts multiply the tokens of all sequences that chose them, so neighbours change the shape of that product.
    dense = experts_of(tiny_config(family).to_dict()) == 0
    torch.testing.assert_close(second_NV, first_NV, rtol=0, atol=1e-6 if dense else 1e-4)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 16, 17, 40])
def test_chunk_and_block_sizes_do_not_change_the_logits(chunk: int, block_size: int) -> None:
    runner = runner_of(block_size=block_size)
    (sequence,) = sequences_of(runner, 37, blocks=42)
    while sequence.computed < sequence.prompt_tokens:
        logits_NV = step(runner, [(sequence, chunk)])
    expected_V = own_logits(sequence.tokens[:37])[-1]
    torch.testing.assert_close(logits_NV[-1], expected_V, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 7, 8, 9])
def test_decode_across_a_block_border(length: int) -> None:
    runner = runner_of(block_size=4)
    (sequence,) = sequences_of(runner, length)
    rows = [step(runner, [(sequence, 64)])[0] for _ in range(6)]
    expected_TV = own_logits(sequence.tokens[:-1])[length - 1 :]
    torch.testing.assert_close(torch.stack(rows), expected_TV, rtol=1e-4, atol=1e-4)


def test_decodes_of_very_different_lengths_run_together() -> None:
    runner = runner_of(columns=256)
    sequences = sequences_of(runner, 1, 2, 9, 30, 31, 100, blocks=27)
    for sequence in sequences:
        step(runner, [(sequence, 128)])
    logits_NV = step(runner, [(sequence, 1) for sequence in sequences])
    for row, sequence in enumerate(sequences):
        expected_V = own_logits(sequence.tokens[:-1])[-1]
        torch.testing.assert_close(logits_NV[row], expected_V, rtol=1e-4, atol=1e-4)


def test_sequences_that_share_columns_read_the_same_prefix() -> None:
    runner = runner_of(block_size=4)
    first, second = sequences_of(runner, 13, 13)
    second.tokens[:8] = first.tokens[:8]
    second.table = first.table[:2] + second.table[2:]
    step(runner, [(first, 64)])
    second.computed = 8  # the prefix cache holds the first two blocks
    logits_NV = step(runner, [(second, 64)])
    expected_V = own_logits(second.tokens[:13])[-1]
    torch.testing.assert_close(logits_NV[0], expected_V, rtol=1e-4, atol=1e-4)


# -- which rows --------------------------------------------------------------------------------------------------------
def test_logits_come_in_plan_order_and_only_of_slices_that_sample() -> None:
    runner = runner_of()
    first, second, third = sequences_of(runner, 7, 9, 5)
    slices = (first.slice(64), second.slice(4), third.slice(64))
    logits = runner.run(StepPlan(0, slices), lambda start, end: None)
    assert logits.scored_TV == {}
    for row_V, sequence in zip(logits.sampled_NV, (first, third), strict=True):
        torch.testing.assert_close(row_V, own_logits(sequence.tokens)[-1], rtol=1e-4, atol=1e-4)


def run_scored(runner: ModelRunner, *pieces: tuple[Running, int]) -> StepLogits:
    scored = SamplingParams(temperature=0.0, prompt_logprobs=0)
    slices = tuple(replace(sequence.slice(tokens), sampling=scored) for sequence, tokens in pieces)
    for (sequence, _), piece in zip(pieces, slices, strict=True):
        sequence.fed(piece)
    return runner.run(StepPlan(0, slices), lambda start, end: None)


def test_a_prompt_that_is_scored_gets_the_logits_of_all_its_rows() -> None:
    runner = runner_of()
    plain, scored = sequences_of(runner, 6, 11)
    step(runner, [(plain, 64)])
    first = run_scored(runner, (plain, 1), (scored, 4))  # a decode is never scored
    second = run_scored(runner, (scored, 64))
    assert (first.scored_TV.keys(), len(first.sampled_NV)) == ({1}, 1)
    assert (second.scored_TV.keys(), len(second.sampled_NV)) == ({1}, 1)
    expected_TV = own_logits(scored.tokens)
    actual_TV = torch.cat([first.scored_TV[1], second.scored_TV[1]])
    torch.testing.assert_close(actual_TV, expected_TV, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second.sampled_NV[0], expected_TV[-1], rtol=1e-4, atol=1e-4)


def test_a_step_of_which_nobody_samples_has_no_logits() -> None:
    runner = runner_of()
    logits = runner.run(StepPlan(0, (sequences_of(runner, 9)[0].slice(4),)), lambda start, end: None)
    assert logits.sampled_NV.shape == (0, VOCAB)


# -- what reaches memory -----------------------------------------------------------------------------------------------
def test_prefill_announces_every_layer_once_when_its_kv_is_final() -> None:
    runner = runner_of()
    (sequence,) = sequences_of(runner, 10)
    announced: list[tuple[int, int]] = []
    seen = []

    def on_layers(start: int, end: int) -> None:
        announced.append((start, end))
        seen.append(runner.arena.read(sequence.table, (start, end), (0, 10)))

    step(runner, [(sequence, 64)], on_layers)
    assert announced == [(0, 2), (2, 3)]
    for (start, end), early in zip(announced, seen, strict=True):
        assert (early == runner.arena.read(sequence.table, (start, end), (0, 10))).all()


def test_a_pure_decode_step_announces_nothing_and_a_mixed_one_does() -> None:
    runner = runner_of()
    first, second = sequences_of(runner, 6, 6)
    announced: list[tuple[int, int]] = []
    step(runner, [(first, 64)])
    step(runner, [(first, 1)], lambda start, end: announced.append((start, end)))
    assert announced == []
    step(runner, [(first, 1), (second, 3)], lambda start, end: announced.append((start, end)))
    assert announced == [(0, 2), (2, 3)]


def test_a_step_writes_its_own_slots_and_nothing_else() -> None:
    runner = runner_of(block_size=4)
    first, second = sequences_of(runner, 6, 9)
    step(runner, [(first, 64)])
    before = runner.arena.bytes_CLHPSX.copy()
    step(runner, [(first, 1), (second, 5)])
    # Slots of first at position 6, of second at positions 0 .. 4.
    own = {(first.table[1], 2), *((second.table[position // 4], position % 4) for position in range(5))}
    changed = (runner.arena.bytes_CLHPSX != before).any(axis=(1, 2, 3, 5))
    assert {(int(column), int(slot)) for column, slot in zip(*changed.nonzero(), strict=True)} == own


def test_stored_keys_are_rotated_at_their_own_positions() -> None:
    runner = runner_of()
    (sequence,) = sequences_of(runner, 11)
    step(runner, [(sequence, 4)])
    step(runner, [(sequence, 64)])
    cache = tiny_model()(torch.tensor([sequence.tokens[:11]]), use_cache=True).past_key_values
    for layer in range(LAYERS):
        stored = torch.from_numpy(runner.arena.read(sequence.table, (layer, layer + 1), (0, 11))).view(torch.float32)
        torch.testing.assert_close(stored[0, :, 0], cache.layers[layer].keys[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stored[0, :, 1], cache.layers[layer].values[0], rtol=1e-4, atol=1e-5)


def test_nan_in_one_sequence_stays_there() -> None:
    runner = runner_of(block_size=4)
    sequences = sequences_of(runner, 5, 21, 9)
    for sequence in sequences:
        step(runner, [(sequence, 64)])
    runner.arena.poison(sequences[1].table)
    logits_NV = step(runner, [(sequence, 1) for sequence in sequences])
    assert logits_NV.isfinite().all(dim=-1).tolist() == [True, False, True]
    for row in (0, 2):
        expected_V = own_logits(sequences[row].tokens[:-1])[-1]
        torch.testing.assert_close(logits_NV[row], expected_V, rtol=1e-4, atol=1e-4)


def test_another_model_in_the_process_keeps_its_own_attention() -> None:
    other = tiny_model()
    before = generate(other, prompt_of(9), 4)
    runner_of()
    assert other.config._attn_implementation == "eager"
    assert generate(other, prompt_of(9), 4) == before


# -- between layers ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layers_per_group", [1, 2, 3, 5])
def test_groups_cover_all_layers_in_order(layers_per_group: int) -> None:
    runner = ModelRunner(tiny_model(), tiny_arena(), layers_per_group)
    announced: list[tuple[int, int]] = []
    step(runner, [(sequences_of(runner, 3)[0], 64)], lambda start, end: announced.append((start, end)))
    assert announced[0][0] == 0
    assert announced[-1][1] == LAYERS
    assert all(left[1] == right[0] for left, right in pairwise(announced))


def hooks_of(runner: ModelRunner) -> int:
    return sum(len(layer._forward_hooks) for layer in runner.layers)


def test_hooks_are_there_for_a_prefill_step_only() -> None:
    runner = runner_of()
    (sequence,) = sequences_of(runner, 6)
    during: list[int] = []
    step(runner, [(sequence, 64)], lambda start, end: during.append(hooks_of(runner)))
    assert during == [2, 2]
    assert hooks_of(runner) == 0


def test_a_step_that_fails_leaves_no_hook_behind() -> None:
    runner = runner_of()

    def fail(start: int, end: int) -> None:
        raise RuntimeError("no target")

    with pytest.raises(RuntimeError, match="no target"):
        step(runner, [(sequences_of(runner, 6)[0], 64)], fail)
    assert hooks_of(runner) == 0


# -- the self-check ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_verify_accepts_the_families_and_leaves_memory_alone(family: str, dtype: str) -> None:
    model = tiny_model(tiny_config(family, initializer_range=0.1)).to(getattr(torch, dtype))
    runner = ModelRunner(model, tiny_arena(config=model.config, dtype=dtype))
    before = runner.arena.bytes_CLHPSX.copy()
    verify(runner)
    assert (runner.arena.bytes_CLHPSX == before).all()
    assert runner.model.config._attn_implementation == "triptych"


class _DecodesOneTooFar(ModelRunner):
    def forward(self, tokens_1T: Any, positions_1T: Any, kept_rows_N: Any, paged: Any) -> torch.Tensor:
        # The same shift in every call would cancel out (rotary positions are relative), so shift decodes only.
        return super().forward(tokens_1T, positions_1T + int(positions_1T.shape[1] == 1), kept_rows_N, paged)


class _KeepsTheFirstRow(ModelRunner):
    def forward(self, tokens_1T: Any, positions_1T: Any, kept_rows_N: Any, paged: Any) -> torch.Tensor:
        return super().forward(tokens_1T, positions_1T, kept_rows_N * 0, paged)


class _Nothing(ModelRunner):
    def forward(self, *tensors: Any) -> torch.Tensor:
        return super().forward(*tensors) * float("nan")


@pytest.mark.parametrize("runner", [_DecodesOneTooFar, _KeepsTheFirstRow, _Nothing])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_verify_refuses_a_broken_runner(family: str, runner: type[ModelRunner]) -> None:
    model = tiny_model(tiny_config(family))
    with pytest.raises(InvalidArgument, match=f"{family} differs from its own eager forward"):
        verify(_beside(runner(model, tiny_arena())))


def _beside(runner: ModelRunner) -> ModelRunner:
    """Let the self-check's own memory be run by the same class."""
    runner.with_arena = lambda arena: type(runner)(runner.model, arena, backend=runner.backend)  # type: ignore[method-assign]
    return runner


class _ForgetsTheFirstBlock(PagedSdpa):
    def prepare(self, kv: PagedKV, spans: Any) -> Any:
        return super().prepare(kv, [Span(s.row, s.tokens, s.start, s.table[-1:] + s.table[1:]) for s in spans])


class _IgnoresTables(PagedSdpa):
    def prepare(self, kv: PagedKV, spans: Any) -> Any:
        return super().prepare(kv, [Span(s.row, s.tokens, s.start, tuple(range(len(s.table)))) for s in spans])


@pytest.mark.parametrize("backend", [_ForgetsTheFirstBlock, _IgnoresTables])
def test_verify_refuses_a_broken_backend(backend: type[PagedSdpa]) -> None:
    with pytest.raises(InvalidArgument, match="differs from its own eager forward"):
        verify(ModelRunner(tiny_model(), tiny_arena(), backend=backend()))


class _WithoutOneOf(PagedSdpa):
    """Misreads a layer's scores, as a backend would that does not know the keyword."""

    def __init__(self, **misread: Any) -> None:
        self._misread = misread

    def prepare(self, kv: PagedKV, spans: Sequence[Span]) -> Any:
        attend: Attend = SdpaAttend(kv, spans)

        def misreading(query_QTD: torch.Tensor, layer: int, scores: Scores) -> torch.Tensor:
            return attend(query_QTD, layer, replace(scores, **self._misread))

        return misreading


@pytest.mark.parametrize("window", [WINDOW, 4_096])
@pytest.mark.parametrize("misread", [{"window": None}, {"window": WINDOW - 1}, {"softcap": None}, {"scaling": 0.3}])
def test_verify_refuses_attention_that_misreads_a_layer(misread: dict[str, Any], window: int) -> None:
    model = tiny_model(tiny_config("gemma2", sliding_window=window))
    with pytest.raises(InvalidArgument, match="gemma2 differs from its own eager forward"):
        verify(ModelRunner(model, tiny_arena(), backend=_WithoutOneOf(**misread)))


def test_a_long_window_is_shortened_only_while_it_is_checked() -> None:
    runner = runner_of_family("gemma2", sliding_window=4_096)
    seen: list[Any] = []
    runner.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((module.config.sliding_window, kwargs["logits_to_keep"])),
        with_kwargs=True,
    )
    verify(runner)
    assert {window for window, _ in seen} == {limits.VERIFY_WINDOW_TOKENS_MAX}
    attention = [layer.self_attn.sliding_window for layer in runner.model.model.layers]
    assert (runner.model.config.sliding_window, attention) == (4_096, [4_096, None, 4_096])


def test_a_changed_module_is_checked_against_what_it_was() -> None:
    runner = runner_of()
    expected_NV = verify(runner)
    assert verify(runner, expected_NV) is expected_NV
    runner.model.model.layers[1].mlp.up_proj.weight.data *= 1.5  # packed wrongly
    verify(runner)
    with pytest.raises(InvalidArgument, match="differs from its own eager forward"):
        verify(runner, expected_NV)


# -- refusals ----------------------------------------------------------------------------------------------------------
def test_attention_sinks_are_refused_by_their_keyword() -> None:
    config = GptOssConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=32, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, pad_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with pytest.raises(InvalidArgument, match="ask attention for s_aux, which is not implemented"):
        verify(runner_of(tiny_model(config)))


def test_a_module_without_the_attention_interface_is_refused_by_name() -> None:
    config = BloomConfig(vocab_size=VOCAB, hidden_size=48, n_layer=2, n_head=HEADS)
    with pytest.raises(InvalidArgument, match="bloom does not support transformers' AttentionInterface"):
        ModelRunner(tiny_model(config), tiny_arena())


def test_layers_that_make_other_heads_than_memory_holds_are_refused() -> None:
    model = tiny_model(tiny_config(num_key_value_heads=3))
    with pytest.raises(InvalidArgument, match="layer 0 makes 3 KV heads of 8 numbers, but memory holds 3 layers of 2"):
        verify(ModelRunner(model, tiny_arena()))


def test_a_module_that_does_not_run_is_refused_with_its_reason() -> None:
    runner = runner_of()
    runner.model.model.layers[2].mlp.act_fn = None
    with pytest.raises(InvalidArgument, match="llama does not run: TypeError: 'NoneType' object is not callable"):
        verify(runner)


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
        (
            "gemma3",
            {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
            },
        ),
    ],
)
def test_rotary_angles_that_depend_on_the_call_are_refused(family: str, rope: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="rope type 'dynamic' depends on the length of a call"):
        runner_of_family(family, rope_parameters=rope)


def test_layers_are_found_by_their_numbers() -> None:
    model = tiny_model(tiny_config("mixtral", num_local_experts=LAYERS))  # as many experts as layers
    assert list(runner_of(model).layers) == list(model.model.layers)
    model.model.layers = model.model.layers[:2]
    with pytest.raises(InvalidArgument, match="mixtral has no list of 3 decoder layers"):
        runner_of(model)
