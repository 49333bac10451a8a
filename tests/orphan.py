"""A driver with one replica that has nothing to do, for tests that kill it: `python -m tests.orphan ADDRESS`."""

from __future__ import annotations

import sys
import time

import ray

from neg_service.cluster.connection import connect
from neg_service.cluster.replica import ACTOR_OPTIONS, Replica
from neg_service.config import ClusterConfig
from tests.faulty import FaultyWorker


def main(address: str) -> None:
    """Say which process the replica is, and wait."""
    connect(ClusterConfig(address=address), show_replicas=False)
    replica = ray.remote(Replica).options(num_cpus=1, **ACTOR_OPTIONS).remote(FaultyWorker(), None)
    ray.get(replica.where.remote())
    sys.stdout.write(f"replica {ray.get(replica.start.remote()).pid}\n")
    sys.stdout.flush()
    time.sleep(600)


if __name__ == "__main__":
    main(sys.argv[1])
