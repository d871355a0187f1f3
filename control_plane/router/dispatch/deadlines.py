"""Deadlines: when a submission or a request must be looked at, if nothing else has happened by then.

    a submission  in all (`deadline_us`), and in the queue until some worker was given some of it
    a request     a sign of life from the worker that has something to do for it

Not here: what becomes of those that are due, how long somebody may wait in the queue (`admission`), and workers that do
not come (`absences`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from control_plane.router.dispatch.alarms import Alarms
from control_plane.router.dispatch.live_request import LiveRequest
from control_plane.router.dispatch.submissions import Submission
from control_plane.router.requests import Submit
from engine.base import limits


@dataclass(frozen=True, slots=True)
class Patience:
    """How long it lasts."""

    queue_wait_ms: Callable[[Submit], int]  # asked again and again: it moves with what others have waited
    no_progress_ms: int = limits.NO_PROGRESS_MS


class Deadlines:
    """Of the living ones: whatever is no longer in these two mappings is not due any more."""

    def __init__(
        self, patience: Patience, submissions: Mapping[int, Submission], requests: Mapping[int, LiveRequest]
    ) -> None:
        self._patience = patience
        self._submissions = submissions
        self._requests = requests
        self._totals = Alarms(self._total_us)  # of submissions, by key
        self._queue_timeouts = Alarms(self._queue_timeout_us)  # likewise
        self._silences = Alarms(self._silence_us)  # of requests, by id

    def watch_submission(self, submission: Submission) -> None:
        self._totals.watch(submission.submit.key)
        self._queue_timeouts.watch(submission.submit.key)

    def watch_silence(self, request: LiveRequest) -> None:
        """It may be due earlier than it was. What moves it back (`heard_us`) need not be told."""
        self._silences.watch(request.id)

    @property
    def next_us(self) -> int | None:
        alarms = (self._totals, self._queue_timeouts, self._silences)
        return min((next_us for each in alarms if (next_us := each.next_us) is not None), default=None)

    # -- those that are due: the caller ends or moves each before asking for the next ----------------------------------
    def passed(self, now_us: int) -> Iterator[Submission]:
        return (self._submissions[key] for key in self._totals.ring(now_us))

    def queued_too_long(self, now_us: int) -> Iterator[Submission]:
        return (self._submissions[key] for key in self._queue_timeouts.ring(now_us))

    def silent(self, now_us: int) -> Iterator[LiveRequest]:
        return (self._requests[request_id] for request_id in self._silences.ring(now_us))

    # -- when each is due ----------------------------------------------------------------------------------------------
    def _total_us(self, key: int) -> int | None:
        submission = self._submissions.get(key)
        return None if submission is None else submission.deadline_us

    def _queue_timeout_us(self, key: int) -> int | None:
        """Not of one that some worker was given: it would cost its client what it has waited for, and others nothing
        would be saved."""
        submission = self._submissions.get(key)
        if submission is None or submission.placed:
            return None
        return submission.submitted_us + 1_000 * self._patience.queue_wait_ms(submission.submit)

    def _silence_us(self, request_id: int) -> int | None:
        """When a worker that has something to do for it should have said something."""
        request = self._requests.get(request_id)
        if request is None or not request.is_watched:
            return None
        token_ms = limits.NO_PROGRESS_TOKEN_MS * (request.context_tokens + request.ahead_tokens)
        return request.heard_us + 1_000 * (self._patience.no_progress_ms + token_ms)
