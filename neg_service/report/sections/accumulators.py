"""Accumulators of what a report shows, while tables are streamed: histograms, strongest neurons, a sample, curves."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from neg_service import schema
from neg_service.report import figures
from neg_service.report.cells import expert_cell
from neg_service.report.console import has_experts
from neg_service.report.figures import drawn
from neg_service.report.page import Grid, Picture
from neg_service.storage.reader import Run

STRONGEST = 5
_MOST_PROMPTS = 200
_SAMPLE, _CURVES = 3000, 6
# |value| in half decades; smaller ones are in the first bin, larger ones in the last.
_EDGES = 10.0 ** np.arange(-9, 1.1, 0.5)

Key = tuple[str, str]
Row = dict[str, Any]


def rows_of(run: Run) -> tuple[pc.Expression, str]:
    """Right answers' rows, and all of prompts without one; and what these rows are of.

    All where targets are compared with one of them, which may be the right answer and then has no rows.
    """
    if run.config["measure"].get("against") is not None:
        return pc.scalar(value=True), "each target"
    n = without = 0
    for batch in run.table("prompts", columns=["answer"]).to_batches():
        n, without = n + batch.num_rows, without + batch["answer"].null_count
    if without == 0:
        return schema.RIGHT, "the right answer"
    return schema.RIGHT, "each target" if without == n else "the right answer, or each target of prompts without one"


def neuron_cells(run: Run) -> dict[str, Callable[[Any], str]]:
    """The columns that name a neuron, and how each is written; those of models without experts name none."""
    return {"layer": str, "expert": expert_cell, "neuron": str} if has_experts(run) else {"layer": str, "neuron": str}


@dataclass
class Strength:
    """What is kept of values while they are read: a histogram a layer, and the strongest of each prompt and target."""

    counts_lb: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    strongest: dict[Key, list[tuple[float, int, Row]]] = field(default_factory=dict)
    _seen: int = 0

    def count(self, layer: int, values: NDArray[Any]) -> None:
        """Add values of a layer to its histogram."""
        counts, _ = np.histogram(np.clip(np.abs(values), _EDGES[0], _EDGES[-1]), _EDGES)
        self.counts_lb[layer] = self.counts_lb.get(layer, np.zeros(len(_EDGES) - 1, np.int64)) + counts

    def wants(self, key: Key) -> bool:
        """Whether neurons of this prompt and target are kept: of the first so many."""
        return key in self.strongest or len(self.strongest) < _MOST_PROMPTS

    def keep(self, key: Key, size: float, row: Row) -> None:
        """Keep a neuron as long as it is one of the strongest of its prompt and target."""
        heap = self.strongest.setdefault(key, [])
        self._seen += 1
        entry = (size, -self._seen, row)
        if len(heap) < STRONGEST:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)

    def rows(self) -> Iterator[tuple[Key, Row]]:
        """The strongest neurons, prompt by prompt, the strongest first."""
        for key, heap in self.strongest.items():
            for _, _, row in sorted(heap, key=lambda one: one[:2], reverse=True):
                yield key, row

    def heat_map(self, number: int, what: str, unit: str, of: str, neurons: str = "a layer's neurons") -> Picture:
        """Share of each layer's values by magnitude; `of` and `neurons` say which values there are."""
        counts = np.stack([self.counts_lb[layer] for layer in sorted(self.counts_lb)])
        used = np.flatnonzero(counts.sum(0))
        bins = slice(used[0], used[-1] + 1) if len(used) else slice(None)
        share = counts[:, bins] / np.maximum(1, counts.sum(1, keepdims=True))
        edges = _EDGES[bins.start : (bins.stop or len(_EDGES) - 1) + 1]
        label = f"|{what}|" + (f", {unit}" if unit else "")
        return Picture(
            f"strength-{number}", f"Strength of neurons by layer: |{what}|",
            f"Share of {neurons} by |{what}|{f' ({unit})' if unit else ''}, for {of}; colours are logarithmic, "
            f"what is smaller or larger than the axis is in its first or last row; grey layers were not measured.",
            f"A heat map of layers against |{what}|",
            drawn(figures.strength_heat_map(share, sorted(self.counts_lb), edges, label)),
        )  # fmt: skip


