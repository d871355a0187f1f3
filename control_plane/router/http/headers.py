"""What a request says of itself in its headers: who asks, under which name, and how soon they want it.

    authorization     Bearer KEY, wherever keys are configured
    x-request-id      the client's own name for the request: echoed and logged, never looked up
    x-slo-ttft-ms     milliseconds to the first token; the body's `triptych.slo` comes before both
    x-slo-tpot-ms     milliseconds per further token

Of a header that came twice the first counts; what a proxy or an attacker added behind it changes nothing.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Final

from control_plane.router.access.caller import Caller
from control_plane.router.access.tenants import Keys, Tenant
from control_plane.router.validation.fields import word
from engine.base import limits
from engine.base.errors import InvalidArgument

AUTHORIZATION: Final = b"authorization"
REQUEST_ID: Final = b"x-request-id"
SLO_TTFT_MS: Final = b"x-slo-ttft-ms"
SLO_TPOT_MS: Final = b"x-slo-tpot-ms"
READ: Final = frozenset((AUTHORIZATION, REQUEST_ID, SLO_TTFT_MS, SLO_TPOT_MS))

Headers = Mapping[bytes, bytes]


def headers_read(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Those that are read here, as ASGI has them: names in lower case."""
    read: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in READ:
            read.setdefault(name, value)
    return read


def label_of(headers: Headers) -> str:
    """The client's own id, fit for a header and a log line."""
    return word(headers.get(REQUEST_ID, b"").decode("latin-1"))


def tenant_of(headers: Headers, keys: Keys) -> Tenant:
    """Raises `Unauthenticated`."""
    return keys.tenant(headers.get(AUTHORIZATION, b"").decode("latin-1"))


def caller_untrusted(headers: Headers, tenant: Tenant, arrived_us: int) -> Caller:
    """Raises `InvalidArgument`."""
    return Caller(
        tenant=tenant,
        label=label_of(headers),
        arrived_us=arrived_us,
        ttft_slo_ms=_slo_ms_untrusted(headers, SLO_TTFT_MS),
        tpot_slo_ms=_slo_ms_untrusted(headers, SLO_TPOT_MS),
    )


_INTEGER: Final = re.compile(rb"[0-9]{1,9}")


def _slo_ms_untrusted(headers: Headers, name: bytes) -> int | None:
    value = headers.get(name)
    if value is None:
        return None
    if _INTEGER.fullmatch(value) and 1 <= int(value) <= limits.SLO_MS_MAX:
        return int(value)
    field = name.decode()
    raise InvalidArgument(f"{field}: must be an integer from 1 to {limits.SLO_MS_MAX}", field=field)
