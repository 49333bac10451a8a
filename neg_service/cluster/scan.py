"""A scan that was prepared, on the cluster: run what is not done yet, and see that all of it is there.

What is wrong with the place for results is told before a model is loaded, and a run that is finished is known to be so
from one listing a table.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import count
from typing import Any

import ray

from neg_service.cluster.connection import connect, disconnect
from neg_service.cluster.driver import Driver, Outcome
from neg_service.cluster.gcs import Unreachable, labels_without
from neg_service.cluster.logs import add_to_logs, tell_interrupted
from neg_service.cluster.metrics import RunMetrics
from neg_service.cluster.plan import Shard, shards_of
from neg_service.cluster.prepare import Prepared, prepare, tokenizer_of
from neg_service.cluster.progress import Progress
from neg_service.cluster.replica import ACTOR_OPTIONS, Destination, Hello, LogStyle, Receipt, Replica, Scan
from neg_service.cluster.resources import (
    ReplicaSize,
    gpu_names,
    nodes,
    replica_count,
    room_now,
    wait_for_size,
)
from neg_service.config import NeuronsConfig, ScanConfig, most_replicas
from neg_service.errors import ConfigurationError, DestinationError, NegServiceError, StorageError
from neg_service.measures.builtin.aggregate_importance import total
from neg_service.measures.choice import count_of, strongest_neurons
from neg_service.places import name_of
from neg_service.prompts.prompt import Prompt, encode
from neg_service.storage.objects import ObjectStore
from neg_service.storage.reader import open_run
from neg_service.storage.run import (
    RUN_COPY,
    RUN_FILE,
    RunDirectory,
    calibration_of,
    note,
    rewrite_copy,
    write_or_match,
)
from neg_service.storage.stores import open_store

log = logging.getLogger(__name__)

_VERSIONS_OF = ("neg-service", "torch", "transformers", "pyarrow", "ray")


@dataclass(frozen=True)
class Summary:
    """What a scan did."""

    uri: str
    shards_before: int
    shards_done: int
    n_shards: int
    n_prompts_now: int
    seconds: float
    bytes_now: int
    set_aside: dict[int, str] = field(default_factory=dict)


def run(prepared: Prepared, *, stay_connected: bool = False) -> Summary:
    """Run the shards that are not done, on the cluster; `stay_connected` leaves Ray to the next scan.

    Raises:
        NegServiceError: a failure that concerns every shard. Shards that fail alone are set aside, in the summary.
    """
    began = time.monotonic()
    storage = prepared.config.storage
    # What is wrong with the place at the start is told at once; only later is it worth waiting for.
    hasty = open_store(prepared.uri, storage.endpoint_url)
    hasty.check()
    done = RunDirectory(hasty, prepared.fingerprint, tuple(prepared.tables)).done()
    done = done & set(range(prepared.plan.n_shards))
    store = open_store(prepared.uri, storage.endpoint_url, storage.patience_seconds)
    directory = RunDirectory(store, prepared.fingerprint, tuple(prepared.tables))
    todo = prepared.plan.n_shards - len(done)
    add_to_logs(run=run_name_of(store.uri))
    log.info("results: %s", store.uri)
    outcome, progress, found = Outcome(), None, dict[str, Any]()
    if todo and prepared.config.neurons.choose == "top" and prepared.config.neurons.over == "dataset":
        prepared = _with_strongest_listed(prepared)
        add_to_logs(run=run_name_of(store.uri))
    if todo:
        _check_encoding(prepared, done)
        config = prepared.config
        connect(config.cluster, show_replicas=config.job.log == "text")
        try:
            size = wait_for_size(config.cluster, config.model.device, prepared.memory)
            # Written before a model is loaded, which shows at once whether the place can be written at all.
            is_new = hasty.get(RUN_FILE) is None
            _begin(hasty, prepared)
            rewrite_copy(hasty)
            try:
                outcome, progress = _drive(prepared, directory, done, size, found)
            except ConfigurationError:
                # Refused after all, by a replica that saw the weights: leave no trace of a run that never was.
                if is_new and not any(store.list(table) for table in prepared.tables):
                    store.delete(RUN_FILE)
                    store.delete(RUN_COPY)
                raise
            # Another driver of the same run may have been refused meanwhile, and have taken its run.json with it.
            _begin(store, prepared)
            note(store, found)
            _require_all_there(directory, prepared, outcome)
        except (KeyboardInterrupt, SystemExit) as stopped:
            # Before the cluster is left, which takes seconds that a job which is stopped may not be given.
            tell_interrupted(stopped)
            raise
        finally:
            if not stay_connected:
                disconnect()
    else:
        _begin(hasty, prepared)
    _clear_unfinished(hasty)
    directory.take_back_done()
    return Summary(
        uri=store.uri,
        shards_before=len(done),
        shards_done=len(done) + outcome.done,
        n_shards=prepared.plan.n_shards,
        n_prompts_now=progress.n_now if progress else 0,
        seconds=progress.seconds if progress else time.monotonic() - began,
        bytes_now=progress.bytes if progress else 0,
        set_aside=outcome.set_aside,
    )


def _begin(store: ObjectStore, prepared: Prepared) -> None:
    """Write run.json, or see that it is that of this very run."""
    write_or_match(store, prepared.identity, prepared.tables, _about(prepared), prepared.request)


def run_name_of(uri: str) -> str:
    """The last part of a run's URI: what metrics and logs call the run."""
    return name_of(uri)


