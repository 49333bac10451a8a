"""What a study of linearity may be told, and that it is checked before anything is scanned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from neg_service.errors import ConfigurationError
from neg_service.measures.shifts import GRIDS
from neg_service.measures.targets import KEEP
from neg_service.settings import basis_setting, check_fields, setting

ESTIMATORS = ("neurgrad", "gradient", "integrated_gradients", "gradient_x_activation", "activation", "random")


@dataclass
class LinearityOptions:
    """What `python -m jobs.study` is told under `study`."""

    prompts: int | None = setting(100, "drawn from those that count; null: all of them", least=1)
    answered: str = setting(
        "right", "only prompts that the model answers rightly, as in the paper; or all", allowed=("right", "all")
    )
    neurons: int | None = setting(
        70, "of each layer, drawn with the seed, the same for all prompts; null: all of them", least=1
    )
    seed: int = setting(0, "of the prompts, neurons and sets that are drawn", least=0)
    basis: str = basis_setting()
    grid: str = setting(
        "adaptive", "of 40 shifts as many as a curve needs; full: all; coarse: 4, interpolated", allowed=GRIDS
    )
    keep: str = setting(
        "answer", "estimates of right answers; or all: of all targets, for prompts without answers", allowed=KEEP
    )
    steps: int = setting(20, "points of integrated gradients", least=1)
    estimators: list[str] = setting(list(ESTIMATORS), "which ones", allowed=ESTIMATORS)
    ranges: list[float] = setting([0.5, 1.0, 2.0, 4.0, 10.0], "largest shifts over which linearity is judged")
    range_prompts: int = setting(20, "on so many of the prompts, spread over them", least=1)
    sets: list[int] = setting([2, 8, 32], "numbers of neurons that are shifted together", least=1)
    set_shift: float = setting(0.5, "by how much")
    draws: int = setting(1000, "of the bootstrap; a fifth of them in each layer", least=1)


def check_options(options: LinearityOptions) -> None:
    """Refuse what would fail after hours of scanning.

    Raises:
        ConfigurationError: naming the key, its value, and what it may be.
    """
    check_fields("study", options)
    for key, given in (("estimators", options.estimators), ("sets", options.sets)):
        if len(set(given)) < len(given):
            raise ConfigurationError("one is named twice", setting=f"study.{key}", value=given)
    if not options.estimators:
        raise ConfigurationError(
            setting="study.estimators", value="[]", allowed=f"at least one of {', '.join(ESTIMATORS)}"
        )
    if not math.isfinite(options.set_shift) or options.set_shift == 0:
        raise ConfigurationError(
            setting="study.set_shift", value=options.set_shift, allowed="a finite number, not zero"
        )
    _check_ranges(options.ranges)


def _check_ranges(ranges: Sequence[float]) -> None:
    if not ranges or not all(largest > 0 and math.isfinite(largest) for largest in ranges):
        raise ConfigurationError(setting="study.ranges", value=list(ranges), allowed="positive numbers, at least one")