def strongest_rows(batch: pa.RecordBatch, size: NDArray[Any]) -> NDArray[np.int64]:
    """The rows of a batch that may be among the strongest of their prompt and target."""
    prompt, target = (
        batch[key].dictionary_encode().indices.to_numpy().astype(np.int64) for key in ("prompt_id", "target")
    )
    pair = prompt * (int(target.max()) + 1) + target
    order = np.lexsort((-size, pair))
    first = np.flatnonzero(np.r_[True, np.diff(pair[order]) != 0])
    rank = np.arange(len(order)) - np.repeat(first, np.diff(np.r_[first, len(order)]))
    chosen: NDArray[np.int64] = order[rank < STRONGEST]
    return chosen


class Sample:
    """A sample of fixed size of rows that come in batches: those with the smallest of random numbers."""

    def __init__(self, most: int = _SAMPLE) -> None:
        self._draw, self._most = np.random.default_rng(0), most
        self._keys: NDArray[np.float64] = np.empty(0)
        self._table: pa.Table | None = None

    def add(self, batch: pa.RecordBatch) -> None:
        """Rows of the same columns."""
        keys = np.r_[self._keys, self._draw.random(batch.num_rows)]
        rows = pa.Table.from_batches([batch])
        rows = rows if self._table is None else pa.concat_tables([self._table, rows])
        chosen = np.argsort(keys, kind="stable")[: self._most]
        self._keys, self._table = keys[chosen], rows.take(pa.array(chosen)).combine_chunks()

    @property
    def table(self) -> pa.Table | None:
        """What was drawn, in an order by chance; None of nothing."""
        return self._table

    def rows(self) -> list[Row]:
        """What was drawn."""
        drawn_rows: list[Row] = [] if self._table is None else self._table.to_pylist()
        return drawn_rows


class Curves:
    """The curve of the strongest neuron of each layer."""

    def __init__(self, run: Run) -> None:
        self._shifts = [float(shift) for shift in run.config["measure"]["shifts"]]
        self._best: dict[int, tuple[float, Row]] = {}

    def add(self, batch: pa.RecordBatch) -> None:
        """Rows of a sweep that kept its curves."""
        layers, size = batch["layer"].to_numpy(), batch[schema.change_columns(batch.schema)[0]].to_numpy()
        for layer in np.unique(layers).tolist():
            own = np.flatnonzero(layers == layer)
            place = int(own[size[own].argmax()])
            if layer not in self._best or size[place] > self._best[layer][0]:
                (row,) = batch.slice(place, 1).to_pylist()
                self._best[layer] = (float(size[place]), row)

    def rows(self) -> list[Row]:
        """Of several layers, spread over the model."""
        layers = sorted(self._best)
        if not layers:
            return []
        chosen = np.unique(np.linspace(0, len(layers) - 1, min(_CURVES, len(layers))).round().astype(int))
        return [self._best[layers[place]][1] | {"shifts": self._shifts} for place in chosen]


def strongest_grid(
    run: Run, kept: Strength, title: str, caption: str, cells: Mapping[str, Any], heads: Mapping[str, str], name: str
) -> Grid:
    """The strongest neurons of each prompt.

    cells: how each value is written. heads: what a column is called, if not as its key.
    """
    texts = texts_of(run, {prompt for prompt, _ in kept.strongest})
    rows = [
        (texts.get(prompt, prompt), target, *(write(row[key]) for key, write in cells.items()))
        for (prompt, target), row in kept.rows()
    ]
    if len(kept.strongest) >= _MOST_PROMPTS:
        caption += f" The first {_MOST_PROMPTS} pairs of a prompt and a target are shown."
    head = ["prompt", "target", *(heads.get(key, key) for key in cells)]
    return Grid(title, caption, head, rows, range(2, len(head)), is_interactive=True, name=name)


def texts_of(run: Run, wanted: Iterable[str], most: int = 70) -> dict[str, str]:
    """The end of each wanted prompt's text, which is where demonstrations are over."""
    only = pc.field("prompt_id").isin(pa.array(sorted(wanted), pa.string()))
    found: dict[str, str] = {}
    for batch in run.table("prompts", ["prompt_id", "prompt"], only).to_batches():
        for prompt_id, text in zip(batch["prompt_id"].to_pylist(), batch["prompt"].to_pylist(), strict=True):
            flat = " ".join(text.split())
            found[prompt_id] = flat if len(flat) <= most else f"… {flat[-most:].partition(' ')[2]}"
    return found