def _clear_unfinished(store: ObjectStore) -> None:
    """Sweep up after writers that were killed; a key that may not do that can still write results."""
    try:
        if cleared := store.clear_unfinished():
            log.info("removed %d unfinished objects of earlier writers", cleared)
    except (DestinationError, StorageError) as error:
        log.info("unfinished objects of earlier writers, if there are any, stay: %s", error)


def _require_all_there(directory: RunDirectory, prepared: Prepared, outcome: Outcome) -> None:
    """What was put must be there when we look again: a last guard against a store that says yes and keeps nothing.

    Raises:
        NegServiceError: naming the shards that are gone.
    """
    gone = set(range(prepared.plan.n_shards)) - set(outcome.set_aside) - directory.done()
    if gone:
        raise NegServiceError(
            f"{directory.store.uri}: {len(gone)} shards were put and are not there, the first is {min(gone)}; "
            f"something else deletes or hides objects; the same command computes them again"
        )


def ranking_of(config: ScanConfig) -> ScanConfig:
    """The scan that finds the strongest neurons over the data set for another one, in its basis if it has one."""
    name = None if config.job.name is None else f"{config.job.name}-strength"
    basis = {key: value for key, value in config.measure.items() if key == "basis"}
    return replace(
        config,
        measure={"name": "strength", **basis},
        neurons=NeuronsConfig(config.neurons.layers),
        job=replace(config.job, name=name, shard_size="auto", resume=None),
    )


def _with_strongest_listed(prepared: Prepared) -> Prepared:
    """The same scan with its neurons as a list: the strongest over the data set, which a scan of its own finds.

    That scan resumes and is stored as any other, beside this one.

    Raises:
        NegServiceError: shards of the ranking were set aside.
    """
    config = prepared.config
    ranking = prepare(ranking_of(config))
    log.info("ranking neurons over the data set first: %s", ranking.uri)
    summary = run(ranking)
    if summary.set_aside:
        shard, error = next(iter(summary.set_aside.items()))
        raise NegServiceError(
            f"{len(summary.set_aside)} shards of the ranking {ranking.uri} were set aside, shard {shard} with: "
            f"{error}; the same command tries them again"
        )
    strength = open_run(ranking.uri, config.storage.endpoint_url).table("strength").to_table()
    strongest = strongest_neurons(*total(strength), config.neurons.count)
    listed = NeuronsConfig(config.neurons.layers, choose="list", list=strongest.tolist())
    about = {"ranked_by": ranking.uri, "neurons": listed.list}
    return replace(prepared, config=replace(config, neurons=listed), about=about)


def _check_encoding(prepared: Prepared, done: set[int]) -> None:
    """Encode what is still to do, for the sake of its errors: replicas encode their own shards."""
    tokenizer, mask_token = tokenizer_of(prepared.local, prepared.info, prepared.config)
    info = prepared.info
    for shard in shards_of(prepared.prompts, prepared.plan, done):
        for _ in encode(tokenizer, shard.prompts, info.context_length, mask_token, model=info):
            pass


