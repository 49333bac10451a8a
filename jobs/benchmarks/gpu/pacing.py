"""Ways that take turns on a device for about as long as they are given, with the memory that each takes.

A way is run with the largest number of items that its share of the time allows, as smaller ones foretell; then all take
turns until they have had their repeats or the time is over. One that fails is told with its reason.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from jobs.benchmarks.figures import figure, ratio
from neg_service.errors import NegServiceError, one_line
from neg_service.models.batches import return_cached_memory, without_frames
from neg_service.models.engines.base import MismatchError

# What may go wrong in a library, on a device, or with another version of either.
FAILURES = (
    NegServiceError,
    MismatchError,
    MemoryError,
    RuntimeError,
    TypeError,
    AttributeError,
    LookupError,
    ValueError,
    ImportError,
    AssertionError,
)


@dataclass(frozen=True)
class Way:
    """`run(n)` does n items.

    counts: ascending, from which the largest that fits into the way's share of the time is taken; as_many_as: in the
    place of that, the way before it that says how many. weight: how much more time than others it gets.
    """

    run: Callable[[int], Any]
    counts: tuple[int, ...] = ()
    as_many_as: str | None = None
    weight: float = 1


@dataclass
class Timed:
    """Of one way: items a call, seconds an item of each repeat, peaks in bytes over what lay there; or why it failed.

    Of a CPU there are no peaks.
    """

    count: int = 0
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    failed: str | None = None

    def told(self) -> dict[str, Any]:
        """For the JSON: milliseconds an item, MiB."""
        if self.failed is not None:
            return {"failed": self.failed}
        found = {"items": self.count, **figure([1e3 * one for one in self.seconds], "ms")}
        return found | ({"peak MiB": round(max(self.peaks) / 2**20, 1)} if self.peaks else {})


def measured(device: torch.device, call: Callable[[], Any]) -> tuple[float, int | None]:
    """Seconds until the device is done, and the peak of its memory over what lay there before, in bytes."""
    is_gpu = device.type == "cuda"
    before = 0
    if is_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    began = time.perf_counter()
    call()
    if is_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    return seconds, torch.cuda.max_memory_allocated(device) - before if is_gpu else None


def take_turns(
    ways: Mapping[str, Way], device: torch.device, repeats: int, seconds: float, what: str
) -> dict[str, Timed]:
    """Run all ways for about so many seconds in all, each at least twice: a call to warm up, and a repeat."""
    end = time.monotonic() + seconds
    found = {name: Timed() for name in ways}
    # As long again as a repeat for what comes before: a call to warm up, and smaller ones.
    unit = seconds / (repeats + 2) / sum(way.weight for way in ways.values())
    for name, way in ways.items():
        if way.as_many_as is not None:
            way = replace(way, counts=(max(1, found[way.as_many_as].count),))
        _attempt(found[name], partial(_settle, way, found[name], device, unit * way.weight))
    for turn in range(repeats):
        for name, way in ways.items():
            own = found[name]
            if own.failed is None and (turn == 0 or time.monotonic() < end):
                _attempt(own, partial(_repeat, way, own, device))
        sys.stderr.write(f"{what}: {'; '.join(_in_short(name, own, turn) for name, own in found.items())}\n")
        if time.monotonic() >= end:
            break
    return found


def ratio_of(over: Timed, under: Timed) -> dict[str, Any]:
    """Of two ways that took turns, over the repeats that both had.

    Raises:
        ValueError: one of them failed.
    """
    if over.failed is not None or under.failed is not None:
        raise ValueError("a way that failed has no ratio")
    n = min(len(over.seconds), len(under.seconds))
    return ratio(over.seconds[:n], under.seconds[:n])


def reason_of(error: BaseException) -> str:
    """For the JSON, in one line."""
    return f"{type(error).__name__}: {one_line(error)}"[:300]


def _settle(way: Way, own: Timed, device: torch.device, share: float) -> None:
    """Warm up, and find how many items a call has."""
    own.count = way.counts[0]
    way.run(own.count)
    for count, following in pairwise(way.counts):
        took = measured(device, partial(way.run, count))[0]
        if took * following / count > share:
            return
        own.count = following


def _repeat(way: Way, own: Timed, device: torch.device) -> None:
    took, peak = measured(device, partial(way.run, own.count))
    own.seconds.append(took / own.count)
    if peak is not None:
        own.peaks.append(peak)


def _attempt(own: Timed, call: Callable[[], None]) -> None:
    try:
        call()
    except FAILURES as error:
        own.failed = reason_of(without_frames(error))
    if own.failed is not None:
        # Out of the handler, where the traceback no longer holds the tensors.
        return_cached_memory()


def _in_short(name: str, own: Timed, turn: int) -> str:
    if own.failed is not None:
        return f"{name} failed"
    return f"{name} {1e3 * own.seconds[-1]:.4g} ms" if len(own.seconds) > turn else f"{name} -"
