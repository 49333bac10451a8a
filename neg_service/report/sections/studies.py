"""What a study found: who estimates NEG best, how linear neurons are, where they are strong, whether they add up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from neg_service.report import figures
from neg_service.report.cells import UNIT, VALUES, estimator_name, interval, percent
from neg_service.report.figures import drawn
from neg_service.report.page import Grid, Picture, Section
from neg_service.report.sections.found import Finding
from neg_service.report.study import answered

Rows = list[dict[str, Any]]


def study_sections(finding: Finding) -> list[Section]:
    """The sections of a study, from its tables."""
    tables, asked = finding.tables, finding.about["study"]
    made = [_estimators(tables, asked), _linearity(tables), _layers(tables)]
    if "additivity" in tables:
        made.append(_additivity(tables["additivity"].to_pylist()))
    return made


def _estimators(tables: Mapping[str, pa.Table], asked: Mapping[str, Any]) -> Section:
    everything = tables["estimators"].to_pylist()
    whole = [row for row in everything if row["layer"] is None]
    best = max(whole, key=lambda row: -2.0 if _is_missing(row["pearson"]) else row["pearson"])
    counts = tables["accuracy"].to_pylist()[0]
    neurons = "all neurons" if asked["neurons"] is None else f"{asked['neurons']} neurons"
    has_answers = counts["with_answer"] == counts["prompts"] or (asked["answered"] == "right" and counts["right"])
    of = "pairs of a prompt and a neuron" if has_answers else "triples of a prompt, a target and a neuron"
    layers = sorted({row["layer"] for row in everything if row["layer"] is not None})
    text = (
        f"{answered(counts)}, with {neurons} (basis {asked['basis']}) of each of {len(layers)} "
        f"layer{'s' * (len(layers) > 1)}: {best['n']} {of}. Intervals hold 95 % of bootstrap draws of whole prompts"
        f"{', and with so few prompts they say little' if counts['studied'] < 10 else ''}. "
        f"{_sentence(estimator_name(best['estimator']))} meets NEG best, with a correlation "
        f"{'above 0.9999' if best['pearson'] > 0.99995 else 'of ' + format(best['pearson'], '.4f')}."
    )
    caption = (
        "Signs and relative errors are of the pairs whose NEG differs from zero by more than the noise that the run "
        "measured; only NeurGrad has the unit of NEG, and with it a relative error. Seconds are of all neurons of a "
        "prompt, with one replica; estimators that one backward pass gives together share its cost."
    )
    if (cost := whole[0]["neg_seconds_a_prompt"]) is not None:
        caption += f" Measuring NEG of {neurons} a layer took {cost:.3g} s a prompt."
    head = ("estimator", "Pearson r", "Spearman", "equal signs, %", "median relative error", "s a prompt")
    rows = [
        (
            estimator_name(row["estimator"]),
            interval(row, "pearson", 4),
            interval(row, "spearman", 4),
            interval(row, "signs", 1, 100),
            interval(row, "median_relative_error", 4),
            "-" if row["seconds_a_prompt"] is None else f"{row['seconds_a_prompt']:.3g}",
        )
        for row in whole
    ]
    points = tables["points"].to_pylist()
    names = [row["estimator"] for row in whole]
    shown = [(name, *VALUES.get(name, (name, ""))) for name in names if name in points[0]]
    return Section(
        "estimators", "Who estimates it best", text,
        [Grid("Estimators against NEG", caption, head, rows, numeric=range(1, 6)), _by_layer(everything)],
        [
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
                drawn(
                    figures.lines_over_layers(
                        [row for row in everything if row["layer"] is not None], "pearson",
                        {name: estimator_name(name) for name in names}, "Pearson r with NEG",
                    )
                ),
            ),
        ],
    )  # fmt: skip


def _by_layer(everything: Rows) -> Grid:
    head = ("layer", "estimator", "Pearson r", "Spearman", "equal signs, %", "median relative error", "n")
    rows = [
        (
            str(row["layer"]), estimator_name(row["estimator"]), interval(row, "pearson", 4),
            interval(row, "spearman", 4), interval(row, "signs", 1, 100), interval(row, "median_relative_error", 4),
            str(row["n"]),
        )
        for row in sorted((row for row in everything if row["layer"] is not None), key=lambda row: row["layer"])
    ]  # fmt: skip
    caption = "The same within each layer."
    return Grid("By layer", caption, head, rows, (0, 2, 3, 4, 5, 6), is_interactive=True, name="estimators-by-layer")


def _linearity(tables: Mapping[str, pa.Table]) -> Section:
    ranges = [row for row in tables["ranges"].to_pylist() if row["n"]]
    whole = sorted((row for row in ranges if row["layer"] is None), key=lambda row: row["range"])
    ends = whole[:: len(whole) - 1 or 1]
    text = "A curve counts as linear where |r| ≥ 0.95; curves whose effect is below the noise are left out." + "".join(
        f" Up to ±{row['range']:g}: {100 * row['share_linear']:.1f} %." for row in ends
    )
    head = ("shifts up to ±", "linear, %", "|r|, lowest 5 %", "|r|, median", "R², median", "curves")
    rows = [
        (
            f"{row['range']:g}", percent(row["share_linear"]), f"{row['r_q05']:.4f}", f"{row['r_q50']:.4f}",
            f"{row['r2_q50']:.4f}", str(row["n"]),
        )
        for row in whole
    ]  # fmt: skip
    histogram = tables["histogram"].to_pylist()
    panels = {
        "|r| of a curve": [row for row in histogram if row["what"] == "r"],
        "R² of the line through the origin": [row for row in histogram if row["what"] == "r2"],
    }
    return Section(
        "linearity", "How linear neurons are", text,
        [
            Grid(
                "Linearity by range", "Each range is judged on 40 shifts, interpolated from four that were run.",
                head, rows, numeric=range(6),
            )
        ],
        [
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
                "The dashed line is what NeurGrad foretells.",
                "Curves of probability over shifts for a few neurons",
                drawn(figures.curves(tables["curves"].to_pylist()), (10, 5.6)), is_wide=True,
            ),
            Picture(
                "histogram-of-r", "How straight curves are",
                "Distribution of |r| and R² over the shifts that NEG is measured on, of all curves above the noise. "
                "On the left a curve beyond the line counts as linear; the axis of shares is logarithmic.",
                "Two histograms, with nearly all curves in the last bin",
                drawn(figures.histograms(panels), (9, 4.0)), is_wide=True,
            ),
        ],
    )  # fmt: skip


def _layers(tables: Mapping[str, pa.Table]) -> Section:
    layers = tables["layers"].to_pylist()
    head = ("layer", "linear, %", "|NEG|, median", "|NEG|, 95 %", "positive, %", "curves")
    rows = [
        (
            "all" if row["layer"] is None else str(row["layer"]), percent(row["share_linear"]),
            f"{row['neg_q50']:.2e}", f"{row['neg_q95']:.2e}", percent(row["share_positive"]), str(row["n"]),
        )
        for row in layers
    ]  # fmt: skip
    return Section(
        "layers", "Where neurons are strong", "NEG of the studied neurons by layer.",
        [
            Grid(
                "Layers", f"|NEG| in {UNIT}; linear and positive ones of those that differ from zero.",
                head, rows, numeric=range(6),
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
    lines = [
        (
            str(row["n_neurons"]), interval(row, "pearson", 4), interval(row, "median_relative_error", 4),
            f"{row['median_delta_p']:.2e}", str(row["n"]),
        )
        for row in rows
    ]  # fmt: skip
    return Section(
        "additivity", "Do neurons add up", text, [Grid("Joint interventions", "", head, lines, numeric=range(5))]
    )


def _is_missing(value: float | None) -> bool:
    return value is None or value != value


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
