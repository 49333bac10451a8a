"""A scan that was prepared, on the cluster: run what is not done yet, and see that all of it is there.

What is wrong with the place for results is told before a model is loaded, and a run that is finished is known to be so
from one listing a table.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any

from neg_service.cluster.actors import RayActors
from neg_service.cluster.connection import connect, disconnect
from neg_service.cluster.driver import Driver, Outcome
from neg_service.cluster.failures import Limits
from neg_service.cluster.lineage import RunEvents
from neg_service.cluster.logs import add_to_logs, tell_interrupted
from neg_service.cluster.messages import Destination, LogStyle, WorkerSpec
from neg_service.cluster.metrics import RunMetrics
from neg_service.cluster.observer import RunNotes, RunObserver
from neg_service.cluster.plan import shards_of
from neg_service.cluster.prepare import Prepared, tell_of_better_shards
from neg_service.cluster.progress import Progress
from neg_service.cluster.ranking import strongest
from neg_service.cluster.replica import scan_worker
from neg_service.cluster.resources import ReplicaSize, gpu_names, nodes, replica_count, wait_for_size
from neg_service.config import ClusterConfig, ModelConfig, ScanConfig, most_replicas
from neg_service.errors import ConfigurationError, DestinationError, NegServiceError, StorageError
from neg_service.measures.base import Measure
from neg_service.measures.choice import count_of
from neg_service.models.inspection import ModelInfo
from neg_service.places import name_of
from neg_service.prompts.prompt import EncodedPrompt
from neg_service.storage.neurons import NEURONS_FILE
from neg_service.storage.objects import ObjectStore
from neg_service.storage.run import (
    RUN_COPY,
    RUN_FILE,
    RunDirectory,
    calibration_of,
    is_without_neurons,
    parse_run_file,
    rewrite_copy,
    write_or_match,
)
from neg_service.storage.stores import open_store

log = logging.getLogger(__name__)

_VERSIONS_OF = ("neg-service", "torch", "transformers", "pyarrow", "ray")


@dataclass(frozen=True)
class Summary:
    """What a scan did; failed: the shards that were given up, with their errors."""

    uri: str
    shards_before: int
    shards_done: int
    n_shards: int
    n_prompts_now: int
    seconds: float
    bytes_now: int
    failed: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Place:
    """Where a scan's results go.

    at_once: the store without retries: what is wrong with the place at the start is told at once, and only later is it
    worth waiting for. done: the shards that were done before this start. is_checked: whether an earlier start has found
    all prompts right, by the same rule for targets that are not one token: runs of single tokens are the same by each.
    """

    at_once: ObjectStore
    directory: RunDirectory
    done: frozenset[int]
    is_checked: bool

    @property
    def store(self) -> ObjectStore:
        """The store that repeats what fails."""
        return self.directory.store


@dataclass(frozen=True)
class _Executed:
    """What the replicas did."""

    outcome: Outcome
    progress: Progress


def run(prepared: Prepared, *, stay_connected: bool = False) -> Summary:
    """Run the shards that are not done, on the cluster; `stay_connected` leaves Ray to the next scan.

    Raises:
        NegServiceError: a failure that concerns every shard. Shards that fail alone are given up, in the summary.
    """
    with RunEvents(prepared) as events:
        summary, directory = _run(prepared, stay_connected)
        events.done(
            shards=summary.shards_done, prompts=summary.n_prompts_now, n_bytes=summary.bytes_now,
            failed=summary.failed, at=directory.snapshot,
        )  # fmt: skip
    return summary


def _run(prepared: Prepared, stay_connected: bool) -> tuple[Summary, RunDirectory]:
    began = time.monotonic()
    place, n_shards = _open(prepared), prepared.plan.n_shards
    add_to_logs(run=run_name_of(place.store.uri))
    log.info("results: %s", place.store.uri)
    executed: _Executed | None = None
    if prepared.ranking is not None and (len(place.done) < n_shards or is_without_neurons(place.at_once)):
        prepared = _with_strongest_listed(prepared, prepared.ranking)
        add_to_logs(run=run_name_of(place.store.uri))
    if not place.is_checked:
        prepared.encoding.encode_all()
    if len(place.done) < n_shards:
        with _connected(prepared.config, stay_connected):
            executed = _execute(prepared, place)
    else:
        _begin(prepared, place.at_once)
    _clear_unfinished(place.at_once)
    place.directory.clear_resolved()
    outcome, progress = (executed.outcome, executed.progress) if executed else (Outcome(), None)
    summary = Summary(
        uri=place.store.uri,
        shards_before=len(place.done),
        shards_done=len(place.done) + outcome.done,
        n_shards=n_shards,
        n_prompts_now=progress.n_now if progress else 0,
        seconds=progress.seconds if progress else time.monotonic() - began,
        bytes_now=progress.bytes if progress else 0,
        failed=outcome.failed,
    )
    return summary, place.directory


def run_name_of(uri: str) -> str:
    """The last part of a run's URI: what metrics and logs call the run."""
    return name_of(uri)


