"""Is it linear, and who estimates it best: the scans that answer this for a model, and the tables that they come to.

1. NeurGrad of all prompts says which of them the model answers rightly; the study is about those, as in the paper.
2. A sweep of sampled neurons measures NEG by intervention, with NeurGrad and the plain gradient of the same neurons.
3. Integrated gradients of the same prompts.
4. A sweep over several ranges of shifts, on fewer prompts.
5. Joint interventions on sets of the sampled neurons, against the sum of what each does alone.

Each is a run of its own, which resumes and is stored as any other. Only right answers' targets are compared where
prompts say which is right. The table `estimators` has a row an estimator and layer (`layer` empty: all of them).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from neg_service.config import NeuronsConfig
from neg_service.errors import ConfigurationError, nearest
from neg_service.estimation.linear import by_layer, by_range, histogram, shifts_of_ranges
from neg_service.estimation.quality import Booleans, Doubles, Estimated, Integers, quality
from neg_service.measures.baselines import random_draw
from neg_service.measures.linearity import GRIDS
from neg_service.storage.reader import Run

log = logging.getLogger(__name__)

ESTIMATORS = (
    "neurgrad",
    "gradient",
    "integrated_gradients",
    "gradient_x_activation",
    "activation",
    "random",
)
# Those with the unit of NEG; of the others a relative error means nothing.
IN_UNITS_OF_NEG = ("neurgrad", "gradient")
_POINTS = 4000
_CURVES = 6

# A finished run of a measure on chosen neurons of the prompts with these ids, or of all.
Scan = Callable[[Mapping[str, Any], NeuronsConfig, Sequence[str] | None], Run]
Rows = list[dict[str, Any]]


@dataclass
class Options:
    """See `conf/study.yaml`."""

    prompts: int | None = 100
    answered: str = "right"
    neurons: int | None = 70
    seed: int = 0
    basis: str = "paper"
    grid: str = "full"
    keep: str = "answer"
    steps: int = 20
    estimators: list[str] = field(default_factory=lambda: list(ESTIMATORS))
    ranges: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0, 4.0, 10.0])
    range_prompts: int = 20
    sets: list[int] = field(default_factory=lambda: [2, 8, 32])
    set_shift: float = 0.5
    draws: int = 1000


@dataclass
class Findings:
    """What a study found: tables by name, and the runs that they come from."""

    runs: dict[str, str] = field(default_factory=dict)
    rows: dict[str, Rows] = field(default_factory=dict)

    def tables(self) -> dict[str, pa.Table]:
        """Arrow tables; those without rows are left out."""
        return {name: pa.Table.from_pylist(rows) for name, rows in self.rows.items() if rows}


@dataclass(frozen=True)
class Triples:
    """Sampled (prompt, target, neuron) triples with their NEG and what estimates it, each [I]."""

    prompts: tuple[str, ...]
    targets: tuple[str, ...]
    prompt: Integers
    target: Integers
    layer: Integers
    neuron: Integers
    neg: Doubles
    r: Doubles
    r2: Doubles
    is_resolved: Booleans
    estimates: dict[str, Doubles]

    def by_layer(self) -> Iterator[tuple[tuple[int, int, int], slice]]:
        """The triples of each (prompt, target, layer), which lie together."""
        key = np.stack([self.prompt, self.target, self.layer], 1)
        starts = np.flatnonzero(np.r_[[True] * min(1, len(key)), (key[1:] != key[:-1]).any(1)])
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(key)], strict=True):
            prompt, target, layer = key[start].tolist()
            yield (prompt, target, layer), slice(start, end)


def check_options(options: Options) -> None:
    """Refuse what would fail after hours of scanning.

    Raises:
        ConfigurationError: naming the key, its value, and what it may be.
    """
    for key, given in (("estimators", options.estimators), ("sets", options.sets)):
        if len(set(given)) < len(given):
            raise ConfigurationError(f"study.{key}={given}: one is named twice")
    if not options.estimators:
        raise ConfigurationError(f"study.estimators=[]: name at least one of {', '.join(ESTIMATORS)}")
    for name in options.estimators:
        if name not in ESTIMATORS:
            raise ConfigurationError(
                f"study.estimators: {name} is unknown; {nearest(name, ESTIMATORS)}known are {', '.join(ESTIMATORS)}"
            )
    if options.answered not in ("right", "all"):
        raise ConfigurationError(f"study.answered={options.answered}: must be right or all")
    if options.grid not in GRIDS:
        raise ConfigurationError(f"study.grid={options.grid} is unknown; known are {', '.join(GRIDS)}")
    shifts_of_ranges(options.ranges)
    for key, value in (
        ("steps", options.steps),
        ("range_prompts", options.range_prompts),
        ("draws", options.draws),
        *(("prompts", value) for value in [options.prompts] if value is not None),
        *(("neurons", value) for value in [options.neurons] if value is not None),
        *(("sets", value) for value in options.sets),
    ):
        if value < 1:
            raise ConfigurationError(f"study.{key}={value}: must be at least 1")


def run_study(options: Options, neurons: NeuronsConfig, scan: Scan) -> Findings:
    """Run or continue the scans, and make the tables; `neurons` chooses layers.

    Raises:
        ConfigurationError: an option that cannot be, or no prompt that the model answers rightly.
    """
    check_options(options)
    if neurons.choose != "all":
        raise ConfigurationError(
            f"neurons.choose={neurons.choose}: a study draws its neurons itself: study.neurons of each layer of "
            f"neurons.layers, or null for all of them"
        )
    found = Findings()
    basis = {"basis": options.basis}

    def run(what: str, measure: dict[str, Any], chosen: NeuronsConfig, ids: Sequence[str] | None) -> Run:
        try:
            made = scan({**measure, **basis}, chosen, ids)
        except ConfigurationError as error:
            # Said of a key that a scan has; in a study it is set under another name.
            raise type(error)(re.sub(r"\bmeasure\.(basis|keep|steps|grid)\b", r"study.\1", str(error))) from error
        found.runs[what] = made.uri
        return made

    whole = NeuronsConfig(neurons.layers)
    sample = whole
    if options.neurons is not None:
        sample = NeuronsConfig(neurons.layers, choose="sample", count=options.neurons, per="layer", seed=options.seed)
    answers = run("neurgrad", {"name": "neurgrad", "keep": options.keep}, whole, None)
    ids, found.rows["accuracy"] = _chosen_prompts(answers, options)
    log.info("%d prompts, %s neurons of each layer", len(ids), options.neurons or "all")
    sweep = run("sweep", {"name": "sweep", "grid": options.grid}, sample, ids)
    triples = _triples(sweep, options)
    runs = {"neurgrad": answers, "gradient": answers, "sweep": sweep}
    if "integrated_gradients" in options.estimators:
        measure = {"name": "integrated_gradients", "steps": options.steps, "keep": options.keep}
        runs["integrated_gradients"] = run("integrated_gradients", measure, whole, ids)
        triples.estimates["integrated_gradients"] = _integrals(runs["integrated_gradients"], triples)
    found.rows["estimators"] = _estimators(triples, options, {name: _cost(own) for name, own in runs.items()})
    found.rows["layers"] = by_layer(triples.r, triples.r2, triples.neg, triples.is_resolved, triples.layer)
    found.rows["histogram"] = [
        {"what": what, **row}
        for what, values in (("r", np.abs(triples.r)), ("r2", triples.r2))
        for row in histogram(values[triples.is_resolved])
    ]
    shifts = shifts_of_ranges(options.ranges)
    measure = {"name": "sweep", "shifts": shifts, "keep_curves": True}
    # Spread over the data set, whose prompts lie together by what they ask.
    few = ids[:: max(1, len(ids) // options.range_prompts)][: options.range_prompts]
    curves = run("ranges", measure, sample, few)
    found.rows["ranges"], found.rows["curves"] = _ranges(curves, options)
    if edits := _sets(triples, options):
        joint = run("sets", {"name": "intervene", "edits": edits}, NeuronsConfig(), ids)
        found.rows["additivity"] = _additivity(joint, triples, options)
    found.rows["points"] = _points(triples, options)
    return found


def _chosen_prompts(run: Run, options: Options) -> tuple[list[str], Rows]:
    prompts = run.table("prompts", columns=["prompt_id", "targets", "answer", "prediction"]).to_table()
    ids = prompts["prompt_id"].to_pylist()
    answer, prediction = prompts["answer"].to_pylist(), prompts["prediction"].to_pylist()
    right = [own for own, a, p in zip(ids, answer, prediction, strict=True) if a is not None and a == p]
    known = sum(a is not None for a in answer)
    accuracy = {"prompts": len(ids), "with_answer": known, "right": len(right)}
    wanted = ids
    if options.answered == "right" and known and all(len(targets) < 2 for targets in prompts["targets"].to_pylist()):
        raise ConfigurationError(
            "study.answered=right: prompts have one target each, which is always the most probable one; give them "
            "several, or use study.answered=all"
        )
    if options.answered == "right" and known:
        wanted = right
        if not right:
            raise ConfigurationError(
                f"study.answered=right: the model answers none of {known} prompts rightly; use study.answered=all"
            )
    if options.prompts is not None and len(wanted) > options.prompts:
        draw = np.random.default_rng(options.seed).choice(len(wanted), options.prompts, replace=False)
        wanted = [wanted[index] for index in sorted(draw)]
    elif options.prompts is not None and len(wanted) < options.prompts:
        log.warning("study.prompts=%d, but there are only %d such prompts", options.prompts, len(wanted))
    return wanted, [accuracy | {"studied": len(wanted)}]


def _has_answers(run: Run) -> bool:
    answers = run.table("prompts", columns=["answer"]).to_table()["answer"]
    return bool(answers.null_count == 0)


def _triples(run: Run, options: Options) -> Triples:
    names = ["prompt_id", "target", "target_index", "layer", "neuron", "neg", "r", "r2", "is_resolved"]
    only_right = pc.field("is_answer") if _has_answers(run) else None
    table = run.table("sweep", [*names, "neurgrad", "gradient", "activation"], only_right).to_table()
    order = pc.sort_indices(table, [(key, "ascending") for key in ("prompt_id", "target_index", "layer", "neuron")])
    table = table.take(order)

    def column(name: str) -> Doubles:
        values: Doubles = table[name].to_numpy().astype(np.float64)
        return values

    prompt, target = (table[name].combine_chunks().dictionary_encode() for name in ("prompt_id", "target"))
    gradient, activation = column("gradient"), column("activation")
    made = {
        "neurgrad": column("neurgrad"),
        "gradient": gradient,
        "gradient_x_activation": gradient * activation,
        "activation": activation,
    }
    triples = Triples(
        prompts=tuple(prompt.dictionary.to_pylist()),
        targets=tuple(target.dictionary.to_pylist()),
        prompt=prompt.indices.to_numpy().astype(np.int64),
        target=target.indices.to_numpy().astype(np.int64),
        layer=table["layer"].to_numpy().astype(np.int64),
        neuron=table["neuron"].to_numpy().astype(np.int64),
        neg=column("neg"),
        r=column("r"),
        r2=column("r2"),
        is_resolved=table["is_resolved"].to_numpy(),
        estimates={name: values for name, values in made.items() if name in options.estimators},
    )
    if "random" in options.estimators:
        triples.estimates["random"] = _random(triples, options.seed)
    return triples


def _random(triples: Triples, seed: int) -> Doubles:
    """The baseline `random` of the triples' neurons."""
    values = np.empty(len(triples.neg))
    n_neurons = int(triples.neuron.max(initial=-1)) + 1
    for (prompt, target, layer), own in triples.by_layer():
        drawn = random_draw(seed, triples.prompts[prompt], triples.targets[target], layer, n_neurons)
        values[own] = drawn[triples.neuron[own]]
    return values


