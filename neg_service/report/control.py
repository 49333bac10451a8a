"""What `jobs.control` prints: the first wishes of a run, and how many were met."""

from __future__ import annotations

from typing import Any

from neg_service.report.console import columns
from neg_service.report.wishes import met_in
from neg_service.storage.reader import Run

# Of a run's wishes a terminal shows so many.
_MOST_ROWS = 20


def results_text(run: Run) -> str:
    """The first wishes of a run, one a line, and how many were met."""
    table = run.table("control").to_table()
    rows = [
        (
            shortened(row["prompt_id"]), repr(row["target"]), f"{row['probability_before']:.4f}", wanted_text(row),
            f"{row['first_shot']:.4f}", f"{row['achieved']:.4f}", str(row["passes"]),
            f"{100 * row['relative_norm']:.2f} %", row["reason"],
        )
        for row in table.slice(0, _MOST_ROWS).to_pylist()
    ]  # fmt: skip
    head = ("prompt", "target", "before", "wanted", "first shot", "achieved", "passes", "of ‖a‖", "")
    more = f"\nand {table.num_rows - _MOST_ROWS} others" * (table.num_rows > _MOST_ROWS)
    return f"{columns(head, rows)}{more}\n\n{met_in(table.to_batches())}"


def wanted_text(row: dict[str, Any]) -> str:
    """What a row of table `control` asks for."""
    if row["kind"] == "probability":
        return f"{row['wanted']:g}"
    if row["kind"] == "top":
        return "top"
    return f"{row['wanted']:g} nats above {'all' if row['against'] is None else repr(row['against'])}"


def shortened(text: str, most: int = 32) -> str:
    """A text of at most so many letters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
