"""What `control` found, in numbers: how much was reached, in how many passes, and how far predictions carry."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from neg_service.report.console import columns
from neg_service.storage.reader import Run

# Of a run's wishes a terminal shows so many.
_MOST_ROWS = 20
# How far a wish is from where the target is, in nats of log-odds.
_SIZES = (1.0, 3.0, 6.0, 10.0)


def results_text(run: Run) -> str:
    """The first wishes of a run, one a line, and how many were met."""
    table = run.table("control").to_table()
    rows = [
        (
            shortened(row["prompt_id"]), repr(row["target"]), f"{row['probability_before']:.4f}", _wanted(row),
            f"{row['first_shot']:.4f}", f"{row['achieved']:.4f}", str(row["passes"]),
            f"{100 * row['relative_norm']:.2f} %", row["reason"],
        )
        for row in table.slice(0, _MOST_ROWS).to_pylist()
    ]  # fmt: skip
    head = ("prompt", "target", "before", "wanted", "first shot", "achieved", "passes", "of ‖a‖", "")
    more = f"\nand {table.num_rows - _MOST_ROWS} others" * (table.num_rows > _MOST_ROWS)
    return f"{columns(head, rows)}{more}\n\n{summary_text(table)}"


def summary_text(table: pa.Table) -> str:
    """For example `reached 198 of 200, in a median of 4 passes`."""
    if not table.num_rows:
        return "nothing was asked for"
    reached = table["reached"].to_numpy()
    passes = float(np.median(table["passes"].to_numpy()))
    return f"reached {int(reached.sum())} of {table.num_rows}, in a median of {passes:g} passes"


def by_size(table: pa.Table) -> list[tuple[str, ...]]:
    """By how far the wish was, in nats of log-odds: how many, reached, the first shot and predictions off, passes.

    Medians; of wishes for a probability alone, for what is off is a probability.
    """
    own = table.filter(pa.compute.equal(table["kind"], "probability"))
    if not own.num_rows:
        return []
    value = {name: own[name].to_numpy() for name in own.column_names if name not in _TEXTS}
    size = np.abs(_log_odds(value["wanted"]) - _log_odds(value["probability_before"]))
    found = []
    for low, high in zip((0.0, *_SIZES), (*_SIZES, np.inf), strict=True):
        is_own = (size >= low) & (size < high)
        if not is_own.any():
            continue
        of = {name: column[is_own] for name, column in value.items()}
        found.append(
            (
                f"{low:g} to {high:g}" if np.isfinite(high) else f"{low:g} and more", str(int(is_own.sum())),
                f"{100 * of['reached'].mean():.0f} %",
                *(
                    f"{np.median(np.abs(of[name] - of[against])):.4f}"
                    for name, against in (
                        ("first_shot", "wanted"), ("achieved", "wanted"), ("predicted_by_neg", "probability"),
                        ("predicted_by_log_odds", "probability"),
                    )
                ),
                f"{np.median(of['passes']):g}", f"{100 * np.median(of['relative_norm']):.2f} %",
            )
        )  # fmt: skip
    return found


BY_SIZE = (
    "nats to go", "wishes", "reached", "first shot off", "achieved off", "NEG's prediction off",
    "log-odds' prediction off", "passes", "of ‖a‖",
)  # fmt: skip
_TEXTS = {"prompt_id", "target", "kind", "against", "basis", "dtype", "norm_is", "reason", "is_answer"}


def _log_odds(p: Any) -> Any:
    p = np.clip(p, 1e-300, 1 - 1e-16)
    return np.log(p) - np.log1p(-p)


def _wanted(row: dict[str, Any]) -> str:
    if row["kind"] == "probability":
        return f"{row['wanted']:g}"
    if row["kind"] == "top":
        return "top"
    return f"{row['wanted']:g} nats above {'all' if row['against'] is None else repr(row['against'])}"


def shortened(text: str, most: int = 32) -> str:
    """A text of at most so many letters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
