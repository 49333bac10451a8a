"""What a run with the measure `control` found, in numbers: how much was reached, and how far predictions carry.

Axes: W wishes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

# Sizes of wishes and of what shifts give, in nats of log-odds.
SIZES = (0.0, 1.0, 3.0, 6.0, 10.0, np.inf)
# What `by_size` gives.
BY_SIZE = (
    "nats to go", "wishes", "reached", "first shot off", "achieved off", "NEG's prediction off",
    "log-odds' prediction off", "passes", "of ‖a‖",
)  # fmt: skip
# Of what it is made.
_NUMBERS = (
    "wanted", "first_shot", "achieved", "probability", "predicted_by_neg", "predicted_by_log_odds", "reached", "passes",
    "relative_norm",
)  # fmt: skip
_THERE = "already there"


def is_of_wishes(names: Collection[str]) -> bool:
    """Whether a table with these columns says what was wanted of targets, and achieved."""
    return {"wish", "kind", "wanted", "first_shot", "achieved", "reached", "reason", "passes"} <= set(names)


@dataclass
class Met:
    """How many wishes were met, while they are read."""

    n_reached: int = 0
    passes: Counter[int] = field(default_factory=Counter)
    # Of those that were not reached, and of those that were there without a shift.
    reasons: Counter[str] = field(default_factory=Counter)
    n_there: int = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Rows of table `control`."""
        self.passes.update(batch["passes"].to_pylist())
        for reason, is_reached in zip(batch["reason"].to_pylist(), batch["reached"].to_pylist(), strict=True):
            self.n_reached += is_reached
            self.n_there += reason == _THERE
            if not is_reached:
                self.reasons[reason] += 1

    @property
    def n(self) -> int:
        """How many wishes there are."""
        return self.passes.total()

    def __str__(self) -> str:
        """For example `reached 198 of 200, in a median of 4 passes`."""
        if not self.n:
            return "nothing was asked for"
        return f"reached {self.n_reached} of {self.n}, in a median of {_median(self.passes):g} passes"


def met_in(batches: Iterable[pa.RecordBatch]) -> Met:
    """Of rows of table `control` that come in parts."""
    met = Met()
    for batch in batches:
        met.add(batch)
    return met


def _median(counts: Counter[int]) -> float:
    """Of whole numbers, each with how often it was seen."""
    numbers = sorted(counts)
    seen = np.cumsum([counts[own] for own in numbers])
    low, high = np.searchsorted(seen, [(seen[-1] - 1) // 2, seen[-1] // 2], "right")
    return (numbers[int(low)] + numbers[int(high)]) / 2


def to_go(table: pa.Table) -> Doubles:
    """How far each wish is from where its target is, in nats: of log-odds, or of a margin [W]."""
    wanted, before = (table[name].to_numpy() for name in ("wanted", "value_before"))
    is_probability = pc.equal(table["kind"], "probability").to_numpy()
    # Margins have no log-odds: what is computed of them there is not used.
    far_w: Doubles = np.where(is_probability, np.abs(log_odds(wanted) - log_odds(before)), np.abs(wanted - before))
    return far_w


def off(kind: str, wanted: float, achieved: float) -> float:
    """How far what was achieved of a wish is from what was wanted, in nats: of log-odds, or of a margin."""
    if kind == "probability":
        return abs(float(log_odds(achieved) - log_odds(wanted)))
    # The top is any margin above 0.
    return max(0.0, -achieved) if kind == "top" else abs(achieved - wanted)


def moved(table: pa.Table) -> Doubles:
    """By how much each shift raised its target's log-odds, signed, in nats [W]."""
    moved_w: Doubles = log_odds(table["probability"].to_numpy()) - log_odds(table["probability_before"].to_numpy())
    return moved_w


def by_size(table: pa.Table) -> list[tuple[str, ...]]:
    """By how far the wish was, in nats of log-odds: how many, reached, the first shot and predictions off, passes.

    Medians; of wishes for a probability alone, for what is off is a probability.
    """
    own = table.filter(pc.equal(table["kind"], "probability"))
    if not own.num_rows:
        return []
    value = {name: own[name].to_numpy() for name in _NUMBERS}
    found = []
    for low, high, is_own in within(to_go(own), SIZES):
        of = {name: column[is_own] for name, column in value.items()}
        found.append(
            (
                sizes_text(low, high), str(int(is_own.sum())),
                f"{100 * of['reached'].mean():.0f} %",
                *(
                    f"{np.median(np.abs(of[name] - of[against])):.4f}"
                    for name, against in (
                        ("first_shot", "wanted"), ("achieved", "wanted"), ("predicted_by_neg", "probability"),
                        ("predicted_by_log_odds", "probability"),
                    )
                ),
                f"{np.median(of['passes']):g}", f"{100 * np.median(of['relative_norm']):.2f} %",
            )
        )  # fmt: skip
    return found


class Quartiles(NamedTuple):
    """The median, and between which values the middle half is."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: NDArray[Any]) -> Quartiles:
        """Of numbers, at least one."""
        return cls(*(float(own) for own in np.quantile(values, (0.25, 0.5, 0.75))))

    def scaled(self, factor: float) -> Quartiles:
        """In another unit, by a factor above 0."""
        return Quartiles(*(factor * own for own in self))


class Carried(NamedTuple):
    """Of shifts that move log-odds by `low` to `high` nats, signed: the share of the change that is predicted.

    n: how many shifts. by_neg, by_log_odds: predicted over given change of probability; 1 is right.
    """

    low: float
    high: float
    n: int
    by_neg: Quartiles
    by_log_odds: Quartiles


def carried(table: pa.Table) -> list[Carried]:
    """How far predictions carry: of what each shift gave, the share that was predicted, by how much it gave.

    Shifts that raise a target and those that lower it stand apart: the same bend makes one prediction too small and the
    other too large. Wishes that moved nothing are left out.
    """
    before, after, by_neg, by_log_odds = (
        table[name].to_numpy()
        for name in ("probability_before", "probability", "predicted_by_neg", "predicted_by_log_odds")
    )
    gave, moved_w = after - before, moved(table)
    edges = (*(-size for size in reversed(SIZES[1:])), *SIZES)
    found = []
    for low, high, is_own in within(np.where(gave == 0, np.nan, moved_w), edges):
        shares = [
            Quartiles.of((predicted[is_own] - before[is_own]) / gave[is_own]) for predicted in (by_neg, by_log_odds)
        ]
        found.append(Carried(low, high, int(is_own.sum()), *shares))
    return found


def sizes_text(low: float, high: float) -> str:
    """For example `3 to 6`, or `10 or more`."""
    if np.isinf(low):
        return f"{high:g} or less"
    return f"{low:g} to {high:g}" if np.isfinite(high) else f"{low:g} or more"


def log_odds(p: Any) -> Any:
    """Of probabilities, in nats; finite also of 0 and 1."""
    p = np.clip(p, 1e-300, 1 - 1e-16)
    return np.log(p) - np.log1p(-p)


def within(values: Doubles, edges: tuple[float, ...]) -> Iterator[tuple[float, float, NDArray[np.bool_]]]:
    """The bins that hold anything, and what they hold; NaN is in none."""
    for low, high in pairwise(edges):
        is_own = (values >= low) & (values < high)
        if is_own.any():
            yield low, high, is_own
