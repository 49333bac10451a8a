"""What a report says of runs, studies and probes: their tables and figures, each with a sentence.

Tables of values are streamed: what is kept of a run is a histogram a layer and the strongest neurons of each prompt.
"""

from __future__ import annotations

import heapq
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from neg_service.errors import DestinationError
from neg_service.report import figures
from neg_service.report.console import accuracy, agreement
from neg_service.report.figures import drawn
from neg_service.report.page import Grid, Picture, Section
from neg_service.storage.objects import ObjectStore
from neg_service.storage.reader import Run, open_run
from neg_service.storage.run import RUN_FILE
from neg_service.storage.stores import open_store

_KINDS = ("study", "probe")
_OF_VALUES = ("neurgrad", "integrated_gradients")
_STRONGEST, _MOST_PROMPTS = 5, 200
# Estimators in units of their own, which no diagonal compares with NEG.
_OWN_UNITS = ("gradient_x_activation", "activation", "random", "integrated_gradients")
# |value| in half decades; smaller ones are in the first bin.
_EDGES = 10.0 ** np.arange(-9, 0.6, 0.5)
_UNIT = "probability a unit of |activation|"

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Found:
    """What lies at the URIs: runs, and the findings of studies and probes with their tables."""

    runs: list[Run] = field(default_factory=list)
    findings: list[tuple[str, str, dict[str, Any], dict[str, pa.Table]]] = field(default_factory=list)


def find(uris: Sequence[str], endpoint_url: str | None) -> Found:
    """Open runs, and studies and probes with the runs that they name.

    Raises:
        DestinationError: neither a run nor findings, or a study whose runs are gone.
    """
    found, seen = Found(), set()
    waiting = list(uris)
    while waiting:
        uri = waiting.pop(0).rstrip("/")
        if uri in seen:
            continue
        seen.add(uri)
        store = open_store(uri, endpoint_url)
        kind = next((kind for kind in _KINDS if store.get(f"{kind}.json") is not None), None)
        if kind is not None:
            about = json.loads(store.get(f"{kind}.json") or b"{}")
            found.findings.append((kind, uri, about, _tables(store)))
            runs = about.get("runs", [])
            # Of a probe there can be dozens; what they say is in its tables.
            # The ranges of a study reach further than its NEG; they are in its tables, and not to be taken for it.
            waiting += [run for what, run in runs.items() if what != "ranges"] if kind == "study" else []
        elif store.get(RUN_FILE) is not None:
            found.runs.append(open_run(uri, endpoint_url))
        else:
            raise DestinationError(f"runs={uri}: there is no run, no study and no probe")
    return found


def sections_of(found: Found) -> list[Section]:
    """The page from top to bottom."""
    made = [_overview(found)]
    for number, (kind, uri, about, tables) in enumerate(found.findings):
        own = _study(uri, about, tables) if kind == "study" else _probe(uri, about, tables)
        made += own if len(found.findings) == 1 else [_numbered(section, number, uri) for section in own]
    for number, run in enumerate(found.runs):
        made += _run_sections(run, number)
    return [section for section in made if section.grids or section.pictures]


def _numbered(section: Section, number: int, uri: str) -> Section:
    """The same section with names of its own, where there are several of its kind."""
    return replace(
        section,
        name=f"{section.name}-{number}",
        title=f"{section.title}: {uri.rsplit('/', 1)[-1]}",
        grids=[replace(grid, name=f"{grid.name}-{number}" if grid.name else "") for grid in section.grids],
        pictures=[replace(picture, name=f"{picture.name}-{number}") for picture in section.pictures],
    )


def _overview(found: Found) -> Section:
    rows = []
    for run in found.runs:
        model = run.about.get("model", {})
        measure = run.config["measure"]
        cost = run.about.get("cost")
        done = run.done()
        rows.append(
            (
                run.name,
                f"{model.get('source', run.config['model']['identity'])}, {run.config['model']['dtype']}",
                f"{model.get('layers', '?')} × {model.get('neurons_a_layer', '?')}",
                str(run.about.get("dataset", {}).get("source", "")),
                str(measure["name"]),
                str(run.config["prompts"]["count"]),
                str(accuracy(run)) if "prompts" in run.tables else "-",
                f"{len(done)} of {run.n_shards}",
                "-" if not cost else f"{cost['seconds'] * cost['replicas'] / cost['prompts']:.3g}",
                str(run.about.get("began", "")),
            )
        )
    head = (
        "run",
        "model",
        "layers × neurons",
        "data",
        "measure",
        "prompts",
        "accuracy",
        "shards",
        "s a prompt",
        "began",
    )
    versions = [run.about.get("versions", {}) for run in found.runs]
    names = list(dict.fromkeys(name for own in versions for name in own))
    software = [(name, ", ".join(dict.fromkeys(own[name] for own in versions if name in own))) for name in names]
    engines = sorted({run.about["engine"] for run in found.runs if run.about.get("engine")})
    text = (
        "Accuracy is the share of prompts whose right answer is the most probable of their targets. Seconds a prompt "
        "are those of one replica; a run that was interrupted does not say. "
        + (f"Engine: {', '.join(engines)}." if engines else "")
    )
    grids = [Grid("Runs", "", head, rows, numeric=(5, 8))] if rows else []
    if software:
        grids.append(Grid("Software", "", ("package", "version"), software))
    return Section("runs", "What was run", text, grids)


