"""OracleExecutor: a model without a model. Right tokens prove that every KV byte was right. No torch.

    KV of token i    digest of (KV bytes of token i-1 *as stored*, token id, position, tenant), in every layer and head
    next token       digest of (every KV byte of the sequence, as stored), modulo the vocabulary

So a row that is missing, stale, foreign, swapped or late changes every token after it (reliability, "oracle engine"),
and `reference_tokens` says without any memory what the tokens should have been. It says nothing about speed (`paced`)
nor about numerics: bytes must arrive as they were sent, so codecs have to be lossless.

Legend: L layers, H heads, P parts, T tokens, X bytes of one token's head; R = L * H * P * X, a token's whole row.
"""

import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from engine.base import limits
from engine.base.failpoints import InjectedFault
from engine.commands import SequenceSlice, StepOutput, StepPlan
from engine.executors import LayersComputed
from engine.kv.arena import Arena
from engine.kv.schema import CacheSchema, Stream
from engine.types import SamplingParams

Bytes: TypeAlias = npt.NDArray[np.uint8]
Digest: TypeAlias = xxhash.xxh3_64

_LANE: Final = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's constants
_MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2: Final = np.uint64(0x94D049BB133111EB)
_DIGESTS_KEPT = 1_024  # sequences of which `trust_read_rows` remembers the digest; an evicted one is read again


def oracle_schema(
    *, layers: int = 4, heads: int = 2, head_dim: int = 8, dtype: str = "uint8", model: str = "oracle"
) -> CacheSchema:
    """Small by default: 128 bytes a token. `paced` asks for a real model's shape."""
    return CacheSchema(model, (Stream(name="kv", layers=layers, heads=heads, head_dim=head_dim, dtype=dtype),))


@dataclass(frozen=True, kw_only=True)
class OracleInfo:
    """What a worker says about the model it serves."""

    schema: CacheSchema
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]


