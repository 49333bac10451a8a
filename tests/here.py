"""A scan in this process, without Ray: for tests of what is made of runs."""

from __future__ import annotations

import time
from unittest.mock import patch

from neg_service.cluster.messages import WorkerSpec
from neg_service.cluster.plan import shards_of
from neg_service.cluster.prepare import Prepared, prepare
from neg_service.cluster.replica import scan_worker
from neg_service.cluster.scan import Summary, about_model
from neg_service.config import ModelConfig, ScanConfig
from neg_service.models.engines.select import Selection
from neg_service.models.language_model import LanguageModel
from neg_service.models.loading import loaded
from neg_service.storage.parts import encode_part, part_key
from neg_service.storage.reader import Run, open_run
from neg_service.storage.run import note, write_or_match
from neg_service.storage.stores import open_store

# By what a model is and how it is loaded: what its self-check found.
_CHECKED: dict[tuple[str, ...], Selection] = {}


def scan_here(config: ScanConfig, shards: int | None = None) -> Run:
    """Compute a run's shards, or its first so many, one after the other, with the worker that a replica has."""
    return open_run(run_here(prepare(config), shards=shards).uri, config.storage.endpoint_url)


def run_here(prepared: Prepared, *, shards: int | None = None, stay_connected: bool = False) -> Summary:
    """In the place of `cluster.scan.run`; there is nothing to stay connected to."""
    config = prepared.config
    store = open_store(prepared.uri, config.storage.endpoint_url)
    about = {
        "model": about_model(config.model.source, prepared.info),
        "dataset": prepared.request["dataset"],
        **prepared.about,
    }
    directory = write_or_match(store, prepared.identity, prepared.tables, about, prepared.request, prepared.neurons)
    before, began, written, n_prompts = directory.done(), time.monotonic(), 0, 0
    todo = list(shards_of(prepared.encoding, prepared.plan, before))[:shards]
    if todo:
        # The first, a middle and the last, as on a cluster.
        samples = [prepared.encoding[i] for i in sorted({0, len(prepared.encoding) // 2, len(prepared.encoding) - 1})]
        worker = scan_worker(WorkerSpec(config, prepared.info.identity, 1, samples))
        with patch("neg_service.cluster.worker.loaded", _loaded):
            info = worker.start()
        calibration = prepared.about.get("calibration") or worker.calibrate()
        note(store, {"calibration": calibration, "engine": info.engine, "runs_on": info.runs_on})
        computing = time.monotonic()
        for shard in todo:
            for name, table in worker.compute(shard, 1.0, calibration).items():
                part = encode_part(name, table, directory.fingerprint, shard.index)
                store.put(part_key(name, shard.index), part)
                written += len(part)
            n_prompts += len(shard.prompts)
        now = time.monotonic()
        cost = {"prompts": n_prompts, "seconds": now - began, "computed_seconds": now - computing}
        note(store, {} if before else {"cost": cost})
    return Summary(
        uri=store.uri,
        shards_before=len(before),
        shards_done=len(before) + len(todo),
        n_shards=prepared.plan.n_shards,
        n_prompts_now=n_prompts,
        seconds=time.monotonic() - began,
        bytes_now=written,
    )


def _loaded(settings: ModelConfig) -> LanguageModel:
    """A model as the worker loads it; in one process the same one is checked once."""
    model = loaded(settings)
    settings_of_engine = (settings.engine, settings.products)
    key = (str(model.identity), type(model.model).__name__, str(model.dtype), str(model.devices), *settings_of_engine)
    if key in _CHECKED:
        model.adopt(_CHECKED[key])
    else:
        _CHECKED[key] = model.ensure_checked()
    return model