# --- a study


def _study(uri: str, about: dict[str, Any], tables: Mapping[str, pa.Table]) -> list[Section]:
    asked = about["study"]
    counts = tables["accuracy"].to_pylist()[0]
    estimators = [row for row in tables["estimators"].to_pylist() if row["layer"] is None]
    by_layer = [row for row in tables["estimators"].to_pylist() if row["layer"] is not None]
    names = [row["estimator"] for row in estimators]
    best = max(estimators, key=lambda row: _number(row["pearson"]))
    text = (
        f"The model answers {counts['right']} of {counts['with_answer']} prompts rightly; {counts['studied']} were "
        f"studied, {asked['neurons']} neurons of each layer: {best['n']} pairs of a prompt and a neuron. Intervals "
        f"hold 95 % of bootstrap draws of whole prompts. {best['estimator'].replace('_', ' ')} meets NEG best, with a "
        f"correlation of {best['pearson']:.4f}."
    )
    head = ("estimator", "Pearson r", "Spearman", "equal signs, %", "median relative error", "s a prompt")
    rows = [
        (
            row["estimator"].replace("_", " "),
            _interval(row, "pearson", 4),
            _interval(row, "spearman", 4),
            _interval(row, "signs", 1, 100),
            _interval(row, "median_relative_error", 4),
            "-" if row["seconds_a_prompt"] is None else f"{row['seconds_a_prompt']:.3g}",
        )
        for row in estimators
    ]
    caption = (
        "Signs and relative errors are of the pairs whose NEG differs from zero by more than the noise that the run "
        "measured. Seconds are of all neurons of a prompt, with one replica."
    )
    if (cost := estimators[0]["neg_seconds_a_prompt"]) is not None:
        caption += f" Measuring NEG of the {asked['neurons']} neurons a layer took {cost:.3g} s a prompt."
    points = tables["points"].to_pylist()
    shown = [name for name in names if name in points[0]]
    quality = Section(
        "estimators", "Who estimates it best", text,
        [Grid("Estimators against NEG", caption, head, rows, numeric=range(1, 6))],
        [
            Picture(
                "neg-against-estimators", "NEG against each estimator",
                "A point is a neuron on a prompt: the strongest thousand, and three thousand drawn from the rest. Axes "
                "are linear near zero and logarithmic beyond; on the grey diagonal an estimate is right. "
                + f"Vertical: NEG, {_UNIT}.",
                "Scatter plots of measured NEG against every estimator",
                drawn(figures.scatter_of_estimates(points, shown, _OWN_UNITS), (10, 6.4 if len(shown) > 3 else 3.6)),
            ),
            Picture(
                "correlation-by-layer", "Correlation with NEG by layer",
                "Pearson's r in each layer, with its 95 % interval.",
                "Lines of correlation over layers, one for each estimator",
                drawn(figures.lines_over_layers(by_layer, "pearson", names, "Pearson r with NEG")),
            ),
        ],
    )  # fmt: skip
    ranges = [row for row in tables["ranges"].to_pylist() if row["n"]]
    whole = sorted((row for row in ranges if row["layer"] is None), key=lambda row: row["range"])
    histogram = [row for row in tables["histogram"].to_pylist() if row["what"] == "r"]
    head = ("shifts up to ±", "linear, %", "|r|, lowest 5 %", "|r|, median", "R², median", "curves")
    linear = Section(
        "linearity", "How linear neurons are",
        "A curve counts as linear where |r| ≥ 0.95; curves whose effect is below the noise are left out."
        + "".join(
            f" Up to ±{row['range']:g}: {100 * row['share_linear']:.1f} %." for row in whole[:: len(whole) - 1 or 1]
        ),
        [
            Grid(
                "Linearity by range", "Each range is judged on 40 shifts, interpolated from four that were run.", head,
                [
                    (
                        f"{row['range']:g}", f"{100 * row['share_linear']:.1f}", f"{row['r_q05']:.4f}",
                        f"{row['r_q50']:.4f}", f"{row['r2_q50']:.4f}", str(row["n"]),
                    )
                    for row in whole
                ],
                numeric=range(6),
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
                "Change of the answer's probability over shifts of one neuron (points), the strongest of several "
                "layers; the dashed line is what NeurGrad foretells.",
                "Curves of probability over shifts for six neurons",
                drawn(figures.curves(tables["curves"].to_pylist()), (10, 5.6)),
            ),
            Picture(
                "histogram-of-r", "How straight curves are",
                "Distribution of |r| over the shifts that NEG is measured on; right of the line a curve counts "
                "as linear.",
                "A histogram of |r| with nearly all curves in the last bin",
                drawn(figures.histogram(histogram, "|r| of a curve")),
            ),
        ],
    )  # fmt: skip
    layers = tables["layers"].to_pylist()
    head = ("layer", "linear, %", "|NEG|, median", "|NEG|, 95 %", "positive, %", "curves")
    strength = Section(
        "layers", "Where neurons are strong",
        "NEG of the sampled neurons by layer, for the right answers.",
        [
            Grid(
                "Layers", f"|NEG| in {_UNIT}; positive ones of those that differ from zero.", head,
                [
                    (
                        "all" if row["layer"] is None else str(row["layer"]), _percent(row["share_linear"]),
                        f"{row['neg_q50']:.2e}", f"{row['neg_q95']:.2e}", _percent(row["share_positive"]),
                        str(row["n"]),
                    )
                    for row in layers
                ],
                numeric=range(6),
            )
        ],
        [
            Picture(
                "strength-over-layers", "Strength and sign over layers",
                f"Left: |NEG| of a layer's neurons ({_UNIT}): median, the middle half, and the middle 90 %. Right: the "
                "share of positive NEGs.",
                "Bands of |NEG| over layers, and points of the share of positive ones",
                drawn(figures.strength_over_layers(layers), (9, 4.2)),
            )
        ],
    )  # fmt: skip
    made = [quality, linear, strength]
    if "additivity" in tables:
        made.append(_additivity(tables["additivity"].to_pylist()))
    return made


