"""Fixtures of the tests with other people's clients."""

from collections.abc import AsyncIterator

import pytest_asyncio

from deploy.local import LocalCluster
from tests.compat.served import serving


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[LocalCluster]:
    async with serving() as cluster:
        yield cluster
