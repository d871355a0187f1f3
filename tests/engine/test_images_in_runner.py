"""Images in the runner: wherever they are and however chunks cut them, the tokens are those of `generate`."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from engine.attention.paged_kv import Span
from engine.attention.paged_numba import PagedNumba
from engine.base.errors import FailedPrecondition, Internal
from engine.commands import SequenceSlice, StepPlan
from engine.executors.torch import Config, TorchExecutor
from engine.image_inputs import EmbeddingRows, placeholders_of, positions_of
from engine.images import PlacedImage, PromptImage, Run, positions_3T, rope_delta
from engine.kv.arena import Arena
from engine.kv.device_arena import DeviceArena
from engine.model_runner import ModelRunner, verify
from engine.models.checkpoint import load_model
from engine.models.demo_vlm.assemble import ensure_demo_vlm
from engine.models.fused_layer import FusedLayer
from engine.models.info import describe, schema_for
from engine.models.packing import prepare_for_cpu
from tests.engine.image_prompts import (
    ARRANGEMENTS,
    Encoding,
    ImagePrompt,
    bare_embedding_arena,
    embedding_arena,
    embeddings_of,
    image_prompt,
    picture_of,
    prompt_with,
)
from tests.engine.tiny_models import GREEDY, prompt_of, scattered_tables, tiny_arena, tiny_config, tiny_model
from tests.engine.vision import tiny_vlms

FAMILIES = tuple(tiny_vlms.FAMILIES)
TOKENS = 14  # of each answer
KV_BLOCKS = 40  # of each sequence
pytestmark = pytest.mark.timeout(180)  # the first fused layer of a fresh checkout compiles the kernels


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny_vlms")
    return {family: tiny_vlms.make_tiny_vlm(family, root / family) for family in FAMILIES}


@lru_cache(maxsize=len(FAMILIES))
def whole_model(folder: Path) -> Any:
    return tiny_vlms.load_model(folder)


@dataclass
class Seeing:
    """A sequence with images: its tokens, how far it is computed, and the columns it owns."""

    seq_id: int
    prompt: Sequence[int]
    images: tuple[PlacedImage, ...]
    table: tuple[int, ...]
    output: list[int] = field(default_factory=list)
    computed: int = 0

    def slice(self, tokens_max: int) -> SequenceSlice:
        tokens = (*self.prompt, *self.output)
        start, end = self.computed, min(self.computed + tokens_max, len(tokens))
        prefill = start < len(self.prompt)
        piece = SequenceSlice(
            seq_id=self.seq_id,
            token_ids=tokens[start:end],
            start=start,
            block_table=self.table,
            sampling=GREEDY,
            sample_position=len(self.output) if end == len(tokens) else None,
            is_prefill=prefill,
            images=self.images if prefill else (),
            rope_delta=0 if prefill else rope_delta([each.image for each in self.images]),
        )
        self.computed = end
        return piece


def step(runner: ModelRunner, pieces: Sequence[tuple[Seeing, int]]) -> torch.Tensor:
    slices = [sequence.slice(tokens_max) for sequence, tokens_max in pieces]
    logits_NV = runner.run(StepPlan(0, tuple(slices)), lambda start, end: None).sampled_NV
    rows = iter(logits_NV)
    for (sequence, _), piece in zip(pieces, slices, strict=True):
        if piece.sample_position is not None:
            sequence.output.append(int(next(rows).argmax()))
    return logits_NV


class Bench:
    """The language half of a family, made fast, over memory; and its tower over embedding memory."""

    def __init__(self, folder: Path, dtype: str = "float32") -> None:
        model, config = load_model(folder, dtype)
        self.embeddings = embedding_arena(folder, dtype)
        self.encoding = Encoding(folder, self.embeddings, dtype)
        kv = tiny_arena(columns=128, block_size=16, config=config, dtype=dtype)
        expected_NV = verify(ModelRunner(model, kv)) if dtype == "float32" else None
        prepare_for_cpu(model, threads=1)
        self.runner = ModelRunner(model, kv, 2, PagedNumba(), self.embeddings)
        if expected_NV is not None:  # weights this random double bfloat16's rounding in every layer
            verify(self.runner, expected_NV)
        self._tables = scattered_tables(kv, KV_BLOCKS, 3)

    def sequence(self, prompt: ImagePrompt) -> Seeing:
        placed = self.encoding.place(prompt.images, prompt.pictures)
        table = self._tables.pop()
        return Seeing(len(self._tables), prompt.token_ids, placed, table)

    def answer(self, sequence: Seeing, chunk: int, tokens: int = TOKENS) -> list[int]:
        while len(sequence.output) < tokens:
            step(self.runner, [(sequence, chunk)])
        return sequence.output


# -- equality with transformers ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_that_cut_images_and_decodes_give_the_tokens_of_generate(
    folders: dict[str, Path], family: str, arrangement: str
) -> None:
    bench, prompt = Bench(folders[family]), image_prompt(folders[family], arrangement)
    assert all(isinstance(layer, FusedLayer) for layer in bench.runner.layers)
    expected = tiny_vlms.generate(whole_model(folders[family]), prompt.inputs, TOKENS)
    assert bench.answer(bench.sequence(prompt), chunk=7) == expected
    assert bench.answer(bench.sequence(prompt), chunk=512) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_with_and_without_images_share_steps(folders: dict[str, Path], family: str) -> None:
    bench, whole = Bench(folders[family]), whole_model(folders[family])
    prompts = [image_prompt(folders[family], arrangement) for arrangement in ("everywhere", "before")]
    first, second = map(bench.sequence, prompts)
    text = Seeing(9, tuple(each for each in prompts[0].token_ids if each > 50), (), bench._tables.pop())
    while not first.output:
        step(bench.runner, [(text, 11), (first, 13)])
    while not second.output:
        step(bench.runner, [(text, 1), (first, 1), (second, 5)])
    for sequence in (first, second, text):
        bench.answer(sequence, chunk=1)
    for sequence, prompt in zip((first, second), prompts, strict=True):
        assert sequence.output == tiny_vlms.generate(whole, prompt.inputs, len(sequence.output))
    inputs = torch.tensor([text.prompt])
    of_text = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    assert text.output == tiny_vlms.generate(whole, of_text, len(text.output))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_whole_model_given_our_embeddings(folders: dict[str, Path], family: str) -> None:
    """The encoder's part is taken out of the comparison: the whole model is handed its outputs."""
    bench, prompt = Bench(folders[family]), image_prompt(folders[family], "everywhere")
    sequence = bench.sequence(prompt)
    pooled = embeddings_of(bench.embeddings, sequence.images)
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=pooled)}
    inputs = {name: value for name, value in prompt.inputs.items() if not name.startswith("pixel_")}
    with torch.inference_mode():
        expected_V = whole_model(folders[family])(**inputs, mm_encoder_outputs=encoded).logits[0, -1]
    while not sequence.output:
        logits_NV = step(bench.runner, [(sequence, 9)])
    torch.testing.assert_close(logits_NV[0], expected_V, rtol=1e-4, atol=1e-4 * float(expected_V.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_rounds_no_more_than_transformers_bfloat16(folders: dict[str, Path], family: str) -> None:
    bench, prompt = Bench(folders[family], "bfloat16"), image_prompt(folders[family], "everywhere")
    sequence = bench.sequence(prompt)
    while not sequence.output:
        ours_NV = step(bench.runner, [(sequence, 9)])
    rounded = AutoModelForImageTextToText.from_pretrained(folders[family], dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        theirs_V, exact_V = (model(**prompt.inputs).logits[0, -1] for model in (rounded, whole_model(folders[family])))
    assert (ours_NV[0] - exact_V).norm() < max(1.5 * (theirs_V - exact_V).norm(), 0.02 * exact_V.norm())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_a_family_that_scales_what_it_looks_up_scales_it_once(family: str) -> None:
    """Gemma's factor is in the lookup or in the forward, and in neither case ours to know."""
    model = tiny_model(tiny_config(family))
    image = PromptImage(key=bytes(16), runs=(Run(3, 6),))
    placed = PlacedImage(image, (5, 2))
    embeddings = bare_embedding_arena(model.config.hidden_size)
    rows_RE = torch.randn(6, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    embeddings.write(placed.table, (0, 1), (0, 6), None, rows_RE.view(torch.uint8).numpy()[None, None, None])
    runner = ModelRunner(model, tiny_arena(config=model.config), embeddings=embeddings)
    sequence = Seeing(0, prompt_of(17), (placed,), (3, 1, 4, 15, 9, 2))
    while not sequence.output:
        logits_NV = step(runner, [(sequence, 5)])
    with torch.inference_mode():
        own_1TE = tiny_model(tiny_config(family)).get_input_embeddings()(torch.tensor([sequence.prompt]))
        own_1TE[0, 3:9] = rows_RE
        expected_V = tiny_model(tiny_config(family))(inputs_embeds=own_1TE).logits[0, -1]
    torch.testing.assert_close(logits_NV[0], expected_V, rtol=1e-4, atol=1e-4)


# -- the executor ------------------------------------------------------------------------------------------------------
class Serving:
    """A tower and an executor, as a worker that encodes itself has them: over one pair of memories, on one thread."""

    def __init__(self, folder: Path) -> None:
        embeddings = embedding_arena(folder, columns=160)
        self._kv = Arena(schema_for(describe(folder), "float32"), columns=128)
        self._kv.poison(range(self._kv.columns))
        self._encoding = Encoding(folder, embeddings)
        self._executor = TorchExecutor(Config(model=folder), self._kv, embeddings)

    def answers(self, prompts: Sequence[ImagePrompt], tokens: int) -> list[list[int]]:
        """Chunks of one prompt beside the decodes of those before it, then all decodes together."""
        tables = scattered_tables(self._kv, KV_BLOCKS, len(prompts))
        sequences = [
            Seeing(index, prompt.token_ids, self._encoding.place(prompt.images, prompt.pictures), tables[index])
            for index, prompt in enumerate(prompts)
        ]
        while any(len(each.output) < tokens for each in sequences):
            running = [each for each in sequences if 0 < len(each.output) < tokens]
            starting = next((each for each in sequences if not each.output), None)
            slices = [each.slice(1) for each in running] + ([] if starting is None else [starting.slice(23)])
            output = self._executor.execute(StepPlan(0, tuple(slices)), lambda start, end: None)
            assert output.failed == {}
            for seq_id, (sampled,) in output.tokens.items():
                sequences[seq_id].output.append(sampled.token_id)
        return [each.output for each in sequences]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_executor_gives_the_tokens_of_generate(folders: dict[str, Path], family: str) -> None:
    prompts = [image_prompt(folders[family], arrangement) for arrangement in ("between", "everywhere", "before")]
    expected = [tiny_vlms.generate(whole_model(folders[family]), prompt.inputs, TOKENS) for prompt in prompts]
    assert Serving(folders[family]).answers(prompts, TOKENS) == expected


@pytest.mark.model
def test_the_demo_model_sees_as_in_transformers() -> None:
    folder = ensure_demo_vlm()
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    question, other = ({"type": "text", "text": text} for text in ("What is in this picture?", " And in this one?"))
    image, pictures = {"type": "image"}, [picture_of(index) for index in range(4)]
    prompts = [
        prompt_with(folder, [{"role": "user", "content": [image, question]}], pictures[:1], processor),
        prompt_with(folder, [{"role": "user", "content": [question, image, other, image]}], pictures[1:3], processor),
        prompt_with(folder, [{"role": "user", "content": [*[image] * 4, question]}], pictures, processor),
    ]
    whole = tiny_vlms.load_model(folder)
    expected = [tiny_vlms.generate(whole, prompt.inputs, TOKENS) for prompt in prompts]
    actual = Serving(folder).answers(prompts, TOKENS)
    assert [tokens[: len(want)] for tokens, want in zip(actual, expected, strict=True)] == expected


def test_embedding_memory_of_another_model_is_refused(folders: dict[str, Path]) -> None:
    kv = Arena(schema_for(describe(folders["llava"]), "float32"), columns=8)
    for other in (embedding_arena(folders["idefics3"]), embedding_arena(folders["llava"], "bfloat16")):
        with pytest.raises(FailedPrecondition, match="embeddings' schema is not that of"):
            TorchExecutor(Config(model=folders["llava"]), kv, other)


# -- which rows and positions ------------------------------------------------------------------------------------------
IMAGES = (
    PromptImage(key=b"a" * 16, runs=(Run(2, 3), Run(6, 4))),
    PromptImage(key=b"b" * 16, runs=(Run(10, 9),)),
)
GRIDS = (
    PromptImage(key=b"a" * 16, runs=(Run(2, 6),), grid=(2, 3)),
    PromptImage(key=b"b" * 16, runs=(Run(10, 8),), grid=(4, 2)),
)
LENGTH = 22


def slice_of(start: int, end: int, images: Sequence[PromptImage], **settings: Any) -> SequenceSlice:
    placed = tuple(PlacedImage(image, (7 * at + 5, 7 * at + 2, 7 * at + 3)) for at, image in enumerate(images))
    tokens = tuple(range(start, end))
    return SequenceSlice(1, tokens, start, (), GREEDY, None, is_prefill=True, images=placed, **settings)


@pytest.mark.parametrize("start", range(LENGTH))
def test_every_chunk_gets_the_rows_of_its_own_placeholders(start: int) -> None:
    hidden, embeddings = 3, bare_embedding_arena(3, columns=20)
    expected_TE = torch.zeros(LENGTH, hidden)
    for index, placed in enumerate(slice_of(0, 1, IMAGES).images):
        rows_RE = torch.arange(placed.image.features * hidden).view(-1, hidden) + 100.0 * (index + 1)
        data = rows_RE.view(torch.uint8).numpy()[None, None, None]
        embeddings.write(placed.table, (0, 1), (0, placed.image.features), None, data)
        for run, first in placed.image.rows():
            expected_TE[run.token_start : run.token_start + run.tokens] = rows_RE[first : first + run.tokens]
    for end in range(start + 1, LENGTH + 1):
        piece, span = slice_of(start, end, IMAGES), Span(2, end - start, start, ())
        embedded_1TE = torch.zeros(1, end - start + 3, hidden)
        placeholders = list(placeholders_of(piece, span))
        if placeholders:
            EmbeddingRows(embeddings).put(embedded_1TE, placeholders)
        assert torch.equal(embedded_1TE[0, 2:-1], expected_TE[start:end])
        assert not embedded_1TE[0, [0, 1, -1]].any(), "the neighbours' rows"


def test_embedding_memory_may_be_on_a_device() -> None:
    embeddings = DeviceArena(bare_embedding_arena(3).schema, columns=20, block_size=4, device="cpu")
    rows_RE = torch.arange(21.0).view(7, 3)
    (placed, _) = slice_of(0, 1, IMAGES).images
    embeddings.write(placed.table, (0, 1), (0, 7), None, rows_RE.view(torch.uint8).numpy()[None, None, None])
    embedded_1TE = torch.zeros(1, 5, 3)
    EmbeddingRows(embeddings).put(embedded_1TE, list(placeholders_of(slice_of(3, 8, IMAGES), Span(0, 5, 3, ()))))
    assert torch.equal(embedded_1TE[0, [0, 1, 3, 4]], rows_RE[1:5])


def test_positions_have_three_dimensions_where_a_grid_is_in_the_step() -> None:
    decode = replace(slice_of(30, 31, ()), rope_delta=-4, is_prefill=False)
    flat, grid = slice_of(4, 12, IMAGES), slice_of(4, 12, GRIDS)
    spans = [Span(0, 1, 30, ()), Span(1, 8, 4, ())]
    assert positions_of([decode, flat], spans).tolist() == [[26, *range(4, 12)]]
    positions = positions_of([decode, grid], spans)
    assert positions.shape == (3, 1, 9)
    assert positions[:, 0, 0].tolist() == [26] * 3
    assert (positions[:, 0, 1:] == positions_3T(GRIDS, 4, 12)).all()


def test_positions_after_an_image_do_not_need_it_in_the_chunk() -> None:
    """All of the prompt's images come with every chunk, also those that are behind it."""
    assert list(placeholders_of(slice_of(18, 22, GRIDS), Span(0, 4, 18, ()))) == []
    delta = rope_delta(GRIDS)
    expected = [list(range(18 + delta, 22 + delta))] * 3
    assert positions_of([slice_of(18, 22, GRIDS)], [Span(0, 4, 18, ())])[:, 0].tolist() == expected


def test_a_step_with_images_needs_embedding_memory() -> None:
    runner = ModelRunner(tiny_model(), tiny_arena())
    sequence = Seeing(0, prompt_of(12), slice_of(0, 1, IMAGES).images, (1, 2, 3))
    with pytest.raises(Internal, match="embedding memory"):
        step(runner, [(sequence, 12)])
