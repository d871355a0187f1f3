"""LiveRequest: one request as workers know it: which choices it stands for, and where it is.

stage      ENCODING -> QUEUED -> PREFILL -> RESERVING <-> TRANSFER -> DECODE -> (over)
holders    images'     images'   images',   source        source,     target
                                 source                   target

Only a request with images is ever ENCODING: first in line, with its images nowhere, then with all of them placed
(`live_image`). Their holders are needed until the prefill worker says that its turn is near.

A loss in a stage that leaves a holder of the whole KV goes back to RESERVING; any other goes back to the beginning,
with prompt + emitted tokens as the new prompt.

A request of several choices is a *group*: one prompt, one prefill, one transfer. Where it would start to decode it
forks instead, and each choice is a request of its own from then on:

           QUEUED -> PREFILL -> RESERVING <-> TRANSFER -> FORKED -> (over)
                                                          |-> DECODE    a child, under an id that the target was told
                                                          |-> DECODE

What its source still says about a child (its token 0, or that the prefill failed) it says in the group's name. So the
group stays, FORKED, until every child has been heard of.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from control_plane.router.dispatch.submissions import Submission
from control_plane.router.requests import Submit
from kv_transfer.codecs import EXACT, Encoding

if TYPE_CHECKING:
    from control_plane.router.dispatch.live_image import LiveImage


class Stage(Enum):
    ENCODING = "encoding"
    QUEUED = "queued"
    PREFILL = "prefill"
    RESERVING = "reserving"
    TRANSFER = "transfer"
    DECODE = "decode"
    FORKED = "forked"


class Placement(NamedTuple):
    """An attempt at a worker. The attempt number fences everything that is said about it later."""

    worker: str
    attempt: int


@dataclass(slots=True)
class LiveRequest:
    id: int
    submission: Submission
    choices: tuple[int, ...]
    stage: Stage = Stage.QUEUED
    source: Placement | None = None
    target: Placement | None = None
    images: "tuple[LiveImage, ...]" = ()  # once it was ENCODING
    embedding_digest: bytes = b""  # schema of their embeddings, wherever those are
    children: dict[int, int] = field(default_factory=dict)  # a group's: choice -> request id that the target was told
    forks: "dict[int, LiveRequest]" = field(default_factory=dict)  # a FORKED group's: children not heard of yet
    group: "LiveRequest | None" = None  # of a child that is not heard of yet: where it came from
    context_tokens: int = 0  # tokens whose KV the source holds, or will
    encoding: Encoding | None = None  # that its KV goes, or has come, through; None: nowhere yet
    refused: set[str] = field(default_factory=set)  # targets that said no in this round
    attempts: int = 0  # attempt numbers used; never reused
    passes: int = 0  # of others whose images had room while its own had none; bounded by PASSES_MAX
    losses: int = 0  # placements lost; bounded by ATTEMPTS_MAX
    moving: bool = False  # its source is a decode worker that gives it away
    failed_at: str = ""  # the prefill worker that gave it up last
    engine_failures: int = 0  # workers whose engine failed on it; bounded by ENGINE_FAILURES_MAX
    prefill_load_tokens: int = 0  # what it adds to its prefill worker's queue, by our estimate
    ahead_tokens: int = 0  # what its workers may compute first, of images and prompts, before they say anything of it
    near_turn: bool = False  # its prefill worker has begun with it, or will in one of its next steps
    priority: int = 0  # that workers are told
    decode_tokens: int = 0  # what it holds of its tenant's share of decode memory
    heard_us: int = 0  # when a worker last said something of it
    silent_in: Stage | None = None  # where its last placement was given up for saying nothing
    silent_at: str = ""  # the decode worker that did
    retry_us: int | None = None  # when to ask full targets again

    @property
    def submit(self) -> Submit:
        return self.submission.submit

    @property
    def identity(self) -> str:
        """Of the KV at its target."""
        return EXACT if self.encoding is None else self.encoding.identity

    @property
    def is_group(self) -> bool:
        return len(self.choices) > 1

    @property
    def choice(self) -> int:
        (choice,) = self.choices
        return choice

    @property
    def open_choices(self) -> tuple[int, ...]:
        return tuple(choice for choice in self.choices if choice not in self.submission.finishes)

    @property
    def emitted(self) -> Sequence[int]:
        """Output that is part of its context. A group has none: its children will."""
        return () if self.is_group else self.submission.outputs[self.choice]

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.submit.token_ids + tuple(self.emitted)

    @property
    def needs_target(self) -> bool:
        """False when token 0 is all there will be: no reservation, no transfer."""
        return self.submit.sampling.max_tokens - len(self.emitted) > 1

    @property
    def order(self) -> tuple[int, int, int]:
        """Its place in line."""
        return self.submit.priority, self.submission.number, self.choices[0]

    def is_at(self, worker_id: str) -> bool:
        places = (self.source, self.target, *(image.place for image in self.images))
        return any(place is not None and place.worker == worker_id for place in places)

    def next_attempt(self) -> int:
        self.attempts += 1
        return self.attempts

    @property
    def needs_encoding(self) -> bool:
        """Not all of its images' embeddings are held somewhere for it."""
        return bool(self.submit.images) and not (self.images and all(image.encoded for image in self.images))

    @property
    def images_placed(self) -> bool:
        return any(image.place is not None for image in self.images)

    @property
    def in_line(self) -> bool:
        """It waits in the router."""
        return self.stage is Stage.QUEUED or (self.stage is Stage.ENCODING and not self.images_placed)

    @property
    def is_watched(self) -> bool:
        """A worker has something to do for it now, and should be heard of soon. In a prefill worker's queue, and where
        all targets are full, it only waits: that is load, and ends with the deadline."""
        match self.stage:
            case Stage.ENCODING:
                return self.images_placed
            case Stage.PREFILL:
                return self.near_turn or any(image.bound for image in self.images)
            case Stage.RESERVING:
                return self.target is not None
        return self.stage in (Stage.TRANSFER, Stage.DECODE)

    # -- groups --------------------------------------------------------------------------------------------------------
    def child(self, choice: int) -> "LiveRequest":
        """This choice, decoding where the group's KV is, under the group's attempt number there."""
        assert self.target is not None
        child = self.single(self.children[choice], choice)
        child.stage, child.target, child.attempts = Stage.DECODE, self.target, self.target.attempt
        child.encoding, child.context_tokens = self.encoding, self.context_tokens
        return child

    def single(self, request_id: int, choice: int) -> "LiveRequest":
        """This choice alone, nowhere yet, with the group's past: poison does not become harmless by being divided."""
        past = {"losses": self.losses, "engine_failures": self.engine_failures, "failed_at": self.failed_at}
        return LiveRequest(request_id, self.submission, (choice,), **past)  # type: ignore[arg-type]
