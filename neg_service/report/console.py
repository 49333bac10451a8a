"""Text for a terminal: aligned rows, sizes, accuracy, and the strongest neurons of a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tabulate import tabulate

from neg_service.layer_neurons import NO_EXPERT, LayerNeurons
from neg_service.report.cells import lists_in
from neg_service.report.wishes import is_of_wishes, met_in
from neg_service.schema import LINEAR, change_columns
from neg_service.storage.reader import Run


@dataclass(frozen=True)
class Accuracy:
    """Of the prompts that have an answer, how many were predicted rightly.

    right_per_token: by the mean log probability of a target's tokens, where any target is several.
    """

    right: int
    of: int
    right_per_token: int | None = None

    def __str__(self) -> str:
        """For example `91.8 % (290 of 316)`."""
        if not self.of:
            return "no answers given"
        found = f"{_percent(self.right, self.of)} ({self.right} of {self.of})"
        if self.right_per_token is None:
            return found
        return f"{found}; by the mean over a target's tokens {_percent(self.right_per_token, self.of)}"


def accuracy(run: Run) -> Accuracy:
    """The model's accuracy on a run's prompts, choosing among the targets."""
    of_sequences = ["prediction_per_token", "target_sequences"]
    if not set(of_sequences) <= set(run.schemas["prompts"].names):
        of_sequences = []
    rows = run.table("prompts").to_table(columns=["answer", "prediction", *of_sequences])
    answered = rows.filter(pc.is_valid(rows["answer"]))

    def right(predicted: pa.ChunkedArray) -> int:
        return int(pc.sum(pc.equal(answered["answer"], predicted)).as_py() or 0)

    found = Accuracy(right(answered["prediction"]), answered.num_rows)
    if not of_sequences or answered["target_sequences"].null_count == answered.num_rows:
        return found
    per_token = pc.coalesce(answered["prediction_per_token"], answered["prediction"])
    return replace(found, right_per_token=right(per_token))


def dequantised_text(found: Mapping[str, Any]) -> str:
    """What a model's weights were made from, as `run.json` and `jobs.check` have it."""
    count = "" if found["tensors"] is None else f" ({found['tensors']} tensors)"
    return f"dequantised from {found['method']}{count}; activations: {found['activations']}"


# The columns of rows of single neurons from which `agreement` is made, and those that stand beside it in a report.
_COMPARED = ("r", "neg", "neurgrad", "gradient", "is_resolved", "signs_agree")
_BESIDE = ("layer", "neuron", "activation", "r2")
# What fits into memory at once; larger tables are for a reader that streams.
_SUMMARISED_ROWS = 5_000_000


def describe_tables(run: Run) -> list[tuple[str, str]]:
    """What is in a run's tables by now, in lines for `aligned`."""
    wishes = next((name for name in run.tables if is_of_wishes(run.schemas[name].names)), None)
    main = wishes or run.tables[-1]
    n_rows = run.table(main).count_rows()
    rows = [
        ("accuracy", str(accuracy(run)) if "prompts" in run.tables else "not measured"),
        ("rows", f"{n_rows} in table {main}"),
    ]
    if wishes:
        rows.append(("wishes", str(met_in(run.table(wishes, ["reached", "reason", "passes"]).to_batches()))))
    if run.values_of_neurons:
        rows.append(("values", _values(run, run.values_of_neurons[0])))
    if is_of_curves(run, main) and 0 < n_rows <= _SUMMARISED_ROWS:
        rows += agreement(run)
    return rows


def _values(run: Run, name: str) -> str:
    """How many values of neurons there are, of what, and in which unit."""
    table = run.described[name]
    return f"{_n_values(run, name)} of {table.title}, {table.unit}".rstrip(", ")


def _n_values(run: Run, name: str) -> int:
    table = run.described[name]
    kind = table.schema.field(table.values).type
    if table.is_by_neuron:
        return int(run.table(name).count_rows())
    if pa.types.is_fixed_size_list(kind):
        return int(run.table(name).count_rows() * kind.list_size)
    # Of what each row is of, for values themselves are too many to be read for that.
    layers = [LayerNeurons(*own) for own in run.about["model"]["layer_neurons"]]
    n = 0
    for batch in run.table(name, ["layer", "expert"]).to_batches():
        experts = batch["expert"].fill_null(NO_EXPERT).to_pylist()
        rows = Counter(zip(batch["layer"].to_pylist(), experts, strict=True))
        n += sum(count * layers[layer].size_of(expert) for (layer, expert), count in rows.items())
    return n


def has_experts(run: Run) -> bool:
    """Whether the model of a run has experts."""
    layers = run.about.get("model", {}).get("layer_neurons", [])
    return any(LayerNeurons(*own).n_experts for own in layers)


