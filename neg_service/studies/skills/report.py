"""What a study of skill neurons found, as text: accuracies by genre, and a few lines on each analysis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from neg_service.prompts.tasks import GENRES
from neg_service.report.console import columns
from neg_service.studies.tables import Row, Rows

# Baselines first, as papers print them.
_ORDER = ("majority", "random", "probability", "activation", "polarity", "magnitude", "forest")


def tables_text(tables: Mapping[str, pa.Table]) -> str:
    """The tables for a person; accuracies are of test, in percent."""
    parts = [_accuracies(tables["accuracy"].to_pylist())]
    for name, text in (
        ("efficiency", _efficiency),
        ("flexibility", _flexibility),
        ("robustness", _robustness),
        ("interdependency", _interdependency),
    ):
        if name in tables:
            parts += text(tables[name].to_pylist())
    return "\n\n".join(parts)


def tasks_in(rows: Rows) -> list[str]:
    """The tasks of rows, in their order."""
    return list(dict.fromkeys(row["task"] for row in rows))


def first_row(rows: Rows, **keys: Any) -> Row | None:
    """The first row with these values."""
    return next((row for row in rows if all(row[key] == value for key, value in keys.items())), None)


def _accuracies(accuracy: Rows) -> str:
    """By genre and task; beside a probe's its number of neurons, chosen on valid."""
    rows = [row for row in accuracy if row["split"] == "test" and row["is_chosen"]]
    shown = [probe for probe in _ORDER if any(row["probe"] == probe for row in rows)]
    lines = []
    for genre in [*GENRES, ""]:
        for task in tasks_in([row for row in rows if row["genre"] == genre]):
            own = {row["probe"]: row for row in rows if row["task"] == task}
            lines.append((genre or "-", task or "-", *(_with_neurons(own.get(probe)) for probe in shown)))
    return columns(("genre", "task", *shown), lines)


def _efficiency(efficiency: Rows) -> list[str]:
    rows = [row for row in efficiency if row["is_chosen"] and row["probe"] == "magnitude"]
    sizes = sorted({row["n_train"] for row in rows})
    lines = [
        (task, *(_with_neurons(first_row(rows, task=task, n_train=size)) for size in sizes)) for task in tasks_in(rows)
    ]
    title = "efficiency: magnitude probe by number of train prompts (in brackets neurons, chosen on valid)"
    return [title, columns(("task", *map(str, sizes)), lines)]


def _flexibility(flexibility: Rows) -> list[str]:
    rows = _of_magnitude(flexibility)
    starts = sorted({row["first_rank"] for row in rows})
    n = rows[0]["n_neurons"]
    lines = [
        (task, *(_percent(first_row(rows, task=task, first_rank=start)) for start in starts)) for task in tasks_in(rows)
    ]
    head = ("task", *(f"{start}-{start + n - 1}" for start in starts))
    return [f"flexibility: magnitude probe with {n} neurons, by their ranks", columns(head, lines)]


def _robustness(robustness: Rows) -> list[str]:
    rows = _of_magnitude(robustness)
    parts = []
    for task in tasks_in(rows):
        own = [row for row in rows if row["task"] == task]
        names = list(dict.fromkeys(row["used_with"] for row in own))
        lines = [
            (f"({i}) {source}", *(_percent(first_row(own, found_with=source, used_with=used)) for used in names))
            for i, source in enumerate(names, 1)
        ]
        head = ("found with \\ used with", *(f"({i})" for i in range(1, len(names) + 1)))
        title = f"robustness: {task}, magnitude probe with {own[0]['n_neurons']} neurons"
        parts += [title, columns(head, lines)]
    return parts


def _interdependency(rows: Rows) -> list[str]:
    edits = list(dict.fromkeys(row["suppressed"] for row in rows))
    lines = []
    for task in tasks_in(rows):
        own = {row["suppressed"]: row for row in rows if row["task"] == task}
        before = f"{100 * next(iter(own.values()))['accuracy_before']:.1f}"
        lines.append((task, before, *(_percent(own.get(edit)) for edit in edits)))
    title = (
        f"interdependency: the model's accuracy while {rows[0]['n_neurons']} skill neurons of a task are suppressed by "
        f"{rows[0]['shift']:g}"
    )
    return [title, columns(("task", "nothing", *edits), lines)]


def _of_magnitude(rows: Rows) -> Rows:
    return [row for row in rows if row["probe"] == "magnitude"]


def _percent(row: Row | None) -> str:
    return "-" if row is None else f"{100 * row['accuracy']:.1f}"


def _with_neurons(row: Row | None) -> str:
    """An accuracy, and where neurons were chosen their number in brackets."""
    return _percent(row) + (f" ({row['n_neurons']})" if row and row["n_neurons"] else "")
