"""What a study of skill neurons may be told, and that it is checked before anything is scanned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from neg_service.config import DatasetConfig, holds
from neg_service.errors import ConfigurationError, nearest

PROBES = ("polarity", "magnitude", "forest", "probability", "activation", "random", "majority")
STUDIES = ("efficiency", "flexibility", "robustness", "interdependency")
# Fewer prompts have no mean to speak of, and the baseline of activations compares with a shard's.
_LEAST_SHARD = 20


@dataclass(frozen=True)
class Context:
    """How a task is put to the model; `demonstration_seed` chooses the demonstrations."""

    wording: str = "default"
    shots: int = 1
    demonstration_seed: int = 0

    @classmethod
    def of(cls, dataset: DatasetConfig) -> Context:
        """How the settings of a data set put a task."""
        return cls(dataset.wording, dataset.shots, dataset.demonstration_seed)

    @property
    def name(self) -> str:
        """For tables and plots."""
        return f"{self.wording}, {self.shots} shot{'s' * (self.shots != 1)}, demonstrations {self.demonstration_seed}"


@dataclass
class SkillOptions:
    """See `conf/probe.yaml`."""

    store_gradients: bool = True
    basis: str = "paper"
    probes: list[str] = field(default_factory=lambda: list(PROBES))
    sizes: list[int] = field(default_factory=lambda: [1, 4, 16, 64, 256, 1024])
    train: int | None = None
    valid: int | None = None
    test: int | None = None
    shard_size: int = 50
    seed: int = 0
    studies: list[str] = field(default_factory=lambda: ["efficiency", "flexibility"])
    train_sizes: list[int] | None = None
    efficiency_neurons: int = 256
    block: int = 64
    blocks: int = 8
    contexts: list[dict[str, Any]] | None = field(default=None, metadata=holds(list[Context] | None))
    suppressed: int = 64
    suppress_by: float = 1.0


def check_options(options: SkillOptions) -> None:
    """Refuse what would fail after hours of scanning, or give nothing.

    Raises:
        ConfigurationError: naming the key, its value, and what it may be.
    """
    for key, given, known in (("probes", options.probes, PROBES), ("studies", options.studies, STUDIES)):
        if unknown := [one for one in given if one not in known]:
            raise ConfigurationError(
                f"is unknown; {nearest(unknown[0], known)}known are {', '.join(known)}",
                setting=f"probe.{key}",
                value=unknown[0],
            )
        if len(set(given)) < len(given) or (key == "probes" and not given):
            raise ConfigurationError("give at least one, and each once", setting=f"probe.{key}", value=given)
    whole = ("train", "valid", "test", "shard_size", "efficiency_neurons", "block", "blocks", "suppressed")
    for key in whole:
        value = getattr(options, key)
        if value is not None and value < 1:
            raise ConfigurationError(setting=f"probe.{key}", value=value, allowed="at least 1")
    sizes = options.sizes
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ConfigurationError(
            setting="probe.sizes", value=sizes, allowed="numbers of neurons, each once, at least 1"
        )
    if options.seed < 0:
        raise ConfigurationError(setting="probe.seed", value=options.seed, allowed="0 or more")
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
            if size < 1 or size % options.shard_size:
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


def contexts_of(options: SkillOptions, base: Context, wordings: Iterable[str]) -> list[Context]:
    """What robustness compares, `base` first: as asked, or all wordings, no shots, and other demonstrations."""
    if options.contexts is not None:
        asked = [replace(base, **own) for own in options.contexts]
    else:
        asked = [replace(base, wording=wording) for wording in wordings]
        asked += [replace(base, shots=0), replace(base, demonstration_seed=base.demonstration_seed + 1)]
    return list(dict.fromkeys([base, *asked]))
