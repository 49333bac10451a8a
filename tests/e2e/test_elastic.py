"""Nodes that come, are drained, and are lost without a word, while a driver works."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import psutil
import pytest

from tests.clusters import eventually, own_cluster
from tests.e2e.commands import Running

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults]
SHARDS = 250


def test_replicas_follow_the_nodes_and_nothing_is_lost_or_counted_against_a_shard(tmp_path: Path) -> None:
    with own_cluster() as cluster:
        first = cluster.add(num_cpus=1)
        driver = Running(
            "", cluster.address, str(tmp_path), str(SHARDS), module="tests.elastic", env=cluster.environment
        )
        driver.wait_for(r"replica 0 is ready")
        second = cluster.add(num_cpus=1)
        driver.wait_for(r"replica 1 is ready")
        # What a pod runs before it ends: it returns when its replica has finished what it had.
        leave = Running(
            "drain", "--address", cluster.address, "--node-id", second["id"], "--seconds", "60", env=cluster.environment
        )
        driver.wait_for(r"replica 1 gets no more shards: its node is being drained")
        assert leave.finish() == 0, leave.output
        assert "goes back to the queue" not in driver.output
        third = cluster.add(num_cpus=1)
        driver.wait_for(r"replica 2 is ready")
        # Gone without a word: what it had goes to others. One failure would be one too many for a shard here.
        cluster.kill(third)
        driver.wait_for(r"shard \d+ goes back to the queue")
        cluster.kill(first)
        eventually(lambda: len(re.findall("goes back to the queue", driver.output)) > 1)
        # With no node left the driver waits, and goes on when one comes.
        cluster.add(num_cpus=1)
        assert driver.finish() == 0, driver.output
        assert f"outcome: {SHARDS} done, 0 failed" in driver.output
        done = Counter(re.findall(r"^done (\d+)$", driver.output, re.MULTILINE))
        assert done == Counter(str(index) for index in range(SHARDS))
        assert "failed on replica" not in driver.output


def test_a_replica_ends_itself_when_its_driver_is_gone_and_its_node_cannot_be_told() -> None:
    with own_cluster() as cluster:
        cluster.add(num_cpus=1)
        driver = Running("", cluster.address, module="tests.orphan", env=cluster.environment)
        replica = psutil.Process(int(driver.wait_for(r"replica (\d+)")[1]))
        raylet = replica.parent()
        assert raylet is not None
        assert "raylet" in raylet.name()
        # As a node without a network: nobody there hears that the driver is gone.
        raylet.suspend()
        driver.kill()
        replica.wait(40)
