"""Prompts with images through the core, with the oracle behind it: embeddings, names, positions and moves are right if
and only if the tokens are."""

from collections import defaultdict

import numpy as np
import pytest

from engine.commands import (
    Activate,
    AddPrefill,
    Admitted,
    BlockTable,
    Branch,
    DecodeHere,
    EngineCommand,
    EngineEvent,
    Paused,
    Prefilled,
    Release,
    Reserve,
    Reserved,
    SequenceSlice,
    StepFailed,
    StepOutput,
    StepPlan,
    TokensSampled,
)
from engine.core import EngineCore, assert_quiet
from engine.executors.oracle import (
    OracleExecutor,
    SeenImage,
    oracle_embedding,
    oracle_embedding_schema,
    reference_output,
    reference_prompt_logprobs,
    reference_tokens,
)
from engine.images import Picture, PlacedImage, PromptImage, Run, rope_delta
from engine.kv.arena import Arena
from engine.scheduler import Scheduler
from engine.types import SamplingParams

BLOCK = 4
IMAGE = 7  # token
ORACLE = OracleExecutor.Config(vocab_size=1 << 40)
RED, BLUE = Picture(2, 1, b"\xff\0\0" * 2), Picture(1, 3, b"\0\0\xff" * 3)


def seen(key: bytes, picture: Picture, *runs: tuple[int, int], grid: tuple[int, int] = (0, 0)) -> SeenImage:
    return PromptImage(key=key, runs=tuple(Run(*run) for run in runs), grid=grid), picture


# Text, an image in two runs, text, an image with a grid of 2 x 3, text: 4 + 2 + 1 + 3 + 2 + 6 + 2 tokens.
IMAGES = (seen(b"red", RED, (4, 2), (7, 3)), seen(b"blue", BLUE, (12, 6), grid=(2, 3)))
PROMPT = (1, 2, 3, 4, *(IMAGE,) * 2, 5, *(IMAGE,) * 3, 6, 8, *(IMAGE,) * 6, 9, 10)
DELTA = 3 - 6
PLACED = tuple(PlacedImage(image, (2 * n + 1, 2 * n)) for n, (image, _) in enumerate(IMAGES))


