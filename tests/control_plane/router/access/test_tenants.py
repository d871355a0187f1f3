"""Keys open what is theirs, say nothing about themselves, and a tenant's name cannot be made up from another's."""

import pytest

from control_plane.router.access.tenants import EVERYBODY, Keys, Tenant
from control_plane.router.requests import Submit
from engine.base.errors import Unauthenticated
from engine.types import SamplingParams

KEYS = Keys({"sk-red": Tenant("red"), "sk-red-2": Tenant("red"), "sk-root": Tenant("root", admin=True)})


@pytest.mark.parametrize(
    ("authorization", "name"), [("Bearer sk-red", "red"), ("bearer sk-red-2", "red"), ("BEARER  sk-root ", "root")]
)
def test_a_key_is_its_tenant(authorization: str, name: str) -> None:
    assert KEYS.tenant(authorization).name == name


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer ", "sk-red", "Basic sk-red", "Bearer sk-re", "Bearer sk-redd", "Bearer \udc80"],
)
def test_anything_else_is_refused_in_the_same_words(authorization: str) -> None:
    with pytest.raises(Unauthenticated, match=r"^authorization: needs 'Bearer KEY' with a key of this server$"):
        KEYS.tenant(authorization)


def test_without_keys_nobody_is_asked_for_one() -> None:
    assert Keys().tenant("") is EVERYBODY
    assert Keys({}).names == {""}


def test_keys_are_not_in_what_is_printed() -> None:
    assert repr(KEYS) == "Keys(3 of 2 tenants)"
    assert "sk-red" not in str(vars(KEYS))


@pytest.mark.parametrize("name", ["a/b", "a b", ".a", "a" * 65, "a\n", "é"])
def test_names_are_plain(name: str) -> None:
    with pytest.raises(ValueError, match="a tenant's name"):
        Tenant(name)


def test_no_salt_spells_another_tenant() -> None:
    scopes = [("", ""), ("", "a"), ("a", ""), ("a", "b"), ("", "a/b"), ("a", "b/c"), ("a.b", "")]
    submits = [Submit(key=1, token_ids=(1,), sampling=SamplingParams(), tenant=t, cache_salt=s) for t, s in scopes]
    assert len({submit.cache_scope for submit in submits}) == len(scopes)
