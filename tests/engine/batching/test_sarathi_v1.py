"""SARATHI: one chunk per step; chunk and decodes together fill whole tiles."""

import pytest

from engine.batching import Chunk
from engine.batching.sarathi_v1 import SarathiV1
from tests.engine.batching.batches import batch_of

CONFIG = SarathiV1.Config(step_tokens=256, tile_tokens=128)


def test_one_prompt_per_step() -> None:
    assert SarathiV1(CONFIG).chunks(batch_of([(0, 20), (0, 30)])) == [Chunk(0, 20)]


@pytest.mark.parametrize("decodes", [0, 1, 3, 17])
def test_chunk_and_decodes_fill_whole_tiles(decodes: int) -> None:
    """The paper's C = 256 - (B - 1), whatever B - 1 is in this step."""
    (chunk,) = SarathiV1(CONFIG).chunks(batch_of([(0, 5_000)], (9,) * decodes))
    assert chunk.tokens + decodes == 256


@pytest.mark.parametrize(("step_tokens", "tokens"), [(300, 256), (128, 128), (100, 100), (1, 1)])
def test_a_budget_between_two_tiles_is_rounded_down(step_tokens: int, tokens: int) -> None:
    config = SarathiV1.Config(step_tokens=step_tokens, tile_tokens=128)
    assert SarathiV1(config).chunks(batch_of([(0, 5_000)])) == [Chunk(0, tokens)]


def test_cohort_of_the_papers_ratio_has_a_decode_beside_every_chunk() -> None:
    """P:D = C / (B - 1): the chunks of one prompt last as long as B - 1 requests decode."""
    decodes = 7
    prompt_tokens, output_tokens = 249 * 4, 4 * decodes
    batching, left, slots = SarathiV1(CONFIG), prompt_tokens, 0
    while left:
        (chunk,) = batching.chunks(batch_of([(prompt_tokens - left, left)], (9,) * decodes))
        left -= chunk.tokens
        slots += decodes
    assert slots == output_tokens
