"""Who asks: from the key in a request's `authorization` to a tenant. Never from a request's body.

A tenant is what capacity is shared out among and what cached KV is kept within. Without keys everybody is one tenant,
who may do everything: that is a router on somebody's own machine.

Keys are kept as digests and compared in constant time, all of them each time, so that neither a core dump nor the time
of a refusal tells one (reliability E13).

What does not belong here: how a protocol carries the key (`http`, `grpc`), and what a tenant's share is
(`shares`).
"""

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from engine.base.errors import Unauthenticated

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_BEARER: Final = "bearer "


@dataclass(frozen=True, slots=True)
class Tenant:
    """`name` is a label of metrics and logs, and part of the cache's keys; so it is short and plain. "" is everybody.
    `admin`: may also do what concerns others, such as emptying the cache."""

    name: str = ""
    admin: bool = False

    def __post_init__(self) -> None:
        if self.name and not _NAME.fullmatch(self.name):
            raise ValueError("a tenant's name has 1 to 64 letters, digits, dots, hyphens or underscores")


EVERYBODY: Final = Tenant(admin=True)


class Keys:
    """The keys that open this router."""

    def __init__(self, tenants: Mapping[str, Tenant] | None = None) -> None:
        """`tenants` by key. None and an empty mapping: no key is asked for."""
        self._tenants = [(_digest(key), tenant) for key, tenant in (tenants or {}).items()]

    def __repr__(self) -> str:
        return f"Keys({len(self._tenants)} of {len(self.names)} tenants)"

    @property
    def names(self) -> frozenset[str]:
        """Of all tenants there are."""
        return frozenset(tenant.name for _, tenant in self._tenants) or frozenset({EVERYBODY.name})

    def tenant(self, authorization: str) -> Tenant:
        """Of "Bearer KEY", as `authorization` headers have it. Raises `Unauthenticated`, with the same words for no
        key and for a wrong one."""
        if not self._tenants:
            return EVERYBODY
        known = self._known(_digest(_key(authorization)))
        if known is None:
            raise Unauthenticated("authorization: needs 'Bearer KEY' with a key of this server")
        return known

    def _known(self, digest: bytes) -> Tenant | None:
        found = None
        for known, tenant in self._tenants:  # to the end: the time says nothing about where a key stands
            if hmac.compare_digest(known, digest):
                found = tenant
        return found


def _key(authorization: str) -> str:
    scheme = authorization[: len(_BEARER)]
    return authorization[len(_BEARER) :].strip() if scheme.lower() == _BEARER else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
