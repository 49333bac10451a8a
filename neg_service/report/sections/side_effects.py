"""What shifts do to other prompts, beside a constant on the target's logit and random neurons."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from neg_service.report import control_figures
from neg_service.report.cells import interval
from neg_service.report.figures import drawn
from neg_service.report.page import Grid, Picture
from neg_service.report.sections.accumulators import Row, Sample, texts_of
from neg_service.report.wishes import Doubles, Quartiles
from neg_service.storage.reader import Run

# Rows of which medians are, those that are points, and those that are listed.
_SAMPLED, _POINTS, _LISTED = 30_000, 3000, 600
_KEY = ("prompt_id", "target", "wish", "method", "kind")
_STEERED = ("steered_probability_before", "steered_probability", "size", "n")
_MEANS = (
    "kl", "same_top", "answer_probability_before", "answer_probability", "target_probability_before",
    "target_probability",
)  # fmt: skip
_REFERENCES, _WORDINGS = "references", "wordings"
# What is smaller differs from nothing by rounding alone.
_LEAST_KL = 1e-10


def is_of_side_effects(names: Collection[str]) -> bool:
    """Whether a table with these columns says what shifts do to other prompts."""
    return {*_KEY, *_STEERED, *_MEANS} <= set(names)


def side_effects_shown(
    run: Run, name: str, wanted: Mapping[tuple[str, str, int], str], number: int
) -> tuple[list[Grid], list[Picture]]:
    """Tables and a picture of table `name`; `wanted` says of the first wishes what they are, and these are listed."""
    sample, listed, n = Sample(_SAMPLED), list[Row](), 0
    ends = [f"{mean}_{end}" for mean in _MEANS for end in ("low", "high")]
    for batch in run.table(name, [*_KEY, *_STEERED, *_MEANS, *ends]).to_batches(batch_size=8192):
        n += batch.num_rows
        sample.add(batch.select([*_KEY, *_STEERED, *_MEANS]))
        if len(listed) < _LISTED:
            own = (row for row in batch.to_pylist() if (row["prompt_id"], row["target"], row["wish"]) in wanted)
            listed += list(own)[: _LISTED - len(listed)]
    table = sample.table
    if table is None or not table.num_rows:
        return [], []
    of = f" Of {table.num_rows} of {n} rows, drawn at random." * (table.num_rows < n)
    return [_by_method(table, of, number), *_listed(run, listed, wanted, n, number)], [
        *_effects(table, number),
        *_carried(table, number),
    ]


def _groups(table: pa.Table) -> list[tuple[str, str, pa.Table]]:
    """By kind of other prompts and by method, as they first come; rows that were drawn come by chance."""
    pairs = set(zip(table["kind"].to_pylist(), table["method"].to_pylist(), strict=True))
    # The shift first, then what stands beside it.
    order = sorted(pairs, key=lambda own: (own[0], own[1] != "shift", own[1]))
    return [
        (kind, method, table.filter((pc.field("kind") == kind) & (pc.field("method") == method)))
        for kind, method in order
    ]


def _by_method(table: pa.Table, of: str, number: int) -> Grid:
    head = (
        "other prompts", "method", "shifts", "target's p where steered, change", "KL, nats", "top answer stays, %",
        "p of their answer, change", "p of the target there, change",
    )  # fmt: skip
    rows = []
    for kind, method, own in _groups(table):
        column = {name: own[name].to_numpy() for name in (*_STEERED, *_MEANS)}
        rows.append(
            (
                kind, method, str(own.num_rows), _quartiles(_change(column, "steered_probability"), "{:+.3f}"),
                _quartiles(column["kl"], "{:.2g}"), _quartiles(100 * column["same_top"], "{:.0f}"),
                _quartiles(_change(column, "answer_probability"), "{:+.4f}"),
                _quartiles(_change(column, "target_probability"), "{:+.4f}"),
            )
        )  # fmt: skip
    return Grid(
        "Side effects, by method",
        "What shifts do to prompts that are not steered: of each shift the mean over these, here the median over "
        "shifts with the values between which the middle half is. A logit constant moves the target's logit so that it "
        "is as probable where it is steered; a shift is worth something where it does less. Random neurons are shifted "
        "by the same values, which gives them the same size and not the same effect. At wordings, which ask the same "
        f"as the steered prompt, its target is wanted, too.{of}",
        head, rows, range(2, len(head)), is_interactive=True, name=f"effects-{number}",
    )  # fmt: skip


def _change(column: Mapping[str, Any], name: str) -> Doubles:
    changed: Doubles = column[name] - column[f"{name}_before"]
    return changed


def _quartiles(values: Doubles, form: str) -> str:
    """A dash where it has no meaning."""
    known = values[np.isfinite(values)]
    if not len(known):
        return "-"
    own = Quartiles.of(known)
    return f"{form.format(own.median)} ({form.format(own.low)} to {form.format(own.high)})"


def _listed(
    run: Run, rows: Iterable[Row], wanted: Mapping[tuple[str, str, int], str], n: int, number: int
) -> list[Grid]:
    shown: list[Row] = [{key: np.nan if value is None else value for key, value in row.items()} for row in rows]
    if not shown:
        return []
    head = (
        "prompt", "target", "wanted", "other prompts", "method", "target's p where steered", "size", "n", "KL, nats",
        "top answer stays, %", "p of their answer before", "after", "p of the target there before", "after",
    )  # fmt: skip
    texts = texts_of(run, {row["prompt_id"] for row in shown})
    cells = [
        (
            texts[row["prompt_id"]], row["target"],
            wanted[row["prompt_id"], row["target"], row["wish"]], row["kind"], row["method"],
            f"{row['steered_probability']:.4f}", f"{row['size']:.3g}", str(row["n"]),
            _interval(row, "kl"), interval(row, "same_top", 0, 100), interval(row, "answer_probability_before", 3),
            interval(row, "answer_probability", 3), _interval(row, "target_probability_before"),
            _interval(row, "target_probability"),
        )
        for row in shown
    ]  # fmt: skip
    caption = (
        "Means over the other prompts, with 95 % intervals from the bootstrap over them; size: √Σδ² of shifts, and the "
        "constant itself, in nats."
    )
    caption += f" The first {len(cells)} of {n} rows." * (n > len(cells))
    return [
        Grid(
            "Side effects of each shift", caption, head, cells, range(5, len(head)), is_interactive=True,
            name=f"effects-each-{number}",
        )
    ]  # fmt: skip


def _interval(row: Row, name: str) -> str:
    """A mean of several orders of magnitude with its interval, to two digits; a dash where it has no meaning."""
    value, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
    if value != value:
        return "-"
    return f"{value:.2g} ({low:.2g} to {high:.2g})" if low == low else f"{value:.2g}"


def _effects(table: pa.Table, number: int) -> list[Picture]:
    points = {}
    for kind, method, own in _groups(table.slice(0, _POINTS)):
        if kind == _REFERENCES:
            column = {name: own[name].to_numpy() for name in (*_STEERED, *_MEANS)}
            points[method] = (_change(column, "steered_probability"), column["kl"])
    if not points:
        return []
    return [
        Picture(
            f"effects-{number}", "Effect against side effect",
            "A point is a wish with a method: the mean KL divergence on references against the change of the target's "
            "probability where it is steered; lower is better at the same effect. Random neurons have the shift's size "
            f"and not its effect. What is below {_LEAST_KL:.0e} stands there.",
            "A scatter plot of the divergence on references against the change of the target's probability",
            drawn(control_figures.effects(points, _LEAST_KL)),
        )
    ]  # fmt: skip


def _carried(table: pa.Table, number: int) -> list[Picture]:
    points = {}
    for kind, method, own in _groups(table.slice(0, _POINTS)):
        if kind == _WORDINGS:
            column = {name: own[name].to_numpy() for name in (*_STEERED, *_MEANS)}
            points[method] = (_change(column, "steered_probability"), _change(column, "target_probability"))
    if not points:
        return []
    return [
        Picture(
            f"carried-{number}", "Does it carry over to other wordings?",
            "A point is a wish with a method: the mean change of the target's probability at texts that ask the same, "
            "against its change where it is steered; on the grey diagonal it is as large there.",
            "A scatter plot of the change at other wordings against the change where the target is steered",
            drawn(control_figures.carried_over(points)),
        )
    ]  # fmt: skip
