"""Targets that were steered: what was wanted and achieved, what it took, how far predictions carry, and by what shifts.

Of tens of thousands of wishes a sample is kept for medians and points; how many were met is counted of all.
Side effects are in `side_effects.py`.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from neg_service.report import control_figures
from neg_service.report.cells import EXPERTS_NOTE
from neg_service.report.console import has_experts
from neg_service.report.control import wanted_text
from neg_service.report.figures import drawn
from neg_service.report.page import Grid, Picture, Section
from neg_service.report.sections.accumulators import STRONGEST, Row, Sample, neuron_cells, texts_of
from neg_service.report.sections.side_effects import is_of_side_effects, side_effects_shown
from neg_service.report.wishes import BY_SIZE, Carried, Met, Quartiles, by_size, carried, off, sizes_text, to_go
from neg_service.storage.reader import Run

# Wishes that medians are of, those that are points, and those that tables name.
_SAMPLED, _POINTS, _NAMED = 20_000, 3000, 200
_KEY = ("prompt_id", "target", "wish")
_READ = (
    *_KEY, "kind", "wanted", "against", "probability_before", "probability", "value_before", "first_shot", "achieved",
    "reached", "reason", "predicted_by_neg", "predicted_by_log_odds", "passes", "n_moved", "relative_norm",
)  # fmt: skip
# What was written behind a prompt, where that was asked for.
_WRITTEN = {
    "text_before": "without the shift", "text": "with it at the last position", "text_everywhere": "with it everywhere",
}  # fmt: skip
Key = tuple[str, str, int]


@dataclass
class _Kept:
    """What is kept of wishes while they are read."""

    met: Met = field(default_factory=Met)
    sample: Sample = field(default_factory=lambda: Sample(_SAMPLED))
    # Rows of the first wishes, and of those that are furthest off, with what they are ordered by.
    few: list[Row] = field(default_factory=list)
    furthest: list[tuple[tuple[bool, float, int], Row]] = field(default_factory=list)
    # The first wishes, by what names them: what was wanted.
    first: dict[Key, str] = field(default_factory=dict)

    def add(self, batch: pa.RecordBatch) -> None:
        """Rows of table `control`."""
        n_before = self.met.n
        self.met.add(batch)
        self.sample.add(batch)
        for row in batch.slice(0, max(0, _NAMED - len(self.first))).to_pylist():
            self.first[key_of(row)] = wanted_text(row)
        self.few += batch.slice(0, max(0, _NAMED - len(self.few))).to_pylist()
        kinds = (batch[name].to_pylist() for name in ("kind", "wanted", "achieved", "reached"))
        for place, (kind, wanted, achieved, is_reached) in enumerate(zip(*kinds, strict=True)):
            # Those that were not reached before all others, and of equal ones the first.
            order = (not is_reached, off(kind, wanted, achieved), -n_before - place)
            if len(self.furthest) < _NAMED:
                heapq.heappush(self.furthest, (order, batch.slice(place, 1).to_pylist()[0]))
            elif order > self.furthest[0][0]:
                heapq.heapreplace(self.furthest, (order, batch.slice(place, 1).to_pylist()[0]))

    @property
    def shown(self) -> list[Row]:
        """The wishes that have a row each: all as they come, or of many those furthest off, the furthest first."""
        if self.met.n <= _NAMED:
            return self.few
        return [row for _, row in sorted(self.furthest, key=lambda own: own[0], reverse=True)]


def key_of(row: Row) -> Key:
    """What names a wish."""
    return row["prompt_id"], row["target"], row["wish"]


def control_section(run: Run, name: str, number: int) -> Section:
    """Of a run whose table `name` says what was wanted of targets."""
    kept = _Kept()
    for batch in run.table(name, [*_READ]).to_batches(batch_size=8192):
        if batch.num_rows:
            kept.add(batch)
    title, table = f"Control: {run.name}", kept.sample.table
    if table is None:
        return Section(f"run-{number}", title)
    bins = carried(table)
    of = f" Of {table.num_rows} of the {kept.met.n} wishes, drawn at random." * (table.num_rows < kept.met.n)
    grids = [_each(run, kept, number), *_by_size(table, of), *_carried(bins, of)]
    grids += [*_written(run, name, kept, number), *_strongest(run, kept, number)]
    pictures = [*_wanted(table, number), _effort(table, number), *_predictions(table, bins, number)]
    for other in run.tables:
        if is_of_side_effects(run.schemas[other].names):
            more_grids, more_pictures = side_effects_shown(run, other, kept.first, number)
            grids, pictures = grids + more_grids, pictures + more_pictures
    return Section(f"run-{number}", title, _text(kept.met, table, bins), grids, pictures)


def _text(met: Met, table: pa.Table, bins: Sequence[Carried]) -> str:
    n_moved, share = (np.median(table[name].to_numpy()) for name in ("n_moved", "relative_norm"))
    told = f"{str(met).capitalize()}; each as an intervention gave it."
    told += f" {met.n_there} of them needed no shift." * (met.n_there > 0)
    told += f" A shift moves {n_moved:g} neurons and has {100 * share:.2g} % of the norm of activations (medians)."
    return f"{told} {_linearity(bins)}".rstrip()


def _linearity(bins: Sequence[Carried]) -> str:
    """What the smallest and the largest rises say of straight lines."""
    rises = [own for own in bins if own.low >= 0]
    if not rises:
        return ""
    said = [
        f"where log-odds rise by {sizes_text(own.low, own.high)} nats, NEG predicts {_of_change(own.by_neg)} of the "
        f"change of probability and the gradient of log-odds {_of_change(own.by_log_odds)}"
        for own in rises[:: max(1, len(rises) - 1)][:2]
    ]
    return (
        "Is probability linear in neurons for large moves, too? A straight line would have its slope predict 100 % of "
        f"the change: {'; '.join(said)} (medians)."
    )


def _of_change(share: Quartiles) -> str:
    percent = 100 * share.median
    return f"{percent:.0f} %" if abs(percent) >= 10 else f"{percent:.2g} %"


def _by_size(table: pa.Table, of: str) -> list[Grid]:
    rows = by_size(table)
    if not rows:
        return []
    caption = (
        "Wishes for a probability by how far their target was from it, in nats of log-odds. What is off is a "
        f"difference of probabilities: from what was wanted, and of predictions from what the shift gave; medians.{of}"
    )
    return [Grid("What it took, by size of the wish", caption, BY_SIZE, rows, range(1, len(BY_SIZE)))]


def _carried(bins: Sequence[Carried], of: str) -> list[Grid]:
    if not bins:
        return []
    head = ("log-odds moved by, nats", "shifts", "NEG predicts, %", "the gradient of log-odds predicts, %")
    rows = [
        (sizes_text(own.low, own.high), str(own.n), *(_share(one) for one in (own.by_neg, own.by_log_odds)))
        for own in bins
    ]
    caption = (
        "The share of the change of probability that was predicted before the shift was tried: its median, and the two "
        f"values between which the middle half is; 100 is right. Negative nats: the target was lowered.{of}"
    )
    return [Grid("How far predictions carry", caption, head, rows, range(1, len(head)))]


def _share(own: Quartiles) -> str:
    return f"{100 * own.median:.1f} ({100 * own.low:.1f} to {100 * own.high:.1f})"


def _each(run: Run, kept: _Kept, number: int) -> Grid:
    """A row for each wish, or for those furthest off."""
    shown, n = kept.shown, kept.met.n
    caption = (
        "Probabilities, and of margins and the top nats above other tokens: before, with the first shift that was "
        "tried, and with the last; passes are interventions and further gradients."
    )
    if reasons := ", ".join(f"{reason}: {count}" for reason, count in kept.met.reasons.most_common()):
        caption += f" Not reached: {n - kept.met.n_reached}; {reasons}."
    if n > len(shown):
        caption += f" {len(shown)} of {n}: those that were not reached, and those furthest off in nats, first."
    head = (
        "prompt", "target", "before", "wanted", "first shot", "achieved", "reached", "reason", "passes",
        "shift, % of ‖a‖",
    )  # fmt: skip
    texts = texts_of(run, {row["prompt_id"] for row in shown})
    rows = [
        (
            texts[row["prompt_id"]], row["target"], _value(row["value_before"]), wanted_text(row),
            _value(row["first_shot"]), _value(row["achieved"]), "yes" if row["reached"] else "no", row["reason"],
            str(row["passes"]), f"{100 * row['relative_norm']:.2f}",
        )
        for row in shown
    ]  # fmt: skip
    title = "Each wish" if n == len(shown) else "The wishes that are furthest off"
    return Grid(title, caption, head, rows, (2, 4, 5, 8, 9), is_interactive=True, name=f"wishes-{number}")


def _value(value: float) -> str:
    """A probability, or nats; of what is close to 0 its size."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def _written(run: Run, name: str, kept: _Kept, number: int) -> list[Grid]:
    """What the model writes behind the first prompts, without and with the shift of each wish."""
    if not set(_WRITTEN) <= set(run.schemas[name].names):
        return []
    only = pc.field("text_before").is_valid() & pc.field("prompt_id").isin(_prompts(kept))
    batches = run.table(name, [*_KEY, *_WRITTEN], only).to_batches(batch_size=8192)
    written = [row for batch in batches for row in batch.to_pylist() if key_of(row) in kept.first]
    if not written:
        return []
    texts = texts_of(run, {row["prompt_id"] for row in written})
    rows = [
        (texts[row["prompt_id"]], row["target"], kept.first[key_of(row)], *(repr(row[own]) for own in _WRITTEN))
        for row in written
    ]
    caption = (
        "Text that the model writes behind a prompt, the most probable token each time: without the shift, with it at "
        "the prompt's last position alone, where it was looked for, and with it at all positions."
    )
    caption += f" Of the first {len(kept.first)} wishes." * (kept.met.n > len(kept.first))
    head = ("prompt", "target", "wanted", *_WRITTEN.values())
    return [Grid("What the model writes", caption, head, rows, is_interactive=True, name=f"written-{number}")]


