"""A scan before it begins, in stages: resolve what was asked for, load the data, encode it, plan; nothing is written.

The order is deliberate: all that can be refused is refused here, before Ray starts and before a model's weights are
touched. Prompts are encoded once: here where settings leave some out, which decides the plan; else when the run starts,
which is told of all mistakes at once, and where it goes on, when it is a shard's turn. What was asked for is kept with
the run, so that it can be planned once more from its URI alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from neg_service.cluster.plan import Plan, batch_bytes, identity_of, make_plan, replica_bytes, run_name
from neg_service.cluster.ranking import needs_ranking, ranking_of
from neg_service.config import DatasetConfig, ScanConfig, batch_size, check, check_batch_bytes, typed
from neg_service.errors import ConfigurationError, DestinationError
from neg_service.measures import measure_of
from neg_service.measures.base import Measure
from neg_service.measures.choice import resolved, with_list_read
from neg_service.models.folder import LocalModel
from neg_service.models.inspection import ModelInfo, inspect_model, mask_token_of
from neg_service.models.loading import check_engine_settings, checked_dtype, load_tokenizer
from neg_service.models.source import DEFAULT, fetch
from neg_service.neurons import NeuronSet
from neg_service.places import absolute, below, local_path, parent_of, without_credentials
from neg_service.prompts.encoding import Encode, Encoding, Ids
from neg_service.prompts.mceval8k import as_masked
from neg_service.prompts.prompt import EncodedPrompt, Prompt, check_prompts
from neg_service.prompts.sources import BUILT_IN, load_dataset
from neg_service.prompts.store import PromptFile
from neg_service.prompts.tokens import Skips, encode
from neg_service.schema import SCHEMA_VERSION
from neg_service.storage.reader import Run, open_run
from neg_service.storage.run import fingerprint_of, require_same
from neg_service.storage.stores import open_store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A scan that has been checked as far as is possible without weights and without a cluster."""

    config: ScanConfig
    prompts: Sequence[Prompt]
    encoding: Encoding
    local: LocalModel
    info: ModelInfo
    plan: Plan
    identity: dict[str, Any]
    measure: Measure[Any]
    tables: dict[str, pa.Schema]
    uri: str
    # What has to be asked for to compute any shard again.
    request: dict[str, Any] = field(default_factory=dict)
    # What else run.json should say of it.
    about: dict[str, Any] = field(default_factory=dict)
    # The scan that first finds the neurons of this one.
    ranking: Prepared | None = None

    @property
    def fingerprint(self) -> str:
        """Of what decides the numbers."""
        return fingerprint_of(self.identity)

    @property
    def neurons(self) -> NeuronSet | None:
        """The neurons of a list, which the run keeps; others follow from the configuration, or from each prompt."""
        chosen = self.config.neurons
        return chosen.list if chosen.choose == "list" else None

    @property
    def memory(self) -> int:
        """About what a replica needs, in bytes."""
        return replica_bytes(self.info, self.config.model.dtype, self.plan, batch_size(self.config))


@dataclass(frozen=True)
class _Loaded:
    """Prompts and a model's files. about: what was left out of the data set."""

    prompts: Sequence[Prompt]
    encoding: Encoding
    local: LocalModel
    info: ModelInfo
    about: dict[str, Any]


def prepare(config: ScanConfig) -> Prepared:
    """Check a configuration and plan its scan; nothing is written.

    Raises:
        ConfigurationError: what was asked for cannot be done; one line says why.
    """
    config, place = _resolve(config)
    loaded = _load(config)
    prepared = _plan(config, loaded, place)
    _tell_old_name(config, loaded.info)
    if config.job.resume is not None:
        wanted = open_run(config.job.resume, config.storage.endpoint_url, key="job.resume")
        stored = {"fingerprint": wanted.fingerprint, "identity": wanted.config}
        require_same(wanted.directory.store, stored, prepared.identity)
        prepared = replace(prepared, uri=wanted.uri)
    if needs_ranking(config.neurons):
        prepared = replace(prepared, ranking=_plan(_with_files_read(ranking_of(config)), loaded, place))
    return prepared


