"""The tables of a study of linearity, from the triples and runs that it measured.

`accuracy` has one row. `estimators` has one for each estimator and layer (`layer` is None: all of them), `ranges` for
each range of shifts and layer, `layers` for each layer, `histogram` for each bin, `additivity` for each size of set;
`curves` and `points` are for a person to look at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from neg_service import schema
from neg_service.layer_neurons import NO_EXPERT
from neg_service.neurons import rows_of
from neg_service.storage.reader import Run, reading
from neg_service.studies.linearity.curves import by_layer, by_range, histogram, r_in_log_odds
from neg_service.studies.linearity.quality import Doubles, Estimated, Quality, quality
from neg_service.studies.linearity.triples import Triples, noise_of_changes, routed_rows
from neg_service.studies.tables import Row, Rows, expert_or_none

# What has the unit of NEG when magnitudes are shifted; of the others a relative error means nothing.
IN_UNITS_OF_NEG = ("neurgrad",)
_POINTS = 4000
_CURVES = 6
_SETS_OF_A_SIZE = 4


def estimators_table(
    triples: Triples, estimators: Sequence[str], draws: int, costs: Mapping[str, float | None]
) -> Rows:
    """How well each estimator meets NEG, over all layers, and with a fifth of the draws in each.

    costs: seconds for each prompt, of the measures `neurgrad`, `integrated_gradients` and `sweep`.
    """
    rows: Rows = []
    for name in estimators:
        estimate = triples.estimates[name]
        for layer in [None, *np.unique(triples.layer).tolist()]:
            own = np.ones(len(triples.layer), bool) if layer is None else triples.layer == layer
            found = quality(
                triples.neg[own], estimate[own], triples.prompt[own], triples.is_resolved[own],
                draws if layer is None else max(1, draws // 5), has_errors=name in IN_UNITS_OF_NEG,
            )  # fmt: skip
            # The others are by-products of the same backward pass, but for a random draw, which costs nothing.
            own_cost = costs.get(name if name == "integrated_gradients" else "neurgrad")
            rows.append(
                {"estimator": name, "layer": layer}
                | quality_columns(found)
                | {
                    "seconds_a_prompt": None if name == "random" else own_cost,
                    "neg_seconds_a_prompt": costs.get("sweep"),
                }
            )
    return rows


def quality_columns(found: Quality) -> Row:
    """Each statistic as a column, with its interval as <name>_low and <name>_high; and the numbers of triples."""
    row: Row = {}
    for name, value in asdict(found).items():
        row |= _interval_columns(name, value) if isinstance(value, dict) else {name: value}
    return row


def _interval_columns(name: str, value: Mapping[str, float]) -> Row:
    return {name: value["value"], f"{name}_low": value["low"], f"{name}_high": value["high"]}


def linearity_tables(triples: Triples) -> dict[str, Rows]:
    """How linear the curves are that NEG was fitted to: by layer, and as histograms."""
    return {
        "layers": by_layer(triples.r, triples.r2, triples.neg, triples.is_resolved, triples.layer, triples.routing),
        "histogram": [
            {"what": what, **row}
            for what, values in (("r", np.abs(triples.r)), ("r2", triples.r2))
            for row in histogram(values[triples.is_resolved])
        ],
    }


def range_table(run: Run, largest: float) -> Rows:
    """How linear curves are over a range, in probability and in log-odds, from a sweep of its own."""
    names = ["layer", "r", "r2", "max_abs_delta_p", "resolution", "n_shifts", "probability"]
    table, _ = routed_rows(run, [*names, "prompt_id", "delta_p"])
    layer, r, r2, moved, resolution, n_shifts, p = (table[name].to_numpy().astype(np.float64) for name in names)
    noise = noise_of_changes(run, table["prompt_id"], resolution, n_shifts)
    shifts = np.array(run.config["measure"]["shifts"], np.float64)
    log_odds_r = r_in_log_odds(shifts, _curves_of(table, len(shifts)), p)
    return by_range(largest, r, r2, moved, layer.astype(np.int64), noise, log_odds_r)


def _curves_of(table: pa.Table, n_shifts: int) -> Doubles:
    curves: Doubles = table["delta_p"].combine_chunks().flatten().to_numpy().reshape(-1, n_shifts).astype(np.float64)
    return curves


def curves_table(run: Run) -> Rows:
    """A few curves to look at, from a sweep that kept them."""
    names = ["prompt_id", "target", "layer", "expert", "neuron", "neurgrad", "probability", "resolution", "delta_p"]
    table, routing = routed_rows(run, names)
    if routing is None:
        names.remove("expert")
    shifts = run.config["measure"]["shifts"]
    curves = _curves_of(table, len(shifts))
    return [
        {name: table[name][index].as_py() for name in names} | {"shifts": [float(shift) for shift in shifts]}
        for index in _curves_to_show(table["layer"].to_numpy().astype(np.int64), curves)
    ]


def _curves_to_show(layer_i: NDArray[np.int64], delta_p_is: Doubles) -> list[int]:
    """The strongest curve of several layers, spread over the model."""
    max_abs_delta_p_i = np.abs(delta_p_is).max(1)
    layers = np.unique(layer_i)
    spread = np.unique(np.linspace(0, len(layers) - 1, min(_CURVES, len(layers))).round().astype(int))
    own_of = [np.flatnonzero(layer_i == layer) for layer in layers[spread]]
    return [int(own[max_abs_delta_p_i[own].argmax()]) for own in own_of]


def sets_of(triples: Triples, sizes: Sequence[int], shift: float, seed: int) -> list[dict[str, Any]]:
    """Edits that shift sets of the sampled neurons together: for each size four sets, or as many as there are."""
    neurons = np.unique(triples.rows, axis=0)
    edits = []
    for size in sizes:
        drawn = np.random.default_rng(seed).permutation(len(neurons))
        for number in range(min(_SETS_OF_A_SIZE, len(neurons) // size)):
            own = neurons[np.sort(drawn[number * size : (number + 1) * size])]
            named = _named(own, has_experts=triples.routing is not None)
            edits.append({"name": f"{size}/{number}", "neurons": named, "shift": shift})
    return edits


def _named(rows_n3: NDArray[np.int64], *, has_experts: bool) -> list[list[int | None]]:
    """Neurons as edits name them: layer and neuron, and of models with experts the expert."""
    if not has_experts:
        return [[layer, neuron] for layer, _, neuron in rows_n3.tolist()]
    return [[layer, neuron, expert_or_none(expert)] for layer, expert, neuron in rows_n3.tolist()]


def additivity_table(run: Run, triples: Triples, edits: Sequence[Mapping[str, Any]], draws: int) -> Rows:
    """Joint interventions against what the NEGs of their neurons predict, `shift * sum of NEG`: a row for each size.

    A relative error is of joint changes above the noise of a single readout.
    """
    with reading(run):
        table = run.table("intervene", ["prompt_id", "target", "edit", "delta_p"], schema.RIGHT).to_table()
    measured = {(row["prompt_id"], row["target"], row["edit"]): row["delta_p"] for row in table.to_pylist()}
    rows: Rows = []
    for size in dict.fromkeys(len(edit["neurons"]) for edit in edits):
        own_edits = [edit for edit in edits if len(edit["neurons"]) == size]
        shift = own_edits[0]["shift"]
        joint, predicted, prompt, noise = _joint_changes(measured, triples, own_edits)
        found = quality(joint, predicted, prompt, np.abs(joint) > noise, draws)
        rows.append(
            {"n_neurons": size, "shift": shift, "n": found.n}
            | _columns_of("pearson", found.pearson)
            | _columns_of("median_relative_error", found.median_relative_error)
            | {"median_delta_p": float(np.median(np.abs(joint)))}
        )
    return rows


def _joint_changes(
    measured: Mapping[tuple[str, str, str], float], triples: Triples, edits: Sequence[Mapping[str, Any]]
) -> tuple[Doubles, Doubles, NDArray[np.int64], Doubles]:
    """For each edit, prompt and target: Δp as measured, as predicted, the prompt's index, and the noise."""
    code_i = _codes(triples.rows)
    pair_i = triples.prompt * len(triples.targets) + triples.target
    pairs, first = np.unique(pair_i, return_index=True)
    prompts, targets = np.divmod(pairs, len(triples.targets))
    keys = [(triples.prompts[p], triples.targets[t]) for p, t in zip(prompts, targets, strict=True)]
    joint, predicted = [], []
    for edit in edits:
        # Of an edit's neurons those that a prompt uses, which have triples.
        members = np.isin(code_i, _codes(rows_of(edit["neurons"])))
        sums = np.bincount(pair_i[members], weights=triples.neg[members], minlength=int(pair_i.max()) + 1)
        predicted.append(edit["shift"] * sums[pairs])
        joint.append([measured[prompt, target, edit["name"]] for prompt, target in keys])
    n = len(edits)
    return np.ravel(joint), np.ravel(predicted), np.tile(prompts, n), np.tile(triples.noise[first], n)


def _codes(rows_n3: NDArray[np.int64]) -> NDArray[np.int64]:
    """A number of its own for each neuron: layer, expert and neuron are below 2¹⁵, 2¹⁶ and 2³²."""
    layer_n, expert_n, neuron_n = rows_n3.T
    code_n: NDArray[np.int64] = (((layer_n << 16) + expert_n - NO_EXPERT) << 32) + neuron_n
    return code_n


def _columns_of(name: str, value: Estimated) -> Row:
    return _interval_columns(name, asdict(value))


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
            "layer": int(triples.layer[i]),
            **({} if triples.routing is None else {"expert": expert_or_none(int(triples.expert[i]))}),
            "neuron": int(triples.neuron[i]), "neg": float(triples.neg[i]),
            "r": float(triples.r[i]), "r2": float(triples.r2[i]), "is_resolved": bool(triples.is_resolved[i]),
            **{name: float(values[i]) for name, values in triples.estimates.items()},
        }
        for i in chosen
    ]  # fmt: skip
