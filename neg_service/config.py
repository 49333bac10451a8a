"""The typed configuration of a scan, and the one place where Hydra's objects become dataclasses.

Hydra composes `conf/`; `typed` turns what comes out into these dataclasses and refuses unknown keys and wrong types;
nothing after it knows Hydra. Science (model, dataset, measure, neurons) decides the numbers and so a run's
fingerprint; operations (cluster, storage, job) only how they are made. The options of a measure are a dataclass of
that measure's own file, so that a new measure changes nothing here.

Fields that hold `auto` or a number, or one name or several, are typed Any, because OmegaConf knows no unions; `check`
narrows them, and `kind` says the type of those that are text, which the command line then keeps as it was typed. What
a field says of itself: `settings.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from neg_service.errors import ConfigurationError
from neg_service.settings import check_fields, must_be, setting

T = TypeVar("T")
_AUTO = ("auto",)


@dataclass
class ModelConfig:
    """Which model, in which precision; see `load_model`."""

    source: str = setting("smollm2", "`smollm2`, a hub id, a directory with safetensors, or a `.gguf` file")
    revision: str | None = setting(None, "branch, tag or commit of a hub id")
    dtype: str = setting(
        "float32", "precision of weights and passes", allowed=("float32", "float64", "bfloat16", "float16")
    )
    device: Any = setting(
        "auto", "`auto`, `cpu`, `cuda`, or several that share the layers: `[cuda:0,cuda:1]`", kind=str | list[str]
    )
    trust_remote_code: bool = setting(False, "run Python code that comes with the model")
    cpu_product: str = setting(
        "auto",
        "what multiplies matrices in float32 on a CPU; `auto`: PyTorch's own way, or oneDNN where it is measured to be "
        "clearly faster",
        allowed=("auto", "torch", "onednn"),
    )
    engine: str = setting(
        "auto",
        "how rows of prompts are run: the best that fits the model, or one of `neg_service/models/README.md`",
        allowed=(
            "auto", "differences", "shared_prefix", "kv_cache", "recurrent_state", "full_sequence",
            "full_sequence_unpadded",
        ),
    )  # fmt: skip
    products: str = setting(
        "exact",
        "how NEG's differences are multiplied with weights in bfloat16: with float32's digits, or rounded to bfloat16",
        allowed=("exact", "fast"),
    )
    self_check: str = setting(
        "remembered",
        "whether a self-check counts that was passed before with the same weights, software and processor",
        allowed=("remembered", "always"),
    )


@dataclass
class DatasetConfig:
    """Which prompts: `facts`, a JSONL, Parquet or CSV file at any fsspec URI, the hub's, or tasks of MCEval8K.

    With `task`, `source` is the hub's or a directory's MCEval8K (`prompts/mceval8k.py`), and `limit` and what follows
    say how its rows become prompts.
    """

    source: str = setting(
        "facts",
        "`facts`, `facts-masked` (for masked models); a `.jsonl`, `.parquet` or `.csv` file, path or URI; or a data "
        "set of the hub, `OWNER/NAME` or `OWNER/NAME@REVISION`, or a folder with its files",
    )
    too_long: str = setting(
        "error", "prompts beyond the model's context: refuse, or leave out and count", allowed=("error", "skip")
    )
    not_one_token: str = setting(
        "error",
        "targets that are not one token after their prompt: refuse; leave out and count them, and prompts whose "
        "answer is one; or read them token by token: their probability is the product over their tokens",
        allowed=("error", "skip", "sequence"),
    )
    ids: Any = setting(None, "only the prompts of these ids, in the order of the data set", kind=str | list[str] | None)
    columns: Any = setting(
        None,
        "what a file calls `prompt`, `messages`, `targets`, `answer`, `id` and `group`, such as `{id: uuid}`; `''` of "
        "one that is not to be read",
        kind=dict[str, str] | None,
    )
    chat: bool = setting(False, "put each prompt into the model's chat template, as one message of the user")
    chat_template: str | None = setting(
        None, "a Jinja file, path or URI, or the text of a chat template itself, in the place of the model's own"
    )
    chat_arguments: Any = setting(
        None, "what else the chat template is told, such as `{enable_thinking: false}`", kind=dict[str, Any] | None
    )
    subset: str | None = setting(None, "which subset of a data set of the hub, where it has several")
    choices: int = setting(
        4, "of a file's rows with an answer and no targets: how many targets, of which one is the answer"
    )
    group_until: str | None = setting(None, "what ends a group's name in its column")
    answer_prefix: str = setting(
        " ", "between a prompt and such a target, unless the prompt ends with a space; `''` for masked models"
    )
    target_prefix: str = setting("", "of a file's targets: what stands before each, such as a space")
    answer_is: str = setting(
        "text", "a row's answer: one of its targets; or their index from 0", allowed=("text", "index")
    )
    task: Any = setting(None, "tasks of MCEval8K: one, a list, or `all`", kind=str | list[str] | None)
    split: Any = setting(
        None,
        "of tasks: one or a list, `valid` if not given; of a data set of the hub: one, where it has several",
        kind=str | list[str] | None,
    )
    limit: int | None = setting(None, "rows of each task and split")
    balanced: str | None = setting(
        None, "the same number of rows for each label, by drawing fewer or more", allowed=("down", "up")
    )
    seed: int = setting(0, "of the answers that are drawn as targets, and of the order of a task's rows")
    shots: int = setting(1, "demonstrations for each label of a task")
    demonstration_seed: int = setting(0, "which demonstrations")
    template: str = setting("default", "the name of a prompt template of the task")
    templates: str | None = setting(
        None, "a `.toml` file of your own templates, or a folder with a `TASK.toml` for each"
    )
    language: str = setting("auto", "of the words around a task's rows; `auto`: each row's own")
    languages: Any = setting(None, "rows of these languages only", kind=str | list[str] | None)


@dataclass
class NeuronsConfig:
    """Which neurons of which layers; see `measures/choice.py`."""

    layers: Any = setting("all", "`all`, or a list of layers from 0: `[0,15,29]`")
    choose: str = setting("all", "which neurons of these layers", allowed=("all", "sample", "top", "list"))
    count: int = setting(0, "how many, for `sample` and `top`")
    per: str = setting(
        "layer", "`sample`: so many of each MLP and expert, or of the whole model", allowed=("layer", "model")
    )
    seed: int = setting(0, "of the sample", least=0)
    over: str = setting(
        "prompt", "`top`: rank for each prompt, or once over the data set", allowed=("prompt", "dataset")
    )
    list: Any = setting(
        None,
        "`[[29,864],...]`, or a `.csv`, `.jsonl` or `.parquet` file, or the folder of a table of results, with the "
        "columns `layer`, `neuron` and, where a model has experts, `expert`; programs also give a `NeuronSet`",
        kind=str | list[list[int]] | None,
    )


@dataclass
class ClusterConfig:
    """How the work is spread. `auto` fits the cluster; `address` empty means `$RAY_ADDRESS`, else a local Ray."""

    address: str | None = setting(None, "a Ray cluster; `$RAY_ADDRESS` if not given, else Ray on this machine")
    connect_seconds: float = setting(60.0, "how long a cluster may take to answer when it is joined", least=0)
    replicas: Any = setting(
        "auto",
        "`cluster.replicas.max`: at most so many; `auto`: as many as there is room for, also as nodes come and go",
        allowed=_AUTO,
        least=1,
        is_whole=True,
    )
    cpus_per_replica: Any = setting(
        "auto",
        "also a replica's torch threads; on CPUs that others use too, 1 is often fastest",
        allowed=_AUTO,
        least=1,
    )
    gpus_per_replica: Any = setting(
        "auto", "0.25 puts four replicas on a GPU, 4 spreads the layers of one over four", allowed=_AUTO, least=0
    )
    batch_bytes: Any = setting(
        "auto",
        "memory that a batch may take; halved by itself when memory ends, and recovers; never changes the results; "
        "`auto`: what keeps the device busy, and no more than half of what it has free",
        allowed=_AUTO,
        least=1,
        is_whole=True,
    )
    batch_tokens: Any = setting(
        None, "the old name of `cluster.batch_bytes`, in tokens", allowed=_AUTO, least=1, is_whole=True
    )
    attempts: int = setting(3, "how often a shard may fail before it is quarantined", least=1)
    wait_seconds: float = setting(
        0.0, "how long to wait for a node on which a replica fits, which an autoscaler is asked for", least=0
    )
    start_seconds: float = setting(3600.0, "how long a replica may take to load its model", least=0)
    stall_seconds: Any = setting(
        "auto",
        "how long a replica may be silent before it is replaced; `auto`: ten times the median shard so far, at "
        "least 120, from the fifth shard on",
        allowed=_AUTO,
        least=1,
    )
    unreachable_seconds: float = setting(
        120.0, "how long a replica that cannot be reached is asked again before it is replaced", least=0
    )


@dataclass
class StorageConfig:
    """Where results go. Credentials come from the environment alone."""

    uri: str = setting("results", "a directory, or `s3://bucket/prefix` with credentials from the environment")
    endpoint_url: str | None = setting(None, "of an S3 server that is not Amazon's")
    retry_timeout_seconds: float = setting(
        600.0, "how long a store that fails in a way that may pass is tried again, each time", least=0
    )


@dataclass
class JobConfig:
    """How this command behaves."""

    name: str | None = setting(
        None, "what people see before the fingerprint; from model, data set and measure if not given"
    )
    limit: int | None = setting(None, "only the first so many prompts, for a trial", least=1)
    shard_size: Any = setting(
        "auto",
        "prompts of a shard, which is part of a run's identity; `auto`: about half a minute of a replica's work, and "
        "at most 64 MiB of results",
        allowed=_AUTO,
        least=1,
        is_whole=True,
    )
    resume: str | None = setting(None, "the URI of a run: refuse anything that would begin another one")
    extend: str | None = setting(
        None, "the URI of a finished run whose prompts come first in the data set: keep them, compute only the others"
    )
    dry_run: bool = setting(False, "print the plan and do nothing")
    forecast: bool = setting(
        False, "measure a small sample, say what the whole scan will take in hours, bytes and money, and store nothing"
    )
    price_per_hour: float | None = setting(
        None, "of `job.forecast`: the price of one replica for one hour, in any currency", least=0
    )
    lineage: str | None = setting(
        None, "where OpenLineage events of a scan go: an http(s) URL, or a file that they are added to"
    )
    progress_seconds: float = setting(10.0, "between progress lines where there is no terminal", least=0)
    log: str = setting(
        "text", "`json`: an object a line, with run, replica and shard, on stderr", allowed=("text", "json")
    )
    traceback: bool = setting(False, "show where an unexpected error came from, in the place of a file that holds it")


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


# What OmegaConf calls the kinds of values.
_KINDS = {"bool": "true or false", "Integer": "a whole number", "Float": "a number"}


def typed(cls: type[T], values: Any, where: str = "") -> T:
    """An instance of the dataclass `cls` from Hydra's configuration or a plain mapping; keys not given keep defaults.

    Raises:
        ConfigurationError: an unknown key, a wrong type, or a value that is missing, by its full key.
    """
    # Here and not above: models are measured by the library without the command line's packages.
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        given = OmegaConf.create(values)
        # A merge would silently keep the default where `???` asks for a value.
        if missing := sorted(OmegaConf.missing_keys(given)):
            raise ConfigurationError("has no value; give one", setting=f"{where}{'.' if where else ''}{missing[0]}")
        merged = OmegaConf.merge(OmegaConf.structured(cls), given)
        result = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = ".".join(part for part in (where, error.full_key) if part)
        reason = str(error).splitlines()[0]
        if of_kind := re.search(r"not a valid (bool)|could not be converted to (Integer|Float)", reason):
            value = OmegaConf.select(given, str(error.full_key))
            raise ConfigurationError(setting=key, value=value, allowed=_KINDS[of_kind[1] or of_kind[2]]) from error
        raise ConfigurationError(reason, setting=key or "configuration") from error
    assert isinstance(result, cls)
    return result


def check(config: ScanConfig) -> None:
    """Refuse values that no cluster and no model could make sense of.

    What belongs to a model, data set or choice of neurons is refused where it is used, by who knows all that there is.

    Raises:
        ConfigurationError: naming the key, its value, and what it may be.
    """
    dataset = [own.name for own in fields(config.dataset) if own.name in ("too_long", "not_one_token", "answer_is")]
    check_fields("dataset", config.dataset, dataset)
    for name in ("cluster", "storage", "job"):
        check_fields(name, getattr(config, name))
    most = most_replicas(config.cluster)
    if must := must_be(ClusterConfig.__dataclass_fields__["replicas"].metadata, most):
        key = "cluster.replicas" + ".max" * isinstance(config.cluster.replicas, Mapping)
        raise ConfigurationError(setting=key, value=most, allowed=must)


def most_replicas(cluster: ClusterConfig) -> Any:
    """`cluster.replicas.max`: a number, or auto.

    Raises:
        ConfigurationError: something else than max is set.
    """
    replicas = cluster.replicas
    if not isinstance(replicas, Mapping):
        return replicas
    if unknown := sorted(set(replicas) - {"max"}):
        raise ConfigurationError("there is only cluster.replicas.max", setting=f"cluster.replicas.{unknown[0]}")
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
    if not isinstance(layers, list) or not layers or not all(is_whole(layer) for layer in layers):
        raise ConfigurationError(
            setting="neurons.layers", value=layers, allowed="all or a list of layer numbers such as [0,5]"
        )
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise ConfigurationError(
                f"layer {layer} does not exist; the model has layers 0 to {n_layers - 1}",
                setting="neurons.layers",
                value=layers,
            )
    if len(set(layers)) < len(layers):
        raise ConfigurationError("a layer is named twice", setting="neurons.layers", value=layers)
    return sorted(layers)


def device_names(device: Any) -> list[str]:
    """The devices of `model.device`: a name, several with commas between them, or a list as Hydra reads one."""
    several = device.split(",") if isinstance(device, str) else device if isinstance(device, list | tuple) else [device]
    return [str(name).strip() for name in several]


def plain(values: Any) -> dict[str, Any]:
    """Hydra's configuration, or any mapping, as plain dictionaries and lists."""
    from omegaconf import OmegaConf

    if isinstance(values, Mapping) and not OmegaConf.is_config(values):
        return dict(values)
    result = OmegaConf.to_container(values, resolve=True)
    assert isinstance(result, dict)
    return {str(key): value for key, value in result.items()}


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