def _resolve(config: ScanConfig) -> tuple[ScanConfig, str]:
    """The configuration as replicas and later starts can use it, and the place for results."""
    check(config)
    # Ray unpacks what a job is sent with into a directory of such a name, and runs the job there.
    if Path.cwd().name.startswith("_ray_pkg_"):
        require_lasting(config.storage.uri)
    place = open_store(config.storage.uri, config.storage.endpoint_url).uri
    # Replicas, and a later repair of the run, do not share this process's working directory.
    config = replace(
        config,
        model=replace(config.model, source=_full(config.model.source)),
        dataset=_with_absolute_paths(config.dataset),
    )
    checked_dtype(config.model.dtype)
    check_engine_settings(config.model)
    return _with_files_read(config), place


def _with_files_read(config: ScanConfig) -> ScanConfig:
    """With the measure's options complete, and the content of files that options name in the place of the names."""
    config = replace(config, measure=measure_of(config.measure).with_files_read().configuration())
    return replace(config, neurons=with_list_read(config.neurons))


def _load(config: ScanConfig) -> _Loaded:
    """The data set and the model's files, without weights; encoded where that decides what stays."""
    prompts: Sequence[Prompt] = load_dataset(config.dataset, config.job.limit)
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
            f"its prompts have masks to fill, and {info.name} ({info.architecture}) is a causal model: use "
            "dataset=facts",
            setting="dataset.source",
            value="facts-masked",
        )
    if config.dataset.task is not None and info.is_masked:
        prompts = [as_masked(prompt) for prompt in prompts]
    skips = Skips(config.dataset.not_one_token == "skip", config.dataset.too_long == "skip")
    encode_with = _encoder(local, info, config, skips)
    if not (skips.not_one_token or skips.too_long):
        return _Loaded(prompts, Encoding(prompts, encode_with), local, info, {})
    ids = Ids()

    def kept_prompts() -> Iterator[Prompt]:
        for encoded in encode_with(prompts):
            ids.append(encoded.ids, encoded.target_ids, encoded.following)
            yield encoded.prompt

    kept = PromptFile(kept_prompts())
    about = _tell_skipped(skips, len(prompts), info)
    return _Loaded(kept, Encoding(kept, encode_with, ids), local, info, about)


def _encoder(local: LocalModel, info: ModelInfo, config: ScanConfig, skips: Skips) -> Encode:
    """Encodes prompts for a model, whose tokenizer is loaded when the first are asked for."""
    tokenizer = cache(partial(tokenizer_of, local, info, config))

    def encode_with(prompts: Iterable[Prompt]) -> Iterator[EncodedPrompt]:
        loaded, mask_token = tokenizer()
        return encode(
            loaded, prompts, info.context_length, mask_token, model=info, skips=skips,
            sequences=config.dataset.not_one_token == "sequence",
        )  # fmt: skip

    return encode_with


def _plan(config: ScanConfig, loaded: _Loaded, place: str) -> Prepared:
    """What the scan will do, and what identifies it."""
    prompts, info = loaded.prompts, loaded.info
    measure = measure_of(config.measure)
    measure.check_targets(info, config.dataset.not_one_token)
    measure.validate(info, config.neurons, prompts)
    config = replace(config, neurons=resolved(config.neurons, info.layer_neurons))
    asked = batch_size(config)
    if asked.value is not None and asked.unit == "bytes":
        check_batch_bytes(asked.key, asked.value, measure.least_batch_bytes(info))
    n_targets = sum(len(prompt.targets) for prompt in prompts) / len(prompts)
    plan = make_plan(prompts, measure.cost(info, config.neurons, n_targets), config.job.shard_size)
    identity = identity_of(config, info, measure.fingerprint_inputs(), prompts, plan)
    name = run_name(config, info, str(config.measure["name"]))
    return Prepared(
        config=config,
        prompts=prompts,
        encoding=loaded.encoding,
        local=loaded.local,
        info=info,
        plan=plan,
        identity=identity,
        measure=measure,
        tables=measure.schemas(info),
        about=loaded.about,
        uri=below(place, f"{name}-{fingerprint_of(identity)}"),
        request=_request(config),
    )


