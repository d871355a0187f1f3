"""What every process of ours does the same way: heeds signals, and does not outlive the one who started it.

Not here: what a process is for, and how it logs (`logs`).
"""

import asyncio
import contextlib
import os
import signal
import sys

LIFELINE_VARIABLE = "TRIPTYCH_LIFELINE"
"""Set by a launcher that keeps the other end of our standard input: when it closes, the launcher is gone."""

LIFELINE_BYTES = 4_096
REPEAT_WITHIN_S = 1.0  # a supervisor that signals everybody, and the launcher that passes it on, ask once between them
STATUS_BUG = 1
STATUS_MISTAKE = 2  # of the person who started us: to start the same again is no remedy
STATUS_AT_ONCE = 130  # ended without the orderly way


class Shutdown:
    """Asked to end: by SIGTERM, SIGINT, or the launcher's death. Asked again, later: end at once."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._first_signal_s: float | None = None
        self._crashed = False

    def install(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        if os.environ.get(LIFELINE_VARIABLE):
            os.set_blocking(sys.stdin.fileno(), False)
            loop.add_reader(sys.stdin.fileno(), self._on_lifeline)

    def ask(self) -> None:
        self._asked.set()

    def crash(self, error: Exception) -> None:
        """A bug of ours: end, and say so with the exit status."""
        self._crashed = True
        self._asked.set()

    async def wait(self) -> None:
        await self._asked.wait()

    @property
    def exit_status(self) -> int:
        return STATUS_BUG if self._crashed else 0

    @property
    def crashed(self) -> bool:
        return self._crashed

    def _on_signal(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._first_signal_s is None:
            self._first_signal_s = now_s
            self._asked.set()
        elif now_s - self._first_signal_s >= REPEAT_WITHIN_S:
            os._exit(STATUS_AT_ONCE)  # whoever sends a second one does not want to wait

    def _on_lifeline(self) -> None:
        with contextlib.suppress(BlockingIOError):
            if os.read(sys.stdin.fileno(), LIFELINE_BYTES):
                return
            if self._asked.is_set():
                os._exit(STATUS_AT_ONCE)  # the launcher was told to end at once, and so are we
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self._asked.set()
