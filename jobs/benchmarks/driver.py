"""The driver alone: shards a second with a worker that does nothing, and memory over very many shards."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from jobs.benchmarks.figures import bar, figure
from neg_service.cluster.driver import Driver
from neg_service.cluster.plan import Shard
from neg_service.cluster.replica import ACTOR_OPTIONS, Hello, Ready, Receipt, Replica
from neg_service.cluster.resources import connect, disconnect
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

    def start(self) -> Ready:
        """Ready."""
        return Ready("nothing")

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
        rates = [_rate(settings.shards, settings.replicas, []) for _ in range(settings.repeats)]
        memory: list[tuple[int, float]] = []
        rates.append(_rate(settings.memory_shards, settings.replicas, memory))
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


def _rate(n_shards: int, replicas: int, memory: list[tuple[int, float]]) -> float:
    done = 0
    began = time.perf_counter()

    def start(_hello: Hello) -> None:
        nonlocal began
        began = time.perf_counter()

    def count(receipt: Receipt) -> None:
        nonlocal done
        done += 1
        if done % max(1, n_shards // 20) == 0:
            memory.append((done, _resident_mib()))

    def spawn() -> Any:
        return ray.remote(Replica).options(num_cpus=0.5, **ACTOR_OPTIONS).remote(NoWork, None)

    driver = Driver((Shard(i, ()) for i in range(n_shards)), spawn, replicas, 3, on_receipt=count, on_first_ready=start)
    driver.run()
    rate = n_shards / (time.perf_counter() - began)
    sys.stderr.write(f"{n_shards} shards: {rate:.0f} a second\n")
    return rate


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
