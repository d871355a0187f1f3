"""One client's view of its request: the core's outputs on one side, a reader on the other.

    Edge --push--> Choice, Choice, ... --next--> News        one wake-up and one reading for all that has come

What does not belong here: which requests there are and what becomes of their figures (`edge`), text (`choice`), and a
reader of several requests (`several_prompts`).
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from control_plane.router.answers.choice import Choice, Delta
from control_plane.router.client_errors import as_ours
from control_plane.router.requests import Ended, PromptScored, RequestStats, TokensReady
from control_plane.router.validation.validator import ValidatedRequest
from engine.base.errors import Cancelled
from engine.types import FinishReason, TokenLogprobs


class News(NamedTuple):
    """What became readable since the last one: every prompt score before the first delta, the ending last."""

    scored: Sequence[PromptScored]
    deltas: Sequence[Delta]  # in the order in which their choices were heard of, one per choice
    ended: Ended | None


class Owner(Protocol):
    """Who speaks to the core for a stream."""

    @property
    def read_grace_ms(self) -> int: ...

    def stop(self, stream: "RequestStream", choice: int) -> None: ...

    def cancel(self, stream: "RequestStream") -> None: ...


class RequestStream:
    """One client's view of its request: `async` reading on one side, the core's pushes on the other.

    One reader. After `News` with `ended` there is nothing more. Leaving the `with` block, however it happens,
    closes the stream, which cancels the request unless it has ended.
    """

    __slots__ = (
        "_choices",
        "_closed",
        "_ended",
        "_open_choices",
        "_owner",
        "_readable",
        "_scored",
        "_withheld",
        "ended_us",
        "first_us",
        "id",
        "interrupt",
        "key",
        "last_us",
        "opened_us",
        "request",
        "second_us",
        "tokens",
        "unread_tokens",
        "wakeup",
    )

    def __init__(
        self,
        owner: Owner,
        key: int,
        id: str,
        request: ValidatedRequest,
        choices: Sequence[Choice],
        opened_us: int,
    ) -> None:
        self.key = key
        self.id = id
        self.request = request
        self.unread_tokens = 0  # of all choices
        # Figures, for who accounts for the request: output tokens of each choice, and when they came.
        self.tokens = [0] * len(choices)
        self.opened_us = opened_us
        self.first_us: int | None = None
        self.second_us: int | None = None  # of the choice that got so far first
        self.last_us = opened_us
        self.ended_us: int | None = None
        # Of whoever reads: what wakes it up, and what stops it while it is stuck in sending.
        self.wakeup: asyncio.Future[None] | None = None
        self.interrupt: Callable[[], None] | None = None
        self._owner = owner
        self._choices = choices
        self._open_choices = len(choices)  # whose last delta has not been read
        self._readable: list[Choice] = []  # those with something unread, each once
        self._scored: list[PromptScored] = []
        self._withheld: list[Delta] = []  # last deltas, read before the ending that they go with
        self._ended: Ended | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("client disconnected")

    # -- the reader's side ---------------------------------------------------------------------------------------------
    async def next(self) -> News:
        """Everything since the last call, in one piece: a reader that fell behind catches up in one step."""
        while (news := self.take()) is None:
            await self._change()
        return news

    def take(self) -> News | None:
        """What there is to tell now; None: nothing, before the next `wakeup`.

        The request's last delta comes together with its ending, so that whoever writes it knows that it is the last.
        Detokenising something impossible is a bug of ours, and the ending of its own request only (I11).
        """
        if not self._readable and not self._scored and self._ended is None:
            return None
        scored, self._scored = self._scored, []
        try:
            deltas = self._read()
        except Exception as raised:
            return News((), (), Ended(key=self.key, error=as_ours(raised), stats=RequestStats()))
        if self._open_choices:
            return News(scored, deltas, self._ended)
        self._withheld += deltas
        if self._ended is None:
            self._scored = scored
            return None
        return News(scored, self._withheld, self._ended)

    def _read(self) -> list[Delta]:
        readable, self._readable = self._readable, []
        self.unread_tokens = 0
        deltas = []
        for choice in readable:
            deltas.append(choice.read())
            if choice.over:
                self._open_choices -= 1
                if not choice.finished_by_core:
                    self._owner.stop(self, choice.index)
        return deltas

    def _change(self) -> asyncio.Future[None]:
        """Done when there is something new. A future and no coroutine: a token's wake-up passes through every one that
        waits for it, and each is a frame that has left the cache since the last token."""
        self.wakeup = asyncio.get_running_loop().create_future()
        return self.wakeup

    def patience(self) -> AbstractAsyncContextManager[None]:
        """Around everything sent to the client: `TimeoutError` if it does not read."""
        return patience([self])

    @property
    def patience_ms(self) -> int:
        return self.request.deadline_ms + self._owner.read_grace_ms

    @property
    def stats(self) -> RequestStats:
        """Whole once the request has ended."""
        return self._ended.stats if self._ended is not None else RequestStats()

    def close(self, reason: str) -> None:
        """Stop reading; idempotent. The reader, if it still waits, gets `Cancelled`."""
        if self._ended is None and not self._closed:
            self._abandon(reason)
            self._owner.cancel(self)

    # -- the edge's side -----------------------------------------------------------------------------------------------
    def push(self, output: TokensReady, now_us: int) -> None:
        choice = self._choices[output.choice]
        if choice.over:
            return  # it stopped at a string, and the core has not heard of it yet
        tokens = len(output.token_ids)
        self.tokens[output.choice] += tokens
        self.last_us = now_us
        if self.second_us is None:
            self._mark_first_tokens(output.choice, now_us)
        if not self._closed:
            self.unread_tokens += tokens
            self._hand_on(choice, output.token_ids, output.logprobs, output.finish)
            self._wake()

    def push_scores(self, output: PromptScored) -> None:
        if not self._closed:
            self._scored.append(output)
            self._wake()

    def end(self, ended: Ended) -> None:
        if self._ended is not None:  # a closed stream has told its reader already
            return
        self._ended = ended
        if ended.finish is not None:
            for choice in self._choices:  # that said nothing of its own: one without tokens, for example
                if not choice.over and not choice.finished_by_core:
                    self._hand_on(choice, (), (), ended.finish)
        self._wake()

    def _hand_on(
        self,
        choice: Choice,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
        finish: FinishReason | None,
    ) -> None:
        if not choice.readable:
            self._readable.append(choice)
        choice.push(token_ids, logprobs, finish)

    def _mark_first_tokens(self, choice: int, now_us: int) -> None:
        if self.first_us is None:
            self.first_us = now_us
        if self.tokens[choice] > 1:
            self.second_us = now_us

    def overflow(self) -> None:
        """Too much is unread: forget it, and interrupt a reader that is stuck in sending."""
        self._abandon("the client does not read")
        if self.interrupt is not None:
            self.interrupt()

    def _abandon(self, reason: str) -> None:
        self._closed = True
        self._readable, self._scored, self._withheld, self.unread_tokens = [], [], [], 0
        self._ended = Ended(key=self.key, error=Cancelled(reason), stats=RequestStats())
        self._wake()

    def _wake(self) -> None:
        if self.wakeup is not None and not self.wakeup.done():
            self.wakeup.set_result(None)


@asynccontextmanager
async def patience(streams: Sequence[RequestStream]) -> AsyncIterator[None]:
    """Around everything sent to the one client of `streams`: `TimeoutError` if it does not read.

    One timer for all, not one per token: a send blocks for ever once the client has stopped reading.
    """
    async with asyncio.timeout(max(stream.patience_ms for stream in streams) / 1000) as limit:

        def interrupt() -> None:
            if not limit.expired():
                limit.reschedule(0.0)

        _on_overflow(streams, interrupt)
        try:
            yield
        finally:
            _on_overflow(streams, None)


def _on_overflow(streams: Sequence[RequestStream], interrupt: Callable[[], None] | None) -> None:
    for stream in streams:
        stream.interrupt = interrupt
