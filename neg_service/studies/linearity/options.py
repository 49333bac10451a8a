"""What a study of linearity may be told, and that it is checked before anything is scanned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from neg_service.errors import ConfigurationError, nearest
from neg_service.measures.shifts import GRIDS
from neg_service.measures.targets import KEEP

ESTIMATORS = ("neurgrad", "gradient", "integrated_gradients", "gradient_x_activation", "activation", "random")
_ANSWERED = ("right", "all")


@dataclass
class LinearityOptions:
    """See `conf/study.yaml`."""

    prompts: int | None = 100
    answered: str = "right"
    neurons: int | None = 70
    seed: int = 0
    basis: str = "paper"
    grid: str = "full"
    keep: str = "answer"
    steps: int = 20
    estimators: list[str] = field(default_factory=lambda: list(ESTIMATORS))
    ranges: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0, 4.0, 10.0])
    range_prompts: int = 20
    sets: list[int] = field(default_factory=lambda: [2, 8, 32])
    set_shift: float = 0.5
    draws: int = 1000


def check_options(options: LinearityOptions) -> None:
    """Refuse what would fail after hours of scanning.

    Raises:
        ConfigurationError: naming the key, its value, and what it may be.
    """
    for key, given in (("estimators", options.estimators), ("sets", options.sets)):
        if len(set(given)) < len(given):
            raise ConfigurationError("one is named twice", setting=f"study.{key}", value=given)
    if not options.estimators:
        raise ConfigurationError(
            f"name at least one of {', '.join(ESTIMATORS)}", setting="study.estimators", value="[]"
        )
    for name in options.estimators:
        if name not in ESTIMATORS:
            raise ConfigurationError(
                f"{name} is unknown; {nearest(name, ESTIMATORS)}known are {', '.join(ESTIMATORS)}",
                setting="study.estimators",
            )
    if options.answered not in _ANSWERED:
        raise ConfigurationError(setting="study.answered", value=options.answered, allowed=f"{' or '.join(_ANSWERED)}")
    for key, choice, known in (("keep", options.keep, KEEP), ("grid", options.grid, GRIDS)):
        if choice not in known:
            raise ConfigurationError(setting=f"study.{key}", value=choice, allowed=f"one of {', '.join(known)}")
    _check_numbers(options)


def _check_numbers(options: LinearityOptions) -> None:
    if options.seed < 0:
        raise ConfigurationError(setting="study.seed", value=options.seed, allowed="0 or more")
    if not math.isfinite(options.set_shift) or options.set_shift == 0:
        raise ConfigurationError(
            setting="study.set_shift", value=options.set_shift, allowed="a finite number, not zero"
        )
    _check_ranges(options.ranges)
    for key, value in (
        ("steps", options.steps),
        ("range_prompts", options.range_prompts),
        ("draws", options.draws),
        ("prompts", options.prompts),
        ("neurons", options.neurons),
        *(("sets", value) for value in options.sets),
    ):
        if value is not None and value < 1:
            raise ConfigurationError(setting=f"study.{key}", value=value, allowed="at least 1")


def _check_ranges(ranges: Sequence[float]) -> None:
    if not ranges or not all(largest > 0 and math.isfinite(largest) for largest in ranges):
        raise ConfigurationError(setting="study.ranges", value=list(ranges), allowed="positive numbers, at least one")
