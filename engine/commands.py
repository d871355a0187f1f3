"""The engine's mailbox: commands that go in between two steps, events that come out of them.

The engine (`engine.core.EngineCore`) is the sole owner of KV memory. It knows sequences, not requests, attempts,
workers or links; `seq_id` is minted by its owner and never reused. Everything here is a value that may cross a thread.

A sequence's life, and who may free its units:

    AddPrefill -> waiting --(units reserved)--> Admitted -> chunks, KVComputed* -> Prefilled
        | decode_here                                        -> running -> TokensSampled* -> Finished
        | otherwise: held for its Source, until Release
    Reserve -> Reserved (memory lent to a writer) -> Activate -> running -> TokensSampled* -> Finished
    Pause: running -> Paused, held for its Source, until Release
    A running sequence that no column is left for: Paused (preempted), or waiting again where prompts are computed too
        and it has no images (what was made of their embeddings cannot be made again without them)
    A group (n > 1): prefilled or received once, then forked into one running sequence per choice
    Release: ends any of them, at any time, any number of times. Only the caller knows whether a codec thread still
    reads or writes the units, so only the caller may send it (DESIGN 2.2: a block has two lifetimes).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from engine.types import FinishReason, SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from engine.images import Picture, PlacedImage, PromptImage

BlockTable = tuple[int, ...]
"""Column ids of a sequence, in token order: token t lives in column `table[t // block_size]`."""


# -- commands ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class AddPrefill:
    """Compute the KV of `token_ids` and sample one token for each of `choices`.

    `token_ids` is prompt + tokens already emitted by earlier attempts; `prompt_tokens` says where output starts (the
    sampler's position is counted from there). With `decode_here` the sequence then joins this engine's decode batch.
    Several choices share one prefill: the sequence is then a *group*, which never decodes itself (see `DecodeHere`).
    """

    seq_id: int
    token_ids: tuple[int, ...]
    prompt_tokens: int
    sampling: SamplingParams
    decode_here: bool = False
    tenant: str = ""
    choices: tuple[int, ...] = (0,)  # indices of the request's choices; all but their randomness is shared
    priority: int = 0  # lower runs earlier, and is preempted later
    images: "tuple[PlacedImage, ...]" = ()  # held by whoever sent this until `Prefilled`, or past `Release`


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeHere:
    """A waiting or prefilled sequence shall continue in this engine's decode batch (its target is this worker).

    A group names one child per choice, in order. Once its first tokens are sampled the engine forks it: each child
    whose choice goes on starts to run with a table of its own that shares the group's full blocks. The group itself
    is then over and awaits `Release`, like the children that never started.
    """

    seq_id: int
    children: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkBound:
    """The sequence's target is known: it no longer counts against `UNBOUND_PREFILLS_MAX`. Idempotent."""

    seq_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Grant columns for the context plus growth, whole and at once, or refuse. Never waits.

    Leading blocks that this engine has cached are shared instead of granted (`Reserved.cached_tokens`); `identity`
    says which cached KV will do: "" is exact KV only, anything else also KV that came through that codec and level.
    `children` are the sequences of a group's choices: each is granted what it will not share.
    """

    seq_id: int
    token_ids: tuple[int, ...]
    growth_tokens: int
    tenant: str = ""
    identity: str = ""
    children: tuple[int, ...] = ()
    priority: int = 0
    images: "tuple[PromptImage, ...]" = ()  # blocks are named after them


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One choice that goes on after a group's KV has arrived: `seq_id` is a child named in `Reserve`."""

    seq_id: int
    choice: int
    token_id: int  # sampled by the source; its KV is not computed


@dataclass(frozen=True, slots=True, kw_only=True)
class Activate:
    """The KV of `token_ids` is in the reserved columns; decode every branch from its pending token on.

    A sequence of one choice is its own branch (`branches[0].seq_id == seq_id`). A group is over with this command:
    its children share its full blocks, and it awaits `Release`.
    """

    seq_id: int
    token_ids: tuple[int, ...]
    prompt_tokens: int
    sampling: SamplingParams
    branches: tuple[Branch, ...]
    rope_delta: int = 0  # as END had it: from a token's index to its position


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """Stop decoding a running sequence and hold its units (it is about to move). Answered by `Paused`, or by the
    `Finished` that was already under way."""

    seq_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """The sequence's end: its units are free (or cached) when this returns. Idempotent; unknown ids are ignored."""

    seq_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetCache:
    """Forget every cached block that no sequence holds, and the names of those that one does."""


# -- commands about embeddings: an embedding is a sequence too, of the rows of one image; `Release` ends it ------------
@dataclass(frozen=True, slots=True, kw_only=True)
class AddEncode:
    """Grant memory for the embedding of one image, and compute it if no other one of that key is here.

    Answered `Encoded` if it is, else `PixelsNeeded`; or `StepFailed` with EMBEDDINGS_FULL, at once: it never waits.
    """

    seq_id: int
    key: bytes
    features: int
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodePixels:
    """What `PixelsNeeded` asked for. `Encoded` follows, or `StepFailed`. Unknown ids are ignored: released by now."""

    seq_id: int
    picture: "Picture"


class EmbeddingWish(NamedTuple):
    seq_id: int
    key: bytes
    features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReserveEmbeddings:
    """Grant memory for all embeddings of one prompt, whole; waits, in order, until there is room for all of them.

    Those that are here already are shared. Answered `EmbeddingsReserved`; or `StepFailed` with EMBEDDINGS_FULL for what
    all of memory could not hold. `Release` of any of them while they wait ends the wait of all.
    """

    wishes: tuple[EmbeddingWish, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingArrived:
    """The writer is done: the embedding is whole, and others may share it. Unknown ids are ignored."""

    seq_id: int


EMBEDDINGS_FULL: Final = "embeddings_full"
"""`StepFailed.reason`: no memory for an embedding."""

EngineCommand = (
    AddPrefill
    | DecodeHere
    | MarkBound
    | Reserve
    | Activate
    | Pause
    | Release
    | ResetCache
    | AddEncode
    | EncodePixels
    | ReserveEmbeddings
    | EmbeddingArrived
)


# -- events ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A prefill has all its own units and will run in one of the next steps (NEAR_TURN on the wire).

    KV of tokens [0, cached_tokens) is in them already, final in every layer: it was in the prefix cache.
    """

    seq_id: int
    block_table: BlockTable
    context_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KVComputed:
    """KV of layers [layer_start, layer_end) and tokens [token_start, token_end) is in memory and will not change."""

    seq_id: int
    layer_start: int
    layer_end: int
    token_start: int
    token_end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScored:
    """Log-probabilities of the prompt's tokens [start, start + len(logprobs)), each given all tokens before it."""

    seq_id: int
    start: int
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One output token. `seq_id` is the sequence that sampled it: for the first tokens of a group, the group."""

    seq_id: int
    position: int  # 0 for the first output token after the original prompt
    token_id: int
    finish: FinishReason | None
    choice: int = 0
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """The whole prompt is computed and one token per choice sampled. A choice with a `finish` needs nothing more; if
    all have one, nothing needs to move anywhere."""

    seq_id: int
    tokens: tuple[SampledToken, ...]  # in order of `AddPrefill.choices`

    @property
    def finished(self) -> bool:
        return all(token.finish is not None for token in self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """Answer to `Reserve`. `block_table` is None when the engine is full. KV of tokens [0, cached_tokens) is there."""

    seq_id: int
    block_table: BlockTable | None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensSampled:
    """All tokens of one step, together: one batched message per step leaves the worker."""

    tokens: tuple[SampledToken, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused:
    """Decoding stopped; KV of `token_ids[:-1]` is in `block_table`, held until `Release`.

    `preempted` says the engine itself stopped it, because it ran out of columns and may not recompute.
    """

    seq_id: int
    token_ids: tuple[int, ...]
    block_table: BlockTable
    preempted: bool
    rope_delta: int = 0  # from a token's index to its position: whoever goes on needs it, and END says it


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailed:
    """The executor raised for these sequences (I11: they fail, the engine lives). Their units await `Release`."""

    seq_ids: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """A snapshot after each step and each batch of commands; the newest replaces the older ones."""

    waiting: int = 0
    prefilling: int = 0
    running: int = 0
    waiting_tokens: int = 0
    free_columns: int = 0  # that a sequence could be granted now: nobody's, and cached ones that nobody holds
    total_columns: int = 0
    lent_columns: int = 0
    cached_columns: int = 0  # of the free ones, those that hold reusable KV
    held_sequences: int = 0
    steps: int = 0
    step_ms: float = 0.0
    prefix_hit_tokens: int = 0  # since the start: context tokens found in the cache
    prefix_query_tokens: int = 0  # since the start: context tokens looked up
    preemptions: int = 0  # since the start
    idle: bool = True
    encoding: int = 0  # images that wait for the tower, or are in it
    free_embedding_columns: int = 0
    embedding_columns: int = 0
    embedding_hits: int = 0  # since the start: embeddings asked for that were here
    vision_forwards: int = 0  # since the start: images that went through the tower
    encode_us: int = 0  # of one image, lately
    tower_loaded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelsNeeded:
    """Memory for the embedding is granted; it has to be computed."""

    seq_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """The embedding is whole, and held until `Release`; then it is cached."""

    seq_id: int
    block_table: BlockTable
    cached: bool = False  # it was here before


class EmbeddingGrant(NamedTuple):
    seq_id: int
    block_table: BlockTable
    cached: bool  # whole already; else somebody has to write it, and say `EmbeddingArrived`


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingsReserved:
    """Answer to `ReserveEmbeddings`, in order of its wishes."""

    grants: tuple[EmbeddingGrant, ...]


EngineEvent = (
    Admitted
    | KVComputed
    | PromptScored
    | Prefilled
    | Reserved
    | TokensSampled
    | Paused
    | StepFailed
    | EngineLoad
    | PixelsNeeded
    | Encoded
    | EmbeddingsReserved
)


REQUESTS_OWN_FAULTS: Final = frozenset({"constraint", "nothing_allowed"})
"""Reasons of `StepFailed` that lie in the request itself: no other worker would do better."""


# -- steps -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """One sequence's share of a step: feed `token_ids` at positions [start, start + len(token_ids)).

        positions   0 ............ start ............ start + len(token_ids)
        KV          | in the arena | computed now    |

    `sample_position` is None for a chunk that is not the context's last, else the output position to sample, once for
    each of `choices`. `context` is every token so far, prompt first: a view of the scheduler's own list, which does
    not change while the step runs.
    """

    seq_id: int
    token_ids: tuple[int, ...]
    start: int
    block_table: BlockTable
    sampling: SamplingParams
    sample_position: int | None
    is_prefill: bool
    tenant: str = ""
    choices: tuple[int, ...] = (0,)
    context: Sequence[int] = ()
    prompt_tokens: int = 0
    images: "tuple[PlacedImage, ...]" = ()  # of a prefill: all of its prompt's, inside these tokens or not
    rope_delta: int = 0  # of a decode: from a token's index to its position (M-RoPE)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one engine step runs. Decodes (one token each) come first, then prefill chunks."""

    step_id: int
    slices: tuple[SequenceSlice, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(piece.token_ids) for piece in self.slices)

    @property
    def num_sequences(self) -> int:
        return len(self.slices)


class Sampled(NamedTuple):
    """What an executor picked for one choice of one slice."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step produced: tokens for each slice that asked for some, or a reason why a slice failed."""

    step_id: int
    tokens: dict[int, tuple[Sampled, ...]] = field(default_factory=dict)  # seq_id -> one per choice of its slice
    failed: dict[int, str] = field(default_factory=dict)  # seq_id -> reason, from a fixed set
    # seq_id -> of the prompt tokens that follow each fed token: positions [start + 1, start + 1 + len)
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)


# -- steps of an encoder -----------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class EncodeItem:
    """One image: write row r of its embedding to column `block_table[r // S]`, slot `r % S`."""

    seq_id: int
    picture: "Picture"
    features: int
    block_table: BlockTable
    key: bytes


@dataclass(frozen=True, slots=True)
class EncodePlan:
    """Images that go through the tower together."""

    step_id: int
    items: tuple[EncodeItem, ...]

    @property
    def num_sequences(self) -> int:
        return len(self.items)


@dataclass(frozen=True, slots=True)
class EncodeOutput:
    step_id: int
    failed: dict[int, str] = field(default_factory=dict)  # seq_id -> reason, from a fixed set
