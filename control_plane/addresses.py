"""Hosts, ports and sockets: what a process listens on, and under which address others reach it.

A port that is taken is the mistake of a person, who gets one line (`OptionError`) from whoever binds first. Not here:
what is served on a socket, and links.
"""

import socket

from control_plane.options import OptionError
from engine.base import limits

WILDCARDS = ("0.0.0.0", "[::]")


def authority(host: str, port: int) -> str:
    """host:port as URLs and gRPC write it: an IPv6 address gets brackets."""
    return f"{bracketed(host)}:{port}"


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def split(address: str) -> tuple[str, int]:
    """The host without brackets, and the port, of an address that `require_address` has accepted."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def hold(option: str, host: str, port: int) -> socket.socket:
    """Take a TCP port (0: any) without serving it. Raises `OptionError` when somebody listens there.

    While the socket lives, the kernel gives the port to nobody who did not ask for it by number; SO_REUSEADDR lets
    the one who will serve it bind it all the same. It does not come back as the local port of a connection either,
    so a server may end and start again.
    """
    held: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        held = socket.socket(family, kind, protocol)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(address)
    except OSError as error:
        if held is not None:
            held.close()
        raise OptionError(option, f"cannot listen on {authority(host, port)}: {error.strerror}") from None
    return held


def listen(option: str, host: str, port: int) -> socket.socket:
    """Take a TCP port and let clients connect; they wait until somebody accepts. Raises `OptionError`."""
    listening = hold(option, host, port)
    try:
        listening.listen(limits.HTTP_BACKLOG)
    except OSError as error:  # two held the port; the other was faster
        listening.close()
        raise OptionError(option, f"cannot listen on {authority(host, port)}: {error.strerror}") from None
    return listening


def port_of(held: socket.socket) -> int:
    return int(held.getsockname()[1])


def authority_of(held: socket.socket) -> str:
    """The very address that is held: a name could mean several, and a server may be content with one of them."""
    host, port = held.getsockname()[:2]
    return authority(host, port)


def advertised_host(listens_at: str, controller: str) -> str:
    """What peers can dial. For a wildcard it is the address of ours from which the controller is reached: a host's own
    name often means loopback (127.0.1.1 on Debian). Connecting a datagram socket sends nothing."""
    host = listens_at.rpartition(":")[0]
    if host not in WILDCARDS:
        return host
    family = socket.AF_INET if host == "0.0.0.0" else socket.AF_UNSPEC
    name, port = split(controller)
    family, kind, protocol, _, address = socket.getaddrinfo(name, port, family, socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return bracketed(probe.getsockname()[0])
