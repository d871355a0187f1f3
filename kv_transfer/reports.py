"""What a role is asked to do (`Work`) and what it reports. The agent translates both; roles never see the wire.

`seq_id` names the attempt inside this worker. A worker reports outcomes of *attempts*; only the router ends a request.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from engine.base.errors import Status
from engine.commands import SampledToken
from engine.images import PIXEL_BYTES, PromptImage
from engine.types import FinishReason, SamplingParams, TokenLogprobs
from kv_transfer.codecs import Encoding


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """An attempt's sequence. `token_ids` is prompt + tokens already emitted: what a prefill computes, or the context
    whose KV a decode will be sent. Output positions count from `prompt_tokens`."""

    seq_id: int
    token_ids: tuple[int, ...]
    prompt_tokens: int
    sampling: SamplingParams
    tenant: str = ""
    priority: int = 0
    choices: tuple[int, ...] = (0,)
    children: tuple[int, ...] = ()  # a group's: the sequence of each choice, where it decodes
    images: tuple[PromptImage, ...] = ()
    identity: str = ""  # of cached KV that will do: "" exact only, else also what has come through this encoding

    @property
    def position(self) -> int:
        """Output position of the next token."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def parts(self) -> tuple["Work", ...]:
        """A group's work, choice by choice: what each of its children is by itself. None for a single choice."""
        pairs = zip(self.children, self.choices if self.children else (), strict=True)
        return tuple(replace(self, seq_id=child, choices=(choice,), children=()) for child, choice in pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeWork:
    """An attempt's image: make the embedding `key`, of `features` rows, from so many pixels."""

    seq_id: int
    key: bytes
    features: int
    width: int
    height: int
    priority: int = 0

    @property
    def pixel_bytes(self) -> int:
        return self.width * self.height * PIXEL_BYTES


class RelocateReason(StrEnum):
    QUIESCING = "quiescing"
    PREEMPTED = "preempted"
    TRANSFER_FAILED = "transfer_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptReport:
    """Base of what is said about one attempt that goes on (or, with `Full`, never began)."""

    seq_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NearTurn(AttemptReport):
    """A source holds all units of its own and will compute next: find it a target."""

    context_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken(AttemptReport):
    position: int
    token_id: int
    finish: FinishReason | None
    choice: int = 0
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScored(AttemptReport):
    """Log-probabilities of prompt tokens [start, start + len(logprobs))."""

    start: int
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted(AttemptReport):
    """A target holds a reservation, open for the transfer of this id."""

    transfer_id: bytes
    skip_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Full(AttemptReport):
    """A target has no memory for this attempt now, and holds nothing for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed(AttemptReport):
    """A target holds all KV of the attempt and starts to decode."""

    encoding: Encoding
    bytes_raw: int
    bytes_wire: int
    transfer_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The tokens of one decode step, over all attempts."""

    tokens: tuple[SampledToken, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Relocate(AttemptReport):
    """The attempt cannot go on here. Its KV is intact and held, waiting for another target."""

    reason: RelocateReason
    token_ids: tuple[int, ...] = ()
    target_attempt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptOver:
    """The attempt is over here. `status` is None for a good end (finished, or delivered to its target)."""

    seq_id: int
    status: Status | None = None
    reason: str = ""


# -- images ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class PixelsWanted(AttemptReport):
    """An encode has memory for its embedding, and needs bytes [offset, offset + length) of its pixels."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded(AttemptReport):
    """The embedding is whole and held."""

    cached: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesWanted(AttemptReport):
    """A prefill has memory for all of its images; these are to be sent: (index, transfer id)."""

    transfers: tuple[tuple[int, bytes], ...]
