"""The engine's mailbox: commands that go in between two steps, events that come out of them.

The engine (`engine.core.EngineCore`) is the sole owner of KV memory. It knows sequences, not requests, attempts,
workers or links; `seq_id` is minted by its owner and never reused. Everything here is a value that may cross a thread.

A sequence's life, and who may free its units:

    AddPrefill -> waiting --(units reserved)--> Admitted -> chunks, KVComputed* -> Prefilled
        | decode_here                                        -> running -> TokensSampled* -> Finished
        | otherwise: held for its Source, until Release
    Reserve -> Reserved (memory lent to a writer) -> Activate -> running -> TokensSampled* -> Finished
    Pause: running -> Paused, held for its Source, until Release
    Release: ends any of them, at any time, any number of times. Only the caller knows whether a codec thread still
    reads or writes the units, so only the caller may send it (DESIGN 2.2: a block has two lifetimes).
"""

from dataclasses import dataclass, field

from engine.types import FinishReason, SamplingParams

BlockTable = tuple[int, ...]
"""Column ids of a sequence, in token order: token t lives in column `table[t // block_size]`."""


# -- commands ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class AddPrefill:
    """Compute the KV of `token_ids` and sample one token.

    `token_ids` is prompt + tokens already emitted by earlier attempts; `prompt_tokens` says where output starts (the
    sampler's position is counted from there). With `decode_here` the sequence then joins this engine's decode batch.
    """

    seq_id: int
    token_ids: tuple[int, ...]
    prompt_tokens: int
    sampling: SamplingParams
    decode_here: bool = False
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeHere:
    """A waiting or prefilled sequence shall continue in this engine's decode batch (its target is this worker)."""

    seq_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkBound:
    """The sequence's target is known: it no longer counts against `UNBOUND_PREFILLS_MAX`. Idempotent."""

    seq_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Grant columns for `context_tokens` plus growth, whole and at once, or refuse. Never waits."""

    seq_id: int
    context_tokens: int
    growth_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Activate:
    """The KV of `token_ids[:-1]` is in the reserved columns; decode from `token_ids[-1]` on."""

    seq_id: int
    token_ids: tuple[int, ...]
    prompt_tokens: int
    sampling: SamplingParams
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """Stop decoding a running sequence and hold its units (it is about to move). Answered by `Paused`, or by the
    `Finished` that was already under way."""

    seq_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """The sequence's end: its units are free when this returns. Idempotent; unknown ids are ignored."""

    seq_id: int


EngineCommand = AddPrefill | DecodeHere | MarkBound | Reserve | Activate | Pause | Release


# -- events ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A prefill has all its own units and will run in one of the next steps (NEAR_TURN on the wire)."""

    seq_id: int
    block_table: BlockTable
    context_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KVComputed:
    """KV of layers [layer_start, layer_end) and tokens [token_start, token_end) is in memory and will not change."""

    seq_id: int
    layer_start: int
    layer_end: int
    token_start: int
    token_end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """The whole prompt is computed and `token_id` sampled. With a `finish` nothing needs to move anywhere."""

    seq_id: int
    token_id: int
    finish: FinishReason | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """Answer to `Reserve`. `block_table` is None when the engine is full."""

    seq_id: int
    block_table: BlockTable | None


@dataclass(frozen=True, slots=True)
class SampledToken:
    seq_id: int
    position: int  # 0 for the first output token after the original prompt
    token_id: int
    finish: FinishReason | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensSampled:
    """All tokens of one step, together: one batched message per step leaves the worker."""

    tokens: tuple[SampledToken, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused:
    """Decoding stopped; KV of `token_ids[:-1]` is in `block_table`, held until `Release`.

    `preempted` says the engine itself stopped it, because it ran out of columns.
    """

    seq_id: int
    token_ids: tuple[int, ...]
    block_table: BlockTable
    preempted: bool


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
    free_columns: int = 0
    total_columns: int = 0
    lent_columns: int = 0
    held_sequences: int = 0
    steps: int = 0
    step_ms: float = 0.0
    idle: bool = True


EngineEvent = Admitted | KVComputed | Prefilled | Reserved | TokensSampled | Paused | StepFailed | EngineLoad


# -- steps -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """One sequence's share of a step: feed `token_ids` at positions [start, start + len(token_ids)).

        positions   0 ............ start ............ start + len(token_ids)
        KV          | in the arena | computed now    |

    `sample_position` is None for a chunk that is not the prompt's last, else the output position to sample.
    """

    seq_id: int
    token_ids: tuple[int, ...]
    start: int
    block_table: BlockTable
    sampling: SamplingParams
    sample_position: int | None
    is_prefill: bool
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one engine step runs. Decodes (one token each) come first, then prefill chunks."""

    step_id: int
    slices: tuple[SequenceSlice, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(piece.token_ids) for piece in self.slices)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step produced: a token for each slice that asked for one, or a reason why a slice failed."""

    step_id: int
    tokens: dict[int, int] = field(default_factory=dict)  # seq_id -> token id
    failed: dict[int, str] = field(default_factory=dict)  # seq_id -> reason, from a fixed set
