"""What a run found, from its tables, which are streamed: how strong neurons are, and which are the strongest."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from neg_service.measures.edits import edit_name
from neg_service.report import figures
from neg_service.report.console import agreement
from neg_service.report.figures import drawn
from neg_service.report.page import Grid, Picture, Section
from neg_service.report.sections.cells import UNIT, VALUES, percent
from neg_service.storage.reader import Run

_STRONGEST, _MOST_PROMPTS, _MOST_EDITS, _MOST_NEURONS = 5, 200, 200, 50
_SAMPLE, _CURVES = 3000, 6
# |value| in half decades; smaller ones are in the first bin, larger ones in the last.
_EDGES = 10.0 ** np.arange(-9, 1.1, 0.5)

Key = tuple[str, str]
Row = dict[str, Any]


def run_sections(run: Run, number: int) -> list[Section]:
    """The sections of a run that has something to show by now; those of sums for probes are the probes' business."""
    if not run.done():
        return []
    for name, (what, _) in VALUES.items():
        if name in run.tables:
            return [_values(run, name, what, number)]
    for name, section in (
        ("sweep", _sweep), ("top_neurons", _top_neurons), ("intervene", _interventions), ("strength", _strength),
    ):  # fmt: skip
        if name in run.tables:
            return [section(run, number)]
    return []


@dataclass
class _Strength:
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
        heapq.heappush(heap, entry) if len(heap) < _STRONGEST else heapq.heappushpop(heap, entry)

    def rows(self) -> Iterator[tuple[Key, Row]]:
        """The strongest neurons, prompt by prompt, the strongest first."""
        for key, heap in self.strongest.items():
            for _, _, row in sorted(heap, key=lambda one: one[:2], reverse=True):
                yield key, row

    def heat_map(self, number: int, what: str, unit: str, of: str) -> Picture:
        """Share of each layer's neurons by magnitude."""
        counts = np.stack([self.counts_lb[layer] for layer in sorted(self.counts_lb)])
        used = np.flatnonzero(counts.sum(0))
        bins = slice(used[0], used[-1] + 1) if len(used) else slice(None)
        share = counts[:, bins] / np.maximum(1, counts.sum(1, keepdims=True))
        edges = _EDGES[bins.start : (bins.stop or len(_EDGES) - 1) + 1]
        label = f"|{what}|" + (f", {unit}" if unit else "")
        return Picture(
            f"strength-{number}", f"Strength of neurons by layer: |{what}|",
            f"Share of a layer's neurons by |{what}|{f' ({unit})' if unit else ''}, for {of}; colours are logarithmic, "
            f"and what is smaller or larger than the axis is in its first or last row.",
            f"A heat map of layers against |{what}|",
            drawn(figures.strength_heat_map(share, sorted(self.counts_lb), edges, label)),
        )  # fmt: skip


def _values(run: Run, column: str, what: str, number: int) -> Section:
    """Of a measure that has a value of every neuron."""
    unit, kept, (only_right, of) = VALUES[column][1], _Strength(), _of(run)
    table = run.table(column, ["prompt_id", "target", "layer", column], only_right)
    for batch in table.to_batches(batch_size=512):
        values = batch[column].flatten().to_numpy().reshape(batch.num_rows, -1)
        keys = zip(*(batch[name].to_pylist() for name in ("prompt_id", "target", "layer")), strict=True)
        for (prompt, target, layer), row in zip(keys, values, strict=True):
            kept.count(layer, row)
            if kept.wants((prompt, target)):
                for neuron in np.argpartition(-np.abs(row), min(_STRONGEST, len(row) - 1))[:_STRONGEST].tolist():
                    found = {"layer": layer, "neuron": neuron, "value": float(row[neuron])}
                    kept.keep((prompt, target), abs(found["value"]), found)
    effect = (
        " A neuron that fires by one unit stronger changes the probability by about so much."
        if column == "neurgrad"
        else ""
    )
    grid = _strongest_grid(
        run, kept, f"The strongest neurons of each prompt: {what}",
        f"The {_STRONGEST} largest |{what}| for {of}{f' ({unit})' if unit else ''}.{effect}",
        {"layer": str, "neuron": str, "value": lambda value: f"{value:+.3e}"}, {"value": what}, f"strongest-{number}",
    )  # fmt: skip
    return Section(f"run-{number}", f"{_title(what)}: {run.name}", "", [grid], [kept.heat_map(number, what, unit, of)])


