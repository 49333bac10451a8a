"""How a neuron is measured. A measure is a module with the names of `Measure`; nothing registers it.

`measure.name` is a module of this package (`neurgrad`), or the dotted path of one elsewhere, so that a person can
bring a measure of their own. A module that is several measures says their `NAMES`; its options' `name` tells it which.
One driver, one replica and one store serve them all.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol, cast

import pyarrow as pa

from neg_service.config import NeuronsConfig, types_of
from neg_service.errors import ConfigurationError
from neg_service.models.batches import Budget
from neg_service.models.inspection import ModelInfo
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.prompt import EncodedPrompt, Prompt


@dataclass(frozen=True)
class Cost:
    """What a prompt is expected to cost.

    bytes: of each table, before compression. rows: how many rows run through layers: branches, interventions.
    """

    bytes: dict[str, int]
    rows: float


class Measure(Protocol):
    """What a module must have to be a measure."""

    # A dataclass of what `conf/measure/<name>.yaml` may say.
    Options: type[Any]

    def read(self, options: Any) -> Any:
        """The options with the content of files that they name in the place of the names: replicas see no files."""
        ...

    def check(self, options: Any, neurons: NeuronsConfig, info: ModelInfo, prompts: Sequence[Prompt]) -> None:
        """Refuse, before anything starts, what this measure cannot do (ConfigurationError)."""
        ...

    def identity(self, options: Any) -> dict[str, Any]:
        """The options that decide the numbers; they go into the run's fingerprint."""
        ...

    def tables(self, options: Any, info: ModelInfo) -> dict[str, pa.Schema]:
        """The tables that each shard gives, in the order in which their parts are put; the last is the commit."""
        ...

    def cost_a_prompt(self, options: Any, neurons: NeuronsConfig, info: ModelInfo, n_targets: float) -> Cost:
        """The expected cost of a prompt with `n_targets` targets."""
        ...

    def calibrate(
        self, model: LanguageModel, prompts: Sequence[EncodedPrompt], options: Any, neurons: NeuronsConfig
    ) -> dict[str, Any]:
        """What one replica of a run finds out before its first shard, from a few prompts; JSON, kept in run.json.

        A measure that has nothing to find out takes `nothing_to_calibrate`: then no replica waits for another.
        """
        ...

    def measure(
        self,
        model: LanguageModel,
        prompts: Sequence[EncodedPrompt],
        options: Any,
        neurons: NeuronsConfig,
        budget: Budget,
        calibration: Mapping[str, Any],
    ) -> dict[str, pa.Table]:
        """Measure a shard; one Arrow table under each name of `tables`."""
        ...


def nothing_to_calibrate(
    model: LanguageModel, prompts: Sequence[EncodedPrompt], options: Any, neurons: NeuronsConfig
) -> dict[str, Any]:
    """Nothing beyond the model's self-check."""
    return {}


def find_measure(name: str) -> Measure:
    """The module of a measure.

    Raises:
        ConfigurationError: an unknown name, with those that are known.
    """
    module = _module(name if "." in name else f"{__name__}.{name}")
    if module is not None and _is_measure(module) and ("." in name or not hasattr(module, "NAMES")):
        return cast(Measure, module)
    known: dict[str, ModuleType] = {}
    for own in _measures():
        known |= dict.fromkeys(getattr(own, "NAMES", [own.__name__.rsplit(".", 1)[-1]]), own)
    if name not in known:
        raise ConfigurationError(
            f"measure.name={name} is unknown; known are {', '.join(known)}, or the dotted path of a module of yours"
        )
    return cast(Measure, known[name])


def types_of_options() -> dict[str, Any]:
    """What the options of this package's measures are called, with their types: those of one name have one type."""
    return {name: kind for own in _measures() for name, kind in types_of(own.Options).items()}


def _measures() -> list[ModuleType]:
    modules = (_module(f"{__name__}.{own.name}") for own in pkgutil.iter_modules(__path__))
    return [own for own in modules if own is not None and _is_measure(own)]


def _module(path: str) -> ModuleType | None:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        # A measure that exists but misses a package of its own should say so itself.
        if error.name is not None and (path == error.name or path.startswith(f"{error.name}.")):
            return None
        raise


def _is_measure(module: ModuleType) -> bool:
    needed = ("Options", "read", "check", "identity", "tables", "cost_a_prompt", "calibrate", "measure")
    return all(hasattr(module, name) for name in needed)
