"""What our errors are to clients, over whichever protocol: an exception of ours becomes an error that may be told.

What does not belong here: how a protocol spells an error (`http.responses`, `grpc.calls`).
"""

import logging

from engine.base.errors import Internal, Status, TriptychError

log = logging.getLogger("triptych.router")


def as_ours(raised: Exception) -> TriptychError:
    """An exception that is no answer is a bug: logged here (tracebacks hold no values), anonymous outside."""
    if isinstance(raised, TriptychError):
        return raised
    log.error("bug in the edge", exc_info=raised)
    return Internal("internal error")


def public_message(error: TriptychError) -> str:
    """What the client may read. Our own bugs do not describe themselves to clients."""
    return "internal error" if error.status is Status.INTERNAL else error.message
