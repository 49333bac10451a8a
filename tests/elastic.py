"""A driver in a process of its own, on a cluster whose nodes a test adds and takes away: `python -m tests.elastic`."""

from __future__ import annotations

import os
import sys

from neg_service.cluster.actors import RayActors
from neg_service.cluster.connection import connect
from neg_service.cluster.driver import Driver
from neg_service.cluster.failures import Limits
from neg_service.cluster.logs import log_to_stderr
from neg_service.cluster.messages import Destination, Shard, ShardResult
from neg_service.cluster.observer import Observer
from neg_service.cluster.resources import ReplicaSize
from neg_service.config import ClusterConfig
from tests.faulty import FaultyWorker


class Teller(Observer):
    """Says which shards are done."""

    def shard_done(self, result: ShardResult) -> None:
        """On stderr."""
        sys.stderr.write(f"done {result.shard}\n")


def main(address: str, place: str, n_shards: int) -> None:
    """Run so many slow shards on replicas of one CPU, as many as there is room for."""
    connect(ClusterConfig(address=address), show_replicas=False)
    destination = Destination(place, None, "f" * 12)
    actors = RayActors(FaultyWorker(seconds=0.2), destination, ReplicaSize(1, 0, 1), "auto")
    shards = (Shard(index, ()) for index in range(n_shards))
    outcome = Driver(shards, actors, Limits(attempts=1), Teller(), n_shards=n_shards).run()
    sys.stderr.write(f"outcome: {outcome.done} done, {len(outcome.failed)} failed\n")


if __name__ == "__main__":
    log_to_stderr("text")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