def _open(prepared: Prepared) -> _Place:
    """See that the place can be read, and what is there.

    Raises:
        DestinationError, StorageError: it cannot.
    """
    storage, tables = prepared.config.storage, tuple(prepared.tables)
    at_once = open_store(prepared.uri, storage.endpoint_url)
    at_once.check()
    done = RunDirectory(at_once, prepared.fingerprint, tables).done() & set(prepared.plan.shards)
    store = open_store(prepared.uri, storage.endpoint_url, storage.retry_timeout_seconds)
    content = at_once.get(RUN_FILE)
    before = {} if content is None else parse_run_file(at_once, content).get("request", {}).get("dataset", {})
    is_checked = before.get("not_one_token") == prepared.config.dataset.not_one_token
    return _Place(at_once, RunDirectory(store, prepared.fingerprint, tables), frozenset(done), is_checked)


def _begin(prepared: Prepared, store: ObjectStore) -> None:
    """Write run.json, or see that it is that of this very run."""
    write_or_match(store, prepared.identity, prepared.tables, _about(prepared), prepared.request, prepared.neurons)


@contextmanager
def _connected(config: ScanConfig, stay_connected: bool) -> Iterator[None]:
    connect(config.cluster, show_replicas=config.job.log == "text")
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stopped:
        # Before the cluster is left, which takes seconds that a job which is stopped may not be given.
        tell_interrupted(stopped)
        raise
    finally:
        if not stay_connected:
            disconnect()


def _execute(prepared: Prepared, place: _Place) -> _Executed:
    """Run what is not done, between two looks at the place for results."""
    config = prepared.config
    size = wait_for_size(config.cluster, config.model.device, prepared.memory)
    tell_of_better_shards(prepared, has_accelerator=size.gpus > 0)
    # Written before a model is loaded, which shows at once whether the place can be written at all.
    is_new = place.at_once.get(RUN_FILE) is None
    _begin(prepared, place.at_once)
    rewrite_copy(place.at_once)
    notes = RunNotes(place.directory, partial(_begin, prepared, place.store))
    try:
        executed = _drive(prepared, place, size, notes)
    except ConfigurationError:
        # Refused after all, by a replica that saw the weights: leave no trace of a run that never was.
        if is_new and not any(place.store.list(table) for table in prepared.tables):
            place.store.delete(RUN_FILE)
            place.store.delete(RUN_COPY)
            if prepared.neurons is not None:
                place.store.delete(NEURONS_FILE)
        raise
    # Another driver of the same run may have been refused meanwhile, and have taken its run.json with it.
    _begin(prepared, place.store)
    notes.keep()
    _require_all_there(prepared, place.directory, executed.outcome)
    return executed


def _drive(prepared: Prepared, place: _Place, size: ReplicaSize, notes: RunNotes) -> _Executed:
    """Have replicas of that size do it; `notes` get what they find out."""
    config = prepared.config
    n_todo = prepared.plan.n_shards - len(place.done)
    most = most_replicas(config.cluster)
    _log_plan(prepared, n_todo, min(n_todo, replica_count(most, size, nodes())), size)
    calibration = _known_calibration(prepared.measure, place.store)
    observer = _observer(prepared, place, notes, n_todo, calibration, size)
    driver = Driver(
        shards_of(prepared.encoding, prepared.plan, place.done),
        _actors(prepared, place, size, most),
        _limits(config.cluster),
        observer,
        n_shards=n_todo,
        calibration=calibration,
    )
    with observer.until_end():
        outcome = driver.run()
    progress = observer.progress
    if not place.done and not outcome.failed:
        # What it cost, to compare measures; a run that was interrupted does not say.
        notes.add(
            cost={
                "prompts": progress.n_now,
                "seconds": round(progress.seconds, 3),
                "computed_seconds": round(progress.computed_seconds, 3),
            }
        )
    return _Executed(outcome, progress)


def _log_plan(prepared: Prepared, n_todo: int, n_replicas: int, size: ReplicaSize) -> None:
    log.info(
        "%d of %d shards to do, %.3g MB in all before compression, on up to %d replica%s of %g CPUs and %g GPUs",
        n_todo, prepared.plan.n_shards, prepared.plan.total_bytes / 1e6,
        n_replicas, "s" * (n_replicas > 1), size.cpus, size.gpus,
    )  # fmt: skip


def _known_calibration(measure: Measure[Any], store: ObjectStore) -> dict[str, Any] | None:
    """What an earlier start of this run found out, or None; empty where there is nothing to find out."""
    return calibration_of(store) if measure.has_to_calibrate else {}


def _observer(
    prepared: Prepared,
    place: _Place,
    notes: RunNotes,
    n_todo: int,
    calibration: dict[str, Any] | None,
    size: ReplicaSize,
) -> RunObserver:
    config, plan, info = prepared.config, prepared.plan, prepared.info
    n_before, is_logged = sum(len(plan.places_of(shard)) for shard in place.done), config.job.log == "json"
    progress = Progress(plan.n_prompts, n_before, config.job.progress_seconds, is_logged=is_logged)
    n_neurons = count_of(config.neurons, info.layer_neurons)
    metrics = RunMetrics(
        run_name_of(place.store.uri), n_todo, n_neurons, plan.n_rows / plan.n_prompts,
        cpus_a_replica=size.cpus, gpus_a_replica=size.gpus,
    )  # fmt: skip
    return RunObserver(place.directory, notes, progress, metrics, calibration)


