"""What a run found, from its tables, which are streamed: how strong neurons are, and which are the strongest."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from neg_service.layer_neurons import NO_EXPERT
from neg_service.report import figures
from neg_service.report.cells import EXPERTS_NOTE, lists_in
from neg_service.report.console import has_experts, is_of_curves
from neg_service.report.figures import drawn
from neg_service.report.page import Grid, Picture, Section
from neg_service.report.sections.accumulators import (
    STRONGEST,
    Strength,
    neuron_cells,
    rows_of,
    strongest_grid,
    strongest_rows,
)
from neg_service.report.sections.control import control_section
from neg_service.report.sections.experts import ExpertStrength
from neg_service.report.sections.interventions import edits_section, sweep_section
from neg_service.report.sections.positions import is_of_positions, positions_section
from neg_service.report.wishes import is_of_wishes
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
        if is_of_positions(run.schemas[name].names):
            return [positions_section(run, name, number)]
        if is_of_wishes(run.schemas[name].names):
            # Its shifts are values of neurons, too: they are shown there.
            return [control_section(run, name, number)]
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
    column, what, experts = str(table.values), table.title, ExpertStrength()
    keys = ["prompt_id", "target", "layer", *["expert"] * has_experts(run)]
    for batch in run.table(name, [*keys, column], only_right).to_batches(batch_size=512):
        rows = zip(*(batch[key].to_pylist() for key in keys), lists_in(batch[column]), strict=True)
        for prompt, target, layer, *expert, row in rows:
            kept.count(layer, row)
            experts.add(layer, expert[0] if expert else None, row)
            if kept.wants((prompt, target)):
                for neuron in np.argpartition(-np.abs(row), min(STRONGEST, len(row) - 1))[:STRONGEST].tolist():
                    found = {"layer": layer, "neuron": neuron, "value": float(row[neuron])}
                    found |= {"expert": expert[0]} if expert else {}
                    kept.keep((prompt, target), abs(found["value"]), found)
    grid = strongest_grid(
        run, kept, f"The strongest neurons of each prompt: {what}",
        _caption(run, table, of),
        {**neuron_cells(run), "value": lambda value: f"{value:+.3e}"}, {"value": what}, f"strongest-{number}",
    )  # fmt: skip
    heat = kept.heat_map(number, what, table.unit, of)
    grids, pictures = experts.shown(run, number, what, of)
    return Section(f"run-{number}", f"{_title(what)}: {run.name}", "", [grid, *grids], [heat, *pictures])


def _by_neuron(run: Run, name: str, number: int) -> Section:
    """Of a table that has a neuron in each row; where they are ranked, of the strongest of each prompt alone."""
    table, kept, (only_right, of) = run.described[name], Strength(), rows_of(run)
    column, what, names = str(table.values), table.title, table.schema.names
    cells: dict[str, Any] = {**neuron_cells(run), column: "{:+.3e}".format}
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
        run, kept, f"The strongest neurons of each prompt: {what}", _caption(run, table, of), cells, {column: what},
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


def _caption(run: Run, table: Table, of: str) -> str:
    unit = f" ({table.unit})" if table.unit else ""
    notes = " ".join([table.note, EXPERTS_NOTE * has_experts(run)])
    return f"The {STRONGEST} largest |{table.title}| for {of}{unit}. {notes}".rstrip()


def _over_data_set(run: Run, name: str, number: int) -> Section:
    """Of sums over a data set, one row for each layer, expert and shard: means over its prompts."""
    table = run.described[name]
    what, unit, with_experts = table.title, table.unit, has_experts(run)
    kept, experts = Strength(), ExpertStrength()
    means = _means(run, name)
    for (layer, expert), mean_n in means.items():
        kept.count(layer, mean_n)
        experts.add(layer, None if expert == NO_EXPERT else expert, mean_n)
    sizes = [len(mean_n) for mean_n in means.values()]
    layer_m, expert_m = (np.repeat([key[i] for key in means], sizes) for i in (0, 1))
    neuron_m = np.concatenate([np.arange(size) for size in sizes])
    mean_m = np.concatenate(list(means.values()))
    best = np.argsort(-np.abs(mean_m), kind="stable")[:_MOST_NEURONS]
    note = f" {EXPERTS_NOTE} A prompt that does not use an expert adds nothing to its neurons." * with_experts
    head = ("rank", "layer", *["expert"] * with_experts, "neuron", what)
    rows = []
    for i, m in enumerate(best):
        own = "-" if expert_m[m] == NO_EXPERT else str(expert_m[m])
        rows.append((str(i), str(layer_m[m]), *[own] * with_experts, str(neuron_m[m]), f"{mean_m[m]:.3e}"))
    grid = Grid(
        "The strongest neurons of the data set", f"{table.note} {_title(unit)}.{note}".strip(), head, rows,
        range(len(head)), is_interactive=True, name=f"strongest-{number}",
    )  # fmt: skip
    heat = kept.heat_map(number, what, unit, "the data set")
    grids, pictures = experts.shown(run, number, what, "the data set", mean_of="all prompts")
    return Section(
        f"run-{number}", f"{_title(what)} over the data set: {run.name}", "", [grid, *grids], [heat, *pictures]
    )  # fmt: skip


def _means(run: Run, name: str) -> dict[tuple[int, int], NDArray[np.float64]]:
    """Means [N] over all prompts by layer and expert, ascending.

    A shard has no row of an expert that none of its prompts used; its prompts count all the same.
    """
    columns = [own for own in ("layer", "expert", "n_prompts") if own in run.schemas[name].names]
    column = str(run.described[name].values)
    stored = run.stored_columns(name).get(column, column)
    summed: dict[tuple[int, int], NDArray[np.float64]] = {}
    n_prompts = 0
    for _, part in run.parts(name):
        table = part.to_table(columns=[*columns, stored]).combine_chunks()
        experts = table["expert"].fill_null(NO_EXPERT).to_pylist() if "expert" in columns else [NO_EXPERT] * len(table)
        keys = zip(table["layer"].to_pylist(), experts, strict=True)
        for key, value_n in zip(keys, lists_in(table[stored].chunk(0)), strict=True):
            summed[key] = summed.get(key, 0.0) + value_n
        n_prompts += table["n_prompts"][0].as_py()
    return {key: summed[key] / n_prompts for key in sorted(summed)}


def _title(what: str) -> str:
    return what[:1].upper() + what[1:]
