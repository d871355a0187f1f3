"""Failpoints: armed ones fire on exactly the hit that the spec names; anything misspelt is refused."""

import signal

import pytest

from engine.base.failpoints import NAMES, Failpoints, InjectedFault, parse


def test_unarmed_does_nothing() -> None:
    failpoints = Failpoints()
    for name in NAMES:
        failpoints.hit(name)
    assert failpoints.hits == {}


def test_raise_on_the_first_hit() -> None:
    with pytest.raises(InjectedFault, match=r"decode\.decoding"):
        Failpoints("decode.decoding=raise").hit("decode.decoding")


@pytest.mark.parametrize(("action", "number"), [("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)])
def test_signals_on_exactly_the_nth_hit(action: str, number: int) -> None:
    sent: list[int] = []
    failpoints = Failpoints(f"prefill.near_turn={action}@3", send_signal=sent.append)
    for _ in range(2):
        failpoints.hit("prefill.near_turn")
    assert sent == []
    for _ in range(3):
        failpoints.hit("prefill.near_turn")
    assert sent == [number]


def test_only_the_named_point_fires() -> None:
    failpoints = Failpoints("decode.reserved=raise")
    failpoints.hit("decode.receiving")
    with pytest.raises(InjectedFault):
        failpoints.hit("decode.reserved")
    assert failpoints.hits == {"decode.receiving": 1, "decode.reserved": 1}


def test_off_disarms_an_earlier_term() -> None:
    Failpoints("decode.reserved=raise; decode.reserved=off").hit("decode.reserved")


def test_two_objects_are_independent() -> None:
    armed, other = Failpoints("decode.reserved=raise@2"), Failpoints("decode.reserved=raise@2")
    armed.hit("decode.reserved")
    other.hit("decode.reserved")
    with pytest.raises(InjectedFault):
        armed.hit("decode.reserved")


def test_an_undeclared_name_is_found_while_any_is_armed() -> None:
    with pytest.raises(ValueError, match="not declared"):
        Failpoints("decode.reserved=raise").hit("decode.reservd")


@pytest.mark.parametrize(
    "spec",
    [
        "decode.reservd=kill",
        "decode.reserved=explode",
        "decode.reserved",
        "decode.reserved=kill@0",
        "=kill",
        "decode.reserved=kill@x",
        "decode.reserved=kill@-1",
    ],
)
def test_misspelt_specs_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="failpoint"):
        parse(spec)


def test_empty_terms_are_allowed() -> None:
    assert parse("") == {}
    assert parse(";;") == {}
