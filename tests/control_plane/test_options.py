"""control_plane.options: what cannot work is refused before a process starts, naming the flag."""

from dataclasses import replace
from typing import Any

import pytest

from control_plane.options import (
    ControllerOptions,
    Device,
    EdgeOptions,
    EngineOptions,
    ExecutorKind,
    OptionError,
    RouterOptions,
    WorkerOptions,
)
from engine.base import limits
from engine.types import Role

WORKER = WorkerOptions(name="p", roles=frozenset({Role.PREFILL}), controller="127.0.0.1:50050")


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"block_size": 0}, "block-size"),
        ({"layers_per_group": 0}, "layers-per-group"),
        ({"step_tokens": 0}, "max-num-batched-tokens"),
        ({"max_model_len": 1}, "max-model-len"),
        ({"kv_cache_mib": 0}, "kv-cache-mib"),
        ({"embedding_cache_mib": 0}, "embedding-cache-mib"),
        ({"executor": ExecutorKind.PACED, "encode_image_ms": 0.0}, "encode-image-ms"),
        ({"executor": ExecutorKind.PACED, "encode_image_ms": float("inf")}, "encode-image-ms"),
        ({"executor": ExecutorKind.ORACLE, "encode_image_ms": 300.0}, "encode-image-ms"),
        ({"model": "oracle"}, "executor"),
        ({"codec": "int7"}, "codec"),
        ({"kl_budget": -0.01}, "kl-budget"),
        ({"kl_budget": 1.01}, "kl-budget"),
        ({"kl_budget": float("nan")}, "kl-budget"),
        ({"batching": "serathi"}, "batching"),
        ({"tbt_slo_ms": 0.0}, "tbt-slo-ms"),
        ({"tbt_slo_ms": float("nan")}, "tbt-slo-ms"),
        ({"model": "oracle", "executor": ExecutorKind.ORACLE, "device": Device.CUDA}, "device"),
    ],
)
def test_an_engine_refuses(given: dict[str, Any], option: str) -> None:
    with pytest.raises(OptionError) as caught:
        EngineOptions(**given)
    assert caught.value.option == option


def test_auto_is_asked_for_like_a_codec() -> None:
    assert EngineOptions(codec="auto", kl_budget=0).codec == "auto"


def test_the_oracle_model_runs_on_executors_without_weights() -> None:
    assert EngineOptions(model="oracle", executor=ExecutorKind.PACED).model == "oracle"


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"roles": frozenset()}, "role"),
        ({"threads": 0}, "threads"),
        ({"cores": (-1,)}, "cores"),
        ({"controller": "nowhere"}, "controller"),
        ({"listen": "127.0.0.1:99999"}, "listen"),
    ],
)
def test_a_worker_refuses(change: dict[str, Any], option: str) -> None:
    with pytest.raises(OptionError) as caught:
        replace(WORKER, **change)
    assert caught.value.option == option


def test_a_worker_may_encode() -> None:
    assert replace(WORKER, roles=frozenset({Role.ENCODE, Role.PREFILL})).roles == {Role.ENCODE, Role.PREFILL}


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"limit_mm_per_prompt": -1}, "limit-mm-per-prompt"),
        ({"limit_mm_per_prompt": limits.IMAGES_CEILING + 1}, "limit-mm-per-prompt"),
        *(
            ({"allowed_media_domains": ("a.example", wrong)}, "allowed-media-domains")
            for wrong in (
                *("", ".", "a.", ".a", "a..b", "-a", "a-", "a.-b", "*.a", "https://a", "a/b", "a:80", "u@a", "a b"),
                *("A.example", "münchen.example", "a" * 64, ".".join(["a" * 49] * 6), "a\n", "[::1]", "a_b", "²"),
            )
        ),
    ],
)
def test_an_edge_refuses(given: dict[str, Any], option: str) -> None:
    with pytest.raises(OptionError) as caught:
        EdgeOptions(**given)
    assert caught.value.option == option


@pytest.mark.parametrize("images", [0, limits.IMAGES_CEILING])
def test_a_deployment_may_take_no_images_or_many(images: int) -> None:
    assert EdgeOptions(limit_mm_per_prompt=images).limit_mm_per_prompt == images


def test_hosts_are_names_as_urls_have_them() -> None:
    hosts = ("localhost", "127.0.0.1", "images.example.org", "xn--mnchen-3ya.example", "a" * 63, "3.a-b.c")
    assert EdgeOptions(allowed_media_domains=hosts).allowed_media_domains == hosts


@pytest.mark.parametrize("address", ["", ":1", "host:", "host:port", "host:-1", "host:65536", "host:²"])
def test_addresses_are_host_and_port(address: str) -> None:
    with pytest.raises(OptionError):
        RouterOptions(controller=address)
    with pytest.raises(OptionError):
        ControllerOptions(listen=address)
