"""Plots, drawn with matplotlib from a run's tables."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.compute as pc
from matplotlib.figure import Figure

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
        strength = np.abs(batch["neurgrad"].flatten().to_numpy()).reshape(batch.num_rows, -1)
        typical, top = np.median(strength, axis=1), strength.max(axis=1)
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
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
