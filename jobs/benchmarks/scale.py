"""The driver with very many replicas: what it costs, and how near it keeps them to their ideal.

A thousand processes do not fit a small machine, so a few asynchronous actors pretend to be the replicas, each of which
does one shard at a time and sleeps in the place of measuring. To the driver they are what real ones are: Ray actors'
calls, two in flight each, whose results come in finish order. Their hosts share the processors with the driver, which
a cluster's replicas would not.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from dataclasses import dataclass
from itertools import count
from typing import Any

import psutil
import ray

from jobs.benchmarks.figures import bar
from neg_service.cluster.connection import connect, disconnect
from neg_service.cluster.driver import Driver
from neg_service.cluster.failures import Limits
from neg_service.cluster.gcs import UnreachableNodes
from neg_service.cluster.messages import ReplicaInfo, Shard, ShardResult, WorkerInfo
from neg_service.cluster.observer import Observer
from neg_service.cluster.scaling import Capacity
from neg_service.config import ClusterConfig


@dataclass
class Settings:
    """See `conf/benchmark/scale.yaml`."""

    name: str
    replicas: int
    shards: int
    seconds: float
    hosts: int


class Host:
    """Many simulated replicas in one process."""

    def __init__(self, seconds: float) -> None:
        """`seconds` is what a shard takes, give or take a fifth."""
        self._seconds = seconds
        self._busy: dict[int, asyncio.Lock] = {}

    async def where(self, number: int) -> str:
        """No node."""
        return ""

    async def start(self, number: int) -> ReplicaInfo:
        """Replica `number` is ready."""
        self._busy[number] = asyncio.Lock()
        return ReplicaInfo(0, "", WorkerInfo("a simulation"))

    async def is_only_storing(self, number: int) -> bool:
        """It never stores."""
        return False

    async def run(self, number: int, shard: Shard, batch_scale: float) -> ShardResult:
        """Replica `number` does a shard after those that it has."""
        async with self._busy[number]:
            await asyncio.sleep(self._seconds * random.Random(shard.index).uniform(0.8, 1.2))
        return ShardResult(shard.index, 1)


@dataclass(frozen=True)
class _Call:
    """A method of one simulated replica, called as Ray's are."""

    method: Any
    number: int

    def remote(self, *arguments: Any) -> Any:
        return self.method.remote(self.number, *arguments)


@dataclass(frozen=True)
class _Simulated:
    """What the driver takes for an actor."""

    host: Any
    number: int

    @property
    def where(self) -> _Call:
        return _Call(self.host.where, self.number)

    @property
    def start(self) -> _Call:
        return _Call(self.host.start, self.number)

    @property
    def is_only_storing(self) -> _Call:
        return _Call(self.host.is_only_storing, self.number)

    @property
    def run(self) -> _Call:
        return _Call(self.host.run, self.number)


class Hosts:
    """The cluster: simulated replicas, on hosts that take turns."""

    def __init__(self, hosts: list[Any], replicas: int) -> None:
        """So many replicas."""
        self.unreachable_nodes = UnreachableNodes()
        self._hosts, self._replicas, self._numbers = hosts, replicas, count()

    def launch(self) -> _Simulated:
        """Another one."""
        number = next(self._numbers)
        return _Simulated(self._hosts[number % len(self._hosts)], number)

    def end(self, actor: Any) -> None:
        """Its host stays."""

    def capacity(self) -> Capacity:
        """For all of them."""
        return Capacity(self._replicas)

    def is_node_lost(self, actor: Any, node: str) -> bool:
        """None is ever."""
        return False


class Clock(Observer):
    """When shards were done, and the driver's memory meanwhile."""

    def __init__(self, n_shards: int) -> None:
        """Of so many shards."""
        self.finished: list[float] = []
        self.memory: list[float] = []
        self._every, self._process = max(1, n_shards // 20), psutil.Process()

    def shard_done(self, result: ShardResult) -> None:
        """Count."""
        self.finished.append(time.perf_counter())
        if len(self.finished) % self._every == 0:
            self.memory.append(self._process.memory_info().rss / 2**20)
            sys.stderr.write(f"{len(self.finished)} shards, {self.memory[-1]:.0f} MiB\n")


def run(settings: Settings) -> dict[str, Any]:
    """Run all shards once."""
    connect(ClusterConfig(address="local"))
    driver_process = psutil.Process()
    try:
        hosts = [
            ray.remote(Host).options(num_cpus=0, max_concurrency=4 * settings.replicas).remote(settings.seconds)
            for _ in range(settings.hosts)
        ]
        clock = Clock(settings.shards)
        # What a sleeping replica could do at best.
        ideal = settings.replicas / settings.seconds
        before, began = driver_process.cpu_times(), time.perf_counter()
        shards = (Shard(index, ()) for index in range(settings.shards))
        Driver(shards, Hosts(hosts, settings.replicas), Limits(attempts=1), clock).run()
        seconds = time.perf_counter() - began
        after = driver_process.cpu_times()
    finally:
        disconnect()
    finished, memory = clock.finished, clock.memory
    # Without the beginning, when all wait for their first shard, and the end, when there are not enough for all.
    edge = settings.replicas * 2
    steady = (len(finished) - 2 * edge) / (finished[-edge] - finished[edge])
    busy = after.user + after.system - before.user - before.system
    tenth = len(memory) // 10
    return {
        "replicas": settings.replicas,
        "shards": len(finished),
        "seconds": round(seconds, 1),
        "shards_a_second": round(steady, 1),
        "ideal_shards_a_second": round(ideal, 1),
        "share_of_ideal": round(steady / ideal, 3),
        "driver_cpu_share": round(busy / seconds, 3),
        "driver_cpu_milliseconds_a_shard": round(1000 * busy / len(finished), 3),
        "driver_memory_mib": {"at a tenth": round(memory[tenth], 1), "at the end": round(memory[-1], 1)},
        "bars": [
            bar("shards that came back", len(finished), settings.shards, at_most=False),
            bar("driver memory growth in MiB over the run", round(memory[-1] - memory[tenth], 1), 10, at_most=True),
        ],
    }
