"""The requests of one client's call, read as one: as many streams as it has prompts, one reader, one set of choices.

Choices are numbered as OpenAI has it: those of the first prompt, those of the second, and so on. The first failure of
any prompt is everybody's; otherwise the last ending is.

A single prompt costs nothing more than its own stream: `next` is that stream's.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Self

from control_plane.router.answers.choice import Delta
from control_plane.router.answers.request_stream import News, RequestStream, patience
from control_plane.router.requests import PromptScored


class PromptStreams:
    """Leaving the `with` block, however it happens, closes every stream."""

    def __init__(self, streams: Sequence[RequestStream]) -> None:
        self.streams = streams
        self.next: Callable[[], Awaitable[News]] = streams[0].next if len(streams) == 1 else self._next
        choices = streams[0].request.choices
        self._open = {index * choices: stream for index, stream in enumerate(streams)}  # by the first choice's number

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("client disconnected")

    @property
    def id(self) -> str:
        """By which its client may abort it."""
        return self.streams[0].id

    def close(self, reason: str) -> None:
        for stream in self.streams:
            stream.close(reason)

    def patience(self) -> AbstractAsyncContextManager[None]:
        return patience(self.streams)

    async def _next(self) -> News:
        while (news := self._take()) is None:
            await self._change()
        return news

    def _take(self) -> News | None:
        scored: list[PromptScored] = []
        deltas: list[Delta] = []
        for first_choice, stream in tuple(self._open.items()):
            news = stream.take()
            if news is None:
                continue
            scored += news.scored
            deltas += [delta._replace(choice=first_choice + delta.choice) for delta in news.deltas]
            if news.ended is not None:
                del self._open[first_choice]
                if news.ended.error is not None or not self._open:
                    return News(scored, deltas, news.ended)
        return News(scored, deltas, None) if scored or deltas else None

    def _change(self) -> asyncio.Future[None]:
        """Done when any of them has something new."""
        wakeup: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for stream in self._open.values():
            stream.wakeup = wakeup
        return wakeup
