"""The typed configuration of a scan, and the one place where Hydra's objects become dataclasses.

Hydra composes `conf/`; `typed` turns what comes out into these dataclasses and refuses unknown keys and wrong types;
nothing after it knows Hydra. Science (model, dataset, measure, neurons) decides the numbers and so a run's
fingerprint; operations (cluster, storage, job) only how they are made. The options of a measure are a dataclass of
that measure's own file, so that a new measure changes nothing here.

Fields that hold `auto` or a number, or one name or several, are typed Any, because OmegaConf knows no unions; `check`
narrows them, and `holds` says the type of those that are text, which the command line then keeps as it was typed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from neg_service.errors import ConfigurationError

T = TypeVar("T")


def holds(kind: Any) -> dict[str, Any]:
    """Metadata of a field that is Any to OmegaConf: what its values are of, for those who want to know."""
    return {"holds": kind}


def types_of(cls: type[Any]) -> dict[str, Any]:
    """The types of a dataclass's fields, with what `holds` says of them."""
    hints = get_type_hints(cls)
    return {own.name: own.metadata.get("holds", hints[own.name]) for own in fields(cls)}


@dataclass
class ModelConfig:
    """Which model, in which precision; see `load_model`."""

    source: str = "smollm2"
    revision: str | None = None
    dtype: str = "float32"
    device: Any = field(default="auto", metadata=holds(str | list[str]))
    trust_remote_code: bool = False


@dataclass
class DatasetConfig:
    """Which prompts: `facts`, a JSONL, Parquet or CSV file at any fsspec URI, or tasks of MCEval8K.

    too_long: what happens to prompts beyond the model's context: `error`, or `skip`, which counts them. not_one_token:
    what happens to targets that are not one token of the model after their prompt: `error`, or `skip`, which leaves
    them out, and prompts whose answer is one, and counts both. ids: of the prompts to take, in the order of the data
    set; all if not given.

    Of a file, columns: what it calls `prompt`, `targets`, `answer`, `id` and `group`, where that is something else.
    choices: how many targets a row with an answer and no targets gets: the answer, and answers of other rows, drawn
    with `seed` from those of the same group first. group_until: what ends a group's name in its column. answer_prefix:
    what stands between a prompt and such a target, unless the prompt ends with a space.

    With `task`, `source` is the hub's or a directory's MCEval8K (`prompts/mceval8k.py`), and the rest says how its rows
    become prompts. task: one, a list, or `all`. split: one or a list. limit: rows of each task and split. balanced:
    `down` or `up` to the same number of rows a label. seed: of the order in which rows are drawn. shots: demonstrations
    a label; demonstration_seed: which ones. wording: its name; wordings: a .toml file of one's own. language: of the
    words around the rows, or `auto`: each row's own. languages: rows of these only.
    """

    source: str = "facts"
    too_long: str = "error"
    not_one_token: str = "error"
    ids: Any = field(default=None, metadata=holds(str | list[str] | None))
    columns: Any = field(default=None, metadata=holds(dict[str, str] | None))
    choices: int = 4
    group_until: str | None = None
    answer_prefix: str = " "
    task: Any = field(default=None, metadata=holds(str | list[str] | None))
    split: Any = field(default="valid", metadata=holds(str | list[str]))
    limit: int | None = None
    balanced: str | None = None
    seed: int = 0
    shots: int = 1
    demonstration_seed: int = 0
    wording: str = "default"
    wordings: str | None = None
    language: str = "auto"
    languages: Any = field(default=None, metadata=holds(str | list[str] | None))


@dataclass
class NeuronsConfig:
    """Which neurons of which layers; see `measures/choice.py`.

    layers: `all` or a list of layer numbers from 0. choose: `all`, `sample`, `top` or `list`. count: how many, for
    sample and top. per: sample so many of each `layer`, or of the whole `model`. seed: of the sample. over: rank
    neurons for each `prompt`, or once over the `dataset`. list: (layer, index) pairs, or a file of them.
    """

    layers: Any = "all"
    choose: str = "all"
    count: int = 0
    per: str = "layer"
    seed: int = 0
    over: str = "prompt"
    list: Any = field(default=None, metadata=holds(str | list[list[int]] | None))


@dataclass
class ClusterConfig:
    """How the work is spread. `auto` fits the cluster; `address` empty means `$RAY_ADDRESS`, else a local Ray.

    connect_seconds: how long a cluster may take to answer when it is joined.
    replicas: `{max: N}`, or N alone: at most so many; auto: as many as there is room for, also as nodes come and go.
    wait_seconds: how long to wait for a node on which a replica fits, which an autoscaler is asked for. start_seconds:
    how long a replica may take to load its model.
    stall_seconds: after how long a silence a replica is replaced; auto: ten times the median of a shard, at least 120.
    unreachable_seconds: for how long a replica that cannot be reached is asked again before it is replaced.
    """

    address: str | None = None
    connect_seconds: float = 60.0
    replicas: Any = "auto"
    cpus_per_replica: Any = "auto"
    gpus_per_replica: Any = "auto"
    batch_tokens: Any = "auto"
    attempts: int = 3
    wait_seconds: float = 0.0
    start_seconds: float = 3600.0
    stall_seconds: Any = "auto"
    unreachable_seconds: float = 120.0


@dataclass
class StorageConfig:
    """Where results go: a local directory or s3://bucket/prefix. Credentials come from the environment alone.

    patience_seconds: for how long a store that fails in a way that may pass is tried again, each time.
    """

    uri: str = "results"
    endpoint_url: str | None = None
    patience_seconds: float = 600.0