def _sweep(run: Run, number: int) -> Section:
    """Of interventions on single neurons."""
    shown = ["layer", "neuron", "neg", "r", "largest_delta_p", "activation"]
    only_right, of = _of(run)
    has_curves = "delta_p" in run.schemas["sweep"].names
    columns = ["prompt_id", "target", *shown, "r2", "neurgrad", "gradient", *["delta_p"] * has_curves]
    kept, sample, curves = _Strength(), _Sample(), _Curves(run)
    for batch in run.table("sweep", columns, only_right).to_batches(batch_size=8192):
        if not batch.num_rows:
            continue
        sample.add(batch.select(["neg", "neurgrad", "gradient"]))
        layers, neg = batch["layer"].to_numpy(), batch["neg"].to_numpy()
        for layer in np.unique(layers).tolist():
            kept.count(layer, neg[layers == layer])
        for row in batch.take(pa.array(_strongest_rows(batch, np.abs(neg)))).to_pylist():
            if kept.wants((row["prompt_id"], row["target"])):
                kept.keep((row["prompt_id"], row["target"]), abs(row["neg"]), row)
        if has_curves:
            curves.add(batch)
    is_signed = run.config["measure"]["shift"] == "signed"
    unit = "probability a unit of activation" if is_signed else UNIT
    four = "{:.4f}".format
    grid = _strongest_grid(
        run, kept, "The strongest swept neurons of each prompt",
        f"NEG is the measured slope ({unit}) for {of}; r says how straight the curve is; beside it the largest change "
        f"of the probability over the shifts.",
        {
            "layer": str, "neuron": str, "neg": "{:+.3e}".format, "r": four, "largest_delta_p": four,
            "activation": "{:+.3f}".format,
        },
        {"neg": "NEG", "largest_delta_p": "largest change of p"}, f"swept-{number}",
    )  # fmt: skip
    points = sample.rows()
    pictures = [
        kept.heat_map(number, "NEG", unit, of),
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
    if shown_curves := curves.rows():
        pictures.append(
            Picture(
                f"curves-{number}", "A few neurons",
                "Change of the probability over shifts of one neuron (points), the strongest of several layers; the "
                f"dashed line is what {'the gradient' if is_signed else 'NeurGrad'} foretells.",
                "Curves of probability over shifts for a few neurons",
                drawn(figures.curves(shown_curves, "gradient" if is_signed else "neurgrad"), (10, 5.6)), is_wide=True,
            )
        )  # fmt: skip
    facts = Grid("Linearity and agreement", "", ("what", "found"), agreement(run))
    return Section(f"run-{number}", f"NEG by intervention: {run.name}", "", [facts, grid], pictures)


def _strongest_rows(batch: pa.RecordBatch, size: NDArray[Any]) -> NDArray[np.int64]:
    """The rows of a batch that may be among the strongest of their prompt and target."""
    prompt, target = (
        batch[key].dictionary_encode().indices.to_numpy().astype(np.int64) for key in ("prompt_id", "target")
    )
    pair = prompt * (int(target.max()) + 1) + target
    order = np.lexsort((-size, pair))
    first = np.flatnonzero(np.r_[True, np.diff(pair[order]) != 0])
    rank = np.arange(len(order)) - np.repeat(first, np.diff(np.r_[first, len(order)]))
    chosen: NDArray[np.int64] = order[rank < _STRONGEST]
    return chosen


class _Sample:
    """A sample of fixed size of rows that come in batches: those with the smallest of random numbers."""

    def __init__(self) -> None:
        self._draw = np.random.default_rng(0)
        self._keys: NDArray[np.float64] = np.empty(0)
        self._table: pa.Table | None = None

    def add(self, batch: pa.RecordBatch) -> None:
        """Rows of the same columns."""
        keys = np.r_[self._keys, self._draw.random(batch.num_rows)]
        rows = pa.Table.from_batches([batch])
        rows = rows if self._table is None else pa.concat_tables([self._table, rows])
        chosen = np.argsort(keys, kind="stable")[:_SAMPLE]
        self._keys, self._table = keys[chosen], rows.take(pa.array(chosen)).combine_chunks()

    def rows(self) -> list[Row]:
        """What was drawn."""
        drawn_rows: list[Row] = [] if self._table is None else self._table.to_pylist()
        return drawn_rows


class _Curves:
    """The curve of the strongest neuron of each layer."""

    def __init__(self, run: Run) -> None:
        self._shifts = [float(shift) for shift in run.config["measure"]["shifts"]]
        self._best: dict[int, tuple[float, Row]] = {}

    def add(self, batch: pa.RecordBatch) -> None:
        """Rows of a sweep that kept its curves."""
        layers, size = batch["layer"].to_numpy(), batch["largest_delta_p"].to_numpy()
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


def _top_neurons(run: Run, number: int) -> Section:
    """Of the strongest neurons alone, as NeurGrad with `keep=top_k` leaves them."""
    kept, (only_right, of) = _Strength(), _of(run)
    in_layer: dict[int, int] = {}
    columns = ["prompt_id", "target", "rank", "layer", "neuron", "neurgrad", "activation"]
    for batch in run.table("top_neurons", columns, only_right).to_batches(batch_size=8192):
        for layer, n in zip(*np.unique(batch["layer"].to_numpy(), return_counts=True), strict=True):
            in_layer[int(layer)] = in_layer.get(int(layer), 0) + int(n)
        best = batch.filter(pc.less(batch["rank"], _STRONGEST))
        for row in best.to_pylist():
            if kept.wants((row["prompt_id"], row["target"])):
                kept.keep((row["prompt_id"], row["target"]), abs(row["neurgrad"]), row)
    count = run.config["measure"]["top_k"]
    grid = _strongest_grid(
        run, kept, "The strongest neurons of each prompt: NeurGrad", f"The {_STRONGEST} largest |NeurGrad| for {of}.",
        {"layer": str, "neuron": str, "neurgrad": "{:+.3e}".format, "activation": "{:+.3f}".format},
        {"neurgrad": "NeurGrad"}, f"strongest-{number}",
    )  # fmt: skip
    picture = Picture(
        f"strongest-layers-{number}", "Where the strongest neurons are",
        f"Of the {count} strongest neurons of each prompt for {of}, how many are in each layer.",
        "Bars of the share of strongest neurons over layers",
        drawn(figures.bars_over_layers(in_layer, f"share of the {count} strongest, %")),
    )  # fmt: skip
    return Section(f"run-{number}", f"NeurGrad, the strongest: {run.name}", "", [grid], [picture])


def _interventions(run: Run, number: int) -> Section:
    """Of joint interventions: a row an edit."""
    only_right, of = _of(run)
    columns = [
        "edit", "target_index", "is_answer", "delta_p", "probability_before", "prediction_before", "prediction",
    ]  # fmt: skip
    sums: dict[str, NDArray[np.float64]] = {}
    for batch in run.table("intervene", columns, only_right).to_batches(batch_size=8192):
        edits = batch["edit"].dictionary_encode()
        names, codes = edits.dictionary.to_pylist(), edits.indices.to_numpy()
        target, before, after = (
            batch[name].to_numpy() for name in ("target_index", "prediction_before", "prediction")
        )  # fmt: skip
        change = batch["delta_p"].to_numpy().astype(np.float64)
        added = np.stack(
            [np.ones(len(target)), change, np.abs(change), before == target, after == target, before != after,
             batch["probability_before"].to_numpy()], 1,
        )  # fmt: skip
        for code, name in enumerate(names):
            sums[name] = sums.get(name, np.zeros(added.shape[1])) + added[codes == code].sum(0)
    shown = list(sums.items())[:_MOST_EDITS]
    sizes = {edit_name(edit, i): len(edit["neurons"]) for i, edit in enumerate(run.config["measure"]["edits"])}
    head = (
        "edit", "neurons", "p before", "change of p, mean", "|change of p|, mean", "right before, %", "right after, %",
        "predictions changed, %", "prompts × targets",
    )  # fmt: skip
    rows = []
    for name, summed in shown:
        n, change, size, right_before, right_after, changed, before = summed
        has_answers = only_right is not None
        rows.append(
            (
                name, str(sizes.get(name, "-")), f"{before / n:.4f}", f"{change / n:+.3e}", f"{size / n:.3e}",
                percent(right_before / n) if has_answers else "-", percent(right_after / n) if has_answers else "-",
                percent(changed / n), f"{n:.0f}",
            )
        )  # fmt: skip
    grid = Grid(
        "Edits", f"Means over all prompts, of the probability p of {of}"
        + (f"; the first {_MOST_EDITS} of {len(sums)} edits." if len(sums) > _MOST_EDITS else "."),
        head, rows, range(1, len(head)), is_interactive=True, name=f"edits-{number}",
    )  # fmt: skip
    return Section(f"run-{number}", f"Joint interventions: {run.name}", "", [grid])


def _strength(run: Run, number: int) -> Section:
    """Of sums of |NeurGrad| over a data set."""
    summed: dict[int, NDArray[np.float64]] = {}
    prompts: dict[int, int] = {}
    for batch in run.table("strength", ["layer", "n_prompts", "strength"]).to_batches(batch_size=256):
        values = batch["strength"].flatten().to_numpy().reshape(batch.num_rows, -1)
        rows = zip(batch["layer"].to_pylist(), batch["n_prompts"].to_pylist(), values, strict=True)
        for layer, n, strength_n in rows:
            summed[layer] = summed.get(layer, 0.0) + strength_n
            prompts[layer] = prompts.get(layer, 0) + n
    kept = _Strength()
    means = {layer: summed[layer] / prompts[layer] for layer in sorted(summed)}
    for layer, mean_n in means.items():
        kept.count(layer, mean_n)
    layer_m = np.repeat(list(means), [len(mean_n) for mean_n in means.values()])
    neuron_m = np.concatenate([np.arange(len(mean_n)) for mean_n in means.values()])
    mean_m = np.concatenate(list(means.values()))
    best = np.argsort(-mean_m, kind="stable")[:_MOST_NEURONS]
    what = "mean over prompts of the largest |NeurGrad|"
    grid = Grid(
        "The strongest neurons of the data set", f"The {what} over a prompt's targets, in {UNIT}.",
        ("rank", "layer", "neuron", "strength"),
        [(str(i), str(layer_m[m]), str(neuron_m[m]), f"{mean_m[m]:.3e}") for i, m in enumerate(best)],
        range(4), is_interactive=True, name=f"strongest-{number}",
    )  # fmt: skip
    heat = kept.heat_map(number, "strength", UNIT, "each prompt's strongest target")
    return Section(f"run-{number}", f"Strength over the data set: {run.name}", "", [grid], [heat])


# --- small things


def _of(run: Run) -> tuple[pc.Expression | None, str]:
    """Right answers' rows alone, where every prompt has one; and what these rows are of."""
    answers = run.table("prompts", columns=["answer"]).to_batches()
    if any(batch["answer"].null_count for batch in answers):
        return None, "each target"
    return pc.field("is_answer"), "the right answer"


def _strongest_grid(
    run: Run, kept: _Strength, title: str, caption: str, cells: Mapping[str, Any], heads: Mapping[str, str], name: str
) -> Grid:
    """cells: how each value is written. heads: what a column is called, if not as its key."""
    texts = _texts(run, {prompt for prompt, _ in kept.strongest})
    rows = [
        (texts.get(prompt, prompt), target, *(write(row[key]) for key, write in cells.items()))
        for (prompt, target), row in kept.rows()
    ]
    if len(kept.strongest) >= _MOST_PROMPTS:
        caption += f" The first {_MOST_PROMPTS} pairs of a prompt and a target are shown."
    head = ["prompt", "target", *(heads.get(key, key) for key in cells)]
    return Grid(title, caption, head, rows, range(2, len(head)), is_interactive=True, name=name)


def _texts(run: Run, wanted: Iterable[str], most: int = 70) -> dict[str, str]:
    """The end of each wanted prompt's text, which is where demonstrations are over."""
    only = pc.field("prompt_id").isin(sorted(wanted))
    found = {}
    for batch in run.table("prompts", ["prompt_id", "prompt"], only).to_batches():
        for prompt_id, text in zip(batch["prompt_id"].to_pylist(), batch["prompt"].to_pylist(), strict=True):
            flat = " ".join(text.split())
            found[prompt_id] = flat if len(flat) <= most else f"… {flat[-most:]}"
    return found


def _title(what: str) -> str:
    return what[:1].upper() + what[1:]