class Rig:
    """One worker's engine. Embeddings are where their table says, as if they had arrived there."""

    def __init__(self, *, columns: int = 32, step_tokens: int = 64, recompute: bool = True, **config: int) -> None:
        self.arena = Arena(ORACLE.schema, columns=columns, block_size=BLOCK)
        self.embeddings = Arena(ORACLE.embedding_schema, columns=8, block_size=BLOCK)
        scheduling = Scheduler.Config(block_size=BLOCK, step_tokens=step_tokens, recompute=recompute, **config)
        self.core = EngineCore(scheduling, ORACLE.schema, self.arena)
        self.executor = OracleExecutor(self.arena, ORACLE, self.embeddings)
        self.events: list[EngineEvent] = []
        self.plans: list[StepPlan] = []

    def place(self, images: tuple[SeenImage, ...]) -> tuple[PlacedImage, ...]:
        """Write their embeddings: the first to columns 1, 0, the next to 3, 2, and so on."""
        return tuple(self.put(image, (2 * n + 1, 2 * n)) for n, image in enumerate(images))

    def put(self, image: SeenImage, table: BlockTable) -> PlacedImage:
        prompt_image, picture = image
        rows_TX = oracle_embedding(picture, prompt_image.key, prompt_image.features, ORACLE.embedding_schema)
        self.embeddings.write(table, (0, 1), (0, len(rows_TX)), None, rows_TX[None, None, None])
        return PlacedImage(prompt_image, table)

    def add(
        self,
        seq_id: int,
        images: tuple[SeenImage, ...] = IMAGES,
        *,
        prompt: tuple[int, ...] = PROMPT,
        placed: tuple[PlacedImage, ...] | None = None,
        sampling: SamplingParams | None = None,
        here: bool = True,
        **options: object,
    ) -> None:
        command = AddPrefill(
            seq_id=seq_id,
            token_ids=prompt,
            prompt_tokens=len(prompt),
            sampling=sampling or greedy(4),
            decode_here=here,
            images=self.place(images) if placed is None else placed,
            **options,  # type: ignore[arg-type]
        )
        self.send(command)

    def send(self, command: EngineCommand) -> None:
        self.events += self.core.handle(command, 0)

    def run(self, steps: int = 64) -> None:
        while steps and (plan := self.core.begin_step(0)):
            steps -= 1
            self.plans.append(plan)
            self.events += self.core.take_events()
            output: StepOutput = self.executor.execute(plan, lambda start, end: None)
            self.events += self.core.finish_step(output, 0)
        self.events += self.core.take_events()

    def close(self, *seq_ids: int) -> None:
        for seq_id in seq_ids:
            self.send(Release(seq_id=seq_id))
        assert_quiet(self.core)

    def heard(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def tokens(self) -> dict[int, list[int]]:
        tokens = defaultdict(list)
        for event in self.events:
            if isinstance(event, Prefilled | TokensSampled):
                for token in event.tokens:
                    tokens[token.seq_id].append(token.token_id)
        return tokens

    def slices(self, seq_id: int) -> list[SequenceSlice]:
        return [piece for plan in self.plans for piece in plan.slices if piece.seq_id == seq_id]


def greedy(count: int, **options: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, **options)


def expected(images: tuple[SeenImage, ...] = IMAGES, count: int = 4, **options: object) -> list[int]:
    return list(reference_tokens(PROMPT, "", greedy(count), count, ORACLE, images=images, **options))  # type: ignore[arg-type]


# -- what the oracle sees ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step_tokens", [1, 3, 5, 64])
def test_tokens_are_the_references_however_the_prompt_is_cut(step_tokens: int) -> None:
    rig = Rig(step_tokens=step_tokens)
    rig.add(1)
    rig.run()
    assert rig.tokens[1] == expected()
    rig.close(1)


def test_whatever_is_in_an_image_changes_the_tokens() -> None:
    red, blue = IMAGES
    others = [
        (),
        (red,),
        (red, (blue[0], RED)),
        (seen(b"pink", RED, (4, 2), (7, 3)), blue),
        (red, seen(b"blue", BLUE, (12, 6))),
        (red, seen(b"blue", BLUE, (12, 6), grid=(3, 2))),
        (seen(b"red", RED, (7, 3), (4, 2)), blue),
    ]
    outputs = {tuple(expected(images)) for images in (IMAGES, *others)}
    assert len(outputs) == 1 + len(others)


def test_every_byte_of_an_embedding_counts() -> None:
    rig = Rig()
    (red, _) = rig.place(IMAGES)
    for row in range(red.image.features):
        rig.embeddings.bytes_CLHPSX[red.table[row // BLOCK], 0, 0, 0, row % BLOCK, row] ^= 1
        rig.add(1 + row, placed=PLACED, tenant=str(row))  # a tenant each: none finds another's prefix
        rig.run()
        right = reference_tokens(PROMPT, str(row), greedy(4), 4, ORACLE, images=IMAGES)
        assert rig.tokens[1 + row][0] != right[0], f"row {row}"
        rig.embeddings.bytes_CLHPSX[red.table[row // BLOCK], 0, 0, 0, row % BLOCK, row] ^= 1


def test_swapped_embeddings_change_the_tokens() -> None:
    rig = Rig()
    first, second = rig.place(IMAGES)
    rig.add(1, placed=(PlacedImage(first.image, second.table), PlacedImage(second.image, first.table)))
    rig.run()
    assert rig.tokens[1][0] != expected()[0]


def test_scores_of_a_prompt_are_those_of_the_reference() -> None:
    rig = Rig(step_tokens=5)
    rig.add(1, sampling=greedy(1, prompt_logprobs=1))
    rig.run()
    scores = [score for event in rig.events if hasattr(event, "logprobs") for score in event.logprobs]
    assert tuple(scores) == reference_prompt_logprobs(PROMPT, "", 1, ORACLE, IMAGES)
    assert tuple(scores) != reference_prompt_logprobs(PROMPT, "", 1, ORACLE)


def test_an_oracle_refuses_embeddings_of_another_schema_and_images_without_any() -> None:
    rig = Rig()
    with pytest.raises(ValueError, match="another schema"):
        OracleExecutor(rig.arena, ORACLE, Arena(oracle_embedding_schema(hidden=3), columns=1))
    blind = OracleExecutor(rig.arena, ORACLE)
    rig.add(1)
    plan = rig.core.begin_step(0)
    assert plan
    with pytest.raises(ValueError, match="no embeddings"):
        blind.execute(plan, lambda start, end: None)


# -- slices ------------------------------------------------------------------------------------------------------------
def test_prefills_are_handed_images_and_decodes_the_delta() -> None:
    rig = Rig(step_tokens=8)
    rig.add(1)
    rig.run()
    prefills, decodes = rig.slices(1)[:3], rig.slices(1)[3:]
    assert [(len(piece.images), piece.rope_delta, piece.is_prefill) for piece in prefills] == [(2, 0, True)] * 3
    assert [(len(piece.images), piece.rope_delta, piece.is_prefill) for piece in decodes] == [(0, DELTA, False)] * 3


# -- the prefix cache --------------------------------------------------------------------------------------------------
def cached_tokens(rig: Rig, seq_id: int) -> int:
    (admitted,) = (event for event in rig.heard(Admitted) if event.seq_id == seq_id)
    return admitted.cached_tokens


def test_the_same_text_and_images_hit_the_cache() -> None:
    rig = Rig()
    rig.add(1)
    rig.run()
    rig.add(2)
    rig.run()
    assert cached_tokens(rig, 2) == 16
    assert rig.tokens[2] == expected()
    rig.close(1, 2)


def test_another_image_hits_only_what_comes_before_it() -> None:
    rig = Rig()
    rig.add(1)
    rig.run()
    rig.add(2, (seen(b"red", RED, (4, 2), (7, 3)), seen(b"green", BLUE, (12, 6), grid=(2, 3))))
    rig.run()
    rig.add(3, (seen(b"pink", RED, (4, 2), (7, 3)), seen(b"blue", BLUE, (12, 6), grid=(2, 3))))
    rig.run()
    rig.add(4, (), placed=())
    rig.run()
    assert [cached_tokens(rig, seq_id) for seq_id in (2, 3, 4)] == [12, 4, 4]
    assert rig.tokens[4] == expected(())


def test_tenants_share_nothing_not_even_the_same_key() -> None:
    rig = Rig()
    for seq_id, tenant in enumerate(("one", "other"), 1):
        rig.add(seq_id, tenant=tenant)
        rig.run()
    assert cached_tokens(rig, 2) == 0
    assert rig.tokens[2] == list(reference_tokens(PROMPT, "other", greedy(4), 4, ORACLE, images=IMAGES))


def test_outputs_behind_images_are_cached_too() -> None:
    """A second turn of a conversation: prompt, answer and more. The answer's blocks are named as it grows."""
    rig = Rig(columns=32)
    rig.add(1, sampling=greedy(9))
    rig.run()
    context = (*PROMPT, *rig.tokens[1][:8])
    rig.add(2, prompt=(*context, 99))
    rig.run()
    assert cached_tokens(rig, 2) == len(context) == 28
    right = reference_tokens((*context, 99), "", greedy(4), 4, ORACLE, images=IMAGES)
    assert rig.tokens[2] == list(right)


# -- moves -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wrong", [0, 1])
def test_a_sequence_goes_on_elsewhere_with_its_delta(wrong: int) -> None:
    source, target = Rig(), Rig()
    source.add(1, here=False)
    source.run()
    images = tuple(image for image, _ in IMAGES)
    target.send(Reserve(seq_id=2, token_ids=PROMPT, growth_tokens=8, images=images))
    move(source, target)
    branch = Branch(seq_id=2, choice=0, token_id=source.tokens[1][0])
    sampling = greedy(4)
    target.send(
        Activate(
            seq_id=2,
            token_ids=PROMPT,
            prompt_tokens=len(PROMPT),
            sampling=sampling,
            branches=(branch,),
            rope_delta=rope_delta(images) + wrong,
        )
    )
    target.run()
    assert (source.tokens[1] + target.tokens[2] == expected()) == (not wrong)
    target.add(3)
    target.run()
    assert cached_tokens(target, 3) == 16, "it is named after its images there, too"
    target.close(2, 3)


def move(source: Rig, target: Rig) -> None:
    """What Source and Target do."""
    (admitted,), (reserved,) = source.heard(Admitted), target.heard(Reserved)
    span = (0, ORACLE.schema.kv.layers), (0, len(PROMPT))
    target.arena.write(reserved.block_table, *span, None, source.arena.read(admitted.block_table, *span))


@pytest.mark.parametrize("here_first", [False, True])
def test_choices_share_images_and_positions(here_first: bool) -> None:
    rig = Rig()
    sampling = SamplingParams(max_tokens=4, seed=5)
    rig.add(1, here=False, choices=(0, 1, 2), sampling=sampling)
    if not here_first:
        rig.run()
    rig.send(DecodeHere(seq_id=1, children=(2, 3, 4)))
    rig.run()
    (prefilled,) = rig.heard(Prefilled)
    for choice, (seq_id, first) in enumerate(zip((2, 3, 4), prefilled.tokens, strict=True)):
        right = reference_output(PROMPT, "", sampling, 4, ORACLE, choice, IMAGES)
        assert [first.token_id, *rig.tokens[seq_id]] == [pick.token_id for pick in right]
    rig.close(1, 2, 3, 4)


def test_a_choice_that_no_column_is_left_for_fails_because_it_cannot_be_computed_again() -> None:
    rig = Rig(columns=6)  # 5 for the prompt, one for the first choice's next block
    rig.add(1, here=False, choices=(0, 1))
    rig.send(DecodeHere(seq_id=1, children=(2, 3)))
    rig.run(1)
    (failed,) = rig.heard(StepFailed)
    assert (failed.seq_ids, failed.reason) == ((3,), "no_room_to_fork")
    rig.close(1, 2, 3)


# -- preemption --------------------------------------------------------------------------------------------------------
def test_a_preempted_sequence_with_images_leaves() -> None:
    """Its embeddings are gone: it is not computed again here, and says what its positions are."""
    rig = Rig(columns=12, growth_reserve_tokens=0)
    text = tuple(range(100, 120))
    rig.add(1, (), prompt=text, placed=(), sampling=greedy(24))
    rig.add(2, sampling=greedy(24))
    rig.run()
    (paused,) = rig.heard(Paused)
    assert (paused.seq_id, paused.preempted, paused.rope_delta) == (2, True, DELTA)
    assert paused.token_ids[: len(PROMPT)] == PROMPT
    assert all(piece.is_prefill == (piece.start < len(PROMPT)) for piece in rig.slices(2)), "never computed again"
    assert np.array_equal(rig.tokens[2], expected(count=len(rig.tokens[2])))
    rig.send(Release(seq_id=2))
    rig.run()
    assert len(rig.tokens[1]) == 24
    rig.close(1, 2)
