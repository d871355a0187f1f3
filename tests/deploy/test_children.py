"""deploy.children: a child is told everything once, and nobody but the router is told a key."""

from itertools import pairwise

import pytest

from control_plane.lifecycle import LIFELINE_VARIABLE
from control_plane.options import EdgeOptions, LogFormat, LogLevel
from deploy.children import OWN_VARIABLES, edge_environment, inherited
from deploy.local import Child, LocalCluster
from deploy.options import ServeOptions

SECRET = "sk-secret"


@pytest.fixture
async def children() -> list[Child]:
    options = ServeOptions(
        edge=EdgeOptions(
            api_keys=(SECRET, "sk-other"), served_model_name="m", allowed_media_domains=("a.example", "b.example")
        ),
        port=0,
        admin_port=0,
        grpc_port=0,
        mixed=1,
        drain_timeout_s=2.5,
        log_level=LogLevel.WARNING,
        log_format=LogFormat.JSON,
    )
    cluster = LocalCluster(options)
    assert await cluster.stop()
    return cluster.children


def test_settings_of_the_launcher_are_not_a_childs() -> None:
    own = dict.fromkeys(OWN_VARIABLES, "1")
    others = {"PATH": "/bin", "XTRIPTYCH_PORT": "1", "triptych": "1"}
    settings = {"TRIPTYCH_CONFIG": "f", "TRIPTYCH_LISTEN": "h:1", "TRIPTYCH_API_KEY": SECRET, "TRIPTYCH_NONE": "1"}
    assert inherited(own | others | settings) == own | others
    assert LIFELINE_VARIABLE in own


def test_a_key_is_on_no_command_line_and_in_the_routers_environment_alone(children: list[Child]) -> None:
    assert not any(SECRET in argument for child in children for argument in child.arguments)
    assert [child.name for child in children if SECRET in str(child.environment)] == ["router"]
    assert edge_environment(EdgeOptions()) == {}


def test_a_key_is_in_no_representation_of_what_holds_it(children: list[Child]) -> None:
    assert SECRET not in repr(EdgeOptions(api_keys=(SECRET,)))
    assert not any(SECRET in repr(child) for child in children), "it may end up in a log"


def test_what_concerns_every_child_is_told_to_every_child(children: list[Child]) -> None:
    assert {child.name for child in children} == {"controller", "prefill-0", "decode-0", "mixed-0", "router"}
    for child in children:
        assert _following(child, "--log-level") == "warning"
        assert _following(child, "--log-format") == "json"
        if child.name != "controller":
            assert _following(child, "--drain-timeout") == "2.5"


def test_what_clients_meet_is_told_to_the_router(children: list[Child]) -> None:
    assert [_following(child, "--served-model-name") for child in children if child.name == "router"] == ["m"]
    assert not any("--served-model-name" in child.arguments for child in children if child.name != "router")


def _following(child: Child, flag: str) -> str:
    return child.arguments[list(child.arguments).index(flag) + 1]


def test_of_several_values_each_is_told(children: list[Child]) -> None:
    (router,) = (child for child in children if child.name == "router")
    flags = list(pairwise(router.arguments))
    assert [value for flag, value in flags if flag == "--allowed-media-domains"] == ["a.example", "b.example"]
