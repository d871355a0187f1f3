"""Images in a prompt: their names in the prefix cache, and their positions."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.images import Picture, PromptImage, Run, naming_ids, positions_3T, rope_delta
from engine.kv.prefix_cache import BlockChain

IMAGE = 7  # token
PROMPT = (1, 2, IMAGE, IMAGE, 3, IMAGE, IMAGE, IMAGE, 4, 5, 6, 8)
SPLIT = (Run(2, 2), Run(5, 3))


def image(key: bytes = b"a", runs: tuple[Run, ...] = SPLIT) -> PromptImage:
    return PromptImage(key=key, runs=runs)


def names(images: Sequence[PromptImage], *, root: bytes = b"root", block_size: int = 2) -> list[bytes]:
    chain = BlockChain(root, root, block_size, images)
    chain.extend(PROMPT)
    return chain.own


# -- names -------------------------------------------------------------------------------------------------------------
def test_rows_count_through_the_runs() -> None:
    assert image().features == 5
    assert image().rows() == ((SPLIT[0], 0), (SPLIT[1], 2))


def test_every_row_has_a_name_of_its_own_and_text_keeps_its_ids() -> None:
    ids = naming_ids(PROMPT, [image()])
    placeholders = [token for token in ids if token < 0]
    assert len(set(placeholders)) == len(placeholders) == 5
    assert [token for token in ids if token >= 0] == [token for token in PROMPT if token != IMAGE]
    assert min(ids) >= -(1 << 63)


def test_a_part_is_named_as_in_the_whole() -> None:
    """Blocks are named as they fill, a few at a time."""
    whole = naming_ids(PROMPT, [image()])
    for start in range(len(PROMPT)):
        for end in range(start, len(PROMPT) + 1):
            assert naming_ids(PROMPT[start:end], [image()], start) == whole[start:end]


def test_the_same_ids_with_another_image_are_other_blocks() -> None:
    first, other = names([image(b"a")]), names([image(b"b")])
    assert first == names([image(b"a")])
    assert first[0] == other[0], "the text before it is the same"
    assert not set(first[1:]) & set(other[1:])
    assert not set(first[1:]) & set(names([])[1:])


def test_the_same_image_elsewhere_in_its_rows_is_another_block() -> None:
    shifted = PromptImage(key=b"a", runs=(Run(0, 4),))
    late = naming_ids((IMAGE,) * 2, [shifted], 2)
    assert late != naming_ids((IMAGE,) * 2, [shifted], 0)


def test_two_images_that_change_places_are_other_blocks() -> None:
    one, two = Run(2, 2), Run(5, 3)
    ab = [image(b"a", (one,)), image(b"b", (two,))]
    ba = [image(b"b", (one,)), image(b"a", (two,))]
    assert not set(names(ab)[1:]) & set(names(ba)[1:])


def test_tenants_and_identities_share_no_name() -> None:
    assert not set(names([image()], root=b"one")) & set(names([image()], root=b"other"))


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_chain_that_grows_has_the_names_of_one_made_at_once(step: int) -> None:
    grown = BlockChain(b"exact", b"own", 2, [image()])
    for end in range(0, len(PROMPT) + step, step):
        grown.extend(PROMPT[:end])
    forked = grown.fork()
    forked.extend((*PROMPT, 9, 9))
    assert (grown.exact, grown.own) == (names([image()], root=b"exact"), names([image()], root=b"own"))
    assert forked.own[:-1] == grown.own


# -- pixels ------------------------------------------------------------------------------------------------------------
def test_a_picture_has_three_bytes_for_each_pixel() -> None:
    assert Picture(2, 3, bytes(18)).pixels == bytes(18)
    for width, height, size in [(2, 3, 17), (0, 3, 0), (3, -1, 0)]:
        with pytest.raises(ValueError, match="pixels"):
            Picture(width, height, bytes(size))


# -- positions ---------------------------------------------------------------------------------------------------------
SIDES = st.integers(1, 6)
LAYOUTS = st.tuples(
    st.integers(0, 5), st.lists(st.tuples(SIDES, SIDES, st.integers(1, 4)), min_size=1, max_size=4), st.integers(0, 4)
)
"""(text tokens before, (rows, columns, text tokens after) of each image)"""


def lay_out(before: int, images: Sequence[tuple[int, int, int]]) -> tuple[list[PromptImage], list[int]]:
    """The images, and which tokens are placeholders (1) or text (0)."""
    ends = list(accumulate((rows * columns + after for rows, columns, after in images), initial=before))
    placed = [
        PromptImage(key=bytes([n]), runs=(Run(start, rows * columns),), grid=(rows, columns))
        for n, (start, (rows, columns, _)) in enumerate(zip(ends, images, strict=False))
    ]
    kinds = [0] * before
    for rows, columns, after in images:
        kinds += [1] * (rows * columns) + [0] * after
    return placed, kinds


@settings(deadline=None)  # the first example imports transformers
@given(LAYOUTS, st.data())
def test_positions_are_those_of_transformers(
    layout: tuple[int, list[tuple[int, int, int]], int], data: st.DataObject
) -> None:
    import torch
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    before, sizes, _ = layout
    images, kinds = lay_out(before, sizes)
    config = Qwen2VLConfig()
    merge = config.vision_config.spatial_merge_size
    model = type("Positions", (), {"config": config, "get_vision_position_ids": Qwen2VLModel.get_vision_position_ids})()
    expected_31T, delta_11 = Qwen2VLModel.get_rope_index(
        model,
        input_ids=torch.tensor([kinds]),
        mm_token_type_ids=torch.tensor([kinds], dtype=torch.int32),
        image_grid_thw=torch.tensor([(1, rows * merge, columns * merge) for rows, columns, _ in sizes]),
    )
    expected_3T = expected_31T[:, 0].numpy()
    np.testing.assert_array_equal(positions_3T(images, 0, len(kinds)), expected_3T)
    assert rope_delta(images) == int(delta_11)
    start = data.draw(st.integers(0, len(kinds)))
    end = data.draw(st.integers(start, len(kinds)))
    np.testing.assert_array_equal(positions_3T(images, start, end), expected_3T[:, start:end])


@given(LAYOUTS)
def test_behind_all_images_the_delta_is_all_there_is(layout: tuple[int, list[tuple[int, int, int]], int]) -> None:
    before, sizes, more = layout
    images, kinds = lay_out(before, sizes)
    after_3T = positions_3T(images, len(kinds), len(kinds) + more)
    assert (after_3T == np.arange(len(kinds), len(kinds) + more) + rope_delta(images)).all()


def test_without_a_grid_positions_are_those_of_text() -> None:
    assert rope_delta([image()]) == 0
    assert (positions_3T([image()], 3, 9) == np.arange(3, 9)).all()
