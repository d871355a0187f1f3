"""The router's side of decoding: a few processes that are started when the first image comes, and kept.

    loop --decode--> queue (tenants in turn) --> thread --pipe--> child    one thread for each child

A child that crashes, or is ended for the time or the memory that an image takes, is replaced when the next image comes;
the image is refused, with one of a fixed set of reasons. What a child says is checked: it has looked at bytes of
anybody's. Children are separate programs, not forks: a fork of a process with threads may hang, and has its memory.

What does not belong here: what is done to the bytes (`child`, `pictures`), what a client is told (`reader`).
"""

import logging
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

from control_plane.router.media import pipe
from control_plane.router.media.pipe import ANSWER, READY, REASONS, REQUEST, Kind
from control_plane.router.media.reasons import ImageRefused, Reason
from control_plane.router.side_thread import SideThread
from engine.base import limits
from engine.base.errors import Internal, Unavailable
from engine.images import PIXEL_BYTES, Picture

log = logging.getLogger("triptych.router")

WALL_FACTOR: Final = 4  # of the CPU time: a loaded machine is nobody's fault
START_MS: Final = 4 * limits.MEDIA_DECODE_MS
COMMAND: Final = ("-m", "control_plane.router.media.child")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image as it came, in pieces as it arrived."""

    kind: Kind
    pieces: Sequence[bytes]

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.pieces))


@dataclass(frozen=True, slots=True)
class Decoded:
    picture: Picture
    digest: bytes  # of the pixels and their shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    children: int = 2
    waiting_max: int = limits.MEDIA_DECODES_WAITING_MAX
    wall_ms: int = WALL_FACTOR * limits.MEDIA_DECODE_MS
    tenants: int = 1


class Decoders:
    """All children of one router."""

    def __init__(self, config: Config | None = None) -> None:
        self._config = config or Config()
        self._threads = SideThread(
            "decode-image",
            waiting_max=self._config.waiting_max,
            what="images",
            tenants=self._config.tenants,
            threads=self._config.children,
        )
        self._idle: deque[Child] = deque()  # shared with the threads, like the next; their methods are atomic
        self._living: set[Child] = set()
        self._closed = False

    @property
    def children(self) -> int:
        """Alive, or not known to be dead."""
        return len(self._living)

    @property
    def pids(self) -> list[int]:
        return [one.pid for one in self._living]

    @property
    def at_once(self) -> int:
        return self._config.children

    async def decode(self, file: ImageFile, *, wait_ms: int, tenant: str = "") -> Decoded:
        """Raises `ImageRefused`, or what a full queue says."""
        if file.size_bytes > pipe.BYTES_MAX:
            raise ImageRefused(Reason.FILE_BYTES)
        return await self._threads.run(partial(self._decode, file), wait_ms=wait_ms, tenant=tenant)

    def close(self) -> None:
        """Also for threads that wait for a child: its end wakes them."""
        self._closed = True
        self._threads.close()
        for one in tuple(self._living):
            self._end(one)

    # -- on a thread ---------------------------------------------------------------------------------------------------
    def _decode(self, file: ImageFile) -> Decoded:
        one = self._take()
        try:
            decoded = one.decode(file, self._config.wall_ms)
        except ImageRefused as refused:
            if one.lost or refused.reason is Reason.MEMORY:
                self._end(one)
            else:
                self._idle.append(one)
            raise
        except BaseException:
            self._end(one)
            raise
        self._idle.append(one)
        return decoded

    def _take(self) -> "Child":
        while self._idle:
            with suppress(IndexError):  # another thread was faster
                one = self._idle.pop()
                if one.alive:
                    return one
                self._end(one)
        one = Child()
        self._living.add(one)  # from now on `close` ends it
        try:
            if self._closed:
                raise Unavailable("shutting down", retry_after_ms=limits.RETRY_AFTER_MS)
            one.wait_until_ready()
        except BaseException:
            self._end(one)
            raise
        return one

    def _end(self, one: "Child") -> None:
        self._living.discard(one)
        one.end()


class Child:
    """One process. Used by one thread at a time; only `kill` may come from another."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # no key of ours, no setting of anybody's
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self._late = False
        self.lost = False  # it has died, or says what no child says

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_ready(self) -> None:
        """A child that does not come up is our fault, not an image's."""
        with self._deadline(START_MS):
            ready = pipe.read(self._out.fileno(), len(READY))
        if ready != READY:
            log.error("the process that decodes images does not start")
            raise Internal("the process that decodes images does not start")

    def decode(self, file: ImageFile, wall_ms: int) -> Decoded:
        with self._deadline(wall_ms):
            try:
                pipe.write(self._in.fileno(), [REQUEST.pack(file.kind, file.size_bytes), *file.pieces])
                return self._answer_untrusted()
            except (BrokenPipeError, _Lost):
                raise ImageRefused(self._why_lost()) from None

    def end(self) -> None:
        """Idempotent."""
        self._process.kill()
        self._process.wait()
        self._in.close()
        self._out.close()

    def _answer_untrusted(self) -> Decoded:
        status, width, height, digest = ANSWER.unpack(self._read(ANSWER.size))
        if status:
            if status > len(REASONS):
                raise _Lost
            raise ImageRefused(REASONS[status - 1])
        if not 1 <= min(width, height) <= max(width, height) <= limits.IMAGE_SIDE_MAX:
            raise _Lost
        if width * height > limits.IMAGE_PIXELS_MAX:
            raise _Lost
        return Decoded(Picture(width, height, self._read(width * height * PIXEL_BYTES)), digest)

    def _read(self, size_bytes: int) -> bytes:
        data = pipe.read(self._out.fileno(), size_bytes)
        if data is None:
            raise _Lost
        return data

    @contextmanager
    def _deadline(self, wall_ms: int) -> Iterator[None]:
        """Past it the process is killed, which ends every wait for it."""
        timer = threading.Timer(wall_ms / 1_000, self._kill_late)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _kill_late(self) -> None:
        self._late = True
        self._process.kill()

    def _why_lost(self) -> Reason:
        self.lost = True
        self._process.kill()  # unless it is dead: it may only have said something impossible
        ended_by = -self._process.wait()
        return Reason.TIME if self._late or ended_by == pipe.TOO_LONG else Reason.CRASH


class _Lost(Exception):
    """Nothing more comes from the child, or nothing that makes sense."""
