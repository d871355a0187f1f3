"""Prefilling: into line, from there to a prefill worker, and back when nobody holds the KV any more.

Requests wait here, not at workers: what a worker was given can no longer be overtaken.

Not here: whose turn it is (`request_queue`), which worker is best (`placement`).
"""

from collections import Counter
from itertools import islice

from control_plane.router.dispatch import worker_messages
from control_plane.router.dispatch.endings import Endings
from control_plane.router.dispatch.groups import Groups
from control_plane.router.dispatch.holders import Holders
from control_plane.router.dispatch.lines import Lines
from control_plane.router.dispatch.live_request import LiveRequest, Placement, Stage
from control_plane.router.dispatch.placement import Choice, Placer
from control_plane.router.dispatch.register import Register
from engine.base import limits
from engine.base.machine import Send


class Prefilling:
    def __init__(
        self,
        register: Register,
        holders: Holders,
        groups: Groups,
        endings: Endings,
        *,
        lines: Lines,
        placer: Placer,
        counters: Counter[tuple[str, str]],
    ) -> None:
        self._register = register
        self._holders = holders
        self._groups = groups
        self._endings = endings
        self._lines = lines
        self._queue, self._drain_rate = lines.prefill
        self._placer = placer
        self._counters = counters

    # -- into line -----------------------------------------------------------------------------------------------------
    def enqueue(self, request: LiveRequest, now_us: int) -> None:
        """For a prefill worker; with images, first for whoever encodes them."""
        if request.needs_encoding:
            self._register.name_images(request)
        self._register.enter(request, Stage.ENCODING if request.needs_encoding else Stage.QUEUED, now_us)
        self._lines.join(request)
        self._holders.changed = True

    def start_over(self, request: LiveRequest, now_us: int) -> list[object]:
        """Prefill prompt + emitted tokens again, from its images on: each of them may be held elsewhere next time, and
        where it was it still is, cached. Choices that have begun to differ go on one by one."""
        actions = self._endings.withdraw(request)
        self._holders.give_back(request)
        request.moving = False
        request.retry_us = None
        parts = [request]
        if request.is_group and any(request.submission.outputs):
            self._register.forget(request)
            parts = [self._register.adopt(part) for part in self._groups.divide(request)]
        request.choices = request.open_choices
        for part in parts:
            self.enqueue(part, now_us)
        return [*actions, *(action for part in parts for action in self._endings.end_if_stranded(part, now_us))]

    # -- out of line ---------------------------------------------------------------------------------------------------
    def place_queued(self, now_us: int) -> list[object]:
        """Give prefill workers what they need to stay busy, in turn. What they do not need yet can still be overtaken
        here."""
        actions: list[object] = []
        placed_tokens = 0
        while (found := self._next_placement()) is not None:
            request, choice = found
            placed_tokens += len(request.token_ids)
            actions.append(self._prefill_at(request, choice, now_us))
        waiting = bool(self._queue) and self._placer.has_prefill_workers
        self._drain_rate.note(placed_tokens, waiting=waiting, now_us=now_us)
        return actions

    def _next_placement(self) -> tuple[LiveRequest, Choice] | None:
        """Whoever's turn it is, at its best worker. While that has no room, it waits, and others may pass.

        A tenant that came back after a while is *urgent*: it also goes before prompts that workers were given earlier.
        """
        if not (self._queue and self._placer.has_room_anywhere(urgent=self._holders.fair)):
            return None
        in_turn = self._queue.in_turn(self._holders.decode_memory.holds_back)
        for request in islice(in_turn, limits.PLACEMENT_TRIES_MAX):
            urgent = self._holders.fair and self._queue.is_behind(request)
            choice = self._placer.prefill(request)
            if choice is not None and self._placer.has_room(choice.worker, urgent=urgent):
                request.priority = -urgent if self._holders.fair else request.submit.priority
                return request, choice
        return None

    def _prefill_at(self, request: LiveRequest, choice: Choice, now_us: int) -> Send:
        worker = choice.worker
        self._queue.place(request, choice.missing_tokens)
        self._holders.decode_memory.take(request)
        self._register.enter(request, Stage.PREFILL, now_us)
        request.source = Placement(worker.id, request.next_attempt())
        request.context_tokens = len(request.token_ids)
        request.encoding = None
        request.near_turn = False
        request.silent_in = None
        self._holders.load_prefill(request, choice)
        self._placer.prompt_sent(request, worker)
        self._note_placement(request, choice, now_us)
        prefill = worker_messages.prefill(request, deadline_ms=request.submission.remaining_ms(now_us))
        return worker_messages.send(worker, prefill=prefill)

    def _note_placement(self, request: LiveRequest, choice: Choice, now_us: int) -> None:
        submission = request.submission
        submission.stats.prefill_worker = choice.worker.id
        self._counters["placements", f"prefill_{choice.reason}"] += 1
        if submission.first("placed", now_us) and (waited_ms := (now_us - submission.queued_us) // 1_000):
            self._counters["queue_wait_ms", ""] += waited_ms