def _prompts(kept: _Kept) -> pa.Array:
    return pa.array(sorted({prompt for prompt, *_ in kept.first}), pa.string())


def _strongest(run: Run, kept: _Kept, number: int) -> list[Grid]:
    """Of the first wishes, the neurons that are moved most."""
    name = next((own for own in run.tables if {"wish", "rank", "neuron", "shift"} <= set(run.schemas[own].names)), None)
    if name is None:
        return []
    prompts = _prompts(kept)
    cells: dict[str, Any] = {**neuron_cells(run), "shift": "{:+.4f}".format, "activation": "{:+.4f}".format}
    only = (pc.field("rank") < STRONGEST) & pc.field("prompt_id").isin(prompts)
    moved = [
        row
        for batch in run.table(name, [*_KEY, "rank", *cells], only).to_batches(batch_size=8192)
        for row in batch.to_pylist()
        if key_of(row) in kept.first
    ]
    # As wishes come; parts of a run have their rows by layer.
    order = {key: place for place, key in enumerate(kept.first)}
    moved.sort(key=lambda row: (order[key_of(row)], row["rank"]))
    texts = texts_of(run, prompts.to_pylist())
    rows = [
        (
            texts[row["prompt_id"]], row["target"], kept.first[key_of(row)],
            *(write(row[key]) for key, write in cells.items()),
        )
        for row in moved
    ]  # fmt: skip
    caption = (
        f"The {STRONGEST} largest shifts of each wish: what is added to the neuron's activation, and that activation, "
        f"in its unit.{f' {EXPERTS_NOTE}' * has_experts(run)}"
    )
    caption += f" Of the first {_NAMED} wishes." * (kept.met.n > len(kept.first))
    head = ["prompt", "target", "wanted", *cells]
    return [
        Grid(
            "The neurons that are moved most", caption, head, rows, range(3, len(head)), is_interactive=True,
            name=f"moved-{number}",
        )
    ]  # fmt: skip


