"""Reception: a submission comes in and takes its place in line, or is told why not.

Also whoever has waited in line for too long: they are refused late, for the same reason as others at once.
"""

from collections import Counter
from collections.abc import Sequence

from control_plane.router.dispatch.absences import Absences
from control_plane.router.dispatch.admission import Admission, Refusal
from control_plane.router.dispatch.endings import Endings
from control_plane.router.dispatch.groups import Groups
from control_plane.router.dispatch.lines import Lines
from control_plane.router.dispatch.live_request import LiveRequest, Stage
from control_plane.router.dispatch.prefilling import Prefilling
from control_plane.router.dispatch.register import Register
from control_plane.router.dispatch.submissions import Submission
from control_plane.router.requests import Ended, Submit
from engine.base.errors import TriptychError
from engine.types import Role


class Reception:
    def __init__(
        self,
        register: Register,
        groups: Groups,
        endings: Endings,
        prefilling: Prefilling,
        *,
        admission: Admission,
        lines: Lines,
        absences: Absences,
        counters: Counter[tuple[str, str]],
    ) -> None:
        self._register = register
        self._groups = groups
        self._endings = endings
        self._prefilling = prefilling
        self._admission = admission
        self._lines = lines
        self._absences = absences
        self._counters = counters
        self._arrivals = 0

    def on_submits(self, submits: Sequence[Submit], now_us: int) -> list[object]:
        """All requests of one call: there is room for all of them, or none is started."""
        requests = [self._request(submit, now_us) for submit in submits]
        refusal = self._admission.refusal(requests)
        if refusal is not None:
            error = self._count(refusal)
            return [Ended(key=each.submit.key, error=error, stats=each.submission.stats) for each in requests]
        for request in requests:
            self._take_in(request, now_us)
        return []

    def _request(self, submit: Submit, now_us: int) -> LiveRequest:
        deadline_us = now_us + 1_000 * self._admission.total_ms(submit)
        submission = Submission(self._arrivals + 1, submit, now_us, deadline_us)
        stage = Stage.ENCODING if submit.images else Stage.QUEUED
        return LiveRequest(0, submission, tuple(range(submit.choices)), stage)

    def _take_in(self, request: LiveRequest, now_us: int) -> None:
        self._arrivals += 1
        request.submission.number = self._arrivals
        self._open(request.submission)
        if request.submit.images:
            self._absences.need(Role.ENCODE, now_us)
        whole = not request.is_group or self._admission.fits(request)
        for part in [request] if whole else self._groups.divide(request):
            self._prefilling.enqueue(self._register.adopt(part), now_us)

    def on_queue_timeout(self, submission: Submission, now_us: int) -> list[object]:
        refusal = self._admission.waited_too_long(submission.submit)
        return self._endings.end(submission, now_us, error=self._count(refusal))

    def close(self) -> None:
        """Nobody is taken in from now on; those who were go on."""
        self._admission.open = False

    def _open(self, submission: Submission) -> None:
        submit = submission.submit
        self._register.submissions[submit.key] = submission
        self._admission.choices.take(submit.tenant, submit.choices)
        self._counters["requests_by_n", str(submit.choices)] += 1
        submission.stats.attempts = 1
        submission.meter = self._lines.prefill.queue.meter(submit.tenant)
        self._register.deadlines.watch_submission(submission)

    def _count(self, refusal: Refusal) -> TriptychError:
        self._counters["rejections", refusal.reason] += 1
        return refusal.error
