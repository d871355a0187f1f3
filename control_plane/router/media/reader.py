"""A conversation's images, from what their parts say to pixels that are counted until the request ends.

    data URL, file  ----------------------> decoders -> pixels, digest
    remote URL      --> fetcher --> file -> decoders

What goes wrong is told by the place of the part: `messages[0].content[1]: ...`, in words of our own. Images of one
request are worked on a few at a time, so that a request of many does not take all places in the queue.

What does not belong here: reading parts (`validation`), what images are in a prompt (`validation.image_prompt`).
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from control_plane.router.media.data_url import is_data_url
from control_plane.router.media.decoding import Decoded, Decoders, ImageFile
from control_plane.router.media.fetch import Fetcher, FetchFailed
from control_plane.router.media.pipe import Kind
from control_plane.router.media.reasons import SENTENCES, ImageRefused, Reason
from control_plane.router.media.remote_url import Denied, FetchDenied
from control_plane.router.shares import Shares
from engine.base import limits
from engine.base.errors import DeadlineExceeded, InvalidArgument, PermissionDenied, ResourceExhausted

DENIED: Final = {
    Denied.OFF: "remote images are not fetched here; send a data URL",
    Denied.FORM: "not a URL that images are fetched from",
    Denied.DOMAIN: "images are not fetched from there",
    Denied.ADDRESS: "images are not fetched from there",
}
FAILED: Final = "the image could not be fetched"


@dataclass(frozen=True, slots=True)
class ImagePart:
    """`where`: its place in the request. `source`: a URL, or the image as it came."""

    where: str
    source: str | ImageFile

    @property
    def is_remote(self) -> bool:
        return isinstance(self.source, str) and not is_data_url(self.source)

    def refused(self, reason: Reason) -> InvalidArgument:
        return InvalidArgument(f"{self.where}: {SENTENCES[reason]}", field=self.where)


class MediaObserver(Protocol):
    """Who counts what clients sent and did not get."""

    def bad_image(self, reason: Reason) -> None: ...

    def fetch_denied(self, reason: Denied) -> None: ...

    def fetch_failed(self) -> None: ...


# -- memory ------------------------------------------------------------------------------------------------------------
class ImageMemory:
    """Counts the pixels of all requests that have not ended, and files that are fetched for them. Of all bytes a
    tenant has a share."""

    def __init__(self, bytes_max: int = limits.IMAGES_HELD_BYTES_MAX, *, tenants: int = 1) -> None:
        self._shares = Shares(bytes_max, tenants=tenants)

    @property
    def held_bytes(self) -> int:
        return self._shares.total

    def hold(self, tenant: str) -> "HeldImages":
        return HeldImages(self._shares, tenant)


class HeldImages:
    """One request's. Whoever has it releases it once the request is over; twice is once."""

    __slots__ = ("_shares", "_tenant", "size_bytes")

    def __init__(self, shares: Shares, tenant: str) -> None:
        self._shares = shares
        self._tenant = tenant
        self.size_bytes = 0

    def take(self, size_bytes: int) -> None:
        if not (self._shares.fits(size_bytes) and self._shares.allows(self._tenant, size_bytes)):
            raise ResourceExhausted("too many images at once", retry_after_ms=limits.RETRY_AFTER_MS)
        self._shares.take(self._tenant, size_bytes)
        self.size_bytes += size_bytes

    def give(self, size_bytes: int) -> None:
        self._shares.give(self._tenant, size_bytes)
        self.size_bytes -= size_bytes

    def release(self) -> None:
        self.give(self.size_bytes)


# -- reading -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Album:
    """The images of one request, in order, and what they hold."""

    images: tuple[Decoded, ...]
    held: HeldImages


class ImageReader:
    def __init__(self, decoders: Decoders, fetcher: Fetcher, memory: ImageMemory, observer: MediaObserver) -> None:
        self._decoders = decoders
        self._fetcher = fetcher
        self._memory = memory
        self._observer = observer

    def close(self) -> None:
        self._decoders.close()

    async def read(self, parts: Sequence[ImagePart], *, wait_ms: int, tenant: str = "") -> Album:
        """All of them, or the error of the first that is wrong. What is returned is the caller's to release."""
        held, turns = self._memory.hold(tenant), asyncio.Semaphore(self._decoders.at_once)
        tasks = [asyncio.create_task(self._one(part, turns, held, wait_ms, tenant)) for part in parts]
        try:
            async with asyncio.timeout(wait_ms / 1_000):  # around all: many may each wait for a little less
                return Album(tuple([await task for task in tasks]), held)
        except BaseException as error:
            await _cancelled(tasks, held)
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded("the request's time ran out while its images were read") from None
            raise

    def layout_refused(self, part: ImagePart) -> InvalidArgument:
        """For who finds out that the model does not take an image of this shape."""
        self._observer.bad_image(Reason.LAYOUT)
        return part.refused(Reason.LAYOUT)

    async def _one(
        self, part: ImagePart, turns: asyncio.Semaphore, held: HeldImages, wait_ms: int, tenant: str
    ) -> Decoded:
        """A file that is fetched is in no body, whose bytes are counted: it is counted here until it is decoded."""
        fetched_bytes_max = limits.IMAGE_FILE_BYTES_MAX if part.is_remote else 0
        async with turns:
            held.take(fetched_bytes_max)
            try:
                decoded = await self._decoders.decode(await self._file(part, tenant), wait_ms=wait_ms, tenant=tenant)
            except ImageRefused as refused:
                self._observer.bad_image(refused.reason)
                raise part.refused(refused.reason) from None
            held.give(fetched_bytes_max)
            held.take(len(decoded.picture.pixels))
            return decoded

    async def _file(self, part: ImagePart, tenant: str) -> ImageFile:
        if isinstance(part.source, ImageFile):
            return part.source
        if not part.is_remote:
            return ImageFile(Kind.DATA_URL, [part.source.encode("utf-8", "replace")])
        try:
            return ImageFile(Kind.FILE, await self._fetcher.fetch(part.source, tenant=tenant))
        except FetchDenied as denied:
            self._observer.fetch_denied(denied.reason)
            raise PermissionDenied(f"{part.where}: {DENIED[denied.reason]}") from None
        except FetchFailed:
            self._observer.fetch_failed()
            raise InvalidArgument(f"{part.where}: {FAILED}", field=part.where) from None


async def _cancelled(tasks: Sequence["asyncio.Task[Decoded]"], held: HeldImages) -> None:
    """Nothing is held afterwards, also if who waits for them is cancelled once more."""
    for task in tasks:
        task.cancel()
    try:
        await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        held.release()
