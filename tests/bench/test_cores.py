"""Where real workers of one machine compute, as the kernel sees it."""

import os

import pytest

from bench.cluster import cluster, engine_cores
from control_plane.options import EngineOptions, ExecutorKind

ORACLE = EngineOptions(model="oracle", executor=ExecutorKind.ORACLE, max_model_len=1_024, kv_cache_mib=8)


@pytest.mark.procs
@pytest.mark.timeout(60)
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core is shared by everybody")
async def test_engines_have_cores_of_their_own_and_loops_stay_off_them() -> None:
    async with cluster(ORACLE) as running:
        engines = {worker.name: engine_cores(worker.pid) for worker in running.workers}
    assert all(engines.values()), "an engine computes where its own loop runs"
    assert not engines["prefill-0"] & engines["decode-0"]
