"""Transports: what opens links. `memory` (virtual time, faults on request) and `grpc` (production).

Both pass tests/contracts/test_links.py. Nothing here knows what a message means; choosing whom to dial, and when again,
is a machine's business. This module holds what the two share and imports neither.
"""

from typing import Final

from engine.base import limits

# Why a link ended, where no one gave a reason. Fixed words: they become metric labels.
UNREACHABLE: Final = "unreachable"  # nobody answered the dial
PEER_CLOSED: Final = "peer_closed"  # the other end called `close`, or left in good order
RESET: Final = "reset"  # the connection broke
SLOW_READER: Final = "slow_reader"  # too much unsent; the peer does not read

UNSENT_BYTES_MAX: Final = 8 * limits.FRAME_WINDOW * limits.FRAME_PAYLOAD_BYTES_MAX
"""Unsent bytes before a slow reader counts as a lost link: the full windows of eight transfers on one link. The bound
on messages alone would let a stalled peer pin gigabytes of frames."""


def require_sendable(message: bytes) -> None:
    """A message over the limit is a bug of the sender, and would end the link at the receiver."""
    if len(message) > limits.MESSAGE_BYTES_MAX:
        raise ValueError(f"message of {len(message)} bytes; a link carries at most {limits.MESSAGE_BYTES_MAX}")


def is_slow_reader(unsent_messages: int, unsent_bytes: int) -> bool:
    """Whether this much unsent ends the link."""
    return unsent_messages > limits.LINK_QUEUE_MESSAGES_MAX or unsent_bytes > UNSENT_BYTES_MAX
