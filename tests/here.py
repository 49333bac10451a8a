"""A scan in this process, without Ray: for tests of what is made of runs."""

from __future__ import annotations

from neg_service.cluster.messages import WorkerSpec
from neg_service.cluster.plan import shards_of
from neg_service.cluster.prepare import prepare
from neg_service.cluster.replica import scan_worker
from neg_service.config import ScanConfig
from neg_service.storage.parts import encode_part, part_key
from neg_service.storage.reader import Run, open_run
from neg_service.storage.run import note, write_or_match
from neg_service.storage.stores import open_store


def scan_here(config: ScanConfig, shards: int | None = None) -> Run:
    """Compute a run's shards, or its first so many, one after the other, with the worker that a replica has."""
    prepared = prepare(config)
    store = open_store(prepared.uri, config.storage.endpoint_url)
    about = {
        "model": {
            "source": config.model.source,
            "layers": prepared.info.n_layers,
            "neurons_a_layer": prepared.info.n_neurons,
        },
        "dataset": prepared.request["dataset"],
    }
    directory = write_or_match(store, prepared.identity, prepared.tables, about, prepared.request)
    worker = scan_worker(WorkerSpec(prepared.config, prepared.info.identity, 1, prepared.encoding[:1]))
    info = worker.start()
    calibration = worker.calibrate()
    note(store, {"calibration": calibration, "engine": info.engine, "runs_on": info.runs_on})
    for shard in list(shards_of(prepared.encoding, prepared.plan, directory.done()))[:shards]:
        for name, table in worker.compute(shard, 1.0, calibration).items():
            store.put(part_key(name, shard.index), encode_part(name, table, directory.fingerprint, shard.index))
    return open_run(store.uri, config.storage.endpoint_url)
