"""Planted bugs: what others shipped (reliability, lessons 1 to 8) and what a prefix cache, several choices (9 to 12)
and images (13 to 16) can get wrong, put into our machines on purpose, one at a time.

They measure the tests, not the product: a virtual cluster that does not notice one of these would not notice the real
thing. Each replaces one method of a machine while its context lasts; the product has no switch for any of them.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import combinations, count
from typing import Any, TypeAlias
from unittest.mock import patch

from control_plane.agent.attempts import Attempt
from control_plane.agent.core import WorkerCore
from control_plane.router.dispatch import encoding, worker_messages
from control_plane.router.dispatch.groups import Groups
from control_plane.router.dispatch.holders import Holders
from control_plane.router.dispatch.live_request import LiveRequest, Placement, Stage
from control_plane.wire import session_pb2 as pb
from engine.base.machine import Command, LinkName
from engine.commands import Prefilled, Release
from engine.kv.block_hash import root_hash
from engine.sequence import Sequence
from engine.sequence_memory import SequenceMemory
from engine.vision.info import VisionInfo
from kv_transfer.custody import Custody
from kv_transfer.frame import FrameHeader
from kv_transfer.source import Source
from kv_transfer.target import Target, _Incoming
from prefill_worker.role import PrefillRole
from tests.sim.cluster import VirtualCluster

Plant: TypeAlias = Callable[[], Any]
"""Makes a context in which the bug is there."""

BUGS: dict[str, Plant] = {}

TRANSFER_ID = slice(16, 32)  # of a frame: enough for a bug that looks at nothing else


def nobody_watches() -> AbstractContextManager[Any]:
    """The router waits for a silent worker until the deadline."""
    return patch.object(LiveRequest, "is_watched", False)


def _bug(plant: Callable[[], Iterator[None]]) -> Callable[[], Iterator[None]]:
    BUGS[plant.__name__] = contextmanager(plant)
    return plant


@_bug
def lesson_1_source_lets_go_too_early() -> Iterator[None]:
    """The prefill is done, so its units are free, whether or not the target has read them all."""
    on_prefilled = PrefillRole.on_prefilled

    def lets_go(self: PrefillRole, event: Prefilled, now_us: int) -> list[object]:
        return [*on_prefilled(self, event, now_us), Command(Release(seq_id=event.seq_id))]

    with patch.object(PrefillRole, "on_prefilled", lets_go):
        yield


@_bug
def lesson_2_abort_frees_under_a_writer() -> Iterator[None]:
    """An ended request's units are free at once, although a codec thread still writes to them."""
    end = Custody.end

    def release_at_once(self: Custody, seq_id: int) -> list[Command]:
        holding = self._holdings.get(seq_id)
        if holding is None or holding.ended:
            return []
        return [*end(self, seq_id), Command(Release(seq_id=seq_id))]

    with patch.object(Custody, "end", release_at_once):
        yield


@_bug
def lesson_3_jobs_are_a_boolean() -> Iterator[None]:
    """Two jobs under way count as one: the first to return frees what the other still uses."""

    def enter(self: Custody, seq_id: int) -> None:
        self._holdings[seq_id].jobs = 1

    def leave(self: Custody, seq_id: int) -> list[Command]:
        if (holding := self._holdings.get(seq_id)) is None:
            return []
        holding.jobs = 0
        return self._release_if_idle(seq_id)

    with patch.object(Custody, "enter", enter), patch.object(Custody, "leave", leave):
        yield


@_bug
def lesson_4_reaping_needs_new_work() -> Iterator[None]:
    """What is overdue is looked for when something new is scheduled, and at no other time."""
    on_prefill, on_tick = WorkerCore._on_prefill, WorkerCore._on_tick

    def reap_then_prefill(self: WorkerCore, link: LinkName, message: Any, now_us: int) -> list[object]:
        return [*self._settle(self._transfers.on_tick(now_us)), *on_prefill(self, link, message, now_us)]

    def tick_without_reaping(self: WorkerCore, now_us: int) -> list[object]:
        with patch.object(self._transfers, "on_tick", lambda now_us: []):
            return on_tick(self, now_us)

    with (
        patch.object(WorkerCore, "_on_prefill", reap_then_prefill),
        patch.object(WorkerCore, "_on_tick", tick_without_reaping),
        patch("kv_transfer.source.Source.next_deadline_us", None),
    ):
        yield


@_bug
def lesson_5_cancel_drops_the_record_only() -> Iterator[None]:
    """The queue's item is removed; the memory that it stood for is nobody's."""

    def drop(self: WorkerCore, attempt: Attempt) -> list[object]:
        self._attempts.forget(attempt.seq_id)
        return []

    with patch.object(WorkerCore, "_drop", drop):
        yield


@_bug
def lesson_6_cancel_in_the_gap() -> Iterator[None]:
    """A target that has been asked for memory, and has not answered yet, is not told that nobody wants it."""
    abort_at = Holders.abort_at

    def abort_known_holders(self: Holders, place: Placement | None, request: LiveRequest) -> list[object]:
        if request.stage is not Stage.RESERVING or place is None or place != request.target:
            return abort_at(self, place, request)
        self.unbind(request)
        return []

    with patch.object(Holders, "abort_at", abort_known_holders):
        yield


@_bug
def lesson_7_decode_starts_on_partial_kv() -> Iterator[None]:
    """END says that everything was sent; that it has arrived is taken for granted."""
    commit_if_whole = Target._commit_if_whole

    def commit(self: Target, incoming: _Incoming, now_us: int) -> list[object]:
        if incoming.end is None:
            return []
        incoming.end = replace(incoming.end, frames=len(incoming.placed), digest=incoming.digest)
        incoming.missing = 0
        return commit_if_whole(self, incoming, now_us)

    with patch.object(Target, "_commit_if_whole", commit):
        yield


