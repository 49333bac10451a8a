"""What a study of skill neurons may be told, and that it is checked before anything is scanned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from neg_service.config import DatasetConfig
from neg_service.errors import ConfigurationError
from neg_service.settings import basis_setting, check_fields, setting

PROBES = ("polarity", "magnitude", "forest", "probability", "activation", "random", "majority")
STUDIES = ("efficiency", "flexibility", "robustness", "interdependency")
# Fewer prompts have no mean to speak of, and the baseline of activations compares with a shard's.
_LEAST_SHARD = 20


@dataclass(frozen=True)
class Context:
    """How a task is put to the model; `demonstration_seed` chooses the demonstrations."""

    template: str = "default"
    shots: int = 1
    demonstration_seed: int = 0

    @classmethod
    def of(cls, dataset: DatasetConfig) -> Context:
        """How the settings of a data set put a task."""
        return cls(dataset.template, dataset.shots, dataset.demonstration_seed)

    @property
    def name(self) -> str:
        """For tables and plots."""
        return f"{self.template}, {self.shots} shot{'s' * (self.shots != 1)}, demonstrations {self.demonstration_seed}"


@dataclass
class SkillOptions:
    """What `python -m jobs.probe` is told under `probe`."""

    store_gradients: bool = setting(True, "false: add up scores in one pass and store no gradients, for large models")
    basis: str = basis_setting()
    probes: list[str] = setting(list(PROBES), "which ones", allowed=PROBES)
    sizes: list[int] = setting(
        [1, 4, 16, 64, 256, 1024], "numbers of neurons; which is best is chosen on valid", least=1
    )
    train: int | None = setting(None, "rows of each task that are taken of train; null: all, or dataset.limit", least=1)
    valid: int | None = setting(None, "the same of valid", least=1)
    test: int | None = setting(None, "the same of test", least=1)
    shard_size: int = setting(50, "train prompts whose scores are added up at once", least=1)
    seed: int = setting(0, "of the random neurons and the forest", least=0)
    studies: list[str] = setting(
        ["efficiency", "flexibility"],
        "which ones; also robustness, interdependency, which take scans of their own",
        allowed=STUDIES,
    )
    train_sizes: list[int] | None = setting(
        None, "efficiency: after how many train prompts; null: shard_size, doubling", least=1
    )
    efficiency_neurons: int = setting(256, "efficiency: at most so many neurons", least=1)
    block: int = setting(64, "flexibility and robustness: neurons of a block", least=1)
    blocks: int = setting(8, "flexibility: blocks, down the ranking", least=1)
    contexts: list[dict[str, Any]] | None = setting(
        None,
        "robustness: [{template: brief}, {shots: 0}]; null: all templates, no shots, other demonstrations",
        kind=list[Context] | None,
    )
    suppressed: int = setting(64, "interdependency: neurons of each task", least=1)
    suppress_by: float = setting(
        1.0, "interdependency: how far they are moved against the right label, in units of activation"
    )


def check_options(options: SkillOptions) -> None:
    """Refuse what would fail after hours of scanning, or give nothing.

    Raises:
        ConfigurationError: naming the key, its value, and what it may be.
    """
    check_fields("probe", options)
    for key, given in (("probes", options.probes), ("studies", options.studies)):
        if len(set(given)) < len(given) or (key == "probes" and not given):
            raise ConfigurationError("give at least one, and each once", setting=f"probe.{key}", value=given)
    sizes = options.sizes
    if not sizes or len(set(sizes)) < len(sizes):
        raise ConfigurationError("give at least one, and each once", setting="probe.sizes", value=sizes)
    if "activation" in options.probes and options.shard_size < _LEAST_SHARD:
        raise ConfigurationError(
            f"the probe activation compares with the mean over a shard and needs at least {_LEAST_SHARD} prompts "
            "in it; or leave it out of probe.probes",
            setting="probe.shard_size",
            value=options.shard_size,
        )
    _check_studies(options)


def _check_studies(options: SkillOptions) -> None:
    """What the studies that were asked for need."""
    least, most = min(options.sizes), max(options.sizes)
    if "efficiency" in options.studies:
        if options.efficiency_neurons < least:
            raise ConfigurationError(
                setting="probe.efficiency_neurons",
                value=options.efficiency_neurons,
                allowed=f"at least {least}, the smallest of probe.sizes",
            )
        for size in options.train_sizes or ():
            if size % options.shard_size:
                raise ConfigurationError(
                    "scores add up shard by shard, so each must be a multiple of "
                    f"probe.shard_size={options.shard_size}",
                    setting="probe.train_sizes",
                    value=options.train_sizes,
                )
    if {"flexibility", "robustness"} & set(options.studies) and options.block > most:
        raise ConfigurationError(
            setting="probe.block", value=options.block, allowed=f"at most {most}, the largest of probe.sizes"
        )
    known_keys = [own.name for own in fields(Context)]
    for index, own in enumerate(options.contexts or ()):
        if not isinstance(own, Mapping) or not own or set(own) - set(known_keys):
            raise ConfigurationError(
                f"must have some of {', '.join(known_keys)}", setting=f"probe.contexts[{index}]", value=own
            )


def contexts_of(options: SkillOptions, base: Context, templates: Iterable[str]) -> list[Context]:
    """What robustness compares, `base` first: as asked, or all templates, no shots, and other demonstrations."""
    if options.contexts is not None:
        asked = [replace(base, **own) for own in options.contexts]
    else:
        asked = [replace(base, template=template) for template in templates]
        asked += [replace(base, shots=0), replace(base, demonstration_seed=base.demonstration_seed + 1)]
    return list(dict.fromkeys([base, *asked]))
