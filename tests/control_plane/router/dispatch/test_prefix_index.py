"""The index knows what was sent where, per tenant and loss; it forgets the right things, and in the right order."""

from control_plane.router.dispatch.prefix_index import BlockHashes, CacheKind, PrefixIndex
from engine.images import PromptImage, Run, naming_ids
from engine.kv.block_hash import block_hashes, root_hash

KIND = CacheKind(b"schema", 4)
PROMPT = tuple(range(16))


def hashes(tokens: tuple[int, ...] = PROMPT, *, tenant: str = "", kind: CacheKind = KIND) -> list[bytes]:
    return list(BlockHashes(tenant, tokens).of(kind))


def test_a_common_beginning_is_found_block_by_block() -> None:
    index = PrefixIndex()
    index.note("p1", hashes(), columns=100)
    assert index.held_blocks("p1", hashes()) == 4
    assert index.held_blocks("p1", hashes((*PROMPT[:9], 99, 99, 99, *PROMPT))) == 2
    assert index.held_blocks("p1", hashes((99, *PROMPT))) == 0
    assert index.held_blocks("p2", hashes()) == 0


def test_blocks_of_another_tenant_loss_model_or_size_are_others() -> None:
    index = PrefixIndex()
    index.note("p1", hashes(), columns=100)
    assert index.held_blocks("p1", hashes(tenant="blue")) == 0
    for kind in (CacheKind(b"schema", 4, "int8/0"), CacheKind(b"another", 4), CacheKind(b"schema", 8)):
        assert index.held_blocks("p1", hashes(kind=kind)) == 0


def test_of_a_chain_the_end_is_forgotten_first() -> None:
    index = PrefixIndex(PrefixIndex.Config(blocks_max=6))
    index.note("p1", hashes(), columns=100)
    index.note("p1", hashes((50,) * 16), columns=100)
    assert index.held_blocks("p1", hashes()) == 2
    assert index.held_blocks("p1", hashes((50,) * 16)) == 4


def test_what_is_sent_again_is_kept_longest() -> None:
    index = PrefixIndex(PrefixIndex.Config(blocks_max=8))
    index.note("p1", hashes(), columns=100)
    index.note("p1", hashes((50,) * 16), columns=100)
    index.note("p1", hashes(), columns=100)
    index.note("p1", hashes((60,) * 16), columns=100)
    assert [index.held_blocks("p1", hashes(prompt)) for prompt in (PROMPT, (50,) * 16, (60,) * 16)] == [4, 0, 4]


def test_no_more_is_remembered_than_the_worker_can_hold() -> None:
    index = PrefixIndex()
    index.note("p1", hashes(), columns=3)
    assert index.held_blocks("p1", hashes()) == 3
    index.note("p2", hashes(), columns=0)  # not known
    assert index.held_blocks("p2", hashes()) == 4


def test_forgetting() -> None:
    index = PrefixIndex()
    for worker in ("p1", "p2", "p3"):
        index.note(worker, hashes(), columns=100)
    index.forget("p1")
    assert [index.held_blocks(worker, hashes()) for worker in ("p1", "p2")] == [0, 4]
    index.clear()
    assert [index.held_blocks(worker, hashes()) for worker in ("p2", "p3")] == [0, 0]


def test_a_chain_goes_on_as_if_it_had_been_one_prompt() -> None:
    for count in (0, 3, 4, 6, 16):
        prompt, more = PROMPT[:count], PROMPT[count:]
        assert list(BlockHashes("", prompt).extended(KIND, more)) == hashes(PROMPT)


def test_a_prompt_without_a_full_block_has_no_hash() -> None:
    assert hashes(PROMPT[:3]) == hashes(kind=CacheKind(b"schema", 0)) == []


def test_hashes_are_computed_once() -> None:
    prompt = BlockHashes("", PROMPT)
    assert prompt.of(KIND) is prompt.of(CacheKind(b"schema", 4))


def test_blocks_of_placeholders_are_named_after_what_they_show() -> None:
    """As in the workers' caches. Blocks before an image are those of text; blocks behind it are not."""
    tokens = (1, 2, 3, 4, 7, 7, 7, 7, 5, 6, 8, 9)

    def shows(key: bytes) -> list[PromptImage]:
        return [PromptImage(key=key, runs=(Run(4, 4),))]

    text, *seen = (list(BlockHashes("", tokens, images).of(KIND)) for images in ([], shows(b"a"), shows(b"b")))
    assert len({text[0], *(names[0] for names in seen)}) == 1
    assert len({text[1], *(names[1] for names in seen)}) == len({text[2], *(names[2] for names in seen)}) == 3
    root = root_hash("", KIND.schema_digest)
    assert seen[0] == block_hashes(root, naming_ids(tokens, shows(b"a")), KIND.block_size)
    assert BlockHashes("", tokens[:10], shows(b"a")).extended(KIND, tokens[10:]) == seen[0]
