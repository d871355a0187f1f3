"""Greedy tokens over separate prefill and decode processes equal plain transformers' (DESIGN 8, fp32 with `raw`).

A first difference where the reference's two best logits are closer than TIE is reported and not failed: summation order
decides there, and neither answer is wrong.
"""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from control_plane.options import Dtype, EngineOptions
from control_plane.wire import inference_pb2 as pb
from control_plane.wire import inference_pb2_grpc as pb_grpc
from deploy.local import LocalCluster
from tests.procs.harness import cluster

DATA = Path(__file__).parents[1] / "data"
TIE = 1e-4
REQUEST_TIMEOUT_S = 300.0
CHUNKED = EngineOptions(dtype=Dtype.FLOAT32, step_tokens=128, kv_cache_mib=512)
"""Prompts of up to 1,500 tokens in chunks of 128 that share their steps with other requests."""


def cases(name: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads((DATA / name).read_text())["cases"]
    return loaded


async def complete(stub: Any, case: dict[str, Any]) -> tuple[list[int], pb.RequestStats]:
    """The output's token ids and what came with them, by gRPC: completions over HTTP answer with text."""
    sampling = pb.GenerateSampling(temperature=0, max_tokens=len(case["tokens"]), ignore_eos=True)
    request = pb.GenerateRequest(tokens=pb.TokenIds(ids=case["prompt"]), sampling=sampling)
    token_ids: list[int] = []
    stats = pb.RequestStats()
    async for response in stub.Generate(request, timeout=REQUEST_TIMEOUT_S):
        token_ids += response.token_ids
        stats = response.stats
    return token_ids, stats


def difference(case: dict[str, Any], got: Sequence[int]) -> str | None:
    """None when equal; else where, and whether it is a tie."""
    for position, (expected, token) in enumerate(zip(case["tokens"], got, strict=True)):
        if token != expected:
            gap = case["gaps"][position]
            return f"{'tie' if gap < TIE else 'WRONG'} at {position}: {token} for {expected}, gap {gap:.2e}"
    return None


async def check_all(running: LocalCluster, wanted: list[dict[str, Any]], *, at_a_time: int) -> None:
    turns = asyncio.Semaphore(at_a_time)

    async def one(stub: Any, case: dict[str, Any]) -> str | None:
        async with turns:
            got, stats = await complete(stub, case)
        assert stats.prefill_worker != stats.decode_worker
        assert stats.codec == "raw"
        assert stats.kv_bytes_wire > stats.kv_bytes_raw > 0
        return difference(case, got)

    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.options.grpc_port}") as channel:
        stub = pb_grpc.InferenceStub(channel)
        differences = [text for text in await asyncio.gather(*(one(stub, case) for case in wanted)) if text]
    print(f"{len(wanted)} prompts, {at_a_time} at a time: {len(differences)} differ {differences}")
    assert not [text for text in differences if text.startswith("WRONG")]


@pytest.mark.procs
@pytest.mark.model
@pytest.mark.timeout(120)
async def test_four_prompts_over_two_processes(model_dir: Path) -> None:
    async with cluster(engine=EngineOptions(dtype=Dtype.FLOAT32, kv_cache_mib=256)) as running:
        await check_all(running, cases("reference_tokens.json"), at_a_time=2)


@pytest.mark.procs
@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("at_a_time", [1, 8])
async def test_prompts_of_1_to_1500_tokens_chunked(model_dir: Path, at_a_time: int) -> None:
    wanted = cases("reference_tokens_slow.json")
    assert len(wanted) >= 20
    async with cluster(engine=CHUNKED) as running:
        await check_all(running, wanted, at_a_time=at_a_time)
