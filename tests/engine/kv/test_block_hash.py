"""Names of blocks: equal if and only if tenant, model, identity and all tokens so far are."""

import pytest

from engine.kv.block_hash import NAME_BYTES, block_hashes, root_hash

ROOT = root_hash("acme", b"model")


def names(*token_ids: int, block_size: int = 2, root: bytes = ROOT) -> list[bytes]:
    return block_hashes(root, token_ids, block_size)


def test_only_full_blocks_have_names() -> None:
    assert [len(names(*range(count))) for count in (0, 1, 2, 3, 4)] == [0, 0, 1, 1, 2]
    assert {len(name) for name in (ROOT, *names(*range(8)))} == {NAME_BYTES}


def test_a_name_continues_the_one_before_it() -> None:
    assert names(1, 2, 3, 4)[1:] == block_hashes(names(1, 2)[0], (3, 4), 2)
    assert names(1, 2, 3, 4, 5, 6)[:2] == names(1, 2, 3, 4)


def test_the_same_block_behind_another_prefix_is_another_block() -> None:
    assert names(1, 2, 3, 4)[1] != names(9, 2, 3, 4)[1]
    assert names(1, 2, 3, 4)[1] != names(3, 4)[0]
    assert names(1, 2)[0] != names(2, 1)[0]


@pytest.mark.parametrize(
    "root",
    [
        root_hash("emca", b"model"),
        root_hash("", b"acmemodel"),
        root_hash("acmem", b"odel"),
        root_hash("acme", b"other"),
        root_hash("acme", b"model", "int8"),
        root_hash("acme", b"mode", "l"),
    ],
    ids=["tenant", "no tenant", "another split", "model", "identity", "a third split"],
)
def test_roots_differ_in_everything_that_decides_what_kv_is(root: bytes) -> None:
    assert names(1, 2, root=root) != names(1, 2)


def test_names_are_the_same_in_every_process() -> None:
    """Router and workers name blocks alike, whatever their PYTHONHASHSEED."""
    assert names(1, 2)[0].hex() == "54ea0b1a6031de37511f3a845537e58b"
