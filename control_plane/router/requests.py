"""What the router's edge (HTTP, gRPC) and its core say to each other.

The edge tokenises, detokenises, knows clients. The core knows token ids and workers. They meet in these values only,
so that the core runs unchanged in the virtual cluster, where no edge exists.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from engine.base.errors import TriptychError
from engine.images import Picture, PromptImage
from engine.types import FinishReason, SamplingParams, TokenLogprobs


def cache_scope(tenant: str, cache_salt: str) -> str:
    """Whose cached KV and images a request may use. Injective: no salt of one tenant spells another one's name."""
    return f"{tenant}/{cache_salt}" if cache_salt else tenant


# -- edge -> core --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class SubmittedImage:
    """An image of a prompt, and its pixels, which are kept until the request ends: an encode may have to start over."""

    image: PromptImage
    picture: Picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """A validated request. `key` is minted by the edge, never reused. Exactly one `Ended` follows.

    `tenant` is who asked, by their key: capacity is shared out among tenants, and cached KV never is. A client's
    `cache_salt` divides its tenant's cache further; together they are the `cache_scope` that workers know.
    """

    key: int
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    tenant: str = ""
    cache_salt: str = ""
    deadline_ms: int = 0
    ttft_slo_ms: int | None = None  # a first token after that is of no use: refused early rather than served late
    codec: str = ""  # how its KV shall travel (`codec_choice.Wish`); the deployment's default when empty
    kl_budget: float | None = None  # likewise
    choices: int = 1  # `n`: they share one prompt, one prefill and one transfer
    images: tuple[SubmittedImage, ...] = ()  # in the order of their placeholders
    priority: int = 0  # lower is placed and runs earlier

    @property
    def cache_scope(self) -> str:
        return cache_scope(self.tenant, self.cache_salt)


@dataclass(frozen=True, slots=True)
class SubmitAll:
    """The requests of one client's call, all of one tenant: all of them are taken in, or none is, and then each ends
    with the same error."""

    submits: tuple[Submit, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """The client is gone. `Ended` with `Cancelled` follows unless the request has already ended."""

    key: int


@dataclass(frozen=True, slots=True)
class Stop:
    """The edge found a stop string in this choice: it is over, and well. With the last one `Ended` follows."""

    key: int
    choice: int = 0


@dataclass(frozen=True, slots=True)
class EndAll:
    """The router ends: so does every request that is left, with this error."""

    error: TriptychError


@dataclass(frozen=True, slots=True)
class ResetCache:
    """Every worker forgets the cached KV that no request holds."""


# -- core -> edge --------------------------------------------------------------------------------------------------
class TokensReady(NamedTuple):
    """The next output tokens of one choice, in order, each exactly once. With `finish` they are its last."""

    key: int
    token_ids: tuple[int, ...]
    choice: int = 0
    finish: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token if they were asked for


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Log-probabilities of prompt tokens [start, start + len(logprobs)), in order, each exactly once. All of them come
    before the first `TokensReady`."""

    key: int
    start: int
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(slots=True)
class RequestStats:
    """What the final chunk tells the client under `triptych`. Worker fields hold the last binding's."""

    prefill_worker: str = ""
    decode_worker: str = ""
    encode_workers: tuple[str, ...] = ()  # one per image, in order
    image_tokens: int = 0  # placeholders in the prompt
    image_hits: int = 0  # images whose embedding was cached: no forward of the tower
    cached_image_tokens: int = 0  # placeholders of those
    codec: str = ""
    level: int = 0  # of the codec
    kv_bytes_raw: int = 0
    kv_bytes_wire: int = 0
    attempts: int = 0
    cached_tokens: int = 0  # prompt tokens that the prefill worker did not have to compute
    skipped_tokens: int = 0  # prompt tokens whose KV the decode worker already had
    phase_ms: dict[str, float] = field(default_factory=dict)  # queue, encode, prefill, transfer, decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A request's one ending: `finish` or `error`, never both. Nothing follows. Of several choices, the last one's.

    `transfer_id` is the last binding's, in hex, and empty if there was none, or none with a transfer. It is for our log
    only: workers know the transfer by it.
    """

    key: int
    finish: FinishReason | None = None
    error: TriptychError | None = None
    stats: RequestStats
    transfer_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One line of `GET /admin/v1/workers`."""

    id: str
    name: str
    address: str
    roles: tuple[str, ...]
    epoch: int
    state: str
    connected: bool
    free_columns: int
    total_columns: int
    running: int
    waiting: int
    attempts: int = 0  # that the worker holds a record for
    held: int = 0  # sequences whose memory is not released
    lent_columns: int = 0  # columns that a transfer writes into
    tasks: int = 0  # asyncio tasks of its process
    cached_columns: int = 0  # of the free ones, those that hold reusable KV
    encoding: int = 0  # images that wait for its tower, or are in it
    free_embedding_columns: int = 0
    embedding_columns: int = 0
