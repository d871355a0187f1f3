"""One call for text over HTTP, completion or chat, from its first byte to its last, streamed or not.

These are raw ASGI applications: a streamed token costs one wake-up, one JSON string and one `send`; everything around
it is built once per call. A client that goes away closes its streams, which frees everything everywhere. A router that
is full, and one that does not know the key, say so before they read a body.

What does not belong here: bodies (`intake`), checking (`validation`), request life (`edge`), what an answer looks like
(`answer`, `completion_format`, `chat_format`).
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send

from control_plane.router.access.caller import Caller
from control_plane.router.access.tenants import Keys, Tenant
from control_plane.router.answers.answer import Answer, Format
from control_plane.router.answers.chat_format import ChatFormat
from control_plane.router.answers.completion_format import CompletionFormat
from control_plane.router.answers.several_prompts import PromptStreams
from control_plane.router.client_errors import as_ours
from control_plane.router.edge import Edge
from control_plane.router.http.headers import Headers, caller_untrusted, headers_read, label_of, tenant_of
from control_plane.router.http.intake import ClientGone, Departure, Intake
from control_plane.router.http.responses import send_error
from control_plane.router.validation.cutouts import Body
from control_plane.router.validation.validator import ValidatedRequest

log = logging.getLogger("triptych.router")

NOBODY = Tenant()  # whose key has not been looked at
ReadBody = Callable[[Body, Caller], Awaitable[Sequence[ValidatedRequest]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """What every call that has a body needs."""

    edge: Edge
    keys: Keys
    intake: Intake
    image_intake: Intake  # of what may hold images; the same one where the model sees none
    clock_us: Callable[[], int]  # the validator's: deadlines run from when a request was taken in
    wall_s: Callable[[], float]


class Generation:
    """`POST /v1/completions` or `POST /v1/chat/completions`: they differ in who reads the body."""

    def __init__(self, front: Front, intake: Intake, read_body: ReadBody) -> None:
        self._front = front
        self._intake = intake
        self._edge = front.edge
        self._read_body = read_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, tenant = headers_read(scope["headers"]), NOBODY
        async with Departure(receive) as departure:
            try:
                tenant = tenant_of(headers, self._front.keys)
                streams = await self._open(headers, tenant, receive, departure)
            except ClientGone:
                return
            except Exception as raised:
                error, label = as_ours(raised), label_of(headers)
                self._edge.refused(error, label, tenant.name)
                await send_error(send, error, label)
                return
            with streams:
                departure.then(lambda: streams.close("client disconnected"))
                await self._serve(streams, send)

    async def _open(self, headers: Headers, tenant: Tenant, receive: Receive, departure: Departure) -> PromptStreams:
        caller = caller_untrusted(headers, tenant, self._front.clock_us())
        self._edge.check_room()
        requests = await self._intake.take(receive, departure, tenant, lambda body: self._read_body(body, caller))
        return PromptStreams(self._edge.open_all(requests))

    async def _serve(self, streams: PromptStreams, send: Send) -> None:
        request, answer = streams.streams[0].request, None
        label = request.label or streams.id
        try:
            answer = Answer(streams, self._format(streams), int(self._front.wall_s()), self._edge.card.name, label)
            async with streams.patience():
                await (answer.stream(send) if request.stream else answer.whole(send))
        except (TimeoutError, OSError):  # does not read, or is gone; an incomplete response makes the server hang up
            log.debug("response abandoned id=%s", streams.id)
        except Exception as raised:
            if answer is not None and answer.started:
                raise  # the server logs it, and hangs up
            await send_error(send, as_ours(raised), label)

    def _format(self, streams: PromptStreams) -> Format:
        if streams.streams[0].request.chat:
            return ChatFormat(streams.streams[0], self._edge.vocabulary)
        return CompletionFormat(streams.streams, self._edge.vocabulary)
