"""The tables of a study, from the triples and runs that it measured: a list of rows each.

`estimators` has a row an estimator and layer (`layer` is None: all of them), `ranges` one a range of shifts and layer,
`additivity` one a size of set; `curves` and `points` are for a person to look at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from neg_service import schema
from neg_service.estimation.linear import by_range
from neg_service.estimation.quality import quality
from neg_service.estimation.triples import Triples, noise_of_changes
from neg_service.storage.reader import Run, reading

# What has the unit of NEG when magnitudes are shifted; of the others a relative error means nothing.
IN_UNITS_OF_NEG = ("neurgrad",)
_POINTS = 4000
_CURVES = 6

Rows = list[dict[str, Any]]


def estimators_table(
    triples: Triples, estimators: Sequence[str], draws: int, costs: Mapping[str, float | None]
) -> Rows:
    """How well each estimator meets NEG, over all layers, and with a fifth of the draws in each.

    costs: seconds a prompt, of the measures `neurgrad`, `integrated_gradients` and `sweep`.
    """
    rows: Rows = []
    for name in estimators:
        estimate = triples.estimates[name]
        for layer in [None, *np.unique(triples.layer).tolist()]:
            own = np.ones(len(triples.layer), bool) if layer is None else triples.layer == layer
            judged = quality(
                triples.neg[own], estimate[own], triples.prompt[own], triples.is_resolved[own],
                draws if layer is None else max(1, draws // 5), has_errors=name in IN_UNITS_OF_NEG,
            )  # fmt: skip
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


def ranges_tables(run: Run, ranges: Sequence[float]) -> tuple[Rows, Rows]:
    """How linear curves are over each range, and a few of them, from a sweep of all ranges' shifts."""
    names = ["prompt_id", "target", "layer", "neuron", "neurgrad", "probability", "resolution", "delta_p"]
    with reading(run):
        table = run.table("sweep", names, schema.RIGHT).to_table()
    shifts = run.config["measure"]["shifts"]
    curves = table["delta_p"].combine_chunks().flatten().to_numpy().reshape(-1, len(shifts)).astype(np.float64)
    layer = table["layer"].to_numpy().astype(np.int64)
    noise = noise_of_changes(run, table["resolution"].to_numpy().astype(np.float64))
    rows = by_range(shifts, curves, layer, ranges, noise)
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


def sets_of(triples: Triples, sizes: Sequence[int], shift: float, seed: int) -> list[dict[str, Any]]:
    """Edits that shift sets of the sampled neurons together: for each size four sets, or as many as there are."""
    neurons = np.unique(np.stack([triples.layer, triples.neuron], 1), axis=0)
    edits = []
    for size in sizes:
        drawn = np.random.default_rng(seed).permutation(len(neurons))
        for number in range(min(4, len(neurons) // size)):
            own = neurons[np.sort(drawn[number * size : (number + 1) * size])]
            edits.append({"name": f"{size}/{number}", "neurons": own.tolist(), "shift": shift})
    return edits


def additivity_table(run: Run, triples: Triples, edits: Sequence[Mapping[str, Any]], draws: int) -> Rows:
    """Joint interventions against what the NEGs of their neurons foretell, `shift * sum of NEG`: a row a size of set.

    A relative error is of joint changes above the noise of a single readout.
    """
    with reading(run):
        table = run.table("intervene", ["prompt_id", "target", "edit", "delta_p"], schema.RIGHT).to_table()
    measured = {(row["prompt_id"], row["target"], row["edit"]): row["delta_p"] for row in table.to_pylist()}
    width = int(triples.neuron.max()) + 1
    code = triples.layer * width + triples.neuron
    pair = triples.prompt * len(triples.targets) + triples.target
    pairs, first = np.unique(pair, return_index=True)
    noise_of = dict(zip(pairs.tolist(), triples.noise[first].tolist(), strict=True))
    rows: Rows = []
    for size in dict.fromkeys(len(edit["neurons"]) for edit in edits):
        foretold, joint, prompts, noise = [], [], [], []
        own_edits = [edit for edit in edits if len(edit["neurons"]) == size]
        shift = own_edits[0]["shift"]
        for edit in own_edits:
            members = np.isin(code, [layer * width + neuron for layer, neuron in edit["neurons"]])
            sums = np.bincount(pair[members], weights=triples.neg[members], minlength=int(pair.max()) + 1)
            for key in pairs.tolist():
                prompt, target = divmod(key, len(triples.targets))
                foretold.append(shift * sums[key])
                joint.append(measured[triples.prompts[prompt], triples.targets[target], edit["name"]])
                prompts.append(prompt)
                noise.append(noise_of[key])
        truth = np.array(joint)
        judged = quality(truth, np.array(foretold), np.array(prompts), np.abs(truth) > np.array(noise), draws)
        rows.append(
            {
                "n_neurons": size, "shift": shift, "n": judged.n,
                "pearson": judged.pearson.value, "pearson_low": judged.pearson.low, "pearson_high": judged.pearson.high,
                "median_relative_error": judged.median_relative_error.value,
                "median_relative_error_low": judged.median_relative_error.low,
                "median_relative_error_high": judged.median_relative_error.high,
                "median_delta_p": float(np.median(np.abs(truth))),
            }
        )  # fmt: skip
    return rows


def points_table(triples: Triples, seed: int) -> Rows:
    """Some triples with their estimates, to plot and to look at: the strongest thousand, and a sample of the rest."""
    n = len(triples.neg)
    strongest = np.argsort(-np.abs(triples.neg), kind="stable")[: _POINTS // 4]
    rest = np.setdiff1d(np.arange(n), strongest)
    draw = np.random.default_rng(seed).permutation(len(rest))[: _POINTS - len(strongest)]
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