def _additivity(rows: Rows) -> Section:
    head = (
        "neurons together",
        "Pearson r",
        "median relative error",
        "|change of probability|, median",
        "sets × prompts",
    )
    return Section(
        "additivity", "Do neurons add up",
        f"Sets of sampled neurons shifted together by {rows[0]['shift']:g}, against the sum of their NEGs times the "
        "shift.",
        [
            Grid(
                "Joint interventions", "", head,
                [
                    (
                        str(row["n_neurons"]), _interval(row, "pearson", 4), _interval(row, "median_relative_error", 4),
                        f"{row['median_delta_p']:.2e}", str(row["n"]),
                    )
                    for row in rows
                ],
                numeric=range(5),
            )
        ],
    )  # fmt: skip


# --- a probe


def _probe(uri: str, about: dict[str, Any], tables: Mapping[str, pa.Table]) -> list[Section]:
    rows = [row for row in tables["accuracy"].to_pylist() if row["split"] == "test" and row["is_chosen"]]
    head = ("genre", "task", "probe", "neurons", "accuracy, %", "95 % interval")
    lines = [
        (
            row["genre"] or "-", row["task"] or "-", row["probe"], str(row.get("n_neurons") or "-"),
            f"{100 * row['accuracy']:.1f}", _from_to(row),
        )
        for row in rows
    ]  # fmt: skip
    name = uri.rsplit("/", 1)[-1]
    grids = [Grid("Accuracy on test", "The number of neurons is chosen on the validation split.", head, lines, (3, 4))]
    if "neurons" in tables:
        best = tables["neurons"].filter(pc.field("rank") < 20).to_pylist()
        columns = [
            key for key in ("task", "score_name", "rank", "layer", "neuron", "polarity", "score") if key in best[0]
        ]
        grids.append(
            Grid(
                "Skill neurons", "The best neurons of each task; the score says how often the right label was ahead.",
                columns,
                [tuple(_cell(row[key]) for key in columns) for row in best],
                numeric=[i for i, key in enumerate(columns) if key not in ("task", "score_name")],
                is_interactive=True, name="skill-neurons",
            )
        )  # fmt: skip
    picture = Picture(
        "skill-accuracy", "Probes and baselines",
        "Accuracy on test of each probe and baseline, task by task.",
        "Bars of accuracy for each probe, a group a task",
        drawn(figures.accuracies(rows), (max(7.2, 1.4 * len({row["task"] for row in rows})), 4.4)),
    )  # fmt: skip
    text = f"From {name}: how well a few neurons do a task without the model's head."
    return [Section("skills", "Skill neurons", text, grids, [picture])]


