"""Link: an ordered, bidirectional stream of messages between two processes, and the transport that opens one.

The contract every implementation passes (tests/contracts/test_links.py):

- messages arrive whole, in order, at most once, until the link is lost; after that nothing arrives;
- `on_lost` is called exactly once, whoever ended the link, and never from inside `send` or `close`;
- `send` never blocks: it queues, and a queue over `LINK_QUEUE_MESSAGES_MAX` loses the link (slow reader);
- half-close does not exist: closing ends both directions, so that nobody waits on half a conversation;
- a sender never learns whether its last messages before a loss were executed: retrying must be idempotent;
- an empty message is a keep-alive. It is never delivered; it only proves that the peer's event loop runs.

Links carry bytes and know nothing about what is in them. Cancellation is a message like any other.
"""

from collections.abc import Callable
from typing import Protocol


class Link(Protocol):
    """One end of an open link."""

    def send(self, message: bytes) -> None:
        """Queue one message. After a loss this does nothing (the loss has been, or will be, reported)."""

    def close(self, reason: str) -> None:
        """End the link for both sides. The peer sees a loss. Idempotent."""


class LinkHandler(Protocol):
    """What the owner of a link end wants to hear. Called from the host's loop only."""

    def on_message(self, message: bytes) -> None: ...

    def on_lost(self, reason: str) -> None: ...


Accept = Callable[[Link, bytes], LinkHandler]
"""Called for each inbound link with the dialler's hello; returns who listens to it."""


class Transport(Protocol):
    """Opens links. One implementation for tests and planning (memory), one for production (grpc)."""

    def dial(self, address: str, hello: bytes, handler: LinkHandler, on_open: Callable[[], None]) -> Link:
        """Start opening a link; `on_open` or `handler.on_lost` follows. `hello` is the first thing the peer sees."""

    def listen(self, address: str, accept: Accept) -> None:
        """Accept links at this address until the transport is closed."""
