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
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from jobs.benchmarks.figures import bar, figure, ratio
from neg_service.cluster.actors import RayActors
from neg_service.cluster.connection import connect, disconnect
from neg_service.cluster.driver import Driver
from neg_service.cluster.failures import Limits
from neg_service.cluster.messages import Destination, ReplicaInfo, Shard, ShardResult, WorkerInfo, WorkerSpec
from neg_service.cluster.observer import Observer
from neg_service.cluster.plan import make_plan, shards_of
from neg_service.cluster.replica import scan_worker
from neg_service.cluster.resources import ReplicaSize
from neg_service.config import ClusterConfig, ModelConfig, NeuronsConfig, ScanConfig
from neg_service.measures.base import Cost
from neg_service.models.loading import load_tokenizer
from neg_service.models.source import fetch
from neg_service.prompts import facts
from neg_service.prompts.prompt import EncodedPrompt
from neg_service.prompts.tokens import encode
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

    def start(self) -> ReplicaInfo:
        """Load the model."""
        return ReplicaInfo(0, "", self._worker.start())

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

    def start(self) -> WorkerInfo:
        """Load the model, and wait for the others."""
        ready: WorkerInfo = self._worker.start()
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
    local = fetch(settings.model)
    spec = WorkerSpec(config, local.identity, settings.threads)
    asked = facts.load()[: settings.prompts]
    solved = "".join(f"{p.text}{p.targets[p.answer or 0]}.\n" for p in facts.load()[:: -(316 // settings.shots)])
    with_shots = [replace(prompt, text=solved + prompt.text) for prompt in asked[: settings.few_shot_prompts]]
    tokenizer = load_tokenizer(local, False)
    bare, few_shot = (list(encode(tokenizer, prompts, None)) for prompts in (asked, with_shots))
    result: dict[str, Any] = {"prompts_a_second": {}, "ratios": {}, "bars": []}
    connect(ClusterConfig(address="local"))
    try:
        for kind, prompts in (("few-shot prompts", few_shot), ("bare facts", bare)):
            shards = list(
                shards_of(prompts, make_plan([one.prompt for one in prompts], Cost({}, 0), settings.shard_size))
            )
            looped, measured, scanned = [], [], []
            for repeat in range(settings.repeats):
                whole, measuring = _loop(shards, spec, settings.threads)
                looped.append(len(prompts) / whole)
                measured.append(len(prompts) / measuring)
                scanned.append(len(prompts) / _scan(shards, spec, settings.threads))
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
        for what, wanted, own_prompts, size in (
            ("keep=answer", replace(config, measure={"name": "neurgrad", "keep": "answer"}), bare, settings.shard_size),
            ("keep=all", replace(config, measure={"name": "neurgrad"}), bare, settings.shard_size),
            ("a sweep", swept, few, max(1, settings.swept_prompts // 12)),
        ):
            shards = _shards(own_prompts, size)
            own = replace(spec, threads=1, config=wanted, samples=own_prompts[:1])
            one, two = [], []
            for repeat in range(settings.repeats):
                one.append(len(own_prompts) / _scan(shards, own, 1))
                two.append(len(own_prompts) / _scan(shards, own, 1, replicas=2))
                sys.stderr.write(f"{what} {repeat + 1}: one {one[-1]:.3g}, two {two[-1]:.3g} prompts/s\n")
            what = f"one thread per replica, {what}"
            result["prompts_a_second"][what] = {"one": figure(one, "prompts/s"), "two": figure(two, "prompts/s")}
            result["ratios"][f"two replicas over one, {what}"] = gain = ratio(two, one)
            result["bars"].append(bar(f"two replicas over one, {what}", gain["median"], 1.6, at_most=False))
    finally:
        disconnect()
    return result


def _shards(prompts: list[EncodedPrompt], size: int) -> list[Shard]:
    return list(shards_of(prompts, make_plan([one.prompt for one in prompts], Cost({}, 0), size)))


def _loop(shards: list[Shard], spec: WorkerSpec, threads: int) -> tuple[float, float]:
    loop: Any = ray.remote(Loop).options(num_cpus=threads).remote(partial(scan_worker, spec))
    ray.get(loop.start.remote())
    seconds: tuple[float, float] = ray.get(loop.run.remote(shards))
    ray.kill(loop)
    return seconds


class Clock(Observer):
    """When the measure was calibrated, and when the last shard was done."""

    began = ended = 0.0

    def calibrated(self, found: dict[str, Any]) -> dict[str, Any]:
        """Start."""
        self.began = time.perf_counter()
        return found

    def shard_done(self, result: ShardResult) -> None:
        """Stop."""
        self.ended = time.perf_counter()


def _scan(shards: list[Shard], spec: WorkerSpec, threads: int, replicas: int = 1) -> float:
    """Seconds from when all replicas are ready, and the measure is calibrated, to the last result."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as place:
        work = Together(partial(scan_worker, spec), f"{place}/ready", replicas)
        actors = RayActors(work, Destination(place, None, "benchmark"), ReplicaSize(threads, 0, 0), replicas)
        Driver(iter(shards), actors, Limits(attempts=1), clock, calibration=None).run()
    return clock.ended - clock.began
