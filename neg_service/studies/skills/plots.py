"""The plots of a study of skill neurons, drawn with matplotlib in its current style."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from neg_service.report.plots import png
from neg_service.studies.skills.options import PROBES
from neg_service.studies.skills.report import first_row, tasks_in
from neg_service.studies.tables import Rows

_WORST, _BEST = 0.0, 1.0
# Of the letters of a title, and of a label with its line, as they are written below.
_INCHES_A_LETTER, _INCHES_A_LABEL = 0.085, 1.1


def plots(tables: Mapping[str, pa.Table]) -> dict[str, bytes]:
    """PNG images by file name."""
    images = {"accuracy_by_neurons.png": _accuracy_by_neurons(tables["accuracy"])}
    if "efficiency" in tables:
        images["efficiency.png"] = _efficiency(tables["efficiency"])
    if "flexibility" in tables:
        images["flexibility.png"] = _flexibility(tables["flexibility"])
    for name, row, column in (
        ("robustness", "found_with", "used_with"),
        ("interdependency", "task", "suppressed"),
    ):
        if name in tables:
            images |= _matrices(name, tables[name], row, column)
    return images


def _accuracy_by_neurons(accuracy: pa.Table) -> bytes:
    rows = [row for row in accuracy.to_pylist() if row["split"] == "test"]
    figure, panels = _panels(tasks_in(rows), "number of neurons", "accuracy on test")
    for task, axes in panels.items():
        own = [row for row in rows if row["task"] == task]
        for i, probe in enumerate(PROBES):
            line = [row for row in own if row["probe"] == probe]
            if not line:
                continue
            if line[0]["n_neurons"] == 0:
                axes.axhline(line[0]["accuracy"], color=f"C{i}", linestyle="--", linewidth=1, label=probe)
            else:
                _curve(axes, line, "n_neurons", probe, f"C{i}")
                chosen = [row for row in line if row["is_chosen"]]
                axes.plot(chosen[0]["n_neurons"], chosen[0]["accuracy"], "o", color=f"C{i}", markersize=7, mfc="none")
        _ticks(axes, [row["n_neurons"] for row in own if row["n_neurons"]])
    return _finished(figure, panels, "What neurons alone answer (circles: number chosen on valid; bands: 95 %)")


def _efficiency(efficiency: pa.Table) -> bytes:
    rows = [row for row in efficiency.to_pylist() if row["is_chosen"]]
    figure, panels = _panels(tasks_in(rows), "train prompts", "accuracy on test")
    for task, axes in panels.items():
        for i, probe in enumerate(("polarity", "magnitude")):
            line = [row for row in rows if row["task"] == task and row["probe"] == probe]
            _curve(axes, line, "n_train", probe, f"C{i}")
        _ticks(axes, [row["n_train"] for row in rows if row["task"] == task])
    return _finished(figure, panels, "Efficiency: how many train prompts the ranking needs")


def _flexibility(flexibility: pa.Table) -> bytes:
    rows = flexibility.to_pylist()
    figure, panels = _panels(tasks_in(rows), "first rank of the block of neurons", "accuracy on test")
    for task, axes in panels.items():
        for i, probe in enumerate(("polarity", "magnitude")):
            line = [row for row in rows if row["task"] == task and row["probe"] == probe]
            _curve(axes, line, "first_rank", probe, f"C{i}")
            axes.set_xticks([row["first_rank"] for row in line])
    return _finished(figure, panels, f"Flexibility: blocks of {rows[0]['n_neurons']} neurons further down the ranking")


def _matrices(name: str, table: pa.Table, row_key: str, column_key: str) -> dict[str, bytes]:
    """Heat maps of accuracy: one, or one for each task where rows are contexts."""
    images = {}
    rows = [row for row in table.to_pylist() if row.get("probe", "magnitude") == "magnitude"]
    groups = tasks_in(rows) if row_key != "task" else [None]
    for group in groups:
        own = [row for row in rows if group is None or row["task"] == group]
        down = list(dict.fromkeys(row[row_key] for row in own))
        across = list(dict.fromkeys(row[column_key] for row in own))
        values = np.array([[_value(own, **{row_key: r, column_key: c}) for c in across] for r in down])
        figure = Figure(figsize=(3.5 + 0.75 * len(across), 2.4 + 0.45 * len(down)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(values, vmin=_WORST, vmax=_BEST, cmap="viridis")
        axes.grid(visible=False)
        for i, j in np.ndindex(values.shape):
            axes.text(
                j, i, f"{100 * values[i, j]:.0f}", ha="center", va="center", color="w" if values[i, j] < 0.6 else "k"
            )
        axes.set_xticks(range(len(across)), across, rotation=40, ha="right", fontsize=8)
        axes.set_yticks(range(len(down)), down, fontsize=8)
        axes.set_xlabel(column_key.replace("_", " "))
        axes.set_ylabel("accuracy of" if row_key == "task" else row_key.replace("_", " "))
        figure.colorbar(image, ax=axes, label="accuracy on test, 0 to 1", shrink=0.8)
        figure.suptitle(name.capitalize() + (f": {group}" if group else ""), fontsize=10)
        images[f"{name}{f'_{group}' if group else ''}.png"] = png(figure)
    return images


def _panels(tasks: Sequence[str], x: str, y: str) -> tuple[Figure, dict[str, mpl.axes.Axes]]:
    across = min(3, len(tasks))
    down = -(-len(tasks) // across)
    figure = Figure(figsize=(1.5 + 3.2 * across, 1.2 + 2.4 * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    for axes in grid[len(tasks) :]:
        axes.set_visible(False)
    panels = dict(zip(tasks, grid, strict=False))
    for task, axes in panels.items():
        axes.set_title(task, fontsize=9)
        axes.set_xlabel(x, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.set_ylim(_WORST, _BEST)
    for axes in grid[::across]:
        axes.set_ylabel(y, fontsize=8)
    return figure, panels


def _curve(axes: mpl.axes.Axes, line: Rows, x: str, label: str, color: str) -> None:
    line = sorted(line, key=lambda row: int(row[x]))
    places = [row[x] for row in line]
    axes.plot(places, [row["accuracy"] for row in line], color=color, marker=".", linewidth=1.2, label=label)
    axes.fill_between(places, [row["low"] for row in line], [row["high"] for row in line], color=color, alpha=0.07)


def _ticks(axes: mpl.axes.Axes, places: Sequence[int]) -> None:
    """A logarithmic axis with the numbers that were tried on it."""
    axes.set_xscale("log")
    axes.set_xticks(sorted(set(places)), [str(place) for place in sorted(set(places))])
    axes.minorticks_off()


def _finished(figure: Figure, panels: Mapping[str, mpl.axes.Axes], title: str) -> bytes:
    handles, labels = next(iter(panels.values())).get_legend_handles_labels()
    # With one panel there is less room than a title or a row of labels takes.
    width = figure.get_figwidth()
    columns = min(len(labels), int(width / _INCHES_A_LABEL))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    figure.suptitle(textwrap.fill(title, int(width / _INCHES_A_LETTER)), fontsize=10)
    return png(figure)


def _value(rows: Rows, **keys: Any) -> float:
    row = first_row(rows, **keys)
    return float(row["accuracy"]) if row else float("nan")
