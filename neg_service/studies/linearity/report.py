"""What a study of linearity found, as text: estimators, linearity, layers and sets."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from neg_service.report.cells import interval, percent
from neg_service.report.console import columns
from neg_service.schema import LINEAR
from neg_service.studies.tables import Row


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
    head = ("shifts up to", "linear %", "|r|, 5 %", "|r|, median", "R2, median", "curves")
    return f"linear: |r| >= {LINEAR}, of curves whose NEG differs from zero\n" + columns(head, lines)


def _layers(table: pa.Table) -> str:
    lines = [layer_cells(row) for row in table.to_pylist()]
    return "layers\n" + columns(("layer", "linear %", "|NEG|, median", "|NEG|, 95 %", "positive %"), lines)


def _additivity(table: pa.Table) -> str:
    lines = [set_cells(row) for row in table.to_pylist()]
    head = ("neurons", "Pearson r", "median relative error", "|change|, median")
    shift = table["shift"][0].as_py()
    return f"sets shifted together by {shift:g}, against the sum of their NEGs\n" + columns(head, lines)
