"""A scan from configuration to results: check everything, plan, and run what is not done yet.

The order is deliberate: all that can be refused is refused before anything is written, before Ray starts, and before
a model's weights are touched; and a run that is finished is known to be so from one listing.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from neg_service.cluster.driver import Driver, Outcome
from neg_service.cluster.plan import (
    Plan,
    Shard,
    identity_of,
    make_plan,
    replica_bytes,
    run_name,
    shards_of,
)
from neg_service.cluster.progress import Progress
from neg_service.cluster.replica import Destination, Hello, Receipt, Replica, ScanWorker
from neg_service.cluster.resources import (
    ReplicaSize,
    connect,
    disconnect,
    nodes,
    replica_count,
    replica_size,
)
from neg_service.config import NeuronsConfig, ScanConfig, check, typed
from neg_service.errors import ConfigurationError, NegServiceError
from neg_service.measures import find_measure
from neg_service.measures.choice import strongest_neurons, with_list_read
from neg_service.measures.strength import total
from neg_service.models.language_model import ModelInfo, checked_dtype, inspect_model, load_tokenizer, mask_token_of
from neg_service.models.source import LocalModel, fetch
from neg_service.prompts.prompt import Prompt, check_prompts, encode
from neg_service.prompts.sources import load_prompts, without_credentials
from neg_service.storage.objects import open_store
from neg_service.storage.reader import open_run
from neg_service.storage.run import RUN_FILE, RunDirectory, calibration_of, fingerprint_of, note, write_or_match

log = logging.getLogger(__name__)

_VERSIONS_OF = ("neg-service", "torch", "transformers", "pyarrow", "ray")


@dataclass(frozen=True)
class Prepared:
    """A scan that has been checked as far as is possible without weights and without a cluster."""

    config: ScanConfig
    prompts: Sequence[Prompt]
    local: LocalModel
    info: ModelInfo
    plan: Plan
    identity: dict[str, Any]
    tables: dict[str, pa.Schema]
    uri: str
    # What else run.json should say of it.
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Of what decides the numbers."""
        return fingerprint_of(self.identity)

    @property
    def memory(self) -> int:
        """About what a replica needs, in bytes."""
        return replica_bytes(self.info, self.config.model.dtype, self.plan)


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


def prepare(config: ScanConfig) -> Prepared:
    """Check a configuration and plan its scan; nothing is written.

    Raises:
        ConfigurationError: what was asked for cannot be done; one line says why.
    """
    check(config)
    if Path(config.model.source).exists():
        # Replicas do not share this process's working directory.
        config = replace(config, model=replace(config.model, source=str(Path(config.model.source).absolute())))
    checked_dtype(config.model.dtype)
    measure = find_measure(str(config.measure.get("name")))
    options = measure.read(typed(measure.Options, config.measure, "measure"))
    config = replace(config, measure=asdict(options))
    config = replace(config, neurons=with_list_read(config.neurons))
    prompts = load_prompts(config.dataset.source, config.job.limit)
    check_prompts(prompts)
    local = fetch(
        config.model.source,
        config.model.revision,
        with_weights=False,
        trust_remote_code=config.model.trust_remote_code,
    )
    info = inspect_model(local, config.model.trust_remote_code)
    measure.check(options, config.neurons, info, prompts)
    n_targets = sum(len(prompt.targets) for prompt in prompts) / len(prompts)
    plan = make_plan(prompts, measure.cost_a_prompt(options, config.neurons, info, n_targets), config.job.shard_size)
    identity = identity_of(config, info, measure.identity(options), prompts, plan)
    name = run_name(config, info, str(config.measure["name"]))
    return Prepared(
        config=config,
        prompts=prompts,
        local=local,
        info=info,
        plan=plan,
        identity=identity,
        tables=measure.tables(options, info),
        uri=f"{config.storage.uri.rstrip('/')}/{name}-{fingerprint_of(identity)}",
    )


