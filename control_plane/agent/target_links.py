"""TargetLinks: a worker's outbound bulk links, one per target worker, and the bindings that wait for one to open.

A link is dialled for the first binding that needs it and shared by all later ones. While it opens, the newest binding
of a sequence counts: the router may have changed its mind. What a binding means is the Source's business.

There is one worker at an address. A router that has not heard of a restart yet names the one that was there, and a
dial reaches its successor; once that is named, too, the link under the former's name is hung up.
"""

from dataclasses import dataclass

from engine.base.machine import Close, Dial, LinkName
from kv_transfer.source import Binding

Waiting = list[tuple[int, Binding]]


@dataclass(slots=True)
class _Link:
    address: str
    up: bool = False


class TargetLinks:
    def __init__(self, hello: bytes) -> None:
        self._hello = hello
        self._links: dict[LinkName, _Link] = {}
        self._waiting: dict[int, Binding] = {}  # by sequence

    def __contains__(self, link: LinkName) -> bool:
        return link in self._links

    def is_up(self, link: LinkName) -> bool:
        return link in self._links and self._links[link].up

    def wait(self, seq_id: int, binding: Binding, address: str) -> list[object]:
        """Keep the binding until its link is up; dial unless that is under way."""
        self._waiting[seq_id] = binding
        if binding.link in self._links:
            return []
        former = [Close(link, "succeeded") for link, known in self._links.items() if known.address == address]
        self._links[binding.link] = _Link(address)
        return [*former, Dial(binding.link, address, self._hello)]

    def forget(self, seq_id: int) -> None:
        """The sequence is over, or has been bound anew. Idempotent."""
        self._waiting.pop(seq_id, None)

    def on_up(self, link: LinkName) -> Waiting:
        self._links[link].up = True
        return self._take(link)

    def on_lost(self, link: LinkName) -> Waiting:
        del self._links[link]
        return self._take(link)

    def _take(self, link: LinkName) -> Waiting:
        taken = [(seq_id, binding) for seq_id, binding in self._waiting.items() if binding.link == link]
        for seq_id, _ in taken:
            del self._waiting[seq_id]
        return taken