@dataclass(frozen=True)
class Neuron:
    """A neuron, and what is known of it on one target: values by their column, the one that ranks it first.

    expert: None of a layer's only MLP, -1 of one that is always on beside experts.
    """

    layer: int
    index: int
    values: dict[str, float]
    expert: int | None = None


def strongest(run: Run, prompt_id: str, target: str, count: int) -> list[Neuron]:
    """The neurons of largest |value| for a prompt's target, strongest first; of a table with a list for each layer.

    Beside it what other such tables know of the neuron on that prompt, as `activations` beside `neurgrad`.
    """
    main, *others = [name for name in run.values_of_neurons if not run.described[name].is_by_neuron]
    of_prompt = pc.field("prompt_id") == prompt_id
    mlps, lists = _by_mlp(run, main, of_prompt & (pc.field("target") == target))
    start_r = np.cumsum([0, *map(len, lists)])
    values_m = np.concatenate(lists)
    best = np.argsort(-np.abs(values_m), kind="stable")[:count]
    rows = np.searchsorted(start_r, best, "right") - 1
    values = {str(run.described[main].values): values_m[best]}
    for name in others:
        if "target" in run.schemas[name].names or "prompt_id" not in run.schemas[name].names:
            continue
        values[str(run.described[name].values)] = np.concatenate(_by_mlp(run, name, of_prompt)[1])[best]
    return [
        Neuron(layer, int(place - start_r[row]), {column: float(own[i]) for column, own in values.items()}, expert)
        for i, (row, place) in enumerate(zip(rows, best, strict=True))
        for layer, expert in [mlps[row]]
    ]


def _by_mlp(run: Run, name: str, only: pc.Expression) -> tuple[list[tuple[int, int | None]], list[NDArray[np.float32]]]:
    """Layer and expert, and the values, of the rows of a table, of which there is one for each MLP and expert."""
    column = str(run.described[name].values)
    keys = [key for key in ("layer", "expert") if key in run.schemas[name].names]
    table = run.table(name).to_table(columns=[*keys, column], filter=only)
    table = table.sort_by([(key, "ascending") for key in keys])
    experts = table["expert"].to_pylist() if "expert" in keys else [None] * table.num_rows
    return list(zip(table["layer"].to_pylist(), experts, strict=True)), lists_in(table[column].combine_chunks())