def run(prepared: Prepared) -> Summary:
    """Run the shards that are not done, on the cluster.

    Raises:
        NegServiceError: a failure that concerns every shard. Shards that fail alone are set aside, in the summary.
    """
    began = time.monotonic()
    store = open_store(prepared.uri, prepared.config.storage.endpoint_url)
    directory = RunDirectory(store, prepared.fingerprint, tuple(prepared.tables))
    planned = range(prepared.plan.n_shards)
    done = directory.done() & set(planned)
    todo = prepared.plan.n_shards - len(done)
    outcome, progress = Outcome(), None
    if todo and prepared.config.neurons.choose == "top" and prepared.config.neurons.over == "dataset":
        prepared = _with_strongest_listed(prepared)
    if todo:
        _check_encoding(prepared, done)
        connect(prepared.config.cluster)
        try:
            size = replica_size(prepared.config.cluster, prepared.config.model.device, prepared.memory, nodes())
            # Written before a model is loaded, which shows at once whether the place can be written at all.
            is_new = store.get(RUN_FILE) is None
            write_or_match(store, prepared.identity, prepared.tables, _about(prepared))
            try:
                outcome, progress = _drive(prepared, directory, done, size)
            except ConfigurationError:
                # Refused after all, by a replica that saw the weights: leave no trace of a run that never was.
                if is_new and not any(store.list(table) for table in prepared.tables):
                    store.delete(RUN_FILE)
                raise
        finally:
            disconnect()
    else:
        write_or_match(store, prepared.identity, prepared.tables, {})
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


def _with_strongest_listed(prepared: Prepared) -> Prepared:
    """The same scan with its neurons as a list: the strongest over the data set, which a scan of its own finds.

    That scan resumes and is stored as any other, beside this one.

    Raises:
        NegServiceError: shards of the ranking were set aside.
    """
    config = prepared.config
    layers = NeuronsConfig(config.neurons.layers)
    name = None if config.job.name is None else f"{config.job.name}-strength"
    ranking = prepare(
        replace(
            config,
            measure={"name": "strength", "basis": config.measure["basis"]},
            neurons=layers,
            job=replace(config.job, name=name, shard_size="auto"),
        )
    )
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
    tokenizer = load_tokenizer(prepared.local, prepared.config.model.trust_remote_code)
    mask_token = mask_token_of(tokenizer, prepared.info.name) if prepared.info.is_masked else None
    for shard in shards_of(prepared.prompts, prepared.plan, done):
        for _ in encode(tokenizer, shard.prompts, prepared.info.context_length, mask_token):
            pass


def _drive(prepared: Prepared, directory: RunDirectory, done: set[int], size: ReplicaSize) -> tuple[Outcome, Progress]:
    config = prepared.config
    todo = prepared.plan.n_shards - len(done)
    n_replicas = replica_count(config.cluster.replicas, size, nodes(), todo)
    aside_before = set(directory.set_aside())
    if not size.gpus and config.model.device == "auto":
        # Ray hides no GPU from an actor that asked for none; all of them would crowd the first one.
        config = replace(config, model=replace(config.model, device="cpu"))
    known = calibration_of(directory.store)
    make_worker = partial(ScanWorker, config, prepared.info.identity, int(size.cpus), _samples(prepared.prompts), known)
    destination = Destination(directory.store.uri, config.storage.endpoint_url, prepared.fingerprint)

    def spawn() -> Any:
        actor = ray.remote(Replica).options(
            num_cpus=size.cpus,
            num_gpus=size.gpus,
            # On a GPU the weights lie in the GPU's memory, of which Ray knows nothing.
            memory=None if size.gpus else size.memory,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=2,
        )
        return actor.remote(make_worker, destination)

    log.info(
        "%d of %d shards to do, %.3g MB in all before compression, on %d replica%s of %g CPUs and %g GPUs",
        todo, prepared.plan.n_shards, prepared.plan.total_bytes / 1e6,
        n_replicas, "s" * (n_replicas > 1), size.cpus, size.gpus,
    )  # fmt: skip
    left = sum(len(shard.prompts) for shard in shards_of(prepared.prompts, prepared.plan, done))
    progress = Progress(prepared.plan.n_prompts, prepared.plan.n_prompts - left, config.job.progress_seconds)

    def on_first_ready(hello: Hello) -> None:
        note(directory.store, {"calibration": hello.ready.calibration})
        progress.start()

    def on_receipt(receipt: Receipt) -> None:
        progress.add(receipt)
        if receipt.shard in aside_before:
            directory.take_back(receipt.shard)

    def on_set_aside(shard: Shard, error: str, failures: int) -> None:
        directory.put_aside(shard.index, error, failures)

    driver = Driver(
        shards_of(prepared.prompts, prepared.plan, done),
        spawn,
        n_replicas,
        config.cluster.attempts,
        on_receipt=on_receipt,
        on_first_ready=on_first_ready,
        on_set_aside=on_set_aside,
    )
    try:
        return driver.run(), progress
    finally:
        progress.close()


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
        "dataset": without_credentials(prepared.config.dataset.source),
        **prepared.about,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS_OF}},
    }
