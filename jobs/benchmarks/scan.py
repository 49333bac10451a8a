"""What Ray and storage cost: a scan with one replica against the same measure called in a plain loop."""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from jobs.benchmarks.figures import bar, figure, ratio
from neg_service.cluster.driver import Driver
from neg_service.cluster.plan import Shard, make_plan, shards_of
from neg_service.cluster.replica import Destination, Hello, Replica, ScanWorker
from neg_service.cluster.resources import connect, disconnect
from neg_service.config import ClusterConfig, ModelConfig, ScanConfig
from neg_service.models.source import fetch
from neg_service.prompts import facts


@dataclass(frozen=True)
class Settings:
    """See `conf/benchmark/scan.yaml`."""

    name: str
    model: str
    threads: int
    repeats: int
    prompts: int
    shard_size: int


class Loop:
    """The plain loop, in an actor of its own so that both sides are in fresh processes with the same threads."""

    def __init__(self, make_worker: Any) -> None:
        self._worker = make_worker()

    def start(self) -> Hello:
        """Load the model."""
        return Hello(0, "", self._worker.start())

    def run(self, shards: list[Shard]) -> float:
        """Measure all shards; seconds."""
        began = time.perf_counter()
        for shard in shards:
            self._worker.compute(shard, 1.0)
        return time.perf_counter() - began


def run(settings: Settings) -> dict[str, Any]:
    """Measure, taking turns."""
    config = ScanConfig(model=ModelConfig(source=settings.model, device="cpu"))
    make_worker = partial(ScanWorker, config, fetch(settings.model).identity, settings.threads)
    prompts = facts.load()[: settings.prompts]
    shards = list(shards_of(prompts, make_plan(prompts, {}, settings.shard_size)))
    connect(ClusterConfig(address="local"))
    try:
        loop: Any = ray.remote(Loop).options(num_cpus=0).remote(make_worker)
        ray.get(loop.start.remote())
        ray.get(loop.run.remote(shards))
        looped, scanned = [], []
        for repeat in range(settings.repeats):
            looped.append(len(prompts) / ray.get(loop.run.remote(shards)))
            scanned.append(len(prompts) / _scan(shards, make_worker, settings.threads))
            sys.stderr.write(f"repeat {repeat + 1}: loop {looped[-1]:.3g}, scan {scanned[-1]:.3g} prompts/s\n")
    finally:
        disconnect()
    share = ratio(scanned, looped)
    return {
        "prompts_a_second": {"loop": figure(looped, "prompts/s"), "scan": figure(scanned, "prompts/s")},
        "ratios": {"scan over loop": share},
        "bars": [bar("scan over loop", share["median"], 0.95, at_most=False)],
    }


def _scan(shards: list[Shard], make_worker: Any, threads: int) -> float:
    began = 0.0

    def start() -> None:
        nonlocal began
        began = time.perf_counter()

    with tempfile.TemporaryDirectory() as place:
        destination = Destination(place, None, "benchmark")

        def spawn() -> Any:
            options = {"num_cpus": threads, "max_restarts": 0, "max_task_retries": 0, "max_concurrency": 2}
            return ray.remote(Replica).options(**options).remote(make_worker, destination)

        ended = 0.0

        def on_receipt(_receipt: Any) -> None:
            nonlocal ended
            ended = time.perf_counter()

        Driver(iter(shards), spawn, 1, 1, on_receipt=on_receipt, on_first_ready=start).run()
    return ended - began