def _actors(prepared: Prepared, place: _Place, size: ReplicaSize, most: int | str) -> RayActors:
    config, storage = prepared.config, prepared.config.storage
    destination = Destination(
        place.store.uri, storage.endpoint_url, prepared.fingerprint, storage.retry_timeout_seconds
    )
    logs = LogStyle(config.job.log, run_name_of(place.store.uri))
    return RayActors(partial(scan_worker, worker_spec(prepared, size)), destination, size, most, logs)


def worker_spec(prepared: Prepared, size: ReplicaSize) -> WorkerSpec:
    """What a replica of that size makes its worker from."""
    config = prepared.config
    config = replace(config, model=_on_own_devices(config.model, size))
    return WorkerSpec(config, prepared.info.identity, int(size.cpus), _samples(prepared.encoding))


def _on_own_devices(model: ModelConfig, size: ReplicaSize) -> ModelConfig:
    """The model's settings as they are right inside an actor."""
    if not size.gpus and model.device == "auto":
        # Ray hides no GPU from an actor that asked for none; all of them would crowd the first one.
        return replace(model, device="cpu")
    if size.gpus > 1 and model.device in ("auto", "cuda"):
        # Ray shows an actor its own GPUs alone, and they are numbered from 0 there.
        return replace(model, device=gpu_names(int(size.gpus)))
    return model


def _limits(cluster: ClusterConfig) -> Limits:
    stall_seconds = None if cluster.stall_seconds == "auto" else float(cluster.stall_seconds)
    return Limits(cluster.attempts, cluster.start_seconds, stall_seconds, cluster.unreachable_seconds)


def _samples(prompts: Sequence[EncodedPrompt]) -> list[EncodedPrompt]:
    """The first, a middle and the last prompt: what a measure calibrates itself on."""
    return [prompts[i] for i in sorted({0, len(prompts) // 2, len(prompts) - 1})]


def _clear_unfinished(store: ObjectStore) -> None:
    """Sweep up after writers that were killed; a key that may not do that can still write results."""
    try:
        if cleared := store.clear_unfinished():
            log.info("removed %d unfinished objects of earlier writers", cleared)
    except (DestinationError, StorageError) as error:
        log.info("unfinished objects of earlier writers, if there are any, stay: %s", error)


def _require_all_there(prepared: Prepared, directory: RunDirectory, outcome: Outcome) -> None:
    """What was put must be there when we look again: a last guard against a store that says yes and keeps nothing.

    Raises:
        NegServiceError: naming the shards that are gone.
    """
    gone = set(prepared.plan.shards) - set(outcome.failed) - directory.done()
    if gone:
        raise NegServiceError(
            f"{directory.store.uri}: {len(gone)} shards were put and are not there, the first is {min(gone)}; "
            f"something else deletes or hides objects; the same command computes them again"
        )


def _with_strongest_listed(prepared: Prepared, ranking: Prepared) -> Prepared:
    """The same scan with its neurons as a list: the strongest over the data set, which a scan of its own finds.

    That scan resumes and is stored as any other, beside this one.

    Raises:
        NegServiceError: shards of the ranking were given up.
    """
    log.info("ranking neurons over the data set first: %s", ranking.uri)
    summary = run(ranking)
    if summary.failed:
        shard, error = next(iter(summary.failed.items()))
        raise NegServiceError(
            f"{len(summary.failed)} shards of the ranking {ranking.uri} failed, shard {shard} with: "
            f"{error}; the same command tries them again"
        )
    listed = strongest(ranking.uri, prepared.config)
    about = {**prepared.about, "ranked_by": ranking.uri}
    return replace(prepared, config=replace(prepared.config, neurons=listed), about=about)


def about_model(source: str, info: ModelInfo) -> dict[str, Any]:
    """What people want to know of a run's model."""
    about = {
        "source": source,
        "architecture": info.architecture,
        "layers": info.n_layers,
        "neurons_a_layer": info.n_neurons,
        "experts_a_layer": max(own.n_experts for own in info.layer_neurons),
        # Of each layer: the MLP's neurons, the experts, the neurons of each, and how many of them a token uses.
        "layer_neurons": [list(astuple(own)) for own in info.layer_neurons],
        "parameters": info.n_parameters,
    }
    return about if info.dequantised is None else about | {"dequantised": asdict(info.dequantised)}


def _about(prepared: Prepared) -> dict[str, Any]:
    """What people want to know of a run beside its identity."""
    return {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": about_model(prepared.config.model.source, prepared.info),
        "dataset": prepared.request["dataset"],
        **prepared.about,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS_OF}},
    }
