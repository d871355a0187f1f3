"""OracleExecutor: a model without a model. Right tokens prove that every KV byte was right. No torch.

    KV of token i    digest of (KV bytes of token i-1 *as stored*, token id, position, tenant), in every layer and head
                     of an image's placeholder: its embedding's row *as stored*, instead of its id
    next token       digest of (every KV byte of the sequence, as stored), modulo the vocabulary; unless greedy, of
                     seed, choice and output position too
    log-probs        made up from the same digests: numbers that must arrive as they were sent, and mean nothing

So a row that is missing, stale, foreign, swapped or late, of KV or of an embedding, changes every token after it
(reliability, "oracle engine"), and `reference_tokens` says without any memory what the tokens should have been. It says
nothing about speed (`paced`) nor about numerics: bytes must arrive as they were sent, so codecs have to be lossless. Of
the parameters that reshape logits (penalties, biases, masks, constraints) it knows none: it has no logits.

Legend: L layers, H heads, P parts, T tokens, X bytes of one token's head; R = L * H * P * X, a token's whole row.
"""

import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from engine.base import limits
from engine.base.failpoints import InjectedFault
from engine.commands import BlockTable, Sampled, SequenceSlice, StepOutput, StepPlan
from engine.executors import LayersComputed
from engine.images import Picture, PromptImage, positions_3T, rope_delta
from engine.kv.arena import Arena
from engine.kv.schema import CacheSchema, Stream
from engine.types import SamplingParams, TokenLogprobs

Bytes: TypeAlias = npt.NDArray[np.uint8]
Digest: TypeAlias = xxhash.xxh3_64
SeenImage: TypeAlias = tuple[PromptImage, Picture]

_LANE: Final = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's constants
_MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2: Final = np.uint64(0x94D049BB133111EB)
_DIGESTS_KEPT = 1_024  # sequences of which `trust_read_rows` remembers the digest; an evicted one is read again


def oracle_schema(
    *, layers: int = 4, heads: int = 2, head_dim: int = 8, dtype: str = "uint8", model: str = "oracle"
) -> CacheSchema:
    """Small by default: 128 bytes a token. `paced` asks for a real model's shape."""
    return CacheSchema(model, (Stream(name="kv", layers=layers, heads=heads, head_dim=head_dim, dtype=dtype),))


def oracle_embedding_schema(*, hidden: int = 16, model: str = "oracle") -> CacheSchema:
    """A byte for each element."""
    stream = Stream(
        name="image",
        layers=1,
        heads=1,
        head_dim=hidden,
        dtype="uint8",
        parts=1,
        position_encoding="none",
        role="embedding",
    )
    return CacheSchema(model, (stream,))


