"""What a study of linearity found, as text: estimators, linearity, layers and sets."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from neg_service.report.cells import interval, percent
from neg_service.report.console import columns
from neg_service.schema import LINEAR
from neg_service.studies.tables import Row, Rows


def tables_text(tables: Mapping[str, pa.Table]) -> str:
    """The tables for a person; intervals in brackets hold 95 % of bootstrap draws over prompts."""
    accuracy = tables["accuracy"].to_pylist()[0]
    parts = [
        answered(accuracy),
        _estimators(tables["estimators"]),
        _ranges(tables["ranges"]),
        _layers(tables["layers"]),
    ]
    if "additivity" in tables:
        parts.append(_additivity(tables["additivity"]))
    return "\n\n".join(parts)


def answered(accuracy: Row) -> str:
    """How many prompts there are, how many of them are answered rightly, and how many were studied."""
    if not accuracy["with_answer"]:
        return f"{accuracy['studied']} of {accuracy['prompts']} prompts are studied, which have no answers"
    right = f"{accuracy['right']} of {accuracy['with_answer']} prompts with an answer are answered rightly"
    p = accuracy.get("median_probability")
    said = f" (the most probable of their targets; median probability {p:.2g})" if p is not None else ""
    return f"{right}{said}; {accuracy['studied']} are studied"


def quality_cells(row: Row) -> tuple[str, ...]:
    """How well an estimator meets NEG: correlations, equal signs in percent, and the error, with their intervals."""
    return (
        interval(row, "pearson", 4),
        interval(row, "spearman", 4),
        interval(row, "signs", 1, 100),
        interval(row, "median_relative_error", 4),
    )


def seconds_cell(row: Row) -> str:
    """What an estimator costs for each prompt."""
    return "-" if row["seconds_a_prompt"] is None else f"{row['seconds_a_prompt']:.3g}"


def range_cells(row: Row) -> tuple[str, ...]:
    """How linear curves are over a range of shifts."""
    return (
        f"{row['range']:g}",
        percent(row["share_linear"]),
        f"{row['r_q05']:.4f}",
        f"{row['r_q50']:.4f}",
        f"{row['r2_q50']:.4f}",
        # Older studies do not say it.
        percent(row.get("share_linear_log_odds")),
        percent(row.get("share_straighter_log_odds")),
        str(row["n"]),
    )


def layer_cells(row: Row) -> tuple[str, ...]:
    """How linear, strong and positive the neurons of a layer are, or of all."""
    return (
        "all" if row["layer"] is None else str(row["layer"]),
        percent(row["share_linear"]),
        f"{row['neg_q50']:.2e}",
        f"{row['neg_q95']:.2e}",
        percent(row["share_positive"]),
    )


# Of models with experts, behind `layer_cells`.
ROUTING_HEAD = ("linear, same experts above, %", "linear, others chosen above, %", "others chosen above")


def has_experts(layers: Rows) -> bool:
    """Whether rows of the table `layers` are of a model with experts."""
    return "n_rerouted" in layers[0]


def routing_cells(row: Row) -> tuple[str, ...]:
    """How linear curves are where layers above chose the same experts for every shift, and where they did not."""
    return (
        percent(row["share_linear_same_experts"]),
        percent(row["share_linear_rerouted"]),
        str(row["n_rerouted"]),
    )


def routing_text(layers: Rows) -> str:
    """The same in sentences; empty of a model without experts."""
    if not has_experts(layers):
        return ""
    whole = next(row for row in layers if row["layer"] is None)
    unused = f" {whole['n_unused']} curves of experts that prompts do not use are left out." * (whole["n_unused"] > 0)
    return (
        f" Of the {whole['n']} curves that NEG is fitted to, {whole['n_rerouted']} have a shift for which a layer "
        f"above chose other experts: {percent(whole['share_linear_rerouted'])} % of these are linear, and "
        f"{percent(whole['share_linear_same_experts'])} % of the others.{unused}"
    )


def set_cells(row: Row) -> tuple[str, ...]:
    """How well neurons that are shifted together add up."""
    return (
        str(row["n_neurons"]),
        interval(row, "pearson", 4),
        interval(row, "median_relative_error", 4),
        f"{row['median_delta_p']:.2e}",
    )


def _estimators(table: pa.Table) -> str:
    rows = [row for row in table.to_pylist() if row["layer"] is None]
    lines = [(row["estimator"], *quality_cells(row), seconds_cell(row)) for row in rows]
    cost = rows[0]["neg_seconds_a_prompt"]
    measured = "" if cost is None else f"; measuring NEG of them took {cost:.3g} s a prompt"
    head = ("estimator", "Pearson r", "Spearman", "equal signs %", "median relative error", "s a prompt")
    return f"estimators against NEG: {rows[0]['n']} NEGs{measured}\n" + columns(head, lines)


def _ranges(table: pa.Table) -> str:
    lines = [range_cells(row) for row in table.to_pylist() if row["layer"] is None and row["n"]]
    head = (
        "shifts up to", "linear %", "|r|, 5 %", "|r|, median", "R2, median", "linear in log-odds %",
        "straighter there %", "curves",
    )  # fmt: skip
    return f"linear: |r| >= {LINEAR}, of curves whose NEG differs from zero\n" + columns(head, lines)


def _layers(table: pa.Table) -> str:
    rows = table.to_pylist()
    with_experts = has_experts(rows)
    lines = [layer_cells(row) + (routing_cells(row) if with_experts else ()) for row in rows]
    head = ("layer", "linear %", "|NEG|, median", "|NEG|, 95 %", "positive %")
    if not with_experts:
        return "layers\n" + columns(head, lines)
    return f"layers.{routing_text(rows)}\n" + columns((*head, *ROUTING_HEAD), lines)


def _additivity(table: pa.Table) -> str:
    lines = [set_cells(row) for row in table.to_pylist()]
    head = ("neurons", "Pearson r", "median relative error", "|change|, median")
    shift = table["shift"][0].as_py()
    return f"sets shifted together by {shift:g}, against the sum of their NEGs\n" + columns(head, lines)
