"""deploy.options: a cluster that cannot work is refused before a process starts, naming the flag."""

from typing import Any

import pytest

from control_plane.options import OptionError
from deploy.options import ServeOptions, fitted
from engine.types import Role


def test_the_default_cluster_is_one_prefill_and_one_decode_worker() -> None:
    assert [(worker.name, worker.roles) for worker in ServeOptions().workers] == [
        ("prefill-0", {Role.PREFILL}),
        ("decode-0", {Role.DECODE}),
    ]


def test_a_mixed_worker_alone_is_a_cluster() -> None:
    (worker,) = ServeOptions(prefill=0, decode=0, mixed=1).workers
    assert worker.roles == {Role.PREFILL, Role.DECODE}


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"encode": -1}, "encode"),
        ({"encode": 2_000}, "encode"),
        ({"prefill": -1}, "prefill"),
        ({"prefill": 0}, "prefill"),
        ({"decode": 0}, "decode"),
        ({"prefill": 2_000}, "prefill"),
        ({"prefill": 2, "decode": 2_000}, "decode"),
        ({"mixed": 10**18}, "mixed"),  # no list of so many is made before
        ({"port": 70_000}, "port"),
        ({"port": 9_000, "admin_port": 9_000}, "admin-port"),
        ({"drain_timeout_s": -1.0}, "drain-timeout"),
        ({"drain_timeout_s": float("nan")}, "drain-timeout"),
    ],
)
def test_serve_refuses(given: dict[str, Any], option: str) -> None:
    with pytest.raises(OptionError) as caught:
        ServeOptions(**given)
    assert caught.value.option == option


def test_the_kernel_may_choose_every_port() -> None:
    assert ServeOptions(port=0, admin_port=0, grpc_port=0).port == 0


# -- models that see ---------------------------------------------------------------------------------------------------
def names(options: ServeOptions) -> list[str]:
    return [worker.name for worker in options.workers]


def test_a_model_that_sees_gets_an_encode_worker_which_takes_the_last_core() -> None:
    options = fitted(ServeOptions(), sees=True)
    assert names(options) == ["prefill-0", "decode-0", "encode-0"]
    assert options.workers[-1].roles == {Role.ENCODE}


def test_a_model_of_text_gets_none() -> None:
    assert names(fitted(ServeOptions(), sees=False)) == ["prefill-0", "decode-0"]
    assert names(fitted(ServeOptions(encode=0), sees=False)) == ["prefill-0", "decode-0"]


@pytest.mark.parametrize("encode", [0, 2])
def test_how_many_encode_may_be_said(encode: int) -> None:
    options = fitted(ServeOptions(encode=encode), sees=True)
    assert sum(worker.roles == {Role.ENCODE} for worker in options.workers) == encode


def test_mixed_workers_alone_encode_themselves() -> None:
    assert names(fitted(ServeOptions(prefill=0, decode=0, mixed=1), sees=True)) == ["mixed-0"]


def test_a_model_of_text_with_encode_workers_is_refused() -> None:
    with pytest.raises(OptionError, match="takes none") as caught:
        fitted(ServeOptions(encode=1), sees=False)
    assert caught.value.option == "encode"