def oracle_embedding(picture: Picture, key: bytes, features: int, schema: CacheSchema) -> Bytes:
    """rows_TR of an image. All of its pixels, its shape and its key are in every byte."""
    shape = struct.pack("<QQQ", picture.width, picture.height, features)
    state = xxhash.xxh3_64_intdigest(shape + key + picture.pixels)
    rows = _Rows(schema.token_bytes)
    return np.stack([rows.expand(xxhash.xxh3_64_intdigest(struct.pack("<QQ", state, row))) for row in range(features)])


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
        embedding_schema: CacheSchema = field(default_factory=oracle_embedding_schema)
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

    def __init__(self, arena: Arena, config: Config, embeddings: Arena | None = None) -> None:
        if arena.schema.digest != config.schema.digest:
            raise ValueError("the arena holds another schema than the oracle computes")
        if embeddings is not None and embeddings.schema.digest != config.embedding_schema.digest:
            raise ValueError("the embeddings have another schema than the oracle reads")
        self._arena = arena
        self._embeddings = embeddings
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
        scored = {piece.seq_id: self._score_prompt(piece) for piece in plan.slices if piece.is_prefill}
        prompt_logprobs = {seq_id: scores for seq_id, scores in scored.items() if scores}
        return StepOutput(plan.step_id, tokens, prompt_logprobs=prompt_logprobs)

    def _compute(self, piece: SequenceSlice) -> None:
        """Fill [start, end):    ... row start-1, from memory | start ........... end)"""
        if self._config.poison_token in piece.token_ids:
            raise InjectedFault("poison token")
        end = piece.start + len(piece.token_ids)
        previous_R = self._stored_rows(piece, piece.start - 1, piece.start)[0] if piece.start else None
        rows_TR = np.stack(list(self._rows.chain(previous_R, self._links(piece))))
        kv = self._config.schema.kv
        rows_TLHPX = rows_TR.reshape(len(rows_TR), kv.layers, kv.heads, kv.parts, -1)
        data_LHPTX = np.ascontiguousarray(rows_TLHPX.transpose(1, 2, 3, 0, 4))
        self._arena.write(piece.block_table, (0, self._layers), (piece.start, end), None, data_LHPTX)

    def _links(self, piece: SequenceSlice) -> Iterator[int]:
        images = [placed.image for placed in piece.images]
        rows = dict(self._placeholders(piece))
        return _links(piece.token_ids, piece.start, piece.tenant, images, rows, piece.rope_delta)

    def _placeholders(self, piece: SequenceSlice) -> Iterator[tuple[int, bytes]]:
        """Those among the fed tokens: where, and the row of embedding memory that each stands for."""
        end = piece.start + len(piece.token_ids)
        for placed in piece.images:
            for run, first_row in placed.image.rows():
                low, high = max(run.token_start, piece.start), min(run.token_start + run.tokens, end)
                if low < high:
                    row = first_row + low - run.token_start
                    rows_TR = self._embedding_rows(placed.table, row, row + high - low)
                    yield from zip(range(low, high), map(bytes, rows_TR), strict=True)

    def _sample(self, piece: SequenceSlice) -> tuple[Sampled, ...]:
        assert piece.sample_position is not None
        digest = self._digest(piece, piece.start + len(piece.token_ids))
        position = piece.sample_position
        return tuple(_pick(digest, piece.sampling, position, choice, self._config) for choice in piece.choices)

    def _score_prompt(self, piece: SequenceSlice) -> tuple[TokenLogprobs, ...]:
        """Of the prompt tokens that follow the fed ones:  fed [start, end)  ->  scored [start + 1, end + 1)"""
        top = piece.sampling.prompt_logprobs
        end = min(piece.start + len(piece.token_ids), piece.prompt_tokens - 1)
        if top is None or end <= piece.start:
            return ()
        rows_TR = self._stored_rows(piece, piece.start, end)
        following = piece.context[piece.start + 1 : end + 1]
        pairs = zip(rows_TR, following, strict=True)
        return tuple(_score(_after(row_R, token_id), token_id, top, self._config) for row_R, token_id in pairs)

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
        return _read_rows(self._arena, piece.block_table, start, end)

    def _embedding_rows(self, table: BlockTable, start: int, end: int) -> Bytes:
        if self._embeddings is None:
            raise ValueError("images, and no embeddings")
        return _read_rows(self._embeddings, table, start, end)


def _read_rows(arena: Arena, table: BlockTable, start: int, end: int) -> Bytes:
    """Memory as rows_TR, each row with its layers, heads and parts in schema order."""
    data_LHPTX = arena.read(table, (0, arena.schema.kv.layers), (start, end))
    return np.ascontiguousarray(data_LHPTX.transpose(3, 0, 1, 2, 4)).reshape(end - start, -1)


def _links(
    token_ids: Sequence[int],
    start: int,
    tenant: str,
    images: Sequence[PromptImage] = (),
    placeholders: Mapping[int, bytes] = MappingProxyType({}),
    delta: int = 0,
) -> Iterator[int]:
    """What each fed token adds to the chain: a digest of what it is, where it is and whose. `placeholders` are rows of
    embeddings, by token."""
    tenant_digest = xxhash.xxh3_64_intdigest(tenant.encode())
    positions = _positions(images, start, start + len(token_ids), delta)
    for index, (token_id, (time, row, column)) in enumerate(zip(token_ids, positions, strict=True), start):
        if embedded := placeholders.get(index):
            where = struct.pack("<qqqQ", time, row, column, tenant_digest)
            yield xxhash.xxh3_64_intdigest(where + embedded)
        else:
            yield xxhash.xxh3_64_intdigest(struct.pack("<QqQ", token_id, time, tenant_digest))


def _positions(images: Sequence[PromptImage], start: int, end: int, delta: int) -> Iterable[tuple[int, int, int]]:
    if images:
        return map(tuple, positions_3T(images, start, end).T.tolist())
    return ((position, position, position) for position in range(start + delta, end + delta))


