"""A scan before it begins, in stages: resolve what was asked for, load the data, encode it, plan; nothing is written.

The order is deliberate: all that can be refused is refused here, before Ray starts and before a model's weights are
touched. Prompts are encoded once: here where settings leave some out, which decides the plan; else when the run starts,
which is told of all mistakes at once, and where it goes on, when it is a shard's turn. What was asked for is kept with
the run, so that it can be planned once more from its URI alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from neg_service.batch_size import batch_size, check_batch_bytes
from neg_service.cluster import extension
from neg_service.cluster.inputs import Loaded, load
from neg_service.cluster.lineage_place import require_lasting_place, require_place_of_events
from neg_service.cluster.plan import Plan, batch_bytes, identity_of, make_plan, replica_bytes, run_name
from neg_service.cluster.ranking import needs_ranking, ranking_of
from neg_service.cluster.shard_size import automatic_shard_size, plans_for_accelerator
from neg_service.config import DatasetConfig, ScanConfig, check, device_names, typed
from neg_service.errors import ConfigurationError, DestinationError
from neg_service.measures import measure_of
from neg_service.measures.base import Measure
from neg_service.measures.choice import resolved, with_list_read
from neg_service.models.folder import LocalModel
from neg_service.models.inspection import ModelInfo
from neg_service.models.loading import check_engine_settings, checked_dtype
from neg_service.models.source import DEFAULT
from neg_service.neurons import NeuronSet
from neg_service.places import absolute, below, local_path, parent_of, without_credentials
from neg_service.prompts.chat import template_text
from neg_service.prompts.encoding import Encoding
from neg_service.prompts.facts import BUILT_IN
from neg_service.prompts.prompt import Prompt
from neg_service.schema import SCHEMA_VERSION
from neg_service.storage.extension import identity_of_extension
from neg_service.storage.reader import Run, open_run
from neg_service.storage.run import fingerprint_of, require_same
from neg_service.storage.stores import open_store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A scan that has been checked as far as is possible without weights and without a cluster."""

    config: ScanConfig
    # Those to compute: of a run that extends another one, what comes behind the other's.
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
    # The run that is extended.
    base: Run | None = None

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


def prepare(config: ScanConfig, at_most: int | None = None) -> Prepared:
    """Check a configuration and plan its scan; nothing is written.

    `at_most`: so many prompts, counted after all settings have left out theirs.

    Raises:
        ConfigurationError: what was asked for cannot be done; one line says why.
    """
    config, place = _resolve(config)
    wanted, base = None, None
    if config.job.resume is not None:
        wanted = open_run(config.job.resume, config.storage.endpoint_url, key="job.resume")
    if extended := config.job.extend or (wanted and wanted.base and wanted.base.uri):
        base = extension.opened_base(config, extended)
        config = replace(config, job=replace(config.job, extend=base.uri))
    loaded = load(config, base, at_most)
    config = replace(config, measure=measure_of(config.measure).of_prompts(loaded.prompts).configuration())
    prepared = _plan(config, loaded, place, base, wanted)
    _tell_old_name(config, loaded.info)
    if wanted is not None:
        stored = {"fingerprint": wanted.fingerprint, "identity": wanted.config}
        require_same(wanted.directory.store, stored, prepared.identity)
        prepared = replace(prepared, uri=wanted.uri)
    if needs_ranking(config.neurons):
        ranked = None if wanted is None else _ranking_before(wanted, config)
        prepared = replace(prepared, ranking=_plan(_with_files_read(ranking_of(config)), loaded, place, like=ranked))
    return prepared


def _resolve(config: ScanConfig) -> tuple[ScanConfig, str]:
    """The configuration as replicas and later starts can use it, and the place for results."""
    check(config)
    require_place_of_events(config.job.lineage)
    # Ray unpacks what a job is sent with into a directory of such a name, and runs the job there.
    if Path.cwd().name.startswith("_ray_pkg_"):
        require_lasting(config.storage.uri)
        require_lasting_place(config.job.lineage)
    place = open_store(config.storage.uri, config.storage.endpoint_url).uri
    # Replicas, and a later repair of the run, do not share this process's working directory.
    config = replace(
        config,
        model=replace(config.model, source=_full(config.model.source)),
        dataset=_with_full_paths(config.dataset),
    )
    checked_dtype(config.model.dtype)
    check_engine_settings(config.model)
    return _with_files_read(config), place


def _with_files_read(config: ScanConfig) -> ScanConfig:
    """With the measure's options complete, and the content of files that options name in the place of the names."""
    config = replace(config, measure=measure_of(config.measure).with_files_read().configuration())
    return replace(config, neurons=with_list_read(config.neurons))


def _ranking_before(run: Run, config: ScanConfig) -> Run | None:
    """The ranking of a run that goes on, where it can still be read; else its neurons are ranked anew."""
    try:
        return open_run(str(run.about["ranked_by"]), config.storage.endpoint_url)
    except (KeyError, DestinationError):
        return None


