"""Which remote image a router may go and get: pure rules, all of which fail closed.

A URL is read by one strict pattern and not by a parser that repairs what it finds: parsers differ in what they make of
a backslash, a tab, an @, a host in hexadecimal, and requests are forged in the difference (Tsai, "A New Era of SSRF",
2017). What the pattern does not take is refused; what it takes, all parsers read alike.

    scheme   http or https, their own ports only, no user, no password
    host     exactly one of `--allowed-media-domains`, as vLLM has it; no subdomains of them, no addresses, and
             international names as they travel (xn--...)
    address  global unicast, of every address that the name has; none that carries another one (mapped, NAT64, 6to4)

What does not belong here: looking names up, and going there (`fetch`).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Final

URL_CHARACTERS_MAX: Final = 2_048
PORTS: Final = {"http": 80, "https": 443}

_LABEL: Final = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_REMOTE: Final = re.compile(
    rf"(?P<scheme>[Hh][Tt][Tt][Pp][Ss]?)://(?P<host>{_LABEL}(?:\.{_LABEL})*)(?::(?P<port>[0-9]{{1,5}}))?"
    r"(?P<target>[/?][!-\[\]_a-z{}|~]*)?",  # visible ASCII without \ ^ `
    re.ASCII,
)
_NUMBER: Final = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")  # as a host's last label: WHATWG reads an address
# These stand for an address of the other kind, wherever that leads (RFC 4291, 6052, 3056, 3068, 4380).
_CARRIERS: Final = tuple(
    map(
        ip_network,
        ("::/96", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "192.88.99.0/24", "2001::/32"),
    )
)
# Protocols' own, and examples' (RFC 6890, 9637): Pythons differ in what they know of these.
_SPECIAL: Final = tuple(map(ip_network, ("192.0.0.0/24", "3fff::/20")))


class Denied(StrEnum):
    """Why nobody goes there. Values are a metric's labels."""

    OFF = "off"
    FORM = "form"
    DOMAIN = "domain"
    ADDRESS = "address"


class FetchDenied(Exception):
    def __init__(self, reason: Denied) -> None:
        super().__init__(reason.value)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class RemoteUrl:
    """Checked. `target` is what the request line says."""

    scheme: str
    host: str
    target: str

    @property
    def port(self) -> int:
        return PORTS[self.scheme]


def allowed_url_untrusted(url: str, domains: Iterable[str]) -> RemoteUrl:
    """Raises `FetchDenied`."""
    found = _REMOTE.fullmatch(url) if len(url) <= URL_CHARACTERS_MAX else None
    if found is None:
        raise FetchDenied(Denied.FORM)
    scheme, host = found["scheme"].lower(), found["host"].lower()
    if _NUMBER.fullmatch(host.rpartition(".")[2]) or int(found["port"] or PORTS[scheme]) != PORTS[scheme]:
        raise FetchDenied(Denied.FORM)
    if host not in {domain.lower() for domain in domains}:
        raise FetchDenied(Denied.DOMAIN)
    path = (found["target"] or "/").partition("#")[0]
    return RemoteUrl(scheme, host, path if path.startswith("/") else f"/{path}")


def check_address(address: str) -> None:
    """Raises `FetchDenied` for whatever is not plainly somewhere on the internet."""
    try:
        parsed = ip_address(address)
    except ValueError:
        raise FetchDenied(Denied.ADDRESS) from None
    if not _is_global_unicast(parsed):
        raise FetchDenied(Denied.ADDRESS)


def _is_global_unicast(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address) and (address.scope_id is not None or address.is_site_local):
        return False
    if any(address in network for network in (*_CARRIERS, *_SPECIAL)):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)
