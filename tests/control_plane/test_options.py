"""control_plane.options: what cannot work is refused before a process starts, naming the flag."""

from dataclasses import replace
from typing import Any

import pytest

from control_plane.options import (
    ControllerOptions,
    Device,
    EngineOptions,
    ExecutorKind,
    OptionError,
    RouterOptions,
    WorkerOptions,
)
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
        ({"roles": frozenset({Role.ENCODE})}, "role"),
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


@pytest.mark.parametrize("address", ["", ":1", "host:", "host:port", "host:-1", "host:65536", "host:²"])
def test_addresses_are_host_and_port(address: str) -> None:
    with pytest.raises(OptionError):
        RouterOptions(controller=address)
    with pytest.raises(OptionError):
        ControllerOptions(listen=address)