def _from_to(row: Mapping[str, Any]) -> str:
    low, high = row.get("low"), row.get("high")
    return "-" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"


# --- a run


def _run_sections(run: Run, number: int) -> list[Section]:
    values = next((name for name in _OF_VALUES if name in run.tables), None)
    if values is not None:
        return [_values(run, values, number)] if run.done() else []
    if "sweep" in run.tables and run.done():
        return [_sweep(run, number)]
    return []


@dataclass
class _Stream:
    """What is kept of a table of values while it is read."""

    counts_lb: dict[int, np.ndarray] = field(default_factory=dict)
    # (prompt, target): a heap of (|value|, value, layer, neuron).
    strongest: dict[tuple[str, str], list[tuple[float, float, int, int]]] = field(default_factory=dict)

    def add(self, batch: pa.RecordBatch, column: str) -> None:
        values = batch[column].flatten().to_numpy().reshape(batch.num_rows, -1)
        keys = zip(*(batch[name].to_pylist() for name in ("prompt_id", "target", "layer")), strict=True)
        for (prompt, target, layer), row in zip(keys, values, strict=True):
            size = np.abs(row)
            counts, _ = np.histogram(np.clip(size, _EDGES[0], _EDGES[-1]), _EDGES)
            self.counts_lb[layer] = self.counts_lb.get(layer, np.zeros(len(_EDGES) - 1)) + counts
            if (prompt, target) not in self.strongest and len(self.strongest) >= _MOST_PROMPTS:
                continue
            heap = self.strongest.setdefault((prompt, target), [])
            for index in np.argpartition(-size, min(_STRONGEST, len(size) - 1))[:_STRONGEST]:
                entry = (float(size[index]), float(row[index]), layer, int(index))
                heapq.heappush(heap, entry) if len(heap) < _STRONGEST else heapq.heappushpop(heap, entry)


def _values(run: Run, column: str, number: int) -> Section:
    stream = _Stream()
    only_right = None if _without_answers(run) else pc.field("is_answer")
    table = run.table(column, ["prompt_id", "target", "layer", column], only_right)
    for batch in table.to_batches(batch_size=512):
        if batch.num_rows:
            stream.add(batch, column)
    layers = sorted(stream.counts_lb)
    counts = np.stack([stream.counts_lb[layer] for layer in layers])
    what = "NeurGrad" if column == "neurgrad" else "integrated gradient"
    unit = _UNIT if column == "neurgrad" else "probability"
    texts = _texts(run)
    rows = [
        (texts.get(prompt, prompt), target, str(layer), str(neuron), f"{value:+.3e}")
        for (prompt, target), heap in stream.strongest.items()
        for _, value, layer, neuron in sorted(heap, reverse=True)
    ]
    of = "the right answer" if only_right is not None else "each target"
    heat = Picture(
        f"strength-{number}", f"Strength of neurons by layer: |{what}|",
        f"Share of a layer's neurons by |{what}| ({unit}) for {of}, over all prompts; colours are logarithmic.",
        f"A heat map of layers against |{what}|",
        drawn(figures.strength_heat_map(counts / counts.sum(1, keepdims=True), _EDGES, f"|{what}|, {unit}")),
    )  # fmt: skip
    effect = (
        ""
        if column != "neurgrad"
        else " A neuron that fires by one unit stronger changes the probability by about so much."
    )
    grid = Grid(
        f"The strongest neurons of each prompt: {what}",
        f"The {_STRONGEST} largest |{what}| for {of}, of the first {len(stream.strongest)} prompts.{effect}",
        ("prompt", "target", "layer", "neuron", what), rows, (2, 3, 4), is_interactive=True, name=f"strongest-{number}",
    )  # fmt: skip
    return Section(f"run-{number}", f"{what}: {run.name}", "", [grid], [heat])


