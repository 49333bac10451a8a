"""A driver in a process of its own, on a cluster whose nodes a test adds and takes away: `python -m tests.elastic`."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any

import ray

from neg_service.cluster.driver import Driver
from neg_service.cluster.logs import log_to_stderr
from neg_service.cluster.plan import Shard
from neg_service.cluster.replica import ACTOR_OPTIONS, Destination, Receipt, Replica
from neg_service.cluster.resources import ReplicaSize, connect, room_now
from neg_service.config import ClusterConfig
from tests.faulty import FaultyWorker


def main(address: str, place: str, n_shards: int) -> None:
    """Run so many slow shards on replicas of one CPU, as many as there is room for."""
    connect(ClusterConfig(address=address), show_replicas=False)
    destination = Destination(place, None, "f" * 12)

    def spawn() -> Any:
        return ray.remote(Replica).options(num_cpus=1, **ACTOR_OPTIONS).remote(FaultyWorker(seconds=0.2), destination)

    def on_receipt(receipt: Receipt) -> None:
        sys.stderr.write(f"done {receipt.shard}\n")

    room = partial(room_now, "auto", ReplicaSize(1, 0, 1))
    shards = (Shard(index, ()) for index in range(n_shards))
    outcome = Driver(shards, spawn, room, attempts=1, on_receipt=on_receipt, n_shards=n_shards).run()
    sys.stderr.write(f"outcome: {outcome.done} done, {len(outcome.set_aside)} set aside\n")


if __name__ == "__main__":
    log_to_stderr("text")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
