"""The runner against transformers: whatever the packing, chunks, tables and neighbours, the logits are the model's."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from engine.attention import StepAttention, attention_function
from engine.attention.paged_kv import PagedKV, Span
from engine.attention.paged_sdpa import PagedSdpa
from engine.base.errors import Internal, InvalidArgument
from engine.model_runner import ModelRunner, verify
from engine.models.family import adapter_for
from engine.models.llama import LlamaAdapter
from tests.engine.tiny_models import (
    FAMILIES,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
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
    return ModelRunner(model, adapter_for(model), tiny_arena(**arena), layers_per_group=2)


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
    runner = runner_of(tiny_model(tiny_config(family)))
    sequences = sequences_of(runner, 5, 16, 33)
    chunk_sizes = iter([3, 7, 1, 5, 6, 4, 11, 2, 9, 13, 8])
    for sequence in sequences:
        while sequence.computed < sequence.prompt_tokens:
            running = [(other, 1) for other in sequences if other.output]
            step(runner, [*running, (sequence, next(chunk_sizes))])
    for _ in range(6):
        step(runner, [(sequence, 1) for sequence in sequences])
    expected = tiny_model(tiny_config(family))
    for sequence in sequences:
        prompt = sequence.tokens[: sequence.prompt_tokens]
        assert sequence.output == generate(expected, prompt, len(sequence.output))


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


def test_a_table_shorter_than_its_sequence_is_a_bug() -> None:
    with pytest.raises(Internal, match="9 tokens do not fit 2 blocks"):
        PagedKV(tiny_arena(block_size=4)).rows_of([Span(0, 9, 0, (3, 5))])


def test_another_model_in_the_process_keeps_its_own_attention() -> None:
    other = tiny_model()
    before = generate(other, prompt_of(9), 4)
    runner_of()
    assert other.config._attn_implementation == "eager"
    assert generate(other, prompt_of(9), 4) == before


# -- refusals ----------------------------------------------------------------------------------------------------------
class _Layer(torch.nn.Module):
    layer_idx = 0


def call_attention(**keywords: Any) -> torch.Tensor:
    span = Span(0, 2, 0, (0,))
    paged = StepAttention.prepare(PagedKV(tiny_arena()), PagedSdpa(), [span])
    query, key = torch.randn(1, HEADS, 2, HEAD_DIM), torch.randn(1, KV_HEADS, 2, HEAD_DIM)
    settings = {"attention_mask": None, "scaling": 1.0, "paged": paged} | keywords
    return attention_function(_Layer(), query, key, key, **settings)[0]


@pytest.mark.parametrize("keyword", ["softcap", "sliding_window", "s_aux", "attention_mask", "dropout", "invented"])
def test_attention_refuses_a_keyword_that_it_does_not_implement(keyword: str) -> None:
    with pytest.raises(InvalidArgument, match=keyword):
        call_attention(**{keyword: 0.5})


def test_attention_takes_keywords_that_change_nothing() -> None:
    out_1TQD = call_attention(
        softcap=None, sliding_window=None, dropout=0.0, use_cache=True, position_ids=torch.ones(1)
    )
    assert out_1TQD.shape == (1, 2, HEADS, HEAD_DIM)
    assert out_1TQD.isfinite().all()


def test_a_model_with_a_window_is_refused_at_load() -> None:
    with pytest.raises(InvalidArgument, match="sliding_window"):
        verify(runner_of(tiny_model(tiny_config("mistral", sliding_window=8))))


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_accepts_the_families_and_leaves_memory_alone(family: str) -> None:
    runner = runner_of(tiny_model(tiny_config(family)))
    before = runner.arena.bytes_CLHPSX.copy()
    verify(runner)
    assert (runner.arena.bytes_CLHPSX == before).all()
    assert runner.model.config._attn_implementation == "triptych"


class _PositionsOffByOne(LlamaAdapter):
    def layer_arguments(self, hidden_1TE: torch.Tensor, positions_1T: torch.Tensor) -> Any:
        # The same shift in every call would cancel out (rotary positions are relative), so shift decodes only.
        shift = int(positions_1T.shape[1] == 1)
        return super().layer_arguments(hidden_1TE, positions_1T + shift)


class _NoFinalNorm(LlamaAdapter):
    def logits(self, hidden_NE: torch.Tensor) -> torch.Tensor:
        return self._model.lm_head(hidden_NE)


class _LayerMissing(LlamaAdapter):
    @property
    def layers(self) -> Any:
        return super().layers[:-1]


class _Nothing(LlamaAdapter):
    def logits(self, hidden_NE: torch.Tensor) -> torch.Tensor:
        return super().logits(hidden_NE) * float("nan")


@pytest.mark.parametrize("adapter", [_PositionsOffByOne, _NoFinalNorm, _LayerMissing, _Nothing])
def test_verify_refuses_a_broken_adapter(adapter: type[LlamaAdapter]) -> None:
    model = tiny_model()
    with pytest.raises(InvalidArgument, match="differs from its own eager forward"):
        verify(ModelRunner(model, adapter(model), tiny_arena()))


class _ForgetsTheFirstBlock(PagedSdpa):
    def prepare(self, kv: PagedKV, spans: Any) -> Any:
        return super().prepare(kv, [Span(s.row, s.tokens, s.start, s.table[-1:] + s.table[1:]) for s in spans])


class _IgnoresTables(PagedSdpa):
    def prepare(self, kv: PagedKV, spans: Any) -> Any:
        return super().prepare(kv, [Span(s.row, s.tokens, s.start, tuple(range(len(s.table)))) for s in spans])


@pytest.mark.parametrize("backend", [_ForgetsTheFirstBlock, _IgnoresTables])
def test_verify_refuses_a_broken_backend(backend: type[PagedSdpa]) -> None:
    model = tiny_model()
    with pytest.raises(InvalidArgument, match="differs from its own eager forward"):
        verify(ModelRunner(model, adapter_for(model), tiny_arena(), backend=backend()))


def test_an_unknown_family_is_refused_by_name() -> None:
    model = tiny_model()
    model.config.model_type = "abacus"
    with pytest.raises(InvalidArgument, match="'abacus' is not supported; these are: llama"):
        adapter_for(model)


def test_rotary_tables_that_depend_on_the_call_are_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(InvalidArgument, match="dynamic"):
        adapter_for(tiny_model(tiny_config(rope_parameters=rope)))


@pytest.mark.parametrize("layers_per_group", [1, 2, 3, 5])
def test_groups_cover_all_layers_in_order(layers_per_group: int) -> None:
    model = tiny_model()
    runner = ModelRunner(model, adapter_for(model), tiny_arena(), layers_per_group)
    announced: list[tuple[int, int]] = []
    step(runner, [(sequences_of(runner, 3)[0], 64)], lambda start, end: announced.append((start, end)))
    assert announced[0][0] == 0
    assert announced[-1][1] == LAYERS
    assert all(left[1] == right[0] for left, right in pairwise(announced))
