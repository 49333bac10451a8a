"""What Ray and storage cost: a scan with one replica against the same measure called in a plain loop.

And what a second replica brings: two of one thread each against one of one thread.

Both leave the same parts, the loop one shard after the other. Both start in a fresh process in each repeat: a process
that has run before is faster, whatever it runs.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from jobs.benchmarks.figures import bar, figure, ratio
from neg_service.cluster.driver import Driver
from neg_service.cluster.plan import Shard, make_plan, shards_of
from neg_service.cluster.replica import ACTOR_OPTIONS, Destination, Hello, Ready, Replica, Scan
from neg_service.cluster.resources import connect, disconnect
from neg_service.config import ClusterConfig, ModelConfig, NeuronsConfig, ScanConfig
from neg_service.measures.base import Cost
from neg_service.models.source import fetch
from neg_service.prompts import facts
from neg_service.storage.parts import encode_part, part_key
from neg_service.storage.stores import open_store


@dataclass
class Settings:
    """See `conf/benchmark/scan.yaml`."""

    name: str
    model: str
    threads: int
    repeats: int
    prompts: int
    few_shot_prompts: int
    shots: int
    shard_size: int
    swept_prompts: int
    swept_neurons: int


class Loop:
    """The plain loop, in an actor of its own so that both sides are in fresh processes with the same threads."""

    def __init__(self, make_worker: Any) -> None:
        self._worker = make_worker()

    def start(self) -> Hello:
        """Load the model."""
        return Hello(0, "", self._worker.start())

    def run(self, shards: list[Shard]) -> tuple[float, float]:
        """Measure all shards and store them, one after the other; seconds in all, and of measuring alone."""
        measuring = 0.0
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as place:
            store = open_store(place)
            for shard in shards:
                before = time.perf_counter()
                tables = self._worker.compute(shard, 1.0)
                measuring += time.perf_counter() - before
                for name, table in tables.items():
                    store.put(part_key(name, shard.index), encode_part(name, table, "benchmark", shard.index))
            return time.perf_counter() - began, measuring


@dataclass
class Together:
    """A worker that is ready when as many others are, so that the time of a scan is not that of loading models."""

    make_worker: Any
    place: str
    replicas: int

    def __call__(self) -> Together:
        """The worker, made in its replica."""
        self._worker = self.make_worker()
        return self

    def start(self) -> Ready:
        """Load the model, and wait for the others."""
        ready: Ready = self._worker.start()
        place = Path(self.place)
        place.mkdir(exist_ok=True)
        (place / str(os.getpid())).touch()
        while len(list(place.iterdir())) < self.replicas:
            time.sleep(0.01)
        return ready

    def calibrate(self) -> dict[str, Any]:
        """As the worker does."""
        found: dict[str, Any] = self._worker.calibrate()
        return found

    def compute(self, shard: Shard, batch_scale: float, *calibration: Any) -> dict[str, pa.Table]:
        """As the worker does."""
        tables: dict[str, pa.Table] = self._worker.compute(shard, batch_scale, *calibration)
        return tables


def run(settings: Settings) -> dict[str, Any]:
    """Measure both kinds of prompts, taking turns."""
    config = ScanConfig(model=ModelConfig(source=settings.model, device="cpu"))
    make_worker = Scan(config, fetch(settings.model).identity, settings.threads)
    bare = facts.load()[: settings.prompts]
    solved = "".join(f"{p.text}{p.targets[p.answer or 0]}.\n" for p in facts.load()[:: -(316 // settings.shots)])
    few_shot = [replace(prompt, text=solved + prompt.text) for prompt in bare[: settings.few_shot_prompts]]
    result: dict[str, Any] = {"prompts_a_second": {}, "ratios": {}, "bars": []}
    connect(ClusterConfig(address="local"))
    try:
        for kind, prompts in (("few-shot prompts", few_shot), ("bare facts", bare)):
            shards = list(shards_of(prompts, make_plan(prompts, Cost({}, 0), settings.shard_size)))
            looped, measured, scanned = [], [], []
            for repeat in range(settings.repeats):
                whole, measuring = _loop(shards, make_worker, settings.threads)
                looped.append(len(prompts) / whole)
                measured.append(len(prompts) / measuring)
                scanned.append(len(prompts) / _scan(shards, make_worker, settings.threads))
                sys.stderr.write(f"{kind} {repeat + 1}: loop {looped[-1]:.3g}, scan {scanned[-1]:.3g} prompts/s\n")
            share = ratio(scanned, looped)
            result["prompts_a_second"][kind] = {
                "loop": figure(looped, "prompts/s"),
                "loop, measuring alone": figure(measured, "prompts/s"),
                "scan": figure(scanned, "prompts/s"),
            }
            result["ratios"][f"scan over loop, {kind}"] = share
            result["ratios"][f"scan over measuring alone, {kind}"] = ratio(scanned, measured)
            result["bars"].append(bar(f"scan over loop, {kind}", share["median"], 0.95, at_most=False))
        few = bare[: settings.swept_prompts]
        sampled = NeuronsConfig(choose="sample", count=settings.swept_neurons)
        swept = replace(config, measure={"name": "sweep", "grid": "coarse"}, neurons=sampled)
        for what, asked, own_prompts, size in (
            ("keep=answer", replace(config, measure={"name": "neurgrad", "keep": "answer"}), bare, settings.shard_size),
            ("keep=all", replace(config, measure={"name": "neurgrad"}), bare, settings.shard_size),
            ("a sweep", swept, few, max(1, settings.swept_prompts // 12)),
        ):
            shards = list(shards_of(own_prompts, make_plan(own_prompts, Cost({}, 0), size)))
            own = replace(make_worker, threads=1, config=asked, samples=own_prompts[:1])
            one, two = [], []
            for repeat in range(settings.repeats):
                one.append(len(own_prompts) / _scan(shards, own, 1))
                two.append(len(own_prompts) / _scan(shards, own, 1, replicas=2))
                sys.stderr.write(f"{what} {repeat + 1}: one {one[-1]:.3g}, two {two[-1]:.3g} prompts/s\n")
            what = f"a thread a replica, {what}"
            result["prompts_a_second"][what] = {"one": figure(one, "prompts/s"), "two": figure(two, "prompts/s")}
            result["ratios"][f"two replicas over one, {what}"] = gain = ratio(two, one)
            result["bars"].append(bar(f"two replicas over one, {what}", gain["median"], 1.6, at_most=False))
    finally:
        disconnect()
    return result


def _loop(shards: list[Shard], make_worker: Any, threads: int) -> tuple[float, float]:
    loop: Any = ray.remote(Loop).options(num_cpus=threads).remote(make_worker)
    ray.get(loop.start.remote())
    seconds: tuple[float, float] = ray.get(loop.run.remote(shards))
    ray.kill(loop)
    return seconds


def _scan(shards: list[Shard], make_worker: Any, threads: int, replicas: int = 1) -> float:
    """Seconds from when all replicas are ready, and the measure is calibrated, to the last receipt."""
    began = 0.0

    def start(found: dict[str, Any]) -> dict[str, Any]:
        nonlocal began
        began = time.perf_counter()
        return found

    with tempfile.TemporaryDirectory() as place:
        destination = Destination(place, None, "benchmark")

        def spawn() -> Any:
            work = Together(make_worker, f"{place}/ready", replicas)
            return ray.remote(Replica).options(num_cpus=threads, **ACTOR_OPTIONS).remote(work, destination)

        ended = 0.0

        def on_receipt(_receipt: Any) -> None:
            nonlocal ended
            ended = time.perf_counter()

        Driver(iter(shards), spawn, replicas, 1, on_receipt=on_receipt, calibration=None, on_calibrated=start).run()
    return ended - began
