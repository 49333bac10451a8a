"""Plots, drawn with matplotlib from a run's tables."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.compute as pc
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from neg_service.report.cells import lists_in
from neg_service.storage.reader import Run

_BLUE, _ORANGE = "#1f77b4", "#d95f02"


def neurgrad_over_layers(run: Run) -> bytes:
    """A PNG: how strong NeurGrad is in each layer, for right answers and for wrong targets.

    For each layer the median over (prompt, target) rows of the median and of the largest |NeurGrad| of a row, on a
    logarithmic axis; streams the table part by part.
    """
    per_row: dict[tuple[int, bool], list[tuple[float, float]]] = {}
    for batch in run.table("neurgrad").to_batches(columns=["layer", "is_answer", "neurgrad"], batch_size=512):
        if not batch.num_rows:
            continue
        strength = [np.abs(own) for own in lists_in(batch["neurgrad"])]
        typical, top = [np.median(own) for own in strength], [own.max() for own in strength]
        is_answer = pc.fill_null(batch["is_answer"], False).to_pylist()
        for layer, right, row in zip(
            batch["layer"].to_pylist(), is_answer, zip(typical, top, strict=True), strict=True
        ):
            per_row.setdefault((layer, right), []).append(row)
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for right, color, who in ((True, _BLUE, "right answer"), (False, _ORANGE, "other targets")):
        layers = sorted(layer for layer, is_right in per_row if is_right is right)
        if not layers:
            continue
        medians = np.array([np.median(per_row[layer, right], axis=0) for layer in layers])
        axes.plot(layers, medians[:, 1], "-o", color=color, markersize=3, label=f"strongest neuron, {who}")
        axes.plot(layers, medians[:, 0], "--", color=color, label=f"median neuron, {who}")
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("|NeurGrad|  (probability per unit of |activation|)")
    title = f"{run.about.get('model', {}).get('source', 'model')}: strength of neurons over layers"
    axes.set_title(f"{title}\nmedian over {run.table('prompts').count_rows()} prompts", fontsize=11)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return png(figure)


def neg_against_neurgrad(run: Run) -> bytes:
    """A PNG: NEG as measured against NeurGrad and against the plain gradient, a point a (target, neuron).

    Both axes are linear near zero and logarithmic beyond, because effects span many orders of magnitude and two signs.
    """
    names = ["neg", "neurgrad", "gradient", "is_answer"]
    table = run.table("sweep").to_table(columns=names)
    neg, neurgrad, gradient = (table[name].to_numpy().astype(float) for name in names[:3])
    right = pc.fill_null(table["is_answer"], False).to_numpy()
    largest = float(max(np.abs(neg).max(initial=0), np.abs(neurgrad).max(initial=0))) or 1.0
    ticks = [10.0 ** (np.floor(np.log10(largest)) - decades) for decades in (0, 2, 4)]
    figure = Figure(figsize=(11, 5.4), dpi=120, layout="constrained")
    for axes, estimate, what in zip(
        figure.subplots(1, 2, sharey=True), (neurgrad, gradient), ("NeurGrad", "plain gradient"), strict=True
    ):
        for is_right, color, who in ((False, _ORANGE, "other targets"), (True, _BLUE, "right answer")):
            own = right == is_right
            axes.plot(estimate[own], neg[own], ".", color=color, markersize=3, alpha=0.5, label=who)
        axes.plot([-2 * largest, 2 * largest], [-2 * largest, 2 * largest], color="0.5", linewidth=0.8, zorder=0)
        for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
            scale("symlog", linthresh=largest / 1e5)
            axis.set_major_locator(FixedLocator([-t for t in ticks] + [0.0] + ticks))
        axes.set_xlim(-2 * largest, 2 * largest)
        axes.set_ylim(-2 * largest, 2 * largest)
        axes.set_xlabel(f"{what}  (estimate from one backward pass)")
        correlation = np.corrcoef(estimate, neg)[0, 1] if len(neg) > 1 else np.nan
        axes.set_title(f"NEG against {what}: r = {correlation:.4f}", fontsize=11)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
    figure.axes[0].set_ylabel("NEG  (probability per unit of |activation|)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=2, fontsize=9, markerscale=3)
    source = run.about.get("model", {}).get("source", "model")
    figure.suptitle(f"{source}: {len(neg)} curves on {run.table('prompts').count_rows()} prompts", fontsize=12)
    return png(figure)


def png(figure: Figure) -> bytes:
    """A figure as an image."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
