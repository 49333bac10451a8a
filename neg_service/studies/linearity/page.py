"""What a study of linearity found, as sections of a page: estimators, linearity, where neurons are strong, sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from neg_service.report import figures
from neg_service.report.cells import UNIT, VALUES, estimator_name
from neg_service.report.figures import drawn
from neg_service.report.page import Grid, Picture, Section
from neg_service.report.sections.loading import StudyView
from neg_service.storage.studies import StudyResults
from neg_service.studies.linearity.report import (
    ROUTING_HEAD,
    answered,
    has_experts,
    layer_cells,
    quality_cells,
    range_cells,
    routing_cells,
    routing_text,
    seconds_cell,
    set_cells,
)
from neg_service.studies.tables import Row, Rows

_FEW_PROMPTS = 10


def linearity_sections(study: StudyResults) -> list[Section]:
    """The sections of a study, from its tables."""
    tables, options = study.tables, study.about["study"]
    made = [_estimators(tables, options), _linearity(tables), _layers(tables)]
    if "additivity" in tables:
        made.append(_additivity(tables["additivity"].to_pylist()))
    return made


# Ranges reach further than NEG does, whose run they are not to be taken for; they are in the study's own tables.
LINEARITY_VIEW = StudyView("study", linearity_sections, shows_run=lambda purpose: not purpose.startswith("range-"))


def _estimators(tables: Mapping[str, pa.Table], options: Mapping[str, Any]) -> Section:
    everything = tables["estimators"].to_pylist()
    whole = [row for row in everything if row["layer"] is None]
    neurons = "all neurons" if options["neurons"] is None else f"{options['neurons']} neurons"
    of_layers = "a layer"
    if has_experts(tables["layers"].to_pylist()):
        neurons, of_layers = f"{neurons} of each expert and MLP", "in all layers"
    caption = (
        "Signs and relative errors are of the pairs whose NEG differs from zero by more than the noise that the run "
        "measured; only NeurGrad has the unit of NEG, and with it a relative error. Seconds are of all neurons of a "
        "prompt, with one replica; estimators that one backward pass gives together share its cost."
    )
    if (cost := whole[0]["neg_seconds_a_prompt"]) is not None:
        caption += f" Measuring NEG of {neurons} {of_layers} took {cost:.3g} s a prompt."
    head = ("estimator", "Pearson r", "Spearman", "equal signs, %", "median relative error", "s a prompt")
    cells = [(estimator_name(row["estimator"]), *quality_cells(row), seconds_cell(row)) for row in whole]
    return Section(
        "estimators",
        "Who estimates it best",
        _best_estimator(tables["accuracy"].to_pylist()[0], everything, options, neurons),
        [Grid("Estimators against NEG", caption, head, cells, numeric=range(1, 6)), _by_layer(everything)],
        _pictures_of_estimators(tables["points"].to_pylist(), everything),
    )


def _best_estimator(counts: Row, everything: Rows, options: Mapping[str, Any], neurons: str) -> str:
    """What was studied, and which estimator is best."""
    whole = [row for row in everything if row["layer"] is None]
    best = max(whole, key=lambda row: -2.0 if _is_missing(row["pearson"]) else row["pearson"])
    has_answers = counts["with_answer"] == counts["prompts"] or (options["answered"] == "right" and counts["right"])
    of = "pairs of a prompt and a neuron" if has_answers else "triples of a prompt, a target and a neuron"
    n_layers = len({row["layer"] for row in everything if row["layer"] is not None})
    few = ", and with so few prompts they say little" if counts["studied"] < _FEW_PROMPTS else ""
    correlation = "above 0.9999" if best["pearson"] > 0.99995 else f"of {best['pearson']:.4f}"
    return (
        f"{answered(counts)}, with {neurons} (basis {options['basis']}) of each of {n_layers} "
        f"layer{'s' * (n_layers > 1)}: {best['n']} {of}. Intervals hold 95 % of bootstrap draws of whole prompts{few}. "
        f"{_sentence(estimator_name(best['estimator']))} meets NEG best, with a correlation {correlation}."
    )


def _pictures_of_estimators(points: Rows, everything: Rows) -> list[Picture]:
    names = [row["estimator"] for row in everything if row["layer"] is None]
    shown = [(name, *VALUES.get(name, (name, ""))) for name in names if name in points[0]]
    of_layers = [row for row in everything if row["layer"] is not None]
    labels = {name: estimator_name(name) for name in names}
    return [
        Picture(
            "neg-against-estimators", "NEG against each estimator",
            "A point is a neuron on a prompt: the strongest, and a sample of the rest. Axes are linear near zero "
            f"and logarithmic beyond; on the grey diagonal an estimate is right. Vertical: NEG, {UNIT}.",
            "Scatter plots of measured NEG against every estimator",
            drawn(figures.scatter_of_estimates(points, shown), (10, 6.8 if len(shown) > 3 else 3.8)), is_wide=True,
        ),
        Picture(
            "correlation-by-layer", "Correlation with NEG by layer",
            "Pearson's r in each layer, with its 95 % interval.",
            "Lines of correlation over layers, one for each estimator",
            drawn(figures.lines_over_layers(of_layers, "pearson", labels, "Pearson r with NEG")),
        ),
    ]  # fmt: skip


def _by_layer(everything: Rows) -> Grid:
    head = ("layer", "estimator", "Pearson r", "Spearman", "equal signs, %", "median relative error", "n")
    rows = [
        (str(row["layer"]), estimator_name(row["estimator"]), *quality_cells(row), str(row["n"]))
        for row in sorted((row for row in everything if row["layer"] is not None), key=lambda row: row["layer"])
    ]
    caption = "The same within each layer."
    return Grid("By layer", caption, head, rows, (0, 2, 3, 4, 5, 6), is_interactive=True, name="estimators-by-layer")


def _linearity(tables: Mapping[str, pa.Table]) -> Section:
    ranges = [row for row in tables["ranges"].to_pylist() if row["n"]]
    whole = sorted((row for row in ranges if row["layer"] is None), key=lambda row: row["range"])
    ends = whole[:: len(whole) - 1 or 1]
    text = "A curve counts as linear where |r| ≥ 0.95; curves whose effect is below the noise are left out." + "".join(
        f" Up to ±{row['range']:g}: {100 * row['share_linear']:.1f} %." for row in ends
    )
    text += routing_text(tables["layers"].to_pylist())
    head = (
        "shifts up to ±", "linear, %", "|r|, lowest 5 %", "|r|, median", "R², median", "linear in log-odds, %",
        "straighter in log-odds, %", "curves",
    )  # fmt: skip
    rows = [range_cells(row) for row in whole]
    histogram = tables["histogram"].to_pylist()
    panels = {
        "|r| of a curve": [row for row in histogram if row["what"] == "r"],
        "R² of the line through the origin": [row for row in histogram if row["what"] == "r2"],
    }
    return Section(
        "linearity", "How linear neurons are", text,
        [
            Grid(
                "Linearity by range", "Each range is evaluated on 40 shifts. In log-odds: of the same curves.",
                head, rows, numeric=range(len(head)),
            )
        ],
        _pictures_of_curves(ranges, tables["curves"].to_pylist(), panels),
    )  # fmt: skip


def _pictures_of_curves(ranges: Rows, curves: Rows, panels: Mapping[str, Rows]) -> list[Picture]:
    return [
        Picture(
            "linearity-over-ranges", "Linearity against the range of shifts",
            "Share of curves with |r| ≥ 0.95 by the largest shift, over all layers and in each.",
            "A line that falls as the range of shifts grows",
            drawn(figures.linearity_over_ranges(ranges)),
        ),
        Picture(
            "curves", "A few neurons",
            "Change of a target's probability over shifts of one neuron (points), of several layers the one that "
            "changes most over the widest range, where neurons may go far through zero; below it the prompt's id. "
            "The dashed line is what NeurGrad predicts.",
            "Curves of probability over shifts for a few neurons",
            drawn(figures.curves(curves), (10, 5.6)), is_wide=True,
        ),
        Picture(
            "histogram-of-r", "How straight curves are",
            "Distribution of |r| and R² over the shifts that NEG is measured on, of all curves above the noise. "
            "On the left a curve beyond the line counts as linear; the axis of shares is logarithmic.",
            "Two histograms, with nearly all curves in the last bin",
            drawn(figures.histograms(panels), (9, 4.0)), is_wide=True,
        ),
    ]  # fmt: skip


def _layers(tables: Mapping[str, pa.Table]) -> Section:
    layers = tables["layers"].to_pylist()
    with_experts = has_experts(layers)
    head = [
        "layer", "linear, %", "|NEG|, median", "|NEG|, 95 %", "positive, %", "curves", *ROUTING_HEAD * with_experts,
    ]  # fmt: skip
    rows = [(*layer_cells(row), str(row["n"]), *(routing_cells(row) if with_experts else ())) for row in layers]
    return Section(
        "layers", "Where neurons are strong", "NEG of the studied neurons by layer.",
        [
            Grid(
                "Layers", f"|NEG| in {UNIT}; linear and positive ones of those that differ from zero.",
                head, rows, numeric=range(len(head)),
            )
        ],
        [
            Picture(
                "strength-over-layers", "Strength and sign over layers",
                f"Left: |NEG| of a layer's neurons ({UNIT}): median, the middle half, and the middle 90 %. Right: the "
                "share of positive NEGs.",
                "Bands of |NEG| over layers, and points of the share of positive ones",
                drawn(figures.strength_over_layers(layers), (9, 4.2)), is_wide=True,
            )
        ],
    )  # fmt: skip


def _additivity(rows: Rows) -> Section:
    head = (
        "neurons together", "Pearson r", "median relative error", "|change of probability|, median", "joint changes",
    )  # fmt: skip
    text = (
        f"Sets of studied neurons shifted together by {rows[0]['shift']:g}, against the sum of their NEGs times the "
        f"shift. Where the error is small, neurons are linear and add up; relative errors are of changes above noise."
    )
    cells = [(*set_cells(row), str(row["n"])) for row in rows]
    return Section(
        "additivity", "Do neurons add up", text, [Grid("Joint interventions", "", head, cells, numeric=range(5))]
    )


def _is_missing(value: float | None) -> bool:
    return value is None or value != value


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