def _wanted(table: pa.Table, number: int) -> list[Picture]:
    """Of probabilities, and of margins, where there are wishes for them."""
    is_probability = pc.equal(table["kind"], "probability")
    kinds = [
        ("wanted", "probability", "Wanted and achieved", is_probability),
        ("wanted-margin", "nats above others", "Wanted and achieved margins", pc.invert(is_probability)),
    ]
    pictures = []
    for name, label, title, is_own in kinds:
        own = table.filter(is_own).slice(0, _POINTS)
        if not own.num_rows:
            continue
        wanted, first, achieved, reached = (
            own[key].to_numpy() for key in ("wanted", "first_shot", "achieved", "reached")
        )
        found = control_figures.Found(wanted, first, achieved, reached, label)
        pictures.append(
            Picture(
                f"{name}-{number}", title,
                "A point is a wish: what its first shift gave, along the gradient of log-odds, and what the last one "
                "gave; on the grey lines they are as wanted. Where a few values are wanted, points are spread sideways."
                f"{' What is beyond the edge stands there.' * (label != 'probability')}",
                "Scatter plots of the first shot and of what was achieved against what was wanted",
                drawn(control_figures.first_and_achieved(found), (8.6, 4.4)), is_wide=True,
            )
        )  # fmt: skip
    return pictures


def _effort(table: pa.Table, number: int) -> Picture:
    own = table.slice(0, _POINTS)
    passes, share, is_reached = (own[name].to_numpy() for name in ("passes", "relative_norm", "reached"))
    return Picture(
        f"effort-{number}", "What it took, by how far the wish was",
        "Passes (interventions and further gradients), and the norm of the shift over that of all activations, against "
        "how far the target was from what was wanted, in nats of log-odds or of a margin; a point is a wish.",
        "Scatter plots of passes and of the shift's norm against the size of the wish",
        drawn(control_figures.effort(to_go(own), passes.astype(np.float64), share, is_reached), (8.6, 4.0)),
        is_wide=True,
    )  # fmt: skip


def _predictions(table: pa.Table, bins: Sequence[Carried], number: int) -> list[Picture]:
    if not bins:
        return []
    own = table.slice(0, _POINTS)
    before_after_2w = np.stack([own[name].to_numpy() for name in ("probability_before", "probability")])
    predicted = {
        name: own[key].to_numpy()
        for name, key in (("NEG", "predicted_by_neg"), ("gradient of log-odds", "predicted_by_log_odds"))
    }
    return [
        Picture(
            f"predictions-{number}", "Are large moves linear? Predicted against given",
            "Left: the change of probability that a slope at the prompt as it is predicts, against what the shift "
            "gave; on the grey diagonal it is right, and what is far off stands at the edge. Right: the share of the "
            "change that is predicted, median and middle half, by how far log-odds were moved; 100 % is a straight "
            "line, and more than 300 % stands there.",
            "Predicted against given changes, and the predicted share of the change by its size",
            drawn(control_figures.predictions(before_after_2w, predicted, bins), (9.6, 4.4)), is_wide=True,
        )
    ]  # fmt: skip