def _sweep(run: Run, number: int) -> Section:
    names = ["prompt_id", "target", "layer", "neuron", "neg", "neurgrad", "r", "r2", "largest_delta_p", "activation"]
    only_right = None if _without_answers(run) else pc.field("is_answer")
    points: list[tuple[float, dict[str, Any]]] = []
    draw = np.random.default_rng(0)
    strongest: dict[tuple[str, str], list[tuple[float, int, dict[str, Any]]]] = {}
    for index, batch in enumerate(run.table("sweep", [*names, "gradient"], only_right).to_batches(batch_size=8192)):
        if not batch.num_rows:
            continue
        # A sample of fixed size: those with the smallest of random numbers.
        keys = draw.random(batch.num_rows)
        chosen = np.argsort(keys)[:3000]
        taken = batch.take(pa.array(chosen)).to_pylist()
        points = sorted([*points, *zip(keys[chosen].tolist(), taken, strict=True)], key=lambda one: one[0])[:3000]
        size = np.abs(batch["neg"].to_numpy())
        codes = [batch[key].dictionary_encode().indices.to_numpy() for key in ("prompt_id", "target")]
        pair = codes[0].astype(np.int64) * (int(codes[1].max()) + 1) + codes[1]
        order = np.lexsort((-size, pair))
        first = np.flatnonzero(np.r_[True, np.diff(pair[order]) != 0])
        rank = np.arange(len(order)) - np.repeat(first, np.diff(np.r_[first, len(order)]))
        best = batch.take(pa.array(order[rank < _STRONGEST])).to_pylist()
        for place, row in enumerate(best):
            key = (row["prompt_id"], row["target"])
            if key not in strongest and len(strongest) >= _MOST_PROMPTS:
                continue
            heap = strongest.setdefault(key, [])
            entry = (abs(row["neg"]), index * 10_000 + place, row)
            heapq.heappush(heap, entry) if len(heap) < _STRONGEST else heapq.heappushpop(heap, entry)
    texts = _texts(run)
    rows = [
        (
            texts.get(row["prompt_id"], row["prompt_id"]), row["target"], str(row["layer"]), str(row["neuron"]),
            f"{row['neg']:+.3e}", f"{row['r']:.4f}", f"{row['largest_delta_p']:.3f}", f"{row['activation']:+.3f}",
        )
        for heap in strongest.values()
        for _, _, row in sorted(heap, key=lambda one: -one[0])
    ]  # fmt: skip
    head = ("prompt", "target", "layer", "neuron", "NEG", "r", "largest change of p", "activation")
    picture = Picture(
        f"sweep-{number}", "NEG against NeurGrad and the plain gradient",
        f"A point is a neuron on a prompt, {len(points)} drawn at random; {_UNIT}.",
        "Scatter plots of NEG against NeurGrad and against the gradient",
        drawn(figures.scatter_of_estimates([row for _, row in points], ["neurgrad", "gradient"], ()), (8, 3.8)),
    )  # fmt: skip
    facts = Grid("Linearity and agreement", "", ("what", "found"), agreement(run))
    grid = Grid(
        "The strongest swept neurons of each prompt",
        "NEG is the measured slope; beside it the largest change of the target's probability over the shifts.",
        head, rows, range(2, 8), is_interactive=True, name=f"swept-{number}",
    )  # fmt: skip
    return Section(f"run-{number}", f"NEG by intervention: {run.name}", "", [facts, grid], [picture])


# --- small things


def _tables(store: ObjectStore) -> dict[str, pa.Table]:
    keys = [entry.key for entry in store.list("")]
    names = [key for key in keys if key.endswith(".parquet") and "/" not in key]
    return {name.removesuffix(".parquet"): pq.read_table(io.BytesIO(store.get(name) or b"")) for name in names}


def _without_answers(run: Run) -> bool:
    return bool(run.table("prompts", columns=["answer"]).to_table()["answer"].null_count)


def _texts(run: Run, most: int = 70) -> dict[str, str]:
    """The end of each prompt's text, which is where demonstrations are over."""

    def pairs() -> Iterator[tuple[str, str]]:
        table = run.table("prompts", columns=["prompt_id", "prompt"]).to_table()
        for prompt_id, text in zip(table["prompt_id"].to_pylist(), table["prompt"].to_pylist(), strict=True):
            flat = " ".join(text.split())
            yield prompt_id, flat if len(flat) <= most else f"… {flat[-most:]}"

    return dict(pairs())


def _interval(row: Mapping[str, Any], name: str, digits: int, factor: float = 1.0) -> str:
    value, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
    if value is None or value != value:
        return "-"
    return f"{factor * value:.{digits}f} ({factor * low:.{digits}f} to {factor * high:.{digits}f})"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _number(value: float | None) -> float:
    return -2.0 if value is None or value != value else value


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