@dataclass
class JobConfig:
    """How this command behaves. `shard_size` is part of a run's identity; `auto` depends on the results' size.

    resume: the URI of the run that is to be continued; anything that would make it another run is refused.
    log: `text` for a person, or `json`: an object a line. traceback: show where an unexpected error came from.
    """

    name: str | None = None
    limit: int | None = None
    shard_size: Any = "auto"
    resume: str | None = None
    dry_run: bool = False
    progress_seconds: float = 10.0
    log: str = "text"
    traceback: bool = False


@dataclass
class ScanConfig:
    """Everything that `python -m jobs.scan` is told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    measure: dict[str, Any] = field(default_factory=lambda: {"name": "neurgrad"})
    neurons: NeuronsConfig = field(default_factory=NeuronsConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    job: JobConfig = field(default_factory=JobConfig)


def typed(cls: type[T], values: Any, where: str = "") -> T:
    """An instance of the dataclass `cls` from Hydra's configuration or a plain mapping; keys not given keep defaults.

    Raises:
        ConfigurationError: an unknown key, a wrong type, or a value that is missing, by its full key.
    """
    try:
        given = OmegaConf.create(values)
        # A merge would silently keep the default where `???` asks for a value.
        if missing := sorted(OmegaConf.missing_keys(given)):
            raise ConfigurationError(f"{where}{'.' if where else ''}{missing[0]}: has no value; give one")
        merged = OmegaConf.merge(OmegaConf.structured(cls), given)
        result = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = ".".join(part for part in (where, error.full_key) if part)
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"{key or 'configuration'}: {reason}") from error
    assert isinstance(result, cls)
    return result


def check(config: ScanConfig) -> None:
    """Refuse values that no cluster and no model could make sense of.

    Raises:
        ConfigurationError: naming the key, its value, and what it may be.
    """
    replicas = "cluster.replicas" + ".max" * isinstance(config.cluster.replicas, Mapping)
    at_least_one = {
        replicas: most_replicas(config.cluster),
        "cluster.batch_tokens": config.cluster.batch_tokens,
        "job.shard_size": config.job.shard_size,
    }
    for key, value in at_least_one.items():
        if value != "auto" and not (_is_whole(value) and value >= 1):
            raise ConfigurationError(f"{key}={value}: must be auto or a whole number, at least 1")
    for key, value, least in (
        ("cluster.cpus_per_replica", config.cluster.cpus_per_replica, 1),
        ("cluster.gpus_per_replica", config.cluster.gpus_per_replica, 0),
        ("cluster.stall_seconds", config.cluster.stall_seconds, 1),
    ):
        if value != "auto" and not (isinstance(value, int | float) and value >= least):
            raise ConfigurationError(f"{key}={value}: must be auto or a number, at least {least}")
    for key, value in (("too_long", config.dataset.too_long), ("not_one_token", config.dataset.not_one_token)):
        if value not in ("error", "skip"):
            raise ConfigurationError(f"dataset.{key}={value}: must be error or skip")
    if config.job.log not in ("text", "json"):
        raise ConfigurationError(f"job.log={config.job.log}: must be text or json")
    for key, seconds in (
        ("storage.patience_seconds", config.storage.patience_seconds),
        ("cluster.wait_seconds", config.cluster.wait_seconds),
        ("cluster.connect_seconds", config.cluster.connect_seconds),
        ("cluster.start_seconds", config.cluster.start_seconds),
        ("cluster.unreachable_seconds", config.cluster.unreachable_seconds),
    ):
        if seconds < 0:
            raise ConfigurationError(f"{key}={seconds}: must not be negative")
    for key, number in (("job.limit", config.job.limit), ("cluster.attempts", config.cluster.attempts)):
        if number is not None and number < 1:
            raise ConfigurationError(f"{key}={number}: must be at least 1")


def most_replicas(cluster: ClusterConfig) -> Any:
    """`cluster.replicas.max`: a number, or auto.

    Raises:
        ConfigurationError: something else than max is set.
    """
    replicas = cluster.replicas
    if not isinstance(replicas, Mapping):
        return replicas
    if unknown := sorted(set(replicas) - {"max"}):
        raise ConfigurationError(f"cluster.replicas.{unknown[0]}: there is only cluster.replicas.max")
    return replicas.get("max", "auto")


def checked_layers(neurons: NeuronsConfig, n_layers: int) -> list[int]:
    """The chosen layers of a model with `n_layers`, in ascending order.

    Raises:
        ConfigurationError: no layers, a layer that does not exist, or one named twice.
    """
    if neurons.layers == "all":
        return list(range(n_layers))
    layers = neurons.layers
    if isinstance(layers, int):
        layers = [layers]
    if not isinstance(layers, list) or not layers or not all(_is_whole(layer) for layer in layers):
        raise ConfigurationError(f"neurons.layers={layers}: must be all or a list of layer numbers such as [0,5]")
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise ConfigurationError(
                f"neurons.layers={layers}: layer {layer} does not exist; the model has layers 0 to {n_layers - 1}"
            )
    if len(set(layers)) < len(layers):
        raise ConfigurationError(f"neurons.layers={layers}: a layer is named twice")
    return sorted(layers)


def device_names(device: Any) -> list[str]:
    """The devices of `model.device`: a name, several with commas between them, or a list as Hydra reads one."""
    several = device.split(",") if isinstance(device, str) else device if isinstance(device, list | tuple) else [device]
    return [str(name).strip() for name in several]


def plain(values: Any) -> dict[str, Any]:
    """Hydra's configuration, or any mapping, as plain dictionaries and lists."""
    if isinstance(values, Mapping) and not OmegaConf.is_config(values):
        return dict(values)
    result = OmegaConf.to_container(values, resolve=True)
    assert isinstance(result, dict)
    return {str(key): value for key, value in result.items()}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