class OracleExecutor:
    """Implements `Executor` over host memory."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        schema: CacheSchema = field(default_factory=oracle_schema)
        vocab_size: int = 1_000
        max_model_len: int = limits.PROMPT_TOKENS_MAX
        eos_token_ids: frozenset[int] = frozenset()
        samples_eos: bool = False  # by default outputs end by length, so that tests know how long they are
        poison_token: int | None = None  # a step that is fed this token raises; it is never sampled
        layers_per_group: int = limits.LAYERS_PER_GROUP
        # Read each stored row once instead of in every step: same tokens, but corruption after the first read goes
        # unseen. For `paced`, whose realistic rows would make reading dominate the modelled time.
        trust_read_rows: bool = False

        @property
        def unsampled(self) -> frozenset[int]:
            poison = frozenset[int]() if self.poison_token is None else frozenset({self.poison_token})
            return poison if self.samples_eos else poison | self.eos_token_ids

    def __init__(self, arena: Arena, config: Config) -> None:
        if arena.schema.digest != config.schema.digest:
            raise ValueError("the arena holds another schema than the oracle computes")
        self._arena = arena
        self._config = config
        self._layers = config.schema.kv.layers
        self._rows = _Rows(config.schema.token_bytes)
        self._digests: OrderedDict[int, tuple[int, Digest]] = OrderedDict()  # seq_id -> (tokens, digest of their rows)

    @property
    def info(self) -> OracleInfo:
        config = self._config
        return OracleInfo(
            schema=config.schema,
            vocab_size=config.vocab_size,
            max_model_len=config.max_model_len,
            eos_token_ids=config.eos_token_ids,
        )

    def execute(self, plan: StepPlan, on_layers: LayersComputed) -> StepOutput:
        """Every layer of token i depends on every layer of token i-1, so all layers are written before the first is
        announced."""
        for piece in plan.slices:
            self._compute(piece)
        for start in range(0, self._layers, self._config.layers_per_group):
            on_layers(start, min(start + self._config.layers_per_group, self._layers))
        tokens = {piece.seq_id: self._sample(piece) for piece in plan.slices if piece.sample_position is not None}
        return StepOutput(plan.step_id, tokens)

    def _compute(self, piece: SequenceSlice) -> None:
        """Fill [start, end):    ... row start-1, from memory | start ........... end)"""
        if self._config.poison_token in piece.token_ids:
            raise InjectedFault("poison token")
        end = piece.start + len(piece.token_ids)
        previous_R = self._stored_rows(piece, piece.start - 1, piece.start)[0] if piece.start else None
        rows = self._rows.chain(previous_R, piece.token_ids, piece.start, piece.tenant)
        rows_TR = np.stack(list(rows))
        kv = self._config.schema.kv
        rows_TLHPX = rows_TR.reshape(len(rows_TR), kv.layers, kv.heads, kv.parts, -1)
        data_LHPTX = np.ascontiguousarray(rows_TLHPX.transpose(1, 2, 3, 0, 4))
        self._arena.write(piece.block_table, (0, self._layers), (piece.start, end), None, data_LHPTX)

    def _sample(self, piece: SequenceSlice) -> int:
        assert piece.sample_position is not None
        digest = self._digest(piece, piece.start + len(piece.token_ids))
        return _token(digest, piece.sampling, piece.sample_position, self._config)

    def _digest(self, piece: SequenceSlice, end: int) -> Digest:
        """Of the rows of tokens [0, end), read from memory (all of them, or those not yet trusted)."""
        done, digest = self._digests.pop(piece.seq_id, (0, xxhash.xxh3_64()))
        if done >= end:
            done, digest = 0, xxhash.xxh3_64()
        digest.update(self._stored_rows(piece, done, end).data)
        if self._config.trust_read_rows:
            self._digests[piece.seq_id] = (end, digest)
            if len(self._digests) > _DIGESTS_KEPT:
                self._digests.popitem(last=False)
        return digest

    def _stored_rows(self, piece: SequenceSlice, start: int, end: int) -> Bytes:
        """Memory as rows_TR, each row with its layers, heads and parts in schema order."""
        data_LHPTX = self._arena.read(piece.block_table, (0, self._layers), (start, end))
        return np.ascontiguousarray(data_LHPTX.transpose(3, 0, 1, 2, 4)).reshape(end - start, -1)


class _Rows:
    """The chain of KV rows: each is a digest of the one before it, blown up to a row's size."""

    def __init__(self, row_bytes: int) -> None:
        self._row_bytes = row_bytes
        self._lanes = np.arange(1, -(-row_bytes // 8) + 1, dtype=np.uint64) * _LANE  # one word each, all different

    def chain(self, previous_R: Bytes | None, token_ids: Sequence[int], start: int, tenant: str) -> Iterator[Bytes]:
        tenant_digest = xxhash.xxh3_64_intdigest(tenant.encode())
        stored = b"" if previous_R is None else previous_R.tobytes()
        for position, token_id in enumerate(token_ids, start):
            link = xxhash.xxh3_64_intdigest(struct.pack("<QQQ", token_id, position, tenant_digest))
            row_R = self._expand(xxhash.xxh3_64_intdigest(stored, seed=link))
            yield row_R
            stored = row_R.tobytes()

    def _expand(self, state: int) -> Bytes:
        """A row whose every byte depends on the state (splitmix64, one word per lane)."""
        words = self._lanes ^ np.uint64(state)
        words *= _MIX_1
        words ^= words >> np.uint64(29)
        words *= _MIX_2
        words ^= words >> np.uint64(32)
        return words.view(np.uint8)[: self._row_bytes]


def reference_tokens(
    prompt: Sequence[int], tenant: str, sampling: SamplingParams, count: int, config: OracleExecutor.Config
) -> tuple[int, ...]:
    """The `count` tokens that must follow this prompt, computed without blocks, chunks, steps or memory.

    It never stops by itself: what ends an output is the scheduler's business.
    """
    rows = _Rows(config.schema.token_bytes)
    digest = xxhash.xxh3_64()
    last_R: Bytes | None = None
    for last_R in rows.chain(None, prompt, 0, tenant):
        digest.update(last_R.data)
    tokens: list[int] = []
    while len(tokens) < count:
        token_id = _token(digest, sampling, len(tokens), config)
        (last_R,) = rows.chain(last_R, (token_id,), len(prompt) + len(tokens), tenant)
        digest.update(last_R.data)
        tokens.append(token_id)
    return tuple(tokens)


def _token(digest: Digest, sampling: SamplingParams, position: int, config: OracleExecutor.Config) -> int:
    """Greedy sampling sees the context only; otherwise seed and output position count too."""
    luck = b"" if sampling.greedy else struct.pack("<QQ", sampling.seed, position)
    token_id = xxhash.xxh3_64_intdigest(digest.digest() + luck) % config.vocab_size
    while token_id in config.unsampled:
        token_id = (token_id + 1) % config.vocab_size
    return token_id