def _plan(config: ScanConfig, loaded: Loaded, place: str, base: Run | None = None, like: Run | None = None) -> Prepared:
    """What the scan will do, and what identifies it; `like`: the run that goes on.

    Where it is left to the plan, a shard is as large as in a run that there is: by other rules that one began.
    """
    prompts, info = loaded.added, loaded.info
    measure = measure_of(config.measure)
    measure.check_targets(info, config.dataset.not_one_token)
    measure.check_places(prompts)
    measure.validate(info, config.neurons, loaded.prompts)
    config = replace(config, neurons=resolved(config.neurons, info.layer_neurons))
    asked = batch_size(config)
    if asked.value is not None and asked.unit == "bytes":
        check_batch_bytes(asked.key, asked.value, measure.least_batch_bytes(info))
    n_targets = sum(len(prompt.targets) for prompt in prompts) / len(prompts)
    cost, shard_size, about = measure.cost(info, config.neurons, n_targets), config.job.shard_size, loaded.about
    extends, first_shard = None, 0
    if base is not None:
        extends, first_shard = identity_of_extension(base.fingerprint, base.config), base.n_shards
    if shard_size == "auto":
        before = base or like
        shard_size = (
            automatic_shard_size(prompts, info, cost, plans_for_accelerator(config, info))
            if before is None
            else before.config["plan"]["shard_size"]
        )
    plan = make_plan(prompts, cost, shard_size, first_shard)
    inputs = measure.fingerprint_inputs()
    identity = identity_of(config, info, inputs, loaded.prompts, plan, loaded.identity, extends)
    if base is not None:
        extension.require_settings_of(base, identity)
        about = about | extension.calibration_for(base, measure)
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
        tables=measure.schemas(info, has_messages=prompts[0].messages is not None),
        about=about,
        base=base,
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


def tell_of_better_shards(prepared: Prepared, *, has_accelerator: bool) -> None:
    """Say once where shards were sized for replicas with an accelerator and these have none, or the other way round."""
    job, plan = prepared.config.job, prepared.plan
    is_named = device_names(prepared.config.model.device) != ["auto"]
    if job.shard_size != "auto" or job.resume is not None or job.extend is not None or is_named:
        return
    cost = prepared.measure.cost(prepared.info, prepared.config.neurons, plan.n_targets / plan.n_prompts)
    better = automatic_shard_size(prepared.prompts, prepared.info, cost, has_accelerator)
    if better != plan.shard_size:
        kinds = ("without an accelerator", "with one") if has_accelerator else ("with an accelerator", "without one")
        log.info(
            "shards of %d prompts are sized for replicas %s, and these are %s: cluster.gpus_per_replica=%d begins "
            "another run, with shards of %d",
            plan.shard_size, *kinds, has_accelerator, better,
        )  # fmt: skip


def require_lasting(uri: str, key: str = "storage.uri") -> None:
    """Refuse a place for results, which `key` names, that goes when a submitted job does.

    Raises:
        ConfigurationError: a relative path.
    """
    path = local_path(uri, key, DestinationError)
    if path is not None and not Path(path).is_absolute():
        raise ConfigurationError(
            "would lie in the job's own directory, which goes when the job does: give s3://bucket/prefix, or an "
            "absolute path that all nodes share",
            setting=key,
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
    asked.model.device, asked.model.self_check = config.model.device, config.model.self_check
    if asked.neurons.choose == "list":
        asked.neurons.list = _neurons_of(run, asked.neurons.list)
    if config.model.source != fresh.model.source:
        asked.model.source = config.model.source
    if config.dataset.source != fresh.dataset.source:
        asked.dataset.source = config.dataset.source
    # A run that fills a bucket has no folder; nothing else is put there than the run itself.
    parent = parent_of(run.uri) or run.uri
    extend = run.base.uri if run.base else None
    job = replace(asked.job, resume=run.uri, extend=extend, progress_seconds=config.job.progress_seconds)
    again = replace(asked, cluster=config.cluster, storage=replace(config.storage, uri=parent), job=job)
    # Its file may have got more rows since, perhaps for a run that extends this one.
    return prepare(again, at_most=run.n_prompts)


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
    if config.job.extend is not None:
        job["extend"] = config.job.extend
    return {
        "model": {key: value for key, value in asdict(config.model).items() if key not in ("device", "self_check")},
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


def _with_full_paths(dataset: DatasetConfig) -> DatasetConfig:
    templates = None if dataset.templates is None else absolute(dataset.templates)
    # Of a small file the content is kept, so that the run can be planned again without it.
    template = None if dataset.chat_template is None else template_text(dataset.chat_template)
    return replace(dataset, source=_full(dataset.source), templates=templates, chat_template=template)


def _full(source: str) -> str:
    return source if source in (DEFAULT, *BUILT_IN) else absolute(source)
