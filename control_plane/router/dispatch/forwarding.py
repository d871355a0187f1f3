"""Forwarding: what clients get of what workers compute: scores of the prompt, then tokens, each exactly once, in order.

Position n of a choice is forwarded once, and only from the attempt that its request is bound to. This is the path of
every token: what need not be asked for each is not asked here.
"""

from collections import Counter

from control_plane.router.dispatch.binding import Binding
from control_plane.router.dispatch.endings import Endings
from control_plane.router.dispatch.groups import Groups
from control_plane.router.dispatch.holders import Holders
from control_plane.router.dispatch.live_request import LiveRequest, Stage
from control_plane.router.dispatch.losses import Losses
from control_plane.router.dispatch.register import Register
from control_plane.router.dispatch.service_time import ServiceTime
from control_plane.router.dispatch.submissions import GROWTH_TOKENS, Submission
from control_plane.router.dispatch.workers import Worker
from control_plane.router.requests import PromptScored, TokensReady
from control_plane.wire import session_pb2 as pb
from control_plane.wire.translate import (
    ReportedToken,
    first_token_from_wire_untrusted,
    scores_from_wire_untrusted,
    tokens_from_wire_untrusted,
)
from engine.base.errors import FrameError
from engine.commands import SampledToken
from engine.types import FinishReason


class Forwarding:
    def __init__(
        self,
        register: Register,
        holders: Holders,
        groups: Groups,
        endings: Endings,
        binding: Binding,
        losses: Losses,
        *,
        service_time: ServiceTime,
        counters: Counter[tuple[str, str]],
    ) -> None:
        self._register = register
        self._requests = register.requests
        self._holders = holders
        self._groups = groups
        self._endings = endings
        self._binding = binding
        self._losses = losses
        self._service_time = service_time
        self._counters = counters

    # -- scores --------------------------------------------------------------------------------------------------------
    def on_prompt_scored(self, worker: Worker, message: pb.PromptScored, now_us: int) -> list[object]:
        request = self._register.from_source(worker, message, now_us)
        if request is None:
            return []
        scores = scores_from_wire_untrusted(message)
        submission = request.submission
        if message.start + len(scores) > len(request.submit.token_ids):
            raise FrameError("length")
        fresh = submission.new_scores(message.start, scores)
        if fresh is None:
            return self._on_gap(request, now_us)
        start = submission.scored_tokens - len(fresh)
        actions: list[object] = [PromptScored(request.submit.key, start, fresh)] if fresh else []
        seeks = submission.scored and request.stage is Stage.PREFILL and request.needs_target
        return [*actions, *self._binding.seek_target(request, now_us)] if seeks else actions

    # -- tokens --------------------------------------------------------------------------------------------------------
    def on_first_token(self, worker: Worker, message: pb.FirstToken, now_us: int) -> list[object]:
        request = self._register.from_source(worker, message, now_us)
        if request is None:
            return []
        token = first_token_from_wire_untrusted(message)
        if token.choice not in request.choices:
            raise FrameError("choice")
        if request.submit.sampling.max_tokens == 0:
            return self._endings.end(request.submission, now_us, finish=FinishReason.LENGTH)
        if request.stage is Stage.FORKED:
            child = request.forks.get(token.choice)
            return [] if child is None else self._forward(child, token.choice, token, now_us)
        return self._forward(request, token.choice, token, now_us)

    def on_tokens(self, worker: Worker, message: pb.Tokens, now_us: int) -> list[object]:
        actions: list[object] = []
        worker_id = worker.id
        for token in tokens_from_wire_untrusted(message):
            request = self._requests.get(token.request)
            if request is None or request.is_group or request.target != (worker_id, token.attempt):
                self._counters["stale_tokens", ""] += 1
                continue
            actions += self._forward(request, request.choice, token, now_us)
        return actions

    def _forward(
        self, request: LiveRequest, choice: int, token: SampledToken | ReportedToken, now_us: int
    ) -> list[object]:
        """Position n of a choice once, in order. A repeat is welcome news twice; a gap means that something was lost
        (a token without the log-probabilities that were asked for is no better)."""
        self._holders.unload_prefill(request.group or request)
        submission = request.submission
        output = submission.outputs[choice]
        position = token.position
        if position < len(output) or choice in submission.finishes:
            return []
        asked = submission.submit.sampling.logprobs is not None
        if position > len(output) or (asked and token.logprobs is None):
            return self._on_gap(request, now_us)
        if not output:
            self._note_first_token(submission, now_us)
        output.append(token.token_id)
        request.heard_us = now_us
        if not position % GROWTH_TOKENS and position:
            submission.meter_growth()
            self._holders.decode_memory.grow(request)
        logprobs = (token.logprobs,) if asked and token.logprobs is not None else ()
        ready = TokensReady(submission.submit.key, (token.token_id,), choice, token.finish, logprobs)
        if request.group is not None:
            self._leave_group(request)
        return [ready, *(self._endings.finish(request, choice, token.finish, now_us) if token.finish else ())]

    def _on_gap(self, request: LiveRequest, now_us: int) -> list[object]:
        self._counters["token_gaps", ""] += 1
        return self._losses.restart(request, now_us)

    def _note_first_token(self, submission: Submission, now_us: int) -> None:
        """Of some choice."""
        if submission.first("token", now_us):
            self._service_time.note(now_us - submission.marks_us["placed"])

    def _leave_group(self, child: LiveRequest) -> None:
        """It is heard of: its group need not speak for it any more."""
        if (group := self._groups.leave(child)) is not None:
            self._groups.disband(group)