class Correlation:
    """Pearson's r of pairs that come in parts.

    Means and sums of squared distances from them are merged part by part, which does not cancel as sums of squares do.
    """

    def __init__(self) -> None:
        """Of nothing."""
        self._n = 0
        self._mean_2 = np.zeros(2)
        self._scatter_22 = np.zeros((2, 2))

    def add(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
        """Further pairs."""
        if not len(x):
            return
        part_2n = np.stack([x, y])
        mean_2 = part_2n.mean(1)
        away = part_2n - mean_2[:, None]
        apart, n = mean_2 - self._mean_2, self._n + len(x)
        self._scatter_22 += away @ away.T + np.outer(apart, apart) * (self._n * len(x) / n)
        self._mean_2 += apart * (len(x) / n)
        self._n = n

    @property
    def value(self) -> float:
        """NaN of fewer than two pairs, or where one side is constant."""
        spread = float(self._scatter_22[0, 0] * self._scatter_22[1, 1])
        return float(self._scatter_22[0, 1] / np.sqrt(spread)) if self._n > 1 and spread > 0 else float("nan")


def is_of_curves(run: Run, name: str) -> bool:
    """Whether a table is of curves over shifts, a neuron in each row, with estimates beside NEG and known noise."""
    has_noise = "noise" in run.about.get("calibration", {})
    names = run.schemas[name].names
    has_changes = change_columns(run.schemas[name])[0] in names
    return {*_COMPARED, *_BESIDE} <= {*names} and has_changes and "shifts" in run.config["measure"] and has_noise


def agreement(run: Run) -> list[tuple[str, str]]:
    """Of a sweep: how many curves are straight, and how well estimates agree with NEG, in lines for `aligned`."""
    columns_read = list(_COMPARED)
    n = linear = agree = resolved = 0
    routing = _CurvesOfExperts() if "is_routed" in run.schemas[run.tables[-1]].names else None
    only = None if routing is None else pc.field("is_routed")
    columns_read += [] if routing is None else ["routing_changed"]
    # Older runs do not say it.
    tells_shifts = "n_shifts" in run.schemas[run.tables[-1]].names
    columns_read += ["n_shifts"] if tells_shifts else []
    n_run = 0
    with_neurgrad, with_gradient = Correlation(), Correlation()
    for batch in run.table(run.tables[-1], columns_read, only).to_batches():
        r, neg, neurgrad, gradient = (batch[name].to_numpy().astype(np.float64) for name in columns_read[:4])
        n += batch.num_rows
        linear += int((np.abs(r) >= LINEAR).sum())
        agree += pc.sum(batch["signs_agree"]).as_py() or 0
        resolved += pc.sum(batch["is_resolved"]).as_py() or 0
        n_run += (pc.sum(batch["n_shifts"]).as_py() or 0) if tells_shifts else 0
        with_neurgrad.add(neg, neurgrad)
        with_gradient.add(neg, gradient)
        if routing is not None:
            routing.add(r, batch["routing_changed"].to_numpy())
    noise = run.about["calibration"]["noise"]
    signs = f", {_percent(agree, resolved)} of signs agree"
    # A neuron that moves by the shift itself is predicted by the plain gradient.
    is_signed = run.config["measure"].get("shift") == "signed"
    return [
        ("curves", f"{n}: a neuron and a target each, of {_shifts(run.config['measure'], n_run / n if n else 0)}"),
        ("linear", f"{_percent(linear, n)} have |r| >= {LINEAR}"),
        *([] if routing is None else routing.lines(run.table(run.tables[-1]).count_rows() - n)),
        ("NEG and NeurGrad", f"correlation {with_neurgrad.value:.4f}{'' if is_signed else signs}"),
        ("NEG and gradient", f"correlation {with_gradient.value:.4f}{signs if is_signed else ''}"),
        ("precision", f"{_error_of(noise)}; {_percent(resolved, n)} are above the noise"),
    ]


@dataclass
class _CurvesOfExperts:
    """Curves of a model with experts: how many have a shift for which a layer above chose other experts, or none.

    Each [2]: without, with.
    """

    n: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2, np.int64))
    linear: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2, np.int64))

    def add(self, r: NDArray[Any], routing_changed: NDArray[Any]) -> None:
        is_changed = (routing_changed > 0).astype(np.int64)
        self.n += np.bincount(is_changed, minlength=2)
        self.linear += np.bincount(is_changed[np.abs(r) >= LINEAR], minlength=2)

    def lines(self, n_unused: int) -> list[tuple[str, str]]:
        without, with_others = (_percent(own, of) for own, of in zip(self.linear, self.n, strict=True))
        share = _percent(self.n[1], self.n.sum())
        changed = f"for {share} some shift has a layer above choose other experts: {with_others} of these are linear, "
        lines = [("experts above", f"{changed}{without} of the others")]
        if n_unused:
            lines.append(("left out", f"{n_unused} curves of experts that their prompts do not use"))
        return lines


def _shifts(measure: Mapping[str, Any], run_on_average: float) -> str:
    shifts = measure["shifts"]
    beside = {
        "coarse": ", interpolated between them",
        "adaptive": f", of which {run_on_average:.1f} were run on average",
    }.get(measure.get("grid", ""), "")
    return f"{len(shifts)} shifts up to ±{max(map(abs, shifts)):g}{beside}"


def _error_of(noise: Mapping[str, Any]) -> str:
    if noise["dtype"] == noise["reference"]:
        return f"{noise['dtype']}, which has no finer reference"
    if noise["neg_error"] is None:
        return f"NEG of no neuron of the calibration can be compared with {noise['reference']} in {noise['dtype']}"
    return f"NEG is off {noise['reference']} by {noise['neg_error']:.0e} (median, relative) in {noise['dtype']}"


def _percent(part: float, of: float) -> str:
    return f"{100 * part / of:.1f} %" if of else "none"


def aligned(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns; the second may have several lines."""
    return _indented(tabulate(list(rows), tablefmt="plain", disable_numparse=True))


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], text: Collection[int] = (0,)) -> str:
    """A table with right-aligned columns, but for those of text."""
    sides = ["left" if i in text else "right" for i in range(len(header))]
    # A title stands as its column does.
    lines = [header, *rows]
    return _indented(tabulate(lines, tablefmt="plain", colalign=sides, disable_numparse=True))


def _indented(table: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in table.splitlines())


def bytes_text(count: float) -> str:
    """For example `305.4 MB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def ranges(numbers: Iterable[int], most: int = 20) -> str:
    """Numbers with neighbours joined: `3, 7-11 (6)`; `none` if there are none."""
    ordered = sorted(numbers)
    spans: list[list[int]] = []
    for number in ordered:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans[:most])
    return f"{text}{', ...' if len(spans) > most else ''} ({len(ordered)})" if ordered else "none"
