"""Taken ports are a person's mistake; held ports are nobody else's; what peers are told can be dialled."""

import socket

import pytest

from control_plane.addresses import advertised_host, authority, authority_of, hold, listen, port_of, split
from control_plane.options import OptionError


@pytest.mark.parametrize(
    ("host", "port", "written"), [("10.0.0.1", 80, "10.0.0.1:80"), ("::1", 80, "[::1]:80"), ("[::1]", 80, "[::1]:80")]
)
def test_an_ipv6_host_gets_brackets_once(host: str, port: int, written: str) -> None:
    assert authority(host, port) == written
    assert split(written) == (host.strip("[]"), port)


def test_a_port_where_somebody_listens_is_refused_by_name() -> None:
    with listen("port", "127.0.0.1", 0) as other, pytest.raises(OptionError, match="in use") as caught:
        hold("admin-port", "127.0.0.1", port_of(other))
    assert caught.value.option == "admin-port"


def test_a_host_that_is_not_ours_is_refused() -> None:
    with pytest.raises(OptionError, match=r"cannot listen on 192\.0\.2\.1:0"):
        hold("port", "192.0.2.1", 0)


def test_who_held_a_port_too_finds_it_taken_by_the_faster_one() -> None:
    with hold("port", "127.0.0.1", 0) as held, listen("port", "127.0.0.1", port_of(held)), pytest.raises(OptionError):
        listen("port", "127.0.0.1", port_of(held))


def test_a_held_port_refuses_connections_until_it_is_served() -> None:
    with hold("port", "127.0.0.1", 0) as held:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(split(authority_of(held)))
        with listen("port", "127.0.0.1", port_of(held)) as server:
            socket.create_connection(split(authority_of(server))).close()


@pytest.mark.parametrize(
    ("listens_at", "controller", "told"),
    [
        ("10.0.0.1:5", "127.0.0.1:1", "10.0.0.1"),
        ("[fe80::1]:5", "127.0.0.1:1", "[fe80::1]"),
        ("0.0.0.0:0", "127.0.0.1:1", "127.0.0.1"),
        ("[::]:0", "127.0.0.1:1", "127.0.0.1"),
    ],
)
def test_a_wildcard_is_told_as_the_address_that_faces_the_controller(
    listens_at: str, controller: str, told: str
) -> None:
    assert advertised_host(listens_at, controller) == told