def _drive(
    prepared: Prepared, directory: RunDirectory, done: set[int], size: ReplicaSize, found: dict[str, Any]
) -> tuple[Outcome, Progress]:
    """Run what is not done; `found` gets what replicas find out, which run.json keeps."""
    config = prepared.config
    todo = prepared.plan.n_shards - len(done)
    most = most_replicas(config.cluster)
    n_replicas = min(todo, replica_count(most, size, nodes()))
    if not size.gpus and config.model.device == "auto":
        # Ray hides no GPU from an actor that asked for none; all of them would crowd the first one.
        config = replace(config, model=replace(config.model, device="cpu"))
    if size.gpus > 1 and config.model.device in ("auto", "cuda"):
        # Ray shows an actor its own GPUs alone, and they are numbered from 0 there.
        config = replace(config, model=replace(config.model, device=gpu_names(int(size.gpus))))
    known = calibration_of(directory.store) if prepared.measure.has_to_calibrate else {}
    work = Scan(config, prepared.info.identity, int(size.cpus), _samples(prepared.prompts))
    storage = config.storage
    destination = Destination(directory.store.uri, storage.endpoint_url, prepared.fingerprint, storage.patience_seconds)

    numbers = count()
    unreachable = Unreachable()

    def spawn() -> Any:
        actor = ray.remote(Replica).options(
            label_selector=labels_without(unreachable.nodes),
            num_cpus=size.cpus,
            num_gpus=size.gpus,
            # On a GPU the weights lie in the GPU's memory, of which Ray knows nothing.
            memory=None if size.gpus else size.memory,
            **ACTOR_OPTIONS,
        )
        told = LogStyle(config.job.log, run_name_of(directory.store.uri), next(numbers))
        return actor.remote(work, destination, told)

    log.info(
        "%d of %d shards to do, %.3g MB in all before compression, on up to %d replica%s of %g CPUs and %g GPUs",
        todo, prepared.plan.n_shards, prepared.plan.total_bytes / 1e6,
        n_replicas, "s" * (n_replicas > 1), size.cpus, size.gpus,
    )  # fmt: skip
    left = sum(len(shard.prompts) for shard in shards_of(prepared.prompts, prepared.plan, done))
    progress = Progress(
        prepared.plan.n_prompts, prepared.plan.n_prompts - left, config.job.progress_seconds,
        is_logged=config.job.log == "json",
    )  # fmt: skip

    metrics = RunMetrics(
        run_name_of(directory.store.uri),
        todo,
        count_of(config.neurons, prepared.info.n_layers, prepared.info.n_neurons),
        prepared.plan.n_rows / prepared.plan.n_prompts,
    )

    def on_receipt(receipt: Receipt) -> None:
        progress.add(receipt)
        metrics.add(receipt)

    def on_first_ready(hello: Hello) -> None:
        found.update(engine=hello.ready.engine, runs_on=hello.ready.runs_on)
        if known is not None:
            found.update(calibration=known)
            with metrics.waits():
                note(directory.store, found)
            progress.start()

    def on_calibrated(calibration: dict[str, Any]) -> dict[str, Any]:
        # Another driver, which was refused, may have taken run.json with it; no shard is put before it says this.
        with metrics.waits():
            _begin(directory.store, prepared)
            note(directory.store, {**found, "calibration": calibration})
            # Another driver of the same run may have been first: then its calibration is the run's.
            noted = calibration_of(directory.store)
        found.update(calibration=calibration if noted is None else noted)
        progress.start()
        agreed: dict[str, Any] = found["calibration"]
        return agreed

    def on_set_aside(shard: Shard, error: str, failures: int) -> None:
        with metrics.waits():
            directory.put_aside(shard.index, error, failures)

    driver = Driver(
        shards_of(prepared.prompts, prepared.plan, done),
        spawn,
        partial(room_now, most, size, unreachable),
        config.cluster.attempts,
        on_receipt=on_receipt,
        on_first_ready=on_first_ready,
        on_set_aside=on_set_aside,
        on_failure=metrics.failed,
        on_counts=lambda counts: metrics.show(counts, progress.seconds_left),
        n_shards=todo,
        start_seconds=config.cluster.start_seconds,
        stall_seconds=None if config.cluster.stall_seconds == "auto" else float(config.cluster.stall_seconds),
        calibration=known,
        on_calibrated=on_calibrated,
        unreachable_seconds=config.cluster.unreachable_seconds,
        unreachable=unreachable,
    )
    try:
        with metrics.until_end():
            outcome = driver.run()
    finally:
        progress.close()
    if not done and not outcome.set_aside:
        # What it cost, for whoever compares measures; a run that was interrupted does not say.
        found["cost"] = {
            "prompts": progress.n_now,
            "seconds": round(progress.seconds, 3),
            "computed_seconds": round(progress.computed_seconds, 3),
        }
    return outcome, progress


def _samples(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first, a middle and the last prompt: what a measure calibrates itself on."""
    return [prompts[i] for i in sorted({0, len(prompts) // 2, len(prompts) - 1})]


def _about(prepared: Prepared) -> dict[str, Any]:
    """What people want to know of a run beside its identity."""
    return {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "source": prepared.config.model.source,
            "architecture": prepared.info.architecture,
            "layers": prepared.info.n_layers,
            "neurons_a_layer": prepared.info.n_neurons,
            "parameters": prepared.info.n_parameters,
        },
        "dataset": prepared.request["dataset"],
        **prepared.about,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS_OF}},
    }
