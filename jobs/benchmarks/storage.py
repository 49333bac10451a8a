"""What storage costs: parts against plain uploads, waiting in a scan, memory while putting, and very many shards.

Everything goes through a real S3 server on this machine, which takes processor time from what is measured.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import botocore.session
import numpy as np
import pyarrow as pa

from infra.s3.server import BUCKET, Server, server_on
from jobs.benchmarks.figures import bar, figure, ratio
from neg_service.cluster.actors import RayActors
from neg_service.cluster.connection import connect, disconnect
from neg_service.cluster.driver import Driver
from neg_service.cluster.failures import Limits
from neg_service.cluster.messages import Destination, ReplicaInfo, Shard, ShardResult, WorkerInfo, WorkerSpec
from neg_service.cluster.observer import Observer
from neg_service.cluster.plan import make_plan, shards_of
from neg_service.cluster.replica import Replica, scan_worker
from neg_service.cluster.resources import ReplicaSize
from neg_service.config import ClusterConfig, ModelConfig, ScanConfig
from neg_service.measures.base import Cost
from neg_service.models.loading import load_tokenizer
from neg_service.models.source import fetch
from neg_service.prompts import facts
from neg_service.prompts.tokens import encode
from neg_service.schema import activations
from neg_service.storage.parts import encode_part, part_key
from neg_service.storage.reader import open_run
from neg_service.storage.run import write_or_match
from neg_service.storage.status import status_of
from neg_service.storage.stores import open_store

_LAYERS, _NEURONS = 30, 1536


@dataclass
class Settings:
    """See `conf/benchmark/storage.yaml`."""

    name: str
    model: str
    threads: int
    repeats: int
    part_mb: int
    parts: int
    prompts: int
    shard_size: int
    shards: int


class NearlyNothing:
    """A worker that does nothing and leaves one row."""

    def start(self) -> WorkerInfo:
        """Ready."""
        return WorkerInfo("nothing")

    def calibrate(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def compute(self, shard: Shard, batch_scale: float, *calibration: Any) -> dict[str, pa.Table]:
        """A row."""
        return {"rows": pa.table({"shard": [shard.index]})}


class LargeTables:
    """A worker that makes one large table a shard."""

    def __init__(self, megabytes: int) -> None:
        """Of so many megabytes in memory."""
        self._megabytes = megabytes

    def start(self) -> WorkerInfo:
        """Ready."""
        return WorkerInfo("nothing")

    def calibrate(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def compute(self, shard: Shard, batch_scale: float, *calibration: Any) -> dict[str, pa.Table]:
        """Fresh memory, as a measure's is."""
        return {"activations": table_of(self._megabytes, shard.index)}


