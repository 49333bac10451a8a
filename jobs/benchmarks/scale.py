"""The driver with very many replicas: what it costs, and how near it keeps them to their ideal.

A thousand processes do not fit a small machine, so a few asynchronous actors pretend to be the replicas, each of which
does one shard at a time and sleeps in the place of measuring. To the driver they are what real ones are: Ray actors'
calls, two in flight each, whose receipts come in finish order. Their hosts share the processors with the driver, which
a cluster's replicas would not.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from dataclasses import dataclass
from typing import Any

import psutil
import ray

from jobs.benchmarks.figures import bar
from neg_service.cluster.driver import Driver
from neg_service.cluster.plan import Shard
from neg_service.cluster.replica import Hello, Ready, Receipt
from neg_service.cluster.resources import connect, disconnect
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

    async def start(self, number: int) -> Hello:
        """Replica `number` is ready."""
        self._busy[number] = asyncio.Lock()
        return Hello(0, "", Ready("a simulation"))

    async def is_only_storing(self, number: int) -> bool:
        """It never stores."""
        return False

    async def run(self, number: int, shard: Shard, batch_scale: float) -> Receipt:
        """Replica `number` does a shard after those that it has."""
        async with self._busy[number]:
            await asyncio.sleep(self._seconds * random.Random(shard.index).uniform(0.8, 1.2))
        return Receipt(shard.index, 1)


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


def run(settings: Settings) -> dict[str, Any]:
    """Run all shards once."""
    connect(ClusterConfig(address="local"))
    driver_process = psutil.Process()
    try:
        hosts = [
            ray.remote(Host).options(num_cpus=0, max_concurrency=4 * settings.replicas).remote(settings.seconds)
            for _ in range(settings.hosts)
        ]
        numbers = iter(range(settings.replicas))
        finished: list[float] = []
        memory: list[float] = []

        def spawn() -> _Simulated:
            number = next(numbers)
            return _Simulated(hosts[number % len(hosts)], number)

        def on_receipt(_receipt: Receipt) -> None:
            finished.append(time.perf_counter())
            if len(finished) % max(1, settings.shards // 20) == 0:
                memory.append(driver_process.memory_info().rss / 2**20)
                sys.stderr.write(f"{len(finished)} shards, {memory[-1]:.0f} MiB\n")

        # What a sleeping replica could do at best.
        ideal = settings.replicas / settings.seconds
        before, began = driver_process.cpu_times(), time.perf_counter()
        shards = (Shard(index, ()) for index in range(settings.shards))
        Driver(shards, spawn, settings.replicas, 1, on_receipt=on_receipt, end=lambda _replica: None).run()
        seconds = time.perf_counter() - began
        after = driver_process.cpu_times()
    finally:
        disconnect()
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