def _tell_old_name(config: ScanConfig, info: ModelInfo) -> None:
    """Say once how an old name of a setting is called by now, and what it is."""
    asked = batch_size(config)
    if asked.is_by_old_name:
        log.warning(
            "%s=%s is called cluster.batch_bytes by now: use about cluster.batch_bytes=%d",
            asked.key, asked.value, batch_bytes(info, config.model.dtype, asked),
        )  # fmt: skip


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
            "would lie in the job's own directory, which goes when the job does: give s3://bucket/prefix, or an "
            "absolute path that all nodes share",
            setting="storage.uri",
            value=uri,
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
    if run.is_of_former_names:
        raise DestinationError(
            f"{run.uri}: was stored by an earlier version (schema {run.config.get('schema_version')}; this one writes "
            f"{SCHEMA_VERSION}), which alone computes its parts again; this one reads them: run its scan again"
        )
    asked, fresh = typed(ScanConfig, run.request), ScanConfig()
    asked.model.device = config.model.device
    if asked.neurons.choose == "list":
        asked.neurons.list = _neurons_of(run, asked.neurons.list)
    if config.model.source != fresh.model.source:
        asked.model.source = config.model.source
    if config.dataset.source != fresh.dataset.source:
        asked.dataset.source = config.dataset.source
    # A run that fills a bucket has no folder; nothing else is put there than the run itself.
    parent = parent_of(run.uri) or run.uri
    job = replace(asked.job, resume=run.uri, progress_seconds=config.job.progress_seconds)
    return prepare(replace(asked, cluster=config.cluster, storage=replace(config.storage, uri=parent), job=job))


def _neurons_of(run: Run, source: Any) -> Any:
    """The neurons of a run with a list; where they are lost, where they came from: others have another digest."""
    try:
        return run.listed_neurons()
    except DestinationError:
        if not isinstance(source, str):
            raise
        return source


def _request(config: ScanConfig) -> dict[str, Any]:
    """What was asked for, without how it is run; credentials in a URL are not kept, neurons in a file of their own."""
    listed = config.neurons.list
    source = (listed.source or None) if isinstance(listed, NeuronSet) else listed
    job = {"name": config.job.name, "limit": config.job.limit, "shard_size": config.job.shard_size}
    return {
        "model": {key: value for key, value in asdict(config.model).items() if key != "device"},
        "dataset": to_be_stored(config.dataset),
        # An old name that says nothing is not to be kept.
        "measure": {key: value for key, value in config.measure.items() if (key, value) != ("batch_bytes", None)},
        "neurons": asdict(replace(config.neurons, list=source)),
        "job": job,
    }


def to_be_stored(dataset: DatasetConfig) -> dict[str, Any]:
    """The settings of a data set without what only reading it needed."""
    templates = None if dataset.templates is None else without_credentials(dataset.templates)
    return asdict(replace(dataset, source=without_credentials(dataset.source), templates=templates))


def _tell_skipped(skips: Skips, n_prompts: int, info: ModelInfo) -> dict[str, Any]:
    """Log what was left out of a data set, and give it for run.json.

    Raises:
        ConfigurationError: nothing is left.
    """
    about: dict[str, Any] = {}
    if skips.not_one_token:
        about |= {"skipped_not_one_token": skips.n_not_one_token, "skipped_targets": skips.n_targets}
        if skips.n_not_one_token or skips.n_targets:
            log.info(
                "skipping %d of %d prompts, whose answers are not one token of the model, and %d targets of others",
                skips.n_not_one_token, n_prompts, skips.n_targets,
            )  # fmt: skip
        if skips.n_not_one_token == n_prompts:
            raise ConfigurationError(
                f"none of {n_prompts} prompts has an answer that is one token of the model: check dataset.source",
                change="dataset.source",
            )
    n_prompts -= skips.n_not_one_token
    if skips.too_long:
        about |= {"skipped_too_long": skips.n_too_long}
        if skips.n_too_long:
            log.info(
                "skipping %d of %d prompts, which have more than the %s tokens of the model's context, the first is %r",
                skips.n_too_long, n_prompts, info.context_length, skips.first_too_long,
            )  # fmt: skip
        if skips.n_too_long == n_prompts:
            raise ConfigurationError(
                f"all {n_prompts} prompts have more than the {info.context_length} tokens of the model's context: "
                "shorten them, or choose another model.source",
                change="model.source",
            )
    return about


def _with_absolute_paths(dataset: DatasetConfig) -> DatasetConfig:
    templates = None if dataset.templates is None else absolute(dataset.templates)
    return replace(dataset, source=_full(dataset.source), templates=templates)


def _full(source: str) -> str:
    return source if source in (DEFAULT, *BUILT_IN) else absolute(source)
