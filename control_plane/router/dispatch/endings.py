"""Endings: a submission ends once, with `Ended`, and whoever may hold something for it is told to forget it.

A choice is over when a worker, or the client's own stop string, says so; a submission with its last choice, or with an
error at any time (`end`).
"""

from control_plane.router.dispatch.absences import Absences
from control_plane.router.dispatch.groups import Groups
from control_plane.router.dispatch.holders import Holders
from control_plane.router.dispatch.lines import Lines
from control_plane.router.dispatch.live_request import LiveRequest, Stage
from control_plane.router.dispatch.placement import Placer
from control_plane.router.dispatch.register import Register
from control_plane.router.dispatch.submissions import Submission
from control_plane.router.requests import Ended
from control_plane.router.shares import Shares
from engine.base.errors import Cancelled, DeadlineExceeded, TriptychError
from engine.types import FinishReason


class Endings:
    def __init__(
        self,
        register: Register,
        holders: Holders,
        groups: Groups,
        *,
        lines: Lines,
        choices: Shares,
        placer: Placer,
        absences: Absences,
    ) -> None:
        self._register = register
        self._holders = holders
        self._groups = groups
        self._lines = lines
        self._choices = choices
        self._placer = placer
        self._absences = absences

    # -- the client ----------------------------------------------------------------------------------------------------
    def on_cancel(self, key: int, now_us: int) -> list[object]:
        submission = self._register.submissions.get(key)
        return [] if submission is None else self.end(submission, now_us, error=Cancelled("cancelled"))

    def on_stop(self, key: int, choice: int, now_us: int) -> list[object]:
        submission = self._register.submissions.get(key)
        if submission is None or choice in submission.finishes:
            return []
        speakers = (r for r in submission.requests.values() if choice in r.choices and r.stage is not Stage.FORKED)
        request = next(speakers, None)
        return [] if request is None else self.finish(request, choice, FinishReason.STOP, now_us)

    def end_all(self, error: TriptychError, now_us: int) -> list[object]:
        """Whoever is left, and with what is known of them."""
        left = list(self._register.submissions.values())
        return [action for submission in left for action in self.end(submission, now_us, error=error)]

    # -- time ----------------------------------------------------------------------------------------------------------
    def on_deadline(self, submission: Submission, now_us: int) -> list[object]:
        *_, newest = submission.requests.values()
        error = DeadlineExceeded(f"deadline passed while {newest.stage.value}")
        return self.end(submission, now_us, error=error)

    def give_up_absent(self, now_us: int) -> list[object]:
        """Roles that nobody has held for too long are no longer waited for."""
        requests = list(self._register.requests.values()) if self._absences.give_up(now_us) else []
        return [action for request in requests for action in self.end_if_stranded(request, now_us)]

    def end_if_stranded(self, request: LiveRequest, now_us: int) -> list[object]:
        """A role was given up without which the request cannot go on from where it is."""
        error = self._absences.error(request) if self._register.knows(request) else None
        return [] if error is None else self.end(request.submission, now_us, error=error)

    # -- the one ending ------------------------------------------------------------------------------------------------
    def finish(self, request: LiveRequest, choice: int, finish: FinishReason, now_us: int) -> list[object]:
        """One choice is over, and well. With the last one all is. In a group it is only noted: the others go on."""
        if not request.is_group:
            self._placer.output_ended(request)
        submission = request.submission
        submission.finishes[choice] = finish
        if submission.over:
            return self.end(submission, now_us, finish=finish)
        return [] if request.is_group else self._drop(request)

    def end(
        self,
        submission: Submission,
        now_us: int,
        *,
        finish: FinishReason | None = None,
        error: TriptychError | None = None,
    ) -> list[object]:
        actions: list[object] = []
        while submission.requests:
            actions += self._drop(next(iter(submission.requests.values())))
        submit, stats = submission.submit, submission.stats
        del self._register.submissions[submit.key]
        self._choices.give(submit.tenant, submit.choices)
        submission.meter_rest()
        stats.phase_ms = submission.phases_ms(now_us)
        transfer_id = submission.transfer_id
        return [*actions, Ended(key=submit.key, finish=finish, error=error, stats=stats, transfer_id=transfer_id)]

    def _drop(self, request: LiveRequest) -> list[object]:
        """Nobody shall work for it any more."""
        actions = self.withdraw(request)
        self._holders.give_back(request)
        self._register.forget(request)
        return actions

    def withdraw(self, request: LiveRequest) -> list[object]:
        """It leaves its line, and whoever may hold anything for it is told to forget it. Told once too often is
        harmless."""
        self._lines.leave(request)
        actions = [
            *self._holders.abort_at(request.source, request),
            *self._holders.abort_at(request.target, request),
            *(action for image in request.images for action in self._holders.abort_image(image)),
        ]
        self._holders.unload_prefill(request)
        request.source = request.target = None
        group = self._groups.leave(request)
        return [*actions, *self._drop(group)] if group is not None else actions
