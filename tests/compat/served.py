"""One real cluster for a whole module of tests: real processes, the default model's real weights in float32."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from control_plane.options import Dtype, EngineOptions
from deploy.local import LocalCluster
from engine.models.checkpoint import DEFAULT_MODEL
from tests.procs.harness import cluster

ENGINE = EngineOptions(dtype=Dtype.FLOAT32, kv_cache_mib=256, max_model_len=2_048)
MODEL = DEFAULT_MODEL
"""What /v1/models says."""


@asynccontextmanager
async def serving() -> AsyncIterator[LocalCluster]:
    async with cluster(engine=ENGINE) as running:
        yield running