@_bug
def lesson_8_identity_is_a_name() -> Iterator[None]:
    """A restarted worker has its old id and counts its transfers from 1 again, as every other does; a transfer's number
    is all that tells whose frame or answer one is, whichever process the link leads to.

    What gets stuck by it is found by the router's watch for silence, and then costs time only. So nobody watches here,
    which by itself breaks no promise.
    """
    target_init, match, on_answer = Target.__init__, Target._match_untrusted, Source.on_frame

    def init(self: Target, *args: Any, **kwargs: Any) -> None:
        numbers = count(1)
        kwargs["mint_transfer_id"] = lambda: next(numbers).to_bytes(16, "big")
        target_init(self, *args, **kwargs)

    def match_any_link(self: Target, link: LinkName, header: FrameHeader, data: bytes) -> _Incoming | None:
        if incoming := self._transfers.get(header.transfer_id):
            incoming.link = link
        return match(self, link, header, data)

    def on_answer_from_any_link(self: Source, link: LinkName, data: bytes, now_us: int) -> list[object]:
        outgoing = self._by_transfer.get(data[TRANSFER_ID])
        if outgoing is not None and outgoing.delivery is not None:
            link = outgoing.delivery.binding.link
        return on_answer(self, link, data, now_us)

    with (
        patch.object(Target, "__init__", init),
        patch.object(Target, "_match_untrusted", match_any_link),
        patch.object(Source, "on_frame", on_answer_from_any_link),
        patch.object(VirtualCluster, "_mint_identity", lambda self, name: name),
        nobody_watches(),
    ):
        yield


@_bug
def lesson_9_cached_blocks_know_no_tenant() -> Iterator[None]:
    """Equal tokens are equal blocks, whoever has sent them."""

    def root_of_all(tenant: str, model: bytes, identity: str = "") -> bytes:
        return root_hash("", model, identity)

    with patch("engine.sequence_memory.root_hash", root_of_all):
        yield


@_bug
def lesson_10_choices_share_the_partial_block() -> Iterator[None]:
    """A fork copies the table whole: each choice writes its next token into the same slot."""
    fork = SequenceMemory.fork

    def fork_whole(self: SequenceMemory, group: Sequence, child: Sequence, *, spare: int) -> bool:
        forked = fork(self, group, child, spare=spare)
        if forked and self._copies and group.computed % self._block_size:
            theirs, mine = self._copies.pop()
            table = self._allocator._holdings[child.seq_id].table
            table[table.index(mine)] = theirs
            self._allocator._hold(theirs, lent=False)
            self._allocator._drop(mine, lent=False)
            self._allocator._take_back([mine])
        return forked

    with patch.object(SequenceMemory, "fork", fork_whole):
        yield


@_bug
def lesson_11_group_is_over_at_its_commit() -> Iterator[None]:
    """The target has the KV, so nobody listens to the source any more: not when it says that a choice was over with
    its first token, and hence never got to the target."""
    fork = Groups.fork

    def fork_and_forget(self: Groups, group: LiveRequest, now_us: int) -> list[object]:
        actions = fork(self, group, now_us)
        for child in list(group.forks.values()):
            if self.leave(child) is not None:
                self.disband(group)
        return actions

    with patch.object(Groups, "fork", fork_and_forget):
        yield


@_bug
def lesson_12_choices_start_over_as_the_first() -> Iterator[None]:
    """A choice that is prefilled again, alone, is a request like any other: which of several it was is lost."""
    prefill = worker_messages.prefill

    def of_the_first(request: LiveRequest, *, deadline_ms: int) -> pb.Prefill:
        message = prefill(request, deadline_ms=deadline_ms)
        if not request.is_group:
            message.choices[:] = [0]
        return message

    with patch.object(worker_messages, "prefill", of_the_first):
        yield


@_bug
def lesson_13_images_are_swapped() -> Iterator[None]:
    """Two embeddings of one size, each sent to where the other belongs."""
    transfers = encoding._transfers_untrusted

    def crosswise(request: LiveRequest, message: pb.ImagesWanted) -> dict[int, bytes]:
        ids = transfers(request, message)
        for one, other in combinations(ids, 2):
            if request.submit.images[one].image.features == request.submit.images[other].image.features:
                ids[one], ids[other] = ids[other], ids[one]
                break
        return ids

    with patch.object(encoding, "_transfers_untrusted", crosswise):
        yield


@_bug
def lesson_14_embedding_let_go_too_early() -> Iterator[None]:
    """A prompt is given to the engine: its images are cache from then on, though no chunk has read them yet."""
    compute = PrefillRole._compute_if_gathered

    def compute_and_let_go(self: PrefillRole, seq_id: int) -> list[object]:
        return [*compute(self, seq_id), *self._custody.has_read(seq_id)]

    with patch.object(PrefillRole, "_compute_if_gathered", compute_and_let_go):
        yield


@_bug
def lesson_15_embeddings_know_no_tenant() -> Iterator[None]:
    """Equal pixels are equal images, whoever has sent them."""
    key = VisionInfo.key

    with patch.object(VisionInfo, "key", lambda self, scope, digest: key(self, "", digest)):
        yield


@_bug
def lesson_16_blocks_are_named_by_placeholders() -> Iterator[None]:
    """The prefix cache sees token ids only: two prompts with different pictures have the same placeholders."""

    def ids_only(token_ids: list[int], images: Any, start: int = 0) -> list[int]:
        return list(token_ids)

    with patch("engine.kv.prefix_cache.naming_ids", ids_only):
        yield
