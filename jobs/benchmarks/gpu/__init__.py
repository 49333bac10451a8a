"""All that somebody with a GPU needs to know, in one command: how fast, in how much memory, how exact, how robust.

Models of the shapes of real ones are made on the device with random weights; nothing is downloaded. Each shape has a
process and a limit on its time, each part a share of what is left of that, and what fails is told in the place of its
figures. Nothing here imports torch: this process never touches the device.

Needs neither Ray nor Hydra: `python -m jobs.benchmarks.gpu KEY=VALUE` is the same with nothing but torch, transformers,
numpy and pyarrow (`__main__.py`).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from jobs.benchmarks.figures import bar
from jobs.benchmarks.gpu.shapes import SHAPES
from jobs.benchmarks.isolated import Outcome, Task, one_after_the_other
from neg_service.errors import ConfigurationError

DTYPES = ("float32", "bfloat16", "float16", "float64")
_GRADIENTS, _INTERVENTIONS = 1.4, 1.2


@dataclass
class Settings:
    """See `conf/benchmark/gpu.yaml`."""

    name: str
    device: str
    shapes: list[str]
    dtypes: list[str]
    threads: int
    repeats: int
    seconds: float
    part_seconds: float
    header_tokens: int
    least_own_tokens: int
    most_own_tokens: int
    targets: int
    prompts: int
    tokens: int
    neurons: int


def run(settings: Settings) -> dict[str, Any]:
    """Measure; the result's `bars` say what was reached.

    Raises:
        ConfigurationError: an unknown shape or dtype, or a number that is too small.
    """
    _check(settings)
    tasks = {
        shape: Task("jobs.benchmarks.gpu.process", "measure_shape", (shape, settings, place == 0))
        for place, shape in enumerate(settings.shapes)
    }
    # A part that has begun may need longer than it aims at.
    outcomes = one_after_the_other(tasks, settings.seconds + 4 * settings.part_seconds)
    shapes = {name: _by_dtype(outcome) for name, outcome in outcomes.items()}
    processor = next((own.pop("processor") for own in shapes.values() if "processor" in own), None)
    failed = _failures(shapes)
    return {
        "processor": processor,
        "shapes": shapes,
        "failed": failed,
        "note": "random weights; ms of gradients are a prompt's, of interventions one's; MiB are over the weights",
        "bars": [*_bars(shapes), bar("parts that failed", len(failed), 0, at_most=True)],
    }


def _check(settings: Settings) -> None:
    for setting, values, known in (("shapes", settings.shapes, SHAPES), ("dtypes", settings.dtypes, DTYPES)):
        for value in values:
            if value not in known:
                raise ConfigurationError(
                    setting=f"benchmark.{setting}", value=value, allowed=f"of {', '.join(known)}, in a list"
                )
        if not values:
            raise ConfigurationError("nothing is to be measured", setting=f"benchmark.{setting}", value=values)
    least = {"repeats": 1, "prompts": 8, "targets": 1, "header_tokens": 2, "tokens": 2, "neurons": 4}
    for name, smallest in (*least.items(), ("least_own_tokens", 1), ("seconds", 1), ("part_seconds", 0.01)):
        if operator.lt(getattr(settings, name), smallest):
            raise ConfigurationError(
                setting=f"benchmark.{name}", value=getattr(settings, name), allowed=f"at least {smallest}"
            )


def _by_dtype(outcome: Outcome) -> dict[str, Any]:
    """What a shape's process told as `dtype: part`, by dtype and part."""
    found: dict[str, Any] = {"seconds": round(outcome.seconds, 1)}
    for step, value in outcome.told.items():
        dtype, _, part = step.partition(": ")
        if part:
            found.setdefault(dtype, {})[part] = value
        else:
            found[step] = value
    if outcome.failed is not None:
        found["failed"] = outcome.failed
    return found


def _failures(found: Any, path: str = "") -> list[str]:
    """What failed, each with where it stands and its reason."""
    if not isinstance(found, dict):
        return []
    own = [f"{path}: {found['failed']}"] if "failed" in found else []
    return own + [
        line for key, value in found.items() for line in _failures(value, f"{path}, {key}" if path else str(key))
    ]


def _bars(shapes: dict[str, Any]) -> list[dict[str, Any]]:
    """Ratios to the floor of every shape and dtype that has them, and whether memory's end was survived."""
    found = []
    for shape, dtypes in shapes.items():
        for dtype, parts in dtypes.items():
            if not isinstance(parts, dict):
                continue
            for part, limit in (("gradients", _GRADIENTS), ("interventions", _INTERVENTIONS)):
                ratios = parts.get(part, {}).get("ratios", {})
                found += [
                    bar(f"{shape}, {dtype}, {part}: {name}", value["median"], limit, at_most=True)
                    for name, value in ratios.items()
                    if name.startswith("engine over floor")
                ]
            if "recovers" in parts.get("memory ends", {}):
                survived = int(parts["memory ends"]["recovers"])
                found.append(bar(f"{shape}, {dtype}: out of memory, halved and recovered", survived, 1, at_most=False))
    return found