def _integrals(run: Run, triples: Triples) -> Doubles:
    """The integrated gradients of the triples' neurons, read part by part."""
    prompts = {name: index for index, name in enumerate(triples.prompts)}
    targets = {name: index for index, name in enumerate(triples.targets)}
    place = dict(triples.by_layer())
    values = np.full(len(triples.neg), np.nan)
    columns = ["prompt_id", "target", "layer", "integrated_gradients"]
    for batch in run.table("integrated_gradients").to_batches(columns=columns, batch_size=256):
        if not batch.num_rows:
            continue
        matrix = batch["integrated_gradients"].flatten().to_numpy().reshape(batch.num_rows, -1)
        keys = zip(*(batch[name].to_pylist() for name in columns[:3]), strict=True)
        for row, (prompt, target, layer) in enumerate(keys):
            own = place.get((prompts.get(prompt, -1), targets.get(target, -1), layer))
            if own is not None:
                values[own] = matrix[row, triples.neuron[own]]
    return values


def _cost(run: Run) -> float | None:
    """Seconds a prompt with one replica; None of a run that was interrupted."""
    cost = run.about.get("cost")
    return None if not cost else cost["seconds"] * cost["replicas"] / cost["prompts"]


def _estimators(triples: Triples, options: Options, costs: Mapping[str, float | None]) -> Rows:
    rows: Rows = []
    for name in options.estimators:
        estimate = triples.estimates[name]
        for layer in [None, *np.unique(triples.layer).tolist()]:
            own = np.ones(len(triples.layer), bool) if layer is None else triples.layer == layer
            draws = options.draws if layer is None else max(1, options.draws // 5)
            judged = quality(triples.neg[own], estimate[own], triples.prompt[own], triples.is_resolved[own], draws)
            if name not in IN_UNITS_OF_NEG:
                judged = replace(judged, median_relative_error=Estimated(float("nan"), float("nan"), float("nan")))
            row: dict[str, Any] = {"estimator": name, "layer": layer}
            for statistic, value in asdict(judged).items():
                if isinstance(value, dict):
                    row |= {
                        statistic: value["value"],
                        f"{statistic}_low": value["low"],
                        f"{statistic}_high": value["high"],
                    }
                else:
                    row[statistic] = value
            # The others are by-products of the same backward pass, but for a random draw, which costs nothing.
            own_cost = costs.get(name if name == "integrated_gradients" else "neurgrad")
            row["seconds_a_prompt"] = None if name == "random" else own_cost
            row["neg_seconds_a_prompt"] = costs.get("sweep")
            rows.append(row)
    return rows


def _ranges(run: Run, options: Options) -> tuple[Rows, Rows]:
    only_right = pc.field("is_answer") if _has_answers(run) else None
    names = ["prompt_id", "target", "layer", "neuron", "neurgrad", "probability", "resolution", "delta_p"]
    table = run.table("sweep", names, only_right).to_table()
    shifts = run.config["measure"]["shifts"]
    curves = table["delta_p"].combine_chunks().flatten().to_numpy().reshape(-1, len(shifts)).astype(np.float64)
    layer = table["layer"].to_numpy().astype(np.int64)
    # The resolution of a NEG is the noise of a single change over the root of the sum of its squared shifts.
    noise = table["resolution"].to_numpy().astype(np.float64) * np.sqrt(np.sum(np.square(shifts)))
    rows = by_range(shifts, curves, layer, options.ranges, noise)
    # For a person to look at: the strongest curve of several layers, spread over the model.
    strength = np.abs(curves).max(1)
    shown = []
    layers = np.unique(layer)
    for one in layers[np.unique(np.linspace(0, len(layers) - 1, min(_CURVES, len(layers))).round().astype(int))]:
        own = np.flatnonzero(layer == one)
        index = own[strength[own].argmax()]
        shown.append(
            {name: table[name][index].as_py() for name in names} | {"shifts": [float(shift) for shift in shifts]}
        )
    return rows, shown


def _sets(triples: Triples, options: Options) -> list[dict[str, Any]]:
    """Edits that shift sets of the sampled neurons together: for each size four sets, or as many as there are."""
    neurons = np.unique(np.stack([triples.layer, triples.neuron], 1), axis=0)
    edits = []
    for size in options.sets:
        drawn = np.random.default_rng(options.seed).permutation(len(neurons))
        for number in range(min(4, len(neurons) // size)):
            own = neurons[np.sort(drawn[number * size : (number + 1) * size])]
            edits.append({"name": f"{size}/{number}", "neurons": own.tolist(), "shift": options.set_shift})
    return edits


def _additivity(run: Run, triples: Triples, options: Options) -> Rows:
    """Joint interventions against the sum of single ones: a row a size of set."""
    only_right = pc.field("is_answer") if _has_answers(run) else None
    table = run.table("intervene", ["prompt_id", "target", "edit", "delta_p"], only_right).to_table()
    measured = {(row["prompt_id"], row["target"], row["edit"]): row["delta_p"] for row in table.to_pylist()}
    width = int(triples.neuron.max()) + 1
    code = triples.layer * width + triples.neuron
    pair = triples.prompt * len(triples.targets) + triples.target
    names = {
        int(key): (triples.prompts[key // len(triples.targets)], triples.targets[key % len(triples.targets)])
        for key in np.unique(pair)
    }
    rows = []
    for size in options.sets:
        predicted, joint, prompts = [], [], []
        for edit in (one for one in _sets(triples, options) if len(one["neurons"]) == size):
            members = np.isin(code, [layer * width + neuron for layer, neuron in edit["neurons"]])
            sums = np.bincount(pair[members], weights=triples.neg[members], minlength=int(pair.max()) + 1)
            for key, (prompt, target) in names.items():
                predicted.append(options.set_shift * sums[key])
                joint.append(measured[prompt, target, edit["name"]])
                prompts.append(key // len(triples.targets))
        if not joint:
            continue
        truth = np.array(joint)
        judged = quality(truth, np.array(predicted), np.array(prompts), truth != 0, options.draws)
        rows.append(
            {
                "n_neurons": size, "shift": options.set_shift, "n": judged.n,
                "pearson": judged.pearson.value, "pearson_low": judged.pearson.low, "pearson_high": judged.pearson.high,
                "median_relative_error": judged.median_relative_error.value,
                "median_relative_error_low": judged.median_relative_error.low,
                "median_relative_error_high": judged.median_relative_error.high,
                "median_delta_p": float(np.median(np.abs(truth))),
            }
        )  # fmt: skip
    return rows


def _points(triples: Triples, options: Options) -> Rows:
    """Some triples with their estimates, to plot and to look at: the strongest thousand, and a sample of the rest."""
    n = len(triples.neg)
    strongest = np.argsort(-np.abs(triples.neg), kind="stable")[: _POINTS // 4]
    rest = np.setdiff1d(np.arange(n), strongest)
    draw = np.random.default_rng(options.seed).permutation(len(rest))[: _POINTS - len(strongest)]
    chosen = np.concatenate([strongest, np.sort(rest[draw])])
    return [
        {
            "prompt_id": triples.prompts[triples.prompt[i]], "target": triples.targets[triples.target[i]],
            "layer": int(triples.layer[i]), "neuron": int(triples.neuron[i]), "neg": float(triples.neg[i]),
            "r": float(triples.r[i]), "r2": float(triples.r2[i]), "is_resolved": bool(triples.is_resolved[i]),
            **{name: float(values[i]) for name, values in triples.estimates.items()},
        }
        for i in chosen
    ]  # fmt: skip
