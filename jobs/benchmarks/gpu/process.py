"""What runs in the process of a shape: its model in each precision, and of each all parts that the time allows."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from jobs.benchmarks.gpu import Settings, checks, speed
from jobs.benchmarks.gpu.pacing import FAILURES, reason_of
from jobs.benchmarks.gpu.shapes import random_model
from jobs.benchmarks.gpu.subject import Subject
from jobs.benchmarks.isolated import Tell
from neg_service.measures.batching import budget_of
from neg_service.models.batches import return_cached_memory, without_frames
from neg_service.models.loading import checked_dtype, set_threads
from neg_service.models.placement import checked_devices


@dataclass(frozen=True)
class Part:
    """What is measured of a model, and its share of the time: about the seconds that it takes where there is enough."""

    measure: Callable[[Subject], dict[str, Any]]
    share: float


# What matters most comes first, and what others' slow ways take last.
PARTS: Mapping[str, Part] = {
    "gradients": Part(speed.gradients, 5),
    "interventions": Part(speed.interventions, 5),
    "prompts together": Part(speed.prompts_together, 3),
    "accuracy": Part(checks.accuracy, 3),
    "foreseen memory": Part(checks.foreseen_memory, 2),
    "memory ends": Part(checks.memory_ends, 2),
    "batch invariance": Part(checks.batch_invariance, 2.5),
    "engines": Part(speed.engines, 5),
    "batch sizes": Part(speed.batch_sizes, 3),
    "other ways": Part(speed.other_ways, 3.5),
}
# What no CPU has: an allocator whose peak is known, and a limit on it.
OF_GPUS = ("foreseen memory", "memory ends")


def measure_shape(tell: Tell, shape: str, settings: Settings, is_first: bool) -> None:
    """Measure one shape in every precision; the first process also says what the device is.

    Told as `dtype: part`. A part that fails is told as such, and one for which no time is left as left out.
    """
    end = time.monotonic() + settings.seconds
    device = checked_devices(settings.device)[0]
    set_threads(settings.threads)
    torch.set_float32_matmul_precision("highest")
    if is_first:
        _tell_part(tell, "processor", lambda: checks.processor(device))
    for place, dtype in enumerate(settings.dtypes):
        # What the first ones leave, the others have too.
        own_end = end - (end - time.monotonic()) * (1 - 1 / (len(settings.dtypes) - place))
        subjects: list[Subject] = []

        _tell_part(tell, f"{dtype}: model", partial(_make, subjects, shape, settings, device, dtype))
        shares = [part.share for part in PARTS.values()]
        for step, (name, part) in enumerate(PARTS.items()) if subjects else ():
            left = own_end - time.monotonic()
            if name in OF_GPUS and device.type != "cuda":
                found = {"left out": "of a CPU no peak of memory is known, and no limit can be set"}
            elif left <= 0:
                found = {"left out": f"no time was left of benchmark.seconds={settings.seconds:g}"}
            else:
                subjects[0].seconds = min(settings.part_seconds, left * part.share / sum(shares[step:]))
                _tell_part(tell, f"{dtype}: {name}", partial(part.measure, subjects[0]))
                subjects[0].model.forget_prefixes()
                continue
            tell(f"{dtype}: {name}", found)
        subjects.clear()
        gc.collect()
        return_cached_memory()


def _tell_part(tell: Tell, step: str, measure: Callable[[], dict[str, Any]]) -> None:
    tell(step, None)
    began = time.monotonic()
    try:
        found = measure()
    except FAILURES as error:
        found = {"failed": reason_of(without_frames(error))}
        sys.stderr.write(f"{step} failed: {found['failed']}\n")
    found["seconds"] = round(time.monotonic() - began, 2)
    tell(step, found)
    return_cached_memory()


def _make(subjects: list[Subject], shape: str, settings: Settings, device: torch.device, dtype: str) -> dict[str, Any]:
    """Make the model and check it, and put it into `subjects`; what that took, and what was found."""
    began = time.monotonic()
    model = random_model(shape, device, checked_dtype(dtype))
    made = time.monotonic()
    selection = model.ensure_checked()
    checked = time.monotonic()
    weights = {id(own): own.nbytes for own in model.model.parameters()}
    sys.stderr.write(f"{shape}, {dtype}: made in {made - began:.1f} s, checked in {checked - made:.1f} s\n")
    subjects.append(Subject(shape, model, settings))
    return {
        "parameters, billions": round(sum(weights.values()) / model.dtype.itemsize / 1e9, 3),
        "weights GiB": round(sum(weights.values()) / 2**30, 2),
        "made in s": round(made - began, 2),
        "checked in s": round(checked - made, 2),
        "engine": selection.engine.name,
        "rejected": selection.rejected,
        "self-check": {
            name: getattr(selection.check, name)
            for name in ("logits", "neurons", "at_readout", "gradients", "finite_difference", "experts")
        },
        "a batch by itself, MiB": round(budget_of(model).bytes / 2**20, 1),
    }
