"""What end-to-end tests share: one Ray cluster for the scans of a file that need none of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ray.cluster_utils import Cluster


@pytest.fixture(scope="module")
def joined() -> Iterator[Cluster]:
    """A cluster of two CPUs, which scans in this process join; commands do not (`commands.environment`)."""
    with pytest.MonkeyPatch.context() as patch:
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100 * 2**20},
        )
        try:
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
        finally:
            cluster.shutdown()
