"""The driver alone: shards a second with a worker that does nothing, and memory over very many shards."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.benchmarks.figures import bar, figure
from neg_service.cluster.actors import RayActors
from neg_service.cluster.connection import connect, disconnect
from neg_service.cluster.driver import Driver
from neg_service.cluster.messages import ReplicaInfo, Shard, ShardResult, WorkerInfo
from neg_service.cluster.observer import Observer
from neg_service.cluster.resources import ReplicaSize
from neg_service.config import ClusterConfig


@dataclass
class Settings:
    """See `conf/benchmark/driver.yaml`."""

    name: str
    replicas: int
    repeats: int
    shards: int
    memory_shards: int


class NoWork:
    """A worker that does nothing, which leaves the driver's own cost."""

    def start(self) -> WorkerInfo:
        """Ready."""
        return WorkerInfo("nothing")

    def calibrate(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def compute(self, shard: Shard, batch_scale: float, *calibration: Any) -> dict[str, pa.Table]:
        """No tables."""
        return {}


def run(settings: Settings) -> dict[str, Any]:
    """Measure; the memory run counts as the last repeat."""
    connect(ClusterConfig(address="local"))
    try:
        rates = [_rate(settings.shards, settings.replicas)[0] for _ in range(settings.repeats)]
        rate_of_all, memory = _rate(settings.memory_shards, settings.replicas)
        rates.append(rate_of_all)
    finally:
        disconnect()
    tenth = settings.memory_shards // 10
    first = next(mib for done, mib in memory if done >= tenth)
    growth = memory[-1][1] - first
    rate = figure(rates, "shards/s")
    return {
        "shards_a_second": rate,
        "driver_memory": [{"shards": done, "value": round(mib, 1), "unit": "MiB"} for done, mib in memory],
        "bars": [
            bar("shards a second", rate["median"], 500, at_most=False),
            bar(
                f"driver memory growth in MiB, shard {tenth} to {settings.memory_shards}",
                round(growth, 1), 10, at_most=True,
            ),
        ],
    }  # fmt: skip


class Clock(Observer):
    """When the first replica was ready, and memory as shards are done."""

    def __init__(self, n_shards: int) -> None:
        """Memory is looked at twenty times over so many shards."""
        self.began: float | None = None
        self.memory: list[tuple[int, float]] = []
        self._every, self._done = max(1, n_shards // 20), 0

    def replica_ready(self, info: ReplicaInfo) -> None:
        """Start."""
        self.began = self.began or time.perf_counter()

    def shard_done(self, result: ShardResult) -> None:
        """Count."""
        self._done += 1
        if self._done % self._every == 0:
            self.memory.append((self._done, _resident_mib()))


def _rate(n_shards: int, replicas: int) -> tuple[float, list[tuple[int, float]]]:
    """Shards a second, and the driver's memory in MiB after so many of them."""
    clock, actors = Clock(n_shards), RayActors(NoWork, None, ReplicaSize(0.5, 0, 0), replicas)
    Driver((Shard(i, ()) for i in range(n_shards)), actors, observer=clock).run()
    rate = n_shards / (time.perf_counter() - (clock.began or 0.0))
    sys.stderr.write(f"{n_shards} shards: {rate:.0f} a second\n")
    return rate, clock.memory


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
