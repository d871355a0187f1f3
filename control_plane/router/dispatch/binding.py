"""Binding: where the KV of a prefill goes, decided late, when its turn is near.

    NEAR_TURN -> Reserve at the best decode worker -> RESERVED -> Bind at the source -> Committed
                 ^                |
                 +---- refused ---+   the next best; when all are full, the first again after a while

A source that decodes too is bound to itself without asking. KV that moves on from a decode worker goes the same way,
except that it never waits. Losses in between are another's (`losses`).
"""

from collections import Counter

from control_plane.router.dispatch import worker_messages
from control_plane.router.dispatch.embedding_index import EmbeddingIndex
from control_plane.router.dispatch.endings import Endings
from control_plane.router.dispatch.groups import Groups
from control_plane.router.dispatch.holders import Holders
from control_plane.router.dispatch.live_request import LiveRequest, Stage
from control_plane.router.dispatch.placement import Choice, Placer
from control_plane.router.dispatch.prefilling import Prefilling
from control_plane.router.dispatch.register import Register
from control_plane.router.dispatch.workers import Worker
from control_plane.wire import session_pb2 as pb
from engine.base import limits
from engine.base.errors import FrameError, Internal
from kv_transfer.frame import TRANSFER_ID_BYTES


class Binding:
    def __init__(
        self,
        register: Register,
        holders: Holders,
        groups: Groups,
        endings: Endings,
        prefilling: Prefilling,
        *,
        placer: Placer,
        embeddings: EmbeddingIndex,
        counters: Counter[tuple[str, str]],
    ) -> None:
        self._register = register
        self._holders = holders
        self._groups = groups
        self._endings = endings
        self._prefilling = prefilling
        self._placer = placer
        self._embeddings = embeddings
        self._counters = counters

    # -- a target is sought --------------------------------------------------------------------------------------------
    def on_near_turn(self, worker: Worker, message: pb.NearTurn, now_us: int) -> list[object]:
        request = self._register.from_source(worker, message, now_us)
        if request is None or request.stage is not Stage.PREFILL:
            return []
        request.submission.note_cached(message.cached_tokens)
        request.submission.mark("near_turn", now_us)
        request.near_turn = True
        request.ahead_tokens = 0
        settled = self._settle_images(request, worker)
        self._register.deadlines.watch_silence(request)
        if not (request.needs_target and request.submission.scored):
            # Scores come before tokens. Over another link a target's token 0 could be faster than the source's last
            # scores, so a prompt is bound once it is scored (`Forwarding.on_prompt_scored`).
            return settled
        return [*settled, *self.seek_target(request, now_us)]

    def _settle_images(self, request: LiveRequest, worker: Worker) -> list[object]:
        """They are all there, and stay there: who encoded them does not matter any more."""
        for live in request.images:
            self._embeddings.note(worker, live.image)
        return self._holders.settle_images(request)

    def seek_target(self, request: LiveRequest, now_us: int, *, avoid: str | None = None) -> list[object]:
        """Ask decode workers in turn; `avoid` has just failed, so it is the last resort (reliability B1)."""
        self._register.enter(request, Stage.RESERVING, now_us)
        request.target = None
        request.refused = {each for each in (avoid, request.silent_at) if each}
        return self._choose_target(request, now_us)

    @property
    def next_deadline_us(self) -> int | None:
        retries_us = (request.retry_us for request in self._register.seeking.values())
        return min((retry_us for retry_us in retries_us if retry_us is not None), default=None)

    def on_tick(self, now_us: int) -> list[object]:
        """Full targets are asked again."""
        actions: list[object] = []
        for request in list(self._register.seeking.values()):
            if request.retry_us is not None and request.retry_us <= now_us:
                request.retry_us = None
                request.refused.clear()
                actions += self._choose_target(request, now_us)
        return actions

    def _choose_target(self, request: LiveRequest, now_us: int) -> list[object]:
        source = self._holders.worker(request.source)
        assert source is not None
        refused = request.refused | {source.id} if request.moving else request.refused
        choice = self._placer.decode(request, source, refused)
        if choice is None:
            return self._wait_for_target(request, now_us)
        self._bind(request, choice)
        if choice.worker is source:
            return self._bind_local(request, source, now_us)
        request.heard_us = now_us
        self._register.deadlines.watch_silence(request)
        request.encoding = self._placer.encoding(request, source, choice.worker)
        deadline_ms = request.submission.remaining_ms(now_us)
        reserve = worker_messages.reserve(request, choice.worker, deadline_ms=deadline_ms)
        return [worker_messages.send(choice.worker, reserve=reserve)]

    def _wait_for_target(self, request: LiveRequest, now_us: int) -> list[object]:
        """A move never waits (DESIGN 1): the giver's columns are what others there wait for, and two givers that waited
        for each other would wait for ever. Its prefix is computed again instead; nothing was lost."""
        if request.moving:
            return self._prefilling.start_over(request, now_us)
        request.retry_us = now_us + limits.RESERVE_RETRY_MS * 1_000
        return self._endings.end_if_stranded(request, now_us)

    def _bind(self, request: LiveRequest, choice: Choice) -> None:
        self._counters["placements", f"decode_{choice.reason}"] += 1
        self._holders.bind(request, choice.worker)
        request.submission.stats.decode_worker = choice.worker.id
        if request.is_group:
            self._groups.name_children(request)

    def _bind_local(self, request: LiveRequest, source: Worker, now_us: int) -> list[object]:
        """The source decodes too: one sequence under two attempt numbers, until token 0 has been heard from either."""
        request.submission.transfer_id = ""
        bind = worker_messages.send(source, bind=worker_messages.bind_local(request))
        if request.is_group:
            return [bind, *self._groups.fork(request, now_us)]
        self._register.enter(request, Stage.DECODE, now_us)
        return [bind]

    # -- what targets say ----------------------------------------------------------------------------------------------
    def on_reserved(self, worker: Worker, message: pb.Reserved, now_us: int) -> list[object]:
        request = self._register.from_target(worker, message, now_us)
        if request is None or request.stage is not Stage.RESERVING:
            return []
        if message.skip_tokens > request.context_tokens:
            raise FrameError("length")
        source = self._holders.worker(request.source)
        assert source is not None
        self._register.enter(request, Stage.TRANSFER, now_us)
        request.silent_in = None
        request.submission.transfer_id = message.transfer_id[:TRANSFER_ID_BYTES].hex()
        if not request.moving:
            request.submission.stats.skipped_tokens = min(message.skip_tokens, len(request.submit.token_ids))
        return [worker_messages.send(source, bind=worker_messages.bind(request, worker, message))]

    def on_refused(self, worker: Worker, message: pb.Refused, now_us: int) -> list[object]:
        request = self._register.from_target(worker, message, now_us)
        if request is None or request.stage is not Stage.RESERVING:
            return []
        if message.reason not in pb.Refusal.values():
            raise FrameError("refusal")
        self._counters["reservations_refused", pb.Refusal.Name(message.reason).lower()] += 1
        if message.reason == pb.INVALID:
            error = Internal("a decode worker found the request invalid")
            return self._endings.end(request.submission, now_us, error=error)
        self._holders.unbind(request)
        request.target = None
        request.refused.add(worker.id)
        return self._choose_target(request, now_us)

    def on_committed(self, worker: Worker, message: pb.Committed, now_us: int) -> list[object]:
        """The target has everything: the source's loss no longer matters."""
        request = self._register.from_target(worker, message, now_us)
        if request is None or request.stage is not Stage.TRANSFER:
            return []
        self._holders.unload_prefill(request)
        self._placer.prompt_received(request, worker)
        self._note_transfer(request, message, now_us)
        request.moving = False
        if request.is_group:
            return self._groups.fork(request, now_us)
        self._register.enter(request, Stage.DECODE, now_us)
        request.source = None
        return []

    def _note_transfer(self, request: LiveRequest, message: pb.Committed, now_us: int) -> None:
        request.submission.mark("committed", now_us)
        stats = request.submission.stats
        if not (request.moving and stats.codec):  # a move is raw, and what was lost before stays lost
            stats.codec, stats.level = message.codec, message.level
        stats.kv_bytes_raw += message.bytes_raw
        stats.kv_bytes_wire += message.bytes_wire
        self._counters["kv_transfers", message.codec] += 1
