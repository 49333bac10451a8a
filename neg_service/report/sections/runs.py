"""What a run found, from its tables, which are streamed: how strong neurons are, and which are the strongest."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from neg_service.report import figures
from neg_service.report.console import is_of_curves
from neg_service.report.figures import drawn
from neg_service.report.page import Grid, Picture, Section
from neg_service.report.sections.accumulators import STRONGEST, Strength, rows_of, strongest_grid, strongest_rows
from neg_service.report.sections.interventions import edits_section, sweep_section
from neg_service.schema import Table
from neg_service.storage.reader import Run, reading

_MOST_NEURONS = 50


def run_sections(run: Run, number: int) -> list[Section]:
    """The sections of a run that has something to show by now; those of sums for probes are the probes' business."""
    if not run.done():
        return []
    with reading(run):
        return _sections(run, number)


def _sections(run: Run, number: int) -> list[Section]:
    """By what the tables are, whatever measure they come from."""
    for name in reversed(run.tables):
        if is_of_curves(run, name):
            return [sweep_section(run, name, number)]
        if "edit" in run.schemas[name].names and "edits" in run.config["measure"]:
            return [edits_section(run, name, number)]
    for name in run.values_of_neurons:
        keys = set(run.schemas[name].names) - {run.described[name].values}
        if {"prompt_id", "target"} <= keys:
            return [_by_neuron(run, name, number) if "neuron" in keys else _by_layer(run, name, number)]
        if keys <= {"layer", "expert", "basis", "n_prompts"}:
            return [_over_data_set(run, name, number)]
    return []


def _by_layer(run: Run, name: str, number: int) -> Section:
    """Of a table that has a value of every neuron of a layer in each row."""
    table, kept, (only_right, of) = run.described[name], Strength(), rows_of(run)
    column, what = str(table.values), table.title
    for batch in run.table(name, ["prompt_id", "target", "layer", column], only_right).to_batches(batch_size=512):
        if not batch.num_rows:
            continue
        values = batch[column].flatten().to_numpy().reshape(batch.num_rows, -1)
        keys = zip(*(batch[key].to_pylist() for key in ("prompt_id", "target", "layer")), strict=True)
        for (prompt, target, layer), row in zip(keys, values, strict=True):
            kept.count(layer, row)
            if kept.wants((prompt, target)):
                for neuron in np.argpartition(-np.abs(row), min(STRONGEST, len(row) - 1))[:STRONGEST].tolist():
                    found = {"layer": layer, "neuron": neuron, "value": float(row[neuron])}
                    kept.keep((prompt, target), abs(found["value"]), found)
    grid = strongest_grid(
        run, kept, f"The strongest neurons of each prompt: {what}",
        _caption(table, of),
        {"layer": str, "neuron": str, "value": lambda value: f"{value:+.3e}"}, {"value": what}, f"strongest-{number}",
    )  # fmt: skip
    heat = kept.heat_map(number, what, table.unit, of)
    return Section(f"run-{number}", f"{_title(what)}: {run.name}", "", [grid], [heat])


def _by_neuron(run: Run, name: str, number: int) -> Section:
    """Of a table that has a neuron in each row; where they are ranked, of the strongest of each prompt alone."""
    table, kept, (only_right, of) = run.described[name], Strength(), rows_of(run)
    column, what, names = str(table.values), table.title, table.schema.names
    cells: dict[str, Any] = {"layer": str, "neuron": str, column: "{:+.3e}".format}
    if "activation" in names and column != "activation":
        cells["activation"] = "{:+.3f}".format
    in_layer: Counter[int] = Counter()
    n_ranks = 0
    read = ["prompt_id", "target", *cells, *["rank"] * ("rank" in names)]
    for batch in run.table(name, read, only_right).to_batches(batch_size=8192):
        if not batch.num_rows:
            continue
        layers, values = batch["layer"].to_numpy(), batch[column].to_numpy()
        for layer in np.unique(layers).tolist():
            in_layer[layer] += int((layers == layer).sum())
            kept.count(layer, values[layers == layer])
        if "rank" in names:
            n_ranks = max(n_ranks, 1 + int(batch["rank"].to_numpy().max()))
        for row in batch.take(pa.array(strongest_rows(batch, np.abs(values)))).to_pylist():
            if kept.wants((row["prompt_id"], row["target"])):
                kept.keep((row["prompt_id"], row["target"]), abs(row[column]), row)
    grid = strongest_grid(
        run, kept, f"The strongest neurons of each prompt: {what}", _caption(table, of), cells, {column: what},
        f"strongest-{number}",
    )  # fmt: skip
    if not n_ranks:
        heat = kept.heat_map(number, what, table.unit, of, "a layer's measured neurons")
        return Section(f"run-{number}", f"{_title(what)}: {run.name}", "", [grid], [heat])
    picture = Picture(
        f"strongest-layers-{number}", "Where the strongest neurons are",
        f"Of the {n_ranks} strongest neurons of each prompt for {of}, how many are in each layer.",
        "Bars of the share of strongest neurons over layers",
        drawn(figures.bars_over_layers(dict(in_layer), f"share of the {n_ranks} strongest, %")),
    )  # fmt: skip
    return Section(f"run-{number}", f"{_title(what)}, the strongest: {run.name}", "", [grid], [picture])


def _caption(table: Table, of: str) -> str:
    unit = f" ({table.unit})" if table.unit else ""
    return f"The {STRONGEST} largest |{table.title}| for {of}{unit}. {table.note}".rstrip()


def _over_data_set(run: Run, name: str, number: int) -> Section:
    """Of sums over a data set, one row for each layer and shard: means over its prompts."""
    table = run.described[name]
    column, what, unit = str(table.values), table.title, table.unit
    summed: dict[int, NDArray[np.float64]] = {}
    prompts: dict[int, int] = {}
    for batch in run.table(name, ["layer", "n_prompts", column]).to_batches(batch_size=256):
        values = batch[column].flatten().to_numpy().reshape(batch.num_rows, -1)
        rows = zip(batch["layer"].to_pylist(), batch["n_prompts"].to_pylist(), values, strict=True)
        for layer, n, value_n in rows:
            summed[layer] = summed.get(layer, 0.0) + value_n
            prompts[layer] = prompts.get(layer, 0) + n
    kept = Strength()
    means = {layer: summed[layer] / prompts[layer] for layer in sorted(summed)}
    for layer, mean_n in means.items():
        kept.count(layer, mean_n)
    layer_m = np.repeat(list(means), [len(mean_n) for mean_n in means.values()])
    neuron_m = np.concatenate([np.arange(len(mean_n)) for mean_n in means.values()])
    mean_m = np.concatenate(list(means.values()))
    best = np.argsort(-np.abs(mean_m), kind="stable")[:_MOST_NEURONS]
    grid = Grid(
        "The strongest neurons of the data set", f"{table.note} {_title(unit)}.".strip(),
        ("rank", "layer", "neuron", what),
        [(str(i), str(layer_m[m]), str(neuron_m[m]), f"{mean_m[m]:.3e}") for i, m in enumerate(best)],
        range(4), is_interactive=True, name=f"strongest-{number}",
    )  # fmt: skip
    heat = kept.heat_map(number, what, unit, "the data set")
    return Section(f"run-{number}", f"{_title(what)} over the data set: {run.name}", "", [grid], [heat])


def _title(what: str) -> str:
    return what[:1].upper() + what[1:]
