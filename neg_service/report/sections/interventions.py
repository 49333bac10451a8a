"""What interventions found: a sweep's NEGs and curves, and what joint edits do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from neg_service.measures.edits import OPERATIONS, edit_name
from neg_service.report import figures
from neg_service.report.cells import EXPERTS_NOTE, VALUES, percent
from neg_service.report.console import agreement
from neg_service.report.figures import drawn
from neg_service.report.page import Grid, Picture, Section
from neg_service.report.sections.accumulators import (
    Curves,
    Row,
    Sample,
    Strength,
    neuron_cells,
    rows_of,
    strongest_grid,
    strongest_rows,
)
from neg_service.schema import change_columns
from neg_service.storage.reader import Run
from neg_service.table import Table

_MOST_EDITS = 200


def sweep_section(run: Run, table: str, number: int) -> Section:
    """Of interventions on single neurons."""
    of_table = Table.of(table, run.schemas[table])
    largest, curve = change_columns(of_table.schema)
    shown = [*neuron_cells(run), "neg", "r", largest, "activation"]
    only_right, of = rows_of(run)
    with_experts = "is_routed" in run.schemas[table].names
    if with_experts:
        only_right &= pc.field("is_routed")
    has_curves = curve in run.schemas[table].names
    columns = ["prompt_id", "target", *shown, "r2", "neurgrad", "gradient", *[curve] * has_curves]
    kept, sample, curves = Strength(), Sample(), Curves(run)
    for batch in run.table(table, columns, only_right).to_batches(batch_size=8192):
        if not batch.num_rows:
            continue
        sample.add(batch.select(["neg", "neurgrad", "gradient"]))
        layers, neg = batch["layer"].to_numpy(), batch["neg"].to_numpy()
        for layer in np.unique(layers).tolist():
            kept.count(layer, neg[layers == layer])
        for row in batch.take(pa.array(strongest_rows(batch, np.abs(neg)))).to_pylist():
            if kept.wants((row["prompt_id"], row["target"])):
                kept.keep((row["prompt_id"], row["target"]), abs(row["neg"]), row)
        if has_curves:
            curves.add(batch)
    is_signed, unit = run.config["measure"].get("shift") == "signed", of_table.unit
    # In the unit of the table's values, a shift's taken off.
    what = unit.split(" a unit")[0]
    four = "{:.4f}".format
    grid = strongest_grid(
        run, kept, "The strongest swept neurons of each prompt",
        f"NEG is the measured slope ({unit}) for {of}; r says how straight the curve is; beside it the largest change "
        f"over the shifts, in {what}.{f' {EXPERTS_NOTE}' * with_experts}",
        {
            **neuron_cells(run), "neg": "{:+.3e}".format, "r": four, largest: "{:.2e}".format,
            "activation": "{:+.3f}".format,
        },
        {"neg": of_table.title, largest: f"largest change, {what}"}, f"swept-{number}",
    )  # fmt: skip
    points = sample.rows()
    pictures = [
        kept.heat_map(number, of_table.title, unit, of, "a layer's swept neurons"),
        Picture(
            f"sweep-{number}", "NEG against NeurGrad and the plain gradient",
            f"A point is a neuron on a prompt, {len(points)} drawn at random; on the grey diagonal an estimate is "
            f"right. Vertical: NEG, {unit}.",
            "Scatter plots of NEG against NeurGrad and against the gradient",
            drawn(
                figures.scatter_of_estimates(points, [(name, *VALUES[name]) for name in ("neurgrad", "gradient")]),
                (8, 4.0),
            ),
            is_wide=True,
        ),
    ]  # fmt: skip
    pictures += _curves_shown(curves.rows(), number, what, is_signed=is_signed)
    caption = "Of all targets, and of all curves, those below the noise among them."
    facts = Grid("Linearity and agreement", caption, ("what", "found"), agreement(run))
    return Section(f"run-{number}", f"NEG by intervention: {run.name}", "", [facts, grid], pictures)


def _curves_shown(rows: list[Row], number: int, what: str, *, is_signed: bool) -> list[Picture]:
    """A picture of a few curves; none of a sweep that did not keep them."""
    if not rows:
        return []
    return [
        Picture(
            f"curves-{number}", "A few neurons",
            f"Change over shifts of one neuron (points), in {what}, the strongest of several layers; the "
            f"dashed line is what {'the gradient' if is_signed else 'NeurGrad'} predicts.",
            "Curves of probability over shifts for a few neurons",
            drawn(figures.curves(rows, "gradient" if is_signed else "neurgrad", what), (10, 5.6)), is_wide=True,
        )
    ]  # fmt: skip


def edits_section(run: Run, table: str, number: int) -> Section:
    """Of joint interventions: a row for each edit."""
    only_right, of = rows_of(run)
    columns = [
        "edit", "target_index", "is_answer", "delta_p", "probability_before", "prediction_before", "prediction",
    ]  # fmt: skip
    with_experts = "n_routed" in run.schemas[table].names
    columns += ["n_routed"] * with_experts
    sums: dict[str, NDArray[np.float64]] = {}
    for batch in run.table(table, columns, only_right).to_batches(batch_size=8192):
        edits = batch["edit"].dictionary_encode()
        names, codes = edits.dictionary.to_pylist(), edits.indices.to_numpy()
        target, before, after = (
            batch[name].to_numpy() for name in ("target_index", "prediction_before", "prediction")
        )  # fmt: skip
        change = batch["delta_p"].to_numpy().astype(np.float64)
        added = np.stack(
            [np.ones(len(target)), change, np.abs(change), before == target, after == target, before != after,
             batch["probability_before"].to_numpy(), *(batch[name].to_numpy() for name in columns[7:])], 1,
        )  # fmt: skip
        for code, name in enumerate(names):
            sums[name] = sums.get(name, np.zeros(added.shape[1])) + added[codes == code].sum(0)
    shown = list(sums.items())[:_MOST_EDITS]
    told = {edit_name(edit, i): edit for i, edit in enumerate(run.config["measure"]["edits"])}
    head = (
        "edit", "what", "neurons", *["neurons that prompts use, mean"] * with_experts, "p before",
        "change of p, mean", "|change of p|, mean", "right before, %", "right after, %", "predictions changed, %",
        "prompts × targets",
    )  # fmt: skip
    has_answers = of == "the right answer"
    rows = []
    for name, (n, change, size, right_before, right_after, changed, before, *routed) in shown:
        rows.append(
            (
                name, _what(told[name]), str(len(told[name]["neurons"])),
                *(f"{own / n:.2f}" for own in routed), f"{before / n:.4f}", f"{change / n:+.3e}",
                f"{size / n:.3e}", percent(right_before / n) if has_answers else "-",
                percent(right_after / n) if has_answers else "-", percent(changed / n), f"{n:.0f}",
            )
        )  # fmt: skip
    grid = Grid(
        "Edits", f"Means over all prompts, of the probability p of {of}"
        + (f"; the first {_MOST_EDITS} of {len(sums)} edits." if len(sums) > _MOST_EDITS else "."),
        head, rows, range(2, len(head)), is_interactive=True, name=f"edits-{number}",
    )  # fmt: skip
    return Section(f"run-{number}", f"Joint interventions: {run.name}", "", [grid])


def _what(edit: Mapping[str, Any]) -> str:
    """An edit in a few words: the operation, and the first of its neurons as layer:neuron."""
    operation = next(name for name in OPERATIONS if edit.get(name) is not None)
    value = edit[operation]
    amount = f"{value:g}" if isinstance(value, int | float) else "each its own"
    neurons = ", ".join(":".join(str(own) for own in neuron if own is not None) for neuron in edit["neurons"][:3])
    return f"{operation} {amount} of {neurons}{', …' if len(edit['neurons']) > 3 else ''}"