def table_of(megabytes: int, seed: int) -> pa.Table:
    """Activations of as many prompts as fill the megabytes: floats as hard to compress as real ones."""
    n_prompts = max(1, megabytes * 10**6 // (4 * _LAYERS * _NEURONS))
    rows = n_prompts * _LAYERS
    values = np.random.default_rng(seed).standard_normal(rows * _NEURONS, dtype=np.float32)
    return pa.Table.from_arrays(
        [
            pa.array([f"p{i // _LAYERS}" for i in range(rows)]),
            pa.array([i % _LAYERS for i in range(rows)], pa.int16()),
            pa.nulls(rows, pa.int16()),
            pa.array(["paper"] * rows),
            pa.FixedSizeListArray.from_arrays(pa.array(values), _NEURONS),
        ],
        schema=activations(_NEURONS),
    )


def run(settings: Settings) -> dict[str, Any]:
    """Measure all four."""
    with tempfile.TemporaryDirectory() as place, _serving(Path(place)) as server:
        throughput = _throughput(settings, server)
        memory = _memory(settings, server)
        connect(ClusterConfig(address="local"))
        try:
            waiting = _waiting(settings, server)
            many = _many_shards(settings, server)
        finally:
            disconnect()
    return {
        "megabytes_a_second": throughput["figures"],
        "ratios": throughput["ratios"],
        "memory": memory,
        "waiting": waiting,
        "many_shards": many,
        "bars": [
            bar("share of a scan in which computing waits for storage", waiting["share"]["median"], 0.05, at_most=True),
            bar("memory while putting, in parts", memory["parts in memory while one is put"], 2, at_most=True),
            bar("seconds to list a finished run of all shards", many["resume_seconds"], 10, at_most=True),
            bar("last tenth over first tenth, seconds per shard", many["last_over_first"], 1.2, at_most=True),
        ],
    }


@contextmanager
def _serving(place: Path) -> Iterator[Server]:
    server = server_on(place)
    server.start()
    keys = {"AWS_ACCESS_KEY_ID": server.writer.access_key, "AWS_SECRET_ACCESS_KEY": server.writer.secret_key}
    before = {name: os.environ.get(name) for name in (*keys, "AWS_REGION")}
    os.environ.update(keys, AWS_REGION="us-east-1")
    try:
        yield server
    finally:
        server.stop()
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({name: value} if value is not None else {})


def _throughput(settings: Settings, server: Server) -> dict[str, Any]:
    """Parts and the same bytes plainly, taking turns: one after the other, as a replica puts them."""
    uri = f"s3://{BUCKET}/throughput"
    store = open_store(uri, server.endpoint_url)
    tables = [table_of(settings.part_mb, i) for i in range(settings.parts)]
    identity = {"plan": {"shards": settings.parts, "shard_size": 1}}
    directory = write_or_match(store, identity, {"activations": tables[0].schema}, {})
    client = botocore.session.get_session().create_client("s3", endpoint_url=server.endpoint_url)
    parts: list[bytes] = []

    def encode() -> None:
        parts[:] = [encode_part("activations", table, directory.fingerprint, i) for i, table in enumerate(tables)]

    def put() -> None:
        for i, part in enumerate(parts):
            store.put(part_key("activations", i), part)

    def put_plainly() -> None:
        for i, part in enumerate(parts):
            client.put_object(Bucket=BUCKET, Key=f"plain/{i}", Body=part)

    def read() -> None:
        assert open_run(uri, server.endpoint_url).table("activations").to_table().num_rows == sum(map(len, tables))

    def get_plainly() -> None:
        for i in range(len(parts)):
            client.get_object(Bucket=BUCKET, Key=f"plain/{i}")["Body"].read()

    ways: dict[str, Callable[[], None]] = {
        "encode": encode, "put": put, "plain put": put_plainly, "read back as a table": read, "plain get": get_plainly
    }  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(settings.repeats + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            rate = sum(map(len, parts)) / 1e6 / (time.perf_counter() - began)
            if turn:
                found[name].append(rate)
        sys.stderr.write(f"{turn}: {', '.join(f'{n} {r[-1]:.0f} MB/s' for n, r in found.items() if r)}\n")
    return {
        "figures": {name: figure(rates, "MB/s, as stored") for name, rates in found.items()},
        "ratios": {
            "put over plain put": ratio(found["put"], found["plain put"]),
            "read back over plain get": ratio(found["read back as a table"], found["plain get"]),
        },
    }


def _memory(settings: Settings, server: Server) -> dict[str, Any]:
    """What a replica grows by while it puts, over what it keeps when it has put, in parts of the size in memory."""
    size = table_of(settings.part_mb, 0).nbytes / 2**20
    destination = Destination(f"s3://{BUCKET}/memory", server.endpoint_url, "benchmark")
    spawn = multiprocessing.get_context("spawn")
    grown = []
    for n_at_once in (1, 2):
        ours, theirs = spawn.Pipe()
        arguments = (theirs, settings.part_mb, destination, n_at_once, settings.parts * n_at_once)
        process = spawn.Process(target=_put_and_tell, args=arguments)
        process.start()
        theirs.close()
        grown.append(ours.recv() / size)
        process.join()
    return {
        "part in memory": {"value": round(size, 1), "unit": "MiB"},
        "parts in memory while one is put": round(grown[0], 2),
        "parts in memory with two shards in flight": round(grown[1], 2),
    }


def _put_and_tell(pipe: Connection, megabytes: int, destination: Destination, n_at_once: int, n_shards: int) -> None:
    replica = Replica(partial(LargeTables, megabytes), destination)
    replica.start()
    with ThreadPoolExecutor(n_at_once) as pool:
        # The first shards leave what stays for good: connections, code, the allocator's arenas of these threads.
        list(pool.map(lambda index: replica.run(Shard(index, ())), range(2 * n_at_once)))
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        list(pool.map(lambda index: replica.run(Shard(index, ())), range(n_shards)))
    pipe.send(_resident("VmHWM") - before)


def _resident(what: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0]) / 1024


def _waiting(settings: Settings, server: Server) -> dict[str, Any]:
    """A scan of bare facts into S3: the seconds in which its replica computes nothing because parts are being put."""
    config = ScanConfig(model=ModelConfig(source=settings.model, device="cpu"))
    local, prompts = fetch(settings.model), facts.load()[: settings.prompts]
    spec = WorkerSpec(config, local.identity, settings.threads)
    encoded = list(encode(load_tokenizer(local, False), prompts, None))
    shards = list(shards_of(encoded, make_plan(prompts, Cost({}, 0), settings.shard_size)))
    shares, rates = [], []
    for repeat in range(settings.repeats):
        destination = Destination(f"s3://{BUCKET}/waiting-{repeat}", server.endpoint_url, "benchmark")
        seconds, results = _drive(shards, partial(scan_worker, spec), destination, settings.threads, 1)
        # The last shard leaves nothing to compute.
        waited = sum(result.waited_seconds for _, result in results[:-1])
        shares.append(waited / seconds)
        rates.append(len(prompts) / seconds)
        sys.stderr.write(f"scan {repeat + 1}: {rates[-1]:.3g} prompts/s, waiting {100 * shares[-1]:.2g} %\n")
    return {"share": figure(shares, "share"), "scan": figure(rates, "prompts/s")}


def _many_shards(settings: Settings, server: Server) -> dict[str, Any]:
    """Shards of one row each: seconds per shard from first to last, and what it takes to see that all are done."""
    uri = f"s3://{BUCKET}/many"
    store = open_store(uri, server.endpoint_url)
    identity = {"plan": {"shards": settings.shards, "shard_size": 1}, "prompts": {"count": settings.shards}}
    directory = write_or_match(store, identity, {"rows": pa.schema([("shard", pa.int64())])}, {})
    shards = [Shard(index, ()) for index in range(settings.shards)]
    destination = Destination(uri, server.endpoint_url, directory.fingerprint)
    seconds, results = _drive(shards, NearlyNothing, destination, 0.5, 2)
    tenth = settings.shards // 10
    times = [when for when, _ in results]
    spans = [times[min(i + tenth, len(times) - 1)] - times[i] for i in range(0, settings.shards - tenth + 1, tenth)]
    listing = []
    for _ in range(settings.repeats):
        began = time.perf_counter()
        assert len(directory.done()) == settings.shards
        listing.append(time.perf_counter() - began)
    began = time.perf_counter()
    status_of(open_run(uri, server.endpoint_url), count_rows=False)
    asked = time.perf_counter() - began
    return {
        "shards_a_second": round(settings.shards / seconds, 1),
        "seconds_of_each_tenth": [round(span, 2) for span in spans],
        "last_over_first": round(spans[-1] / spans[0], 3),
        "resume_seconds": round(median(listing), 2),
        "status_seconds": round(asked, 2),
    }


class Clock(Observer):
    """When the first replica was ready, and results with when they came."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.began = 0.0
        self.results: list[tuple[float, ShardResult]] = []

    def replica_ready(self, info: ReplicaInfo) -> None:
        """Start."""
        self.began = self.began or time.perf_counter()

    def shard_done(self, result: ShardResult) -> None:
        """Note it."""
        self.results.append((time.perf_counter(), result))
        if len(self.results) % 1000 == 0:
            sys.stderr.write(f"{len(self.results)} shards in {self.results[-1][0] - self.began:.1f} s\n")


def _drive(
    shards: list[Shard], make_worker: Any, destination: Destination, cpus: float, replicas: int
) -> tuple[float, list[tuple[float, ShardResult]]]:
    """Seconds from the first replica ready to the last result, and the results with when they came."""
    clock = Clock()
    actors = RayActors(make_worker, destination, ReplicaSize(cpus, 0, 0), replicas)
    Driver(iter(shards), actors, Limits(attempts=1), clock).run()
    return clock.results[-1][0] - clock.began, clock.results
