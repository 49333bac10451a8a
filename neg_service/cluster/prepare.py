"""A scan before it begins: the configuration checked, the prompts loaded, the plan made; nothing is written.

The order is deliberate: all that can be refused is refused here, before Ray starts and before a model's weights are
touched. What was asked for is kept with the run, so that it can be planned once more from its URI alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from neg_service.cluster.plan import Plan, identity_of, make_plan, replica_bytes, run_name
from neg_service.config import DatasetConfig, ScanConfig, check, typed
from neg_service.errors import ConfigurationError, DestinationError
from neg_service.measures import find_measure
from neg_service.measures.choice import with_list_read
from neg_service.models.folder import LocalModel
from neg_service.models.inspection import ModelInfo, inspect_model, mask_token_of
from neg_service.models.loading import checked_dtype, load_tokenizer
from neg_service.models.source import DEFAULT, fetch
from neg_service.places import absolute, below, local_path, parent_of, without_credentials
from neg_service.prompts.mceval8k import as_masked
from neg_service.prompts.prompt import Prompt, check_prompts, fits, speakable
from neg_service.prompts.sources import BUILT_IN, load_dataset
from neg_service.storage.reader import Run, open_run
from neg_service.storage.run import fingerprint_of, require_same
from neg_service.storage.stores import open_store

log = logging.getLogger(__name__)


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
    # What has to be asked for to compute any shard again.
    request: dict[str, Any] = field(default_factory=dict)
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


def prepare(config: ScanConfig) -> Prepared:
    """Check a configuration and plan its scan; nothing is written.

    Raises:
        ConfigurationError: what was asked for cannot be done; one line says why.
    """
    check(config)
    # Ray unpacks what a job is sent with into a directory of such a name, and runs the job there.
    if Path.cwd().name.startswith("_ray_pkg_"):
        require_lasting(config.storage.uri)
    place = open_store(config.storage.uri, config.storage.endpoint_url).uri
    # Replicas, and whoever repairs the run, do not share this process's working directory.
    config = replace(
        config,
        model=replace(config.model, source=_full(config.model.source)),
        dataset=_with_absolute_paths(config.dataset),
    )
    checked_dtype(config.model.dtype)
    measure = find_measure(str(config.measure.get("name")))
    options = measure.read(typed(measure.Options, config.measure, "measure"))
    config = replace(config, measure=asdict(options))
    config = replace(config, neurons=with_list_read(config.neurons))
    prompts = load_dataset(config.dataset, config.job.limit)
    check_prompts(prompts)
    local = fetch(
        config.model.source,
        config.model.revision,
        with_weights=False,
        trust_remote_code=config.model.trust_remote_code,
    )
    info = inspect_model(local, config.model.trust_remote_code, check_files=True)
    if config.dataset.source == "facts-masked" and not info.is_masked:
        raise ConfigurationError(
            f"dataset.source=facts-masked: its prompts have masks to fill, and {info.name} ({info.architecture}) is a "
            f"causal model: use dataset=facts"
        )
    if config.dataset.task is not None and info.is_masked:
        prompts = [as_masked(prompt) for prompt in prompts]
    about: dict[str, Any] = {}
    if config.dataset.not_one_token == "skip":
        prompts, about = _of_one_token(prompts, local, info, config)
    if config.dataset.too_long == "skip":
        prompts, skipped = _short_enough(prompts, local, info, config)
        about |= skipped
    measure.check(options, config.neurons, info, prompts)
    n_targets = sum(len(prompt.targets) for prompt in prompts) / len(prompts)
    plan = make_plan(prompts, measure.cost_a_prompt(options, config.neurons, info, n_targets), config.job.shard_size)
    identity = identity_of(config, info, measure.identity(options), prompts, plan)
    name = run_name(config, info, str(config.measure["name"]))
    prepared = Prepared(
        config=config,
        prompts=prompts,
        local=local,
        info=info,
        plan=plan,
        identity=identity,
        tables=measure.tables(options, info),
        about=about,
        uri=below(place, f"{name}-{fingerprint_of(identity)}"),
        request=_request(config),
    )
    if config.job.resume is not None:
        wanted = open_run(config.job.resume, config.storage.endpoint_url, key="job.resume")
        require_same(wanted.directory.store, {"fingerprint": wanted.fingerprint, "identity": wanted.config}, identity)
        prepared = replace(prepared, uri=wanted.uri)
    return prepared


def tokenizer_of(local: LocalModel, info: ModelInfo, config: ScanConfig) -> tuple[Any, int | None]:
    """A model's tokenizer, and the id of its mask token if it is a masked one.

    Raises:
        ModelError: there is none, or it is another model's.
    """
    tokenizer = load_tokenizer(local, config.model.trust_remote_code)
    return tokenizer, mask_token_of(tokenizer, info.name, info.n_input_ids) if info.is_masked else None


def require_lasting(uri: str) -> None:
    """Refuse a place for results that goes when a submitted job does.

    Raises:
        ConfigurationError: a relative path.
    """
    path = local_path(uri, "storage.uri", DestinationError)
    if path is not None and not Path(path).is_absolute():
        raise ConfigurationError(
            f"storage.uri={uri}: would lie in the job's own directory, which goes when the job does: give "
            f"s3://bucket/prefix, or an absolute path that all nodes share"
        )


def prepare_again(run: Run, config: ScanConfig) -> Prepared:
    """Plan an existing run once more from what its run.json says was asked for.

    Of `config` the cluster, the storage and the device count, and the sources of model and data set where they are not
    those of a new configuration: files may have moved since.

    Raises:
        ConfigurationError: the run cannot be planned, or its model, prompts or software are others by now.
    """
    if not run.request:
        raise DestinationError(f"{run.uri}: does not say what was asked for; run its scan again")
    asked, fresh = typed(ScanConfig, run.request), ScanConfig()
    asked.model.device = config.model.device
    if config.model.source != fresh.model.source:
        asked.model.source = config.model.source
    if config.dataset.source != fresh.dataset.source:
        asked.dataset.source = config.dataset.source
    # A run that fills a bucket has no folder; nothing else is put there than the run itself.
    parent = parent_of(run.uri) or run.uri
    job = replace(asked.job, resume=run.uri, progress_seconds=config.job.progress_seconds)
    return prepare(replace(asked, cluster=config.cluster, storage=replace(config.storage, uri=parent), job=job))


def _request(config: ScanConfig) -> dict[str, Any]:
    """What was asked for, without how it is run; credentials in a URL are not kept."""
    job = {"name": config.job.name, "limit": config.job.limit, "shard_size": config.job.shard_size}
    return {
        "model": {key: value for key, value in asdict(config.model).items() if key != "device"},
        "dataset": to_be_stored(config.dataset),
        "measure": dict(config.measure),
        "neurons": asdict(config.neurons),
        "job": job,
    }


def to_be_stored(dataset: DatasetConfig) -> dict[str, Any]:
    """The settings of a data set without what only reading it needed."""
    wordings = None if dataset.wordings is None else without_credentials(dataset.wordings)
    return asdict(replace(dataset, source=without_credentials(dataset.source), wordings=wordings))


def _of_one_token(
    prompts: Sequence[Prompt], local: LocalModel, info: ModelInfo, config: ScanConfig
) -> tuple[list[Prompt], dict[str, Any]]:
    """The prompts with those of their targets that are one token, and how many targets and prompts go."""
    tokenizer, mask_token = tokenizer_of(local, info, config)
    found = list(speakable(tokenizer, prompts, mask_token, info))
    kept = [prompt for prompt, _ in found if prompt.targets]
    n_skipped = len(prompts) - len(kept)
    n_targets = sum(n for prompt, n in found if prompt.targets)
    if n_skipped or n_targets:
        log.info(
            "skipping %d of %d prompts, whose answers are not one token of the model, and %d targets of others",
            n_skipped, len(prompts), n_targets,
        )  # fmt: skip
    if not kept:
        raise ConfigurationError(
            f"none of {len(prompts)} prompts has an answer that is one token of the model: check dataset.source"
        )
    return kept, {"skipped_not_one_token": n_skipped, "skipped_targets": n_targets}


def _short_enough(
    prompts: Sequence[Prompt], local: LocalModel, info: ModelInfo, config: ScanConfig
) -> tuple[list[Prompt], dict[str, Any]]:
    """The prompts that the model's context holds, and how many it does not."""
    tokenizer, mask_token = tokenizer_of(local, info, config)
    fitting = fits(tokenizer, prompts, info.context_length, mask_token=mask_token, model=info)
    kept = [prompt for prompt, is_short in zip(prompts, fitting, strict=True) if is_short]
    n_skipped = len(prompts) - len(kept)
    if n_skipped:
        log.info(
            "skipping %d of %d prompts, which have more than the %s tokens of the model's context, the first is %r",
            n_skipped, len(prompts), info.context_length, prompts[fitting.index(False)].id,
        )  # fmt: skip
    if not kept:
        raise ConfigurationError(
            f"all {len(prompts)} prompts have more than the {info.context_length} tokens of the model's context: "
            f"shorten them, or choose another model.source"
        )
    return kept, {"skipped_too_long": n_skipped}


def _with_absolute_paths(dataset: DatasetConfig) -> DatasetConfig:
    wordings = None if dataset.wordings is None else absolute(dataset.wordings)
    return replace(dataset, source=_full(dataset.source), wordings=wordings)


def _full(source: str) -> str:
    return source if source in (DEFAULT, *BUILT_IN) else absolute(source)
