"""Where along a prompt neurons say something about the answer: a map of layers and tokens for each of a few prompts."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import pyarrow.compute as pc

from neg_service.report import figures
from neg_service.report.figures import drawn
from neg_service.report.page import Grid, Picture, Section
from neg_service.report.sections.accumulators import Row, rows_of
from neg_service.storage.reader import Run

_MOST_PROMPTS, _MOST_TOKENS = 6, 60
_READ = ("prompt_id", "target", "layer", "expert", "neuron", "position", "token", "neurgrad", "total")


def is_of_positions(names: list[str]) -> bool:
    """Whether a table with these columns is a map of layers and tokens."""
    return {"position", "token", "total"} <= set(names)


def positions_section(run: Run, name: str, number: int) -> Section:
    """A map and the strongest neurons of the first prompts."""
    only_right, of = rows_of(run)
    table = run.described[name]
    rows: dict[tuple[str, str], list[Row]] = {}
    for batch in run.table(name, [*_READ], only_right).to_batches(batch_size=8192):
        for row in batch.to_pylist():
            key = (row["prompt_id"], row["target"])
            if key in rows or len(rows) < _MOST_PROMPTS:
                rows.setdefault(key, []).append(row)
    n_of_target = _tokens_of_targets(run, {prompt_id for prompt_id, _ in rows})
    pictures = [
        _map(place, own, number, table.unit, n_of_target.get((own[0]["prompt_id"], own[0]["target"]), 0))
        for place, own in enumerate(rows.values())
    ]
    head = ("prompt", "target", "token", "layer", "neuron", table.title, f"Σ |{table.title}|")
    strongest = [cells for own in rows.values() for cells in _strongest(own)]
    grid = Grid(
        "The strongest neuron at each token", f"Of all layers, for {of} ({table.unit}); tokens in their order.", head,
        strongest, (3, 4, 5, 6), is_interactive=True, name=f"positions-{number}",
    )  # fmt: skip
    return Section(f"run-{number}", f"{table.title} by layer and token: {run.name}", "", [grid], pictures)


def _tokens_of_targets(run: Run, prompt_ids: Collection[str]) -> dict[tuple[str, str], int]:
    """How many tokens of each target are on its map, where any of a prompt's is several: all but its last one."""
    if "prompts" not in run.tables or "target_sequences" not in run.schemas["prompts"].names:
        # A run of an earlier version, or of a measure of somebody's own.
        return {}
    wanted = pc.field("prompt_id").isin(sorted(prompt_ids)) & pc.field("target_sequences").is_valid()
    prompts = run.table("prompts", ["prompt_id", "targets", "target_sequences"], wanted).to_table().to_pylist()
    return {
        (row["prompt_id"], target): len(tokens) - 1
        for row in prompts
        for target, tokens in zip(row["targets"], row["target_sequences"], strict=True)
    }


def _map(place: int, rows: list[Row], number: int, unit: str, n_of_target: int) -> Picture:
    first = rows[0]
    layers, last = sorted({row["layer"] for row in rows}), max(row["position"] for row in rows)
    # Of a long prompt its end.
    shown = range(max(0, last + 1 - _MOST_TOKENS), last + 1)
    total_lt = np.full((layers[-1] - layers[0] + 1, len(shown)), np.nan)
    tokens = [""] * len(shown)
    for row in rows:
        if row["position"] in shown:
            total_lt[row["layer"] - layers[0], row["position"] - shown.start] = row["total"]
            tokens[row["position"] - shown.start] = row["token"]
    left_out = f"; the last {len(shown)} of {last + 1} tokens" * (shown.start > 0)
    n_shown = min(n_of_target, len(shown))
    behind = ". Behind the line are the target's own tokens but its last one, which is predicted and not read"
    return Picture(
        f"positions-{number}-{place}", f"{first['prompt_id']} → {first['target'].strip()!r}",
        f"Sum of the sizes of all neurons of a layer at a token ({unit}), on a logarithmic scale{left_out}"
        f"{behind if n_shown else ''}.",
        "A heat map of layers against the tokens of a prompt",
        drawn(
            figures.position_map(total_lt, layers[0], tokens, unit, n_shown), (max(5.0, 1.5 + 0.42 * len(shown)), 5.0)
        ),
        is_wide=len(shown) > 12,
    )  # fmt: skip


def _strongest(rows: list[Row]) -> list[tuple[str, ...]]:
    best: dict[int, Mapping[str, object]] = {}
    total: dict[int, float] = {}
    for row in rows:
        at = row["position"]
        total[at] = total.get(at, 0.0) + row["total"]
        if at not in best or abs(row["neurgrad"]) > abs(best[at]["neurgrad"]):  # type: ignore[arg-type]
            best[at] = row
    return [
        (
            str(row["prompt_id"]), str(row["target"]), repr(row["token"]), str(row["layer"]), _neuron(row),
            f"{row['neurgrad']:+.3e}", f"{total[at]:.3e}",
        )
        for at, row in sorted(best.items())
    ]  # fmt: skip


def _neuron(row: Mapping[str, object]) -> str:
    return f"{row['neuron']}" if row["expert"] is None else f"{row['neuron']} of expert {row['expert']}"
