"""Names of KV blocks: hashes over everything that decides what a block's KV is. Tiny: the router names blocks too.

    root          tenant, model, identity
    name of 0     root,      tokens [0, S)
    name of 1     name of 0, tokens [S, 2S)       so equal names mean equal tokens from the prompt's first on

`identity` is "" for KV as the model computed it, and otherwise says what it came through (codec and level): lossy KV
never answers to the name of exact KV. The tenant is in the root, so no name is ever shared between two (I4).
Placeholders of images have one id whatever they show: what is hashed for them is `engine.images.naming_ids`.

128 bits of BLAKE2b: 0.6 us a block of 16 tokens where xxh3 takes 0.25. Clients choose the tokens, and against a hash
that is not cryptographic one of them could compute a prompt whose name is that of somebody else's.
"""

import struct
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeAlias

NAME_BYTES = 16

BlockName: TypeAlias = bytes


def root_hash(tenant: str, model: bytes, identity: str = "") -> BlockName:
    """What the first block's name continues. `model` is the schema's digest (`CacheSchema.digest`)."""
    fields = (tenant.encode(), model, identity.encode())
    lengths = struct.pack("<3Q", *map(len, fields))  # ("a", "b") must not be ("ab", "")
    return blake2b(lengths + b"".join(fields), digest_size=NAME_BYTES).digest()


def block_hashes(parent: BlockName, token_ids: Sequence[int], block_size: int) -> list[BlockName]:
    """Names of the full blocks of `token_ids`, which follow the block named `parent` (or start at a root)."""
    data = array("q", token_ids).tobytes()
    block_bytes = 8 * block_size
    names: list[BlockName] = []
    for start in range(0, len(data) - block_bytes + 1, block_bytes):
        parent = blake2b(parent + data[start : start + block_bytes], digest_size=NAME_BYTES).digest()
        names.append(parent)
    return names
