"""What every registered batching promises. A new one is in here by existing; its own test adds its paper's claim."""

from dataclasses import dataclass, field

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.base.errors import InvalidArgument, NotFound
from engine.batching import Batch, Batching, Prompt, batchings, build, prefill_budget
from engine.step_time import StepTimeModel
from tests.engine.batching.batches import batch_of, step_of

MODEL = StepTimeModel(
    step_us=30_000, prefill_token_us=1_500, prefill_pair_us=0.2, decode_context_us=5, decode_sequence_us=1_000
)
few = hypothesis.settings(max_examples=25)  # hundreds of steps each
every_batching = pytest.mark.parametrize("name", batchings.names())

settings = st.fixed_dictionaries(
    {
        "step_tokens": st.sampled_from([1, 7, 32, 64, 100, 512]),
        "tbt_slo_ms": st.sampled_from([None, 1.0, 60.0, 200.0, 10_000.0]),
        "model": st.sampled_from([None, MODEL]),
        "align_tokens": st.sampled_from([1, 4, 16]),
        "tile_tokens": st.sampled_from([1, 32, 128]),
    }
)
prompts_left = st.lists(st.tuples(st.integers(0, 900), st.integers(1, 200)), max_size=6)
contexts = st.lists(st.integers(1, 2_000), max_size=40).map(tuple)


@every_batching
def test_says_what_it_is(name: str) -> None:
    kind = batchings.get(name)
    assert "arXiv" in kind.paper
    assert kind.loses
    assert kind.composes_with
    assert isinstance(kind.needs, tuple)


@every_batching
@given(settings=settings, prompts=prompts_left, decodes=contexts, sequences_left=st.integers(0, 8))
def test_a_step_is_a_step(name, settings, prompts, decodes, sequences_left) -> None:
    batch = batch_of(prompts, decodes, sequences_left)
    batching = build(name, **settings)
    chunks = batching.chunks(batch)
    left = {prompt.seq_id: prompt.uncomputed_tokens for prompt in batch.prompts}
    assert len({chunk.seq_id for chunk in chunks}) == len(chunks) <= sequences_left
    assert all(1 <= chunk.tokens <= left[chunk.seq_id] for chunk in chunks)
    tokens = sum(chunk.tokens for chunk in chunks)
    assert tokens + len(decodes) <= max(
        settings["step_tokens"], len(decodes) + prefill_budget(settings["step_tokens"], len(decodes))
    )
    assert chunks == batching.chunks(batch)


@every_batching
@given(settings=settings, prompts=prompts_left.filter(bool), decodes=contexts)
def test_the_oldest_prompt_advances_beside_any_decodes(name, settings, prompts, decodes) -> None:
    chunks = build(name, **settings).chunks(batch_of(prompts, decodes, 1))
    assert [chunk.seq_id for chunk in chunks] == [0]


@dataclass
class Stream:
    """A stand-in for the scheduler: prompts arrive in order, and their chunks are what the method says."""

    batching: Batching
    decodes: tuple[int, ...]
    waiting: list[Prompt]
    chunks: dict[int, list[int]] = field(default_factory=dict)
    finished: list[int] = field(default_factory=list)
    steps: int = 0

    def step(self) -> None:
        batch = Batch(self.decodes, tuple(self.waiting), 4)
        chunks = self.batching.chunks(batch)
        self.batching.observe(step_of(batch, chunks), 2 * MODEL(step_of(batch, chunks)))
        tokens_of = dict(chunks)
        for seq_id, tokens in chunks:
            self.chunks.setdefault(seq_id, []).append(tokens)
        moved = [self._moved(prompt, tokens_of.get(prompt.seq_id, 0)) for prompt in self.waiting]
        self.finished += [prompt.seq_id for prompt in moved if not prompt.uncomputed_tokens]
        self.waiting = [prompt for prompt in moved if prompt.uncomputed_tokens]
        self.steps += 1

    @staticmethod
    def _moved(prompt: Prompt, tokens: int) -> Prompt:
        return Prompt(prompt.seq_id, prompt.computed_tokens + tokens, prompt.uncomputed_tokens - tokens)


@every_batching
@few
@given(settings=settings, prompts=prompts_left, decodes=contexts)
def test_chunks_sum_to_the_prompt_and_everybody_ends(name, settings, prompts, decodes) -> None:
    stream = Stream(build(name, **settings), decodes, list(batch_of(prompts).prompts))
    tokens_in_all = sum(left for _, left in prompts)
    while stream.waiting:
        stream.step()
        assert stream.steps <= tokens_in_all
    assert {seq_id: sum(tokens) for seq_id, tokens in stream.chunks.items()} == {
        seq_id: left for seq_id, (_, left) in enumerate(prompts)
    }


@every_batching
@few
@given(settings=settings, decodes=contexts, short=st.integers(1, 40))
def test_no_stream_of_short_prompts_keeps_a_long_one_waiting(name, settings, decodes, short) -> None:
    """A short prompt arrives whenever there is room for one, for ever."""
    stream = Stream(build(name, **settings), decodes, [Prompt(0, 0, 5), Prompt(1, 0, 150)])
    while 1 not in stream.finished:
        stream.step()
        arrivals = range(stream.steps * 10, stream.steps * 10 + 4 - len(stream.waiting))
        stream.waiting += [Prompt(seq_id, 0, short) for seq_id in arrivals]
        assert stream.steps <= 5 + 150


@every_batching
@given(settings=settings, prompts=prompts_left.filter(bool), decodes=contexts)
def test_a_cut_chunk_ends_at_a_block_border_of_its_prompt(name, settings, prompts, decodes) -> None:
    """Unless not even the next border can be reached."""
    batch = batch_of(prompts, decodes)
    align = settings["align_tokens"]
    for seq_id, tokens in build(name, **settings).chunks(batch):
        computed, left = prompts[seq_id]
        assert tokens == left or (computed + tokens) % align == 0 or computed % align + tokens < align


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"step_tokens": 0}, "step_tokens"),
        ({"align_tokens": 0}, "align_tokens"),
        ({"tile_tokens": -1}, "tile_tokens"),
        ({"tbt_slo_ms": 0.0}, "tbt_slo_ms"),
        ({"tbt_slo_ms": float("nan")}, "tbt_slo_ms"),
        ({"tbt_slo_ms": float("inf")}, "tbt_slo_ms"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, float], word: str) -> None:
    with pytest.raises(InvalidArgument, match=word) as caught:
        build("sarathi", **settings)  # type: ignore[arg-type]
    assert caught.value.field == word


def test_an_unknown_name_says_which_there_are() -> None:
    with pytest.raises(NotFound, match="did you mean 'sarathi'"):
        build("sarathy")