class _Rows:
    """The chain of KV rows: each is a digest of the one before it, blown up to a row's size."""

    def __init__(self, row_bytes: int) -> None:
        self._row_bytes = row_bytes
        self._lanes = np.arange(1, -(-row_bytes // 8) + 1, dtype=np.uint64) * _LANE  # one word each, all different

    def chain(self, previous_R: Bytes | None, links: Iterable[int]) -> Iterator[Bytes]:
        stored = b"" if previous_R is None else previous_R.tobytes()
        for link in links:
            row_R = self.expand(xxhash.xxh3_64_intdigest(stored, seed=link))
            yield row_R
            stored = row_R.tobytes()

    def expand(self, state: int) -> Bytes:
        """A row whose every byte depends on the state (splitmix64, one word per lane)."""
        words = self._lanes ^ np.uint64(state)
        words *= _MIX_1
        words ^= words >> np.uint64(29)
        words *= _MIX_2
        words ^= words >> np.uint64(32)
        return words.view(np.uint8)[: self._row_bytes]


def reference_tokens(
    prompt: Sequence[int],
    tenant: str,
    sampling: SamplingParams,
    count: int,
    config: OracleExecutor.Config,
    choice: int = 0,
    images: Sequence[SeenImage] = (),
) -> tuple[int, ...]:
    """The `count` tokens that must follow this prompt, computed without blocks, chunks, steps or memory.

    It never stops by itself: what ends an output is the scheduler's business.
    """
    return tuple(pick.token_id for pick in reference_output(prompt, tenant, sampling, count, config, choice, images))


def reference_output(
    prompt: Sequence[int],
    tenant: str,
    sampling: SamplingParams,
    count: int,
    config: OracleExecutor.Config,
    choice: int = 0,
    images: Sequence[SeenImage] = (),
) -> tuple[Sampled, ...]:
    """`reference_tokens` with their log-probabilities, if `sampling` asks for them."""
    rows = _Rows(config.schema.token_bytes)
    digest = xxhash.xxh3_64()
    last_R: Bytes | None = None
    for last_R in rows.chain(None, _prompt_links(prompt, tenant, images, config)):
        digest.update(last_R.data)
    delta = rope_delta([image for image, _ in images])
    picks: list[Sampled] = []
    while len(picks) < count:
        pick = _pick(digest, sampling, len(picks), choice, config)
        link = _links((pick.token_id,), len(prompt) + len(picks), tenant, delta=delta)
        (last_R,) = rows.chain(last_R, link)
        digest.update(last_R.data)
        picks.append(pick)
    return tuple(picks)


def reference_prompt_logprobs(
    prompt: Sequence[int],
    tenant: str,
    top: int,
    config: OracleExecutor.Config,
    images: Sequence[SeenImage] = (),
) -> tuple[TokenLogprobs, ...]:
    """Of the prompt's tokens but the first."""
    rows = _Rows(config.schema.token_bytes).chain(None, _prompt_links(prompt, tenant, images, config))
    pairs = zip(prompt[1:], rows, strict=False)  # nothing follows the last row
    return tuple(_score(_after(row_R, token_id), token_id, top, config) for token_id, row_R in pairs)


def _prompt_links(
    prompt: Sequence[int], tenant: str, images: Sequence[SeenImage], config: OracleExecutor.Config
) -> Iterator[int]:
    placeholders: dict[int, bytes] = {}
    for image, picture in images:
        rows_TR = oracle_embedding(picture, image.key, image.features, config.embedding_schema)
        for run, first_row in image.rows():
            placeholders |= {run.token_start + i: bytes(rows_TR[first_row + i]) for i in range(run.tokens)}
    return _links(prompt, 0, tenant, [image for image, _ in images], placeholders)


def _pick(
    digest: Digest, sampling: SamplingParams, position: int, choice: int, config: OracleExecutor.Config
) -> Sampled:
    """Greedy sampling sees the context only; otherwise seed, choice and output position count too."""
    luck = b"" if sampling.greedy else struct.pack("<QQQ", sampling.seed, choice, position)
    state = xxhash.xxh3_64_intdigest(digest.digest() + luck)
    token_id = state % config.vocab_size
    while token_id in config.unsampled:
        token_id = (token_id + 1) % config.vocab_size
    return Sampled(token_id, None if sampling.logprobs is None else _score(state, token_id, sampling.logprobs, config))


def _after(row_R: Bytes, token_id: int) -> int:
    """What the score of a prompt token is made from: itself, and all before it (the row is a digest of them)."""
    return xxhash.xxh3_64_intdigest(row_R.tobytes(), seed=token_id)


def _score(state: int, token_id: int, top: int, config: OracleExecutor.Config) -> TokenLogprobs:
    """A rank out of the digest, and a quarter of a nat per rank: numbers that 32 bits hold exactly.

    top 3, rank 2      (some id, -0.25)  (token id, -0.5)  (some id, -0.75)
    """
    rank = 1 + state % (top + 2)  # now and then not among the likeliest
    others = [(token_id + place) % config.vocab_size for place in range(1, top + 1)]
    ids = [token_id if place == rank else other for place, other in enumerate(others, 1)]
    return TokenLogprobs(-rank / 4, rank, tuple((id_, -place / 4) for place, id_ in enumerate(ids, 1)))
