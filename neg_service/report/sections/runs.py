"""What a run found, from its tables, which are streamed: how strong neurons are, and which are the strongest."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from neg_service.report import figures
from neg_service.report.cells import UNIT, VALUES
from neg_service.report.figures import drawn
from neg_service.report.page import Grid, Picture, Section
from neg_service.report.sections.interventions import edits_section, sweep_section
from neg_service.report.sections.kept import STRONGEST, Strength, rows_of, strongest_grid
from neg_service.storage.reader import Run, reading

_MOST_NEURONS = 50


def run_sections(run: Run, number: int) -> list[Section]:
    """The sections of a run that has something to show by now; those of sums for probes are the probes' business."""
    if not run.done():
        return []
    with reading(run):
        return _sections(run, number)


def _sections(run: Run, number: int) -> list[Section]:
    for name, (what, _) in VALUES.items():
        if name in run.tables:
            return [_values(run, name, what, number)]
    for name, section in (
        ("sweep", sweep_section), ("top_neurons", _top_neurons), ("intervene", edits_section), ("strength", _strength),
    ):  # fmt: skip
        if name in run.tables:
            return [section(run, number)]
    return []


def _values(run: Run, column: str, what: str, number: int) -> Section:
    """Of a measure that has a value of every neuron."""
    unit, kept, (only_right, of) = VALUES[column][1], Strength(), rows_of(run)
    table = run.table(column, ["prompt_id", "target", "layer", column], only_right)
    for batch in table.to_batches(batch_size=512):
        if not batch.num_rows:
            continue
        values = batch[column].flatten().to_numpy().reshape(batch.num_rows, -1)
        keys = zip(*(batch[name].to_pylist() for name in ("prompt_id", "target", "layer")), strict=True)
        for (prompt, target, layer), row in zip(keys, values, strict=True):
            kept.count(layer, row)
            if kept.wants((prompt, target)):
                for neuron in np.argpartition(-np.abs(row), min(STRONGEST, len(row) - 1))[:STRONGEST].tolist():
                    found = {"layer": layer, "neuron": neuron, "value": float(row[neuron])}
                    kept.keep((prompt, target), abs(found["value"]), found)
    effect = (
        " A neuron that fires by one unit stronger changes the probability by about so much."
        if column == "neurgrad"
        else ""
    )
    grid = strongest_grid(
        run, kept, f"The strongest neurons of each prompt: {what}",
        f"The {STRONGEST} largest |{what}| for {of}{f' ({unit})' if unit else ''}.{effect}",
        {"layer": str, "neuron": str, "value": lambda value: f"{value:+.3e}"}, {"value": what}, f"strongest-{number}",
    )  # fmt: skip
    return Section(f"run-{number}", f"{_title(what)}: {run.name}", "", [grid], [kept.heat_map(number, what, unit, of)])


def _top_neurons(run: Run, number: int) -> Section:
    """Of the strongest neurons alone, as NeurGrad with `keep=top_k` leaves them."""
    kept, (only_right, of) = Strength(), rows_of(run)
    in_layer: dict[int, int] = {}
    columns = ["prompt_id", "target", "rank", "layer", "neuron", "neurgrad", "activation"]
    for batch in run.table("top_neurons", columns, only_right).to_batches(batch_size=8192):
        for layer, n in zip(*np.unique(batch["layer"].to_numpy(), return_counts=True), strict=True):
            in_layer[int(layer)] = in_layer.get(int(layer), 0) + int(n)
        best = batch.filter(pc.less(batch["rank"], STRONGEST))
        for row in best.to_pylist():
            if kept.wants((row["prompt_id"], row["target"])):
                kept.keep((row["prompt_id"], row["target"]), abs(row["neurgrad"]), row)
    count = run.config["measure"]["top_k"]
    grid = strongest_grid(
        run, kept, "The strongest neurons of each prompt: NeurGrad",
        f"The {STRONGEST} largest |NeurGrad| for {of} ({UNIT}).",
        {"layer": str, "neuron": str, "neurgrad": "{:+.3e}".format, "activation": "{:+.3f}".format},
        {"neurgrad": "NeurGrad"}, f"strongest-{number}",
    )  # fmt: skip
    picture = Picture(
        f"strongest-layers-{number}", "Where the strongest neurons are",
        f"Of the {count} strongest neurons of each prompt for {of}, how many are in each layer.",
        "Bars of the share of strongest neurons over layers",
        drawn(figures.bars_over_layers(in_layer, f"share of the {count} strongest, %")),
    )  # fmt: skip
    return Section(f"run-{number}", f"NeurGrad, the strongest: {run.name}", "", [grid], [picture])


def _strength(run: Run, number: int) -> Section:
    """Of sums of |NeurGrad| over a data set."""
    summed: dict[int, NDArray[np.float64]] = {}
    prompts: dict[int, int] = {}
    for batch in run.table("strength", ["layer", "n_prompts", "strength"]).to_batches(batch_size=256):
        values = batch["strength"].flatten().to_numpy().reshape(batch.num_rows, -1)
        rows = zip(batch["layer"].to_pylist(), batch["n_prompts"].to_pylist(), values, strict=True)
        for layer, n, strength_n in rows:
            summed[layer] = summed.get(layer, 0.0) + strength_n
            prompts[layer] = prompts.get(layer, 0) + n
    kept = Strength()
    means = {layer: summed[layer] / prompts[layer] for layer in sorted(summed)}
    for layer, mean_n in means.items():
        kept.count(layer, mean_n)
    layer_m = np.repeat(list(means), [len(mean_n) for mean_n in means.values()])
    neuron_m = np.concatenate([np.arange(len(mean_n)) for mean_n in means.values()])
    mean_m = np.concatenate(list(means.values()))
    best = np.argsort(-mean_m, kind="stable")[:_MOST_NEURONS]
    what = "mean over prompts of the largest |NeurGrad|"
    grid = Grid(
        "The strongest neurons of the data set", f"The {what} over a prompt's targets, in {UNIT}.",
        ("rank", "layer", "neuron", "strength"),
        [(str(i), str(layer_m[m]), str(neuron_m[m]), f"{mean_m[m]:.3e}") for i, m in enumerate(best)],
        range(4), is_interactive=True, name=f"strongest-{number}",
    )  # fmt: skip
    heat = kept.heat_map(number, "strength", UNIT, "each prompt's strongest target")
    return Section(f"run-{number}", f"Strength over the data set: {run.name}", "", [grid], [heat])


def _title(what: str) -> str:
    return what[:1].upper() + what[1:]
