"""Ways that take turns on a device for about as long as they are given, with the memory that each takes.

A GPU needs a nearly constant time to start a pass, whatever the pass holds: what a few items take says little of many.
So a way is called with more and more items for as long as what was measured says that a call stays within its share of
the time; then all take turns until they have had their repeats or the time is over. One that fails is told with its
reason.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
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


# So many times as many items are tried at once, at most: where a pass costs what its items cost, a call that turns out
# too long is so many times longer than the one before.
_GROWTH = 4


@dataclass(frozen=True)
class Way:
    """`run(n)` does n items; where there are several `variants` of it, by name, the fastest on a first call is taken.

    counts: ascending, how many items a call may have. as_many_as: in the place of that, the way before it that says how
    many. weight: how much more time than others it gets. is_slow: its figure is the last call of those that find out
    how many items it has, and it takes no turns.
    """

    run: Callable[[int], Any] | Mapping[str, Callable[[int], Any]]
    counts: tuple[int, ...] = ()
    as_many_as: str | None = None
    weight: float = 1
    is_slow: bool = False

    @property
    def variants(self) -> Mapping[str, Callable[[int], Any]]:
        """What it may run, by name; one way has no name."""
        return self.run if isinstance(self.run, Mapping) else {"": self.run}


@dataclass
class Timed:
    """Of one way: items a call, seconds an item of each repeat, peaks in bytes over what lay there; or why it failed.

    variant: the one that was fastest. Of a CPU there are no peaks.
    """

    count: int = 0
    variant: str = ""
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    failed: str | None = None

    def add(self, took: float, peak: int | None) -> None:
        """A call's seconds and peak."""
        self.seconds.append(took / self.count)
        if peak is not None:
            self.peaks.append(peak)

    def told(self) -> dict[str, Any]:
        """For the JSON: milliseconds an item, MiB."""
        if self.failed is not None:
            return {"failed": self.failed}
        found = {"items": self.count, **({"variant": self.variant} if self.variant else {})}
        found |= figure([1e3 * one for one in self.seconds], "ms")
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
    """Run all ways for about so many seconds in all, each at least twice, a slow one at least once."""
    end = time.monotonic() + seconds
    found = {name: Timed() for name in ways}
    # As long again as two repeats for what comes before.
    unit = seconds / sum(way.weight * (1 if way.is_slow else repeats + 2) for way in ways.values())
    for name, way in ways.items():
        _attempt(found[name], partial(_settle, way, found, name, device, unit * way.weight))
    for turn in range(repeats):
        for name, way in ways.items():
            own = found[name]
            if own.failed is None and not way.is_slow and (turn == 0 or time.monotonic() < end):
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


def _settle(way: Way, found: Mapping[str, Timed], name: str, device: torch.device, share: float) -> None:
    """Find how many items a call has, and which variant is the fastest; this also warms up."""
    own = found[name]
    if way.as_many_as is not None:
        own.count = max(1, found[way.as_many_as].count)
        took = {variant: measured(device, partial(run, own.count))[0] for variant, run in way.variants.items()}
        own.variant = min(took, key=lambda variant: took[variant])
        return
    own.variant, run = next(iter(way.variants.items()))
    own.count = way.counts[0]
    calls = [measured(device, partial(run, own.count))]
    if calls[0][0] > share and not way.is_slow:
        # A first call may have waited for kernels to be loaded.
        calls[0] = measured(device, partial(run, own.count))
    known = [(own.count, calls[0][0])]
    while following := _following(way.counts, known, share):
        own.count = following
        calls.append(measured(device, partial(run, following)))
        known.append((following, calls[-1][0]))
    if way.is_slow:
        own.add(*calls[-1])


def _repeat(way: Way, own: Timed, device: torch.device) -> None:
    own.add(*measured(device, partial(way.variants[own.variant], own.count)))


def _following(counts: Sequence[int], known: Sequence[tuple[int, float]], share: float) -> int | None:
    """The count to try next; None where the last one is the largest that stays within its share of the time.

    known: counts, and the seconds that they took. What more would take is on the line through the last two.
    """
    count, took = known[-1]
    before, took_before = known[-2] if len(known) > 1 else (0, took)
    slope = max(0.0, took - took_before) / (count - before)
    within = [
        one for one in counts if count < one <= _GROWTH * count and max(took, took + slope * (one - count)) <= share
    ]
    return max(within, default=None)


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
