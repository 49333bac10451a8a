"""Sampled (prompt, target, neuron) triples: their NEG as a sweep measured it, and what each estimator says of it.

Of prompts that say which answer is right, the right one's rows alone; of others all targets. Neurons of experts that a
prompt does not use have no NEG there, and are left out.

Axes: I triples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from neg_service import schema
from neg_service.measures.builtin.baselines import random_draw
from neg_service.measures.shifts import AdaptiveGrid, Grid, adapted, coarse_grid, given_grid
from neg_service.storage.reader import Run, reading
from neg_service.studies.linearity.curves import CurveRouting
from neg_service.studies.linearity.quality import Booleans, Doubles, Integers
from neg_service.studies.tables import mlp_of_rows


@dataclass(frozen=True)
class Triples:
    """Triples with their NEG and what estimates it, each [I], by prompt, target, layer, expert and neuron.

    prompt, target: indices into `prompts` and `targets`. expert: see `layer_neurons.py`. noise: what a single |Δp| has
    to exceed. estimates: by the estimator's name. routing: of models with experts.
    """

    prompts: tuple[str, ...]
    targets: tuple[str, ...]
    prompt: Integers
    target: Integers
    layer: Integers
    expert: Integers
    neuron: Integers
    neg: Doubles
    r: Doubles
    r2: Doubles
    noise: Doubles
    is_resolved: Booleans
    estimates: dict[str, Doubles]
    routing: CurveRouting | None = None

    def by_mlp(self) -> Iterator[tuple[tuple[int, int, int, int], slice]]:
        """The triples of each (prompt, target, layer, expert), which lie together."""
        key = np.stack([self.prompt, self.target, self.layer, self.expert], 1)
        starts = np.flatnonzero(np.r_[[True] * min(1, len(key)), (key[1:] != key[:-1]).any(1)])
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(key)], strict=True):
            prompt, target, layer, expert = key[start].tolist()
            yield (prompt, target, layer, expert), slice(start, end)

    @property
    def rows(self) -> Integers:
        """Rows (layer, expert, neuron) [I, 3]."""
        return np.stack([self.layer, self.expert, self.neuron], 1)


def triples_of(sweep: Run, estimators: Sequence[str], seed: int) -> Triples:
    """The triples of a sweep, with those estimates that came with it; `seed` is of the estimator `random`."""
    names = [
        "prompt_id", "target", "target_index", "layer", "expert", "neuron", "neg", "r", "r2", "resolution",
        "n_shifts", "is_resolved", "neurgrad", "gradient", "activation",
    ]  # fmt: skip
    table, routing = routed_rows(sweep, names)
    keys = [name for name in ("prompt_id", "target_index", "layer", "expert", "neuron") if name in table.column_names]
    order = pc.sort_indices(table, [(key, "ascending") for key in keys])
    table = table.take(order)
    if routing is not None:
        routing = replace(routing, is_rerouted=routing.is_rerouted[order.to_numpy()])

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
    layer, expert = mlp_of_rows(table)
    triples = Triples(
        prompts=tuple(prompt.dictionary.to_pylist()),
        targets=tuple(target.dictionary.to_pylist()),
        prompt=prompt.indices.to_numpy().astype(np.int64),
        target=target.indices.to_numpy().astype(np.int64),
        layer=layer,
        expert=expert,
        neuron=table["neuron"].to_numpy().astype(np.int64),
        neg=column("neg"),
        r=column("r"),
        r2=column("r2"),
        noise=noise_of_changes(sweep, table["prompt_id"], column("resolution"), column("n_shifts")),
        is_resolved=table["is_resolved"].to_numpy(),
        estimates={name: values for name, values in made.items() if name in estimators},
        routing=routing,
    )
    if "random" in estimators:
        triples.estimates["random"] = _random(triples, seed)
    return triples


def routed_rows(sweep: Run, names: Sequence[str]) -> tuple[pa.Table, CurveRouting | None]:
    """Rows of right answers, of neurons that the prompt uses; of models with experts what routing did to them, too."""
    has_experts = "is_routed" in sweep.schemas["sweep"].names
    there = [name for name in names if name in sweep.schemas["sweep"].names]
    with reading(sweep):
        table = sweep.table(
            "sweep", [*there, *["is_routed", "routing_changed"] * has_experts], schema.RIGHT
        ).to_table()  # fmt: skip
    if not has_experts:
        return table, None
    unused = table.filter(pc.invert(table["is_routed"]))
    table = table.filter(table["is_routed"])
    routing = CurveRouting(table["routing_changed"].to_numpy() > 0, unused["layer"].to_numpy().astype(np.int64))
    return table.select(there), routing


def noise_of_changes(sweep: Run, prompt_id_i: pa.ChunkedArray, resolution_i: Doubles, n_shifts_i: Doubles) -> Doubles:
    """What a single |Δp| has to exceed, from the resolution of the NEGs, which are weighted sums of several.

    n_shifts_i: how many each NEG is of.
    """
    measure = sweep.config["measure"]
    full = given_grid(measure["shifts"])
    grid: Grid | AdaptiveGrid = full
    if measure["grid"] == "coarse":
        grid = coarse_grid(measure["max_shift"], measure["step"])
    elif measure["grid"] == "adaptive":
        grid = adapted(full, measure["tolerance"])
    counts, place_i = np.unique(n_shifts_i, return_inverse=True)
    stages = [grid.stage_of(int(count)) for count in counts]
    # Where errors are a share of effects they grow with shifts: what those of the largest have.
    gains = np.array([[stage.noise_gain, stage.share_of_largest] for stage in stages]).reshape(-1, 2)
    is_per_row = bool(sweep.about["calibration"]["noise"].get("is_per_row"))
    is_share_i = is_per_row & ~pc.is_in(prompt_id_i, _with_rows_of_several_tokens(sweep)).to_numpy()
    noise_i: Doubles = resolution_i / gains[place_i, is_share_i.astype(int)]
    return noise_i


def _with_rows_of_several_tokens(sweep: Run) -> pa.Array:
    """The ids of prompts whose neurons are at an earlier token, or with targets of several: their noise is one σ."""
    names = [name for name in ("position", "target_sequences") if name in sweep.schemas["prompts"].names]
    with reading(sweep):
        table = sweep.table("prompts", ["prompt_id", *names]).to_table()
    is_tree = np.zeros(len(table), bool)
    for name in names:
        is_tree |= table[name].is_valid().to_numpy()
    return table["prompt_id"].combine_chunks().filter(pa.array(is_tree))


def _random(triples: Triples, seed: int) -> Doubles:
    """The baseline `random` of the triples' neurons."""
    values = np.empty(len(triples.neg))
    n_neurons = int(triples.neuron.max(initial=-1)) + 1
    for (prompt, target, layer, expert), own in triples.by_mlp():
        drawn = random_draw(seed, triples.prompts[prompt], triples.targets[target], layer, n_neurons, expert)
        values[own] = drawn[triples.neuron[own]]
    return values


def integrals_of(run: Run, triples: Triples) -> Doubles:
    """The integrated gradients of the triples' neurons, read part by part."""
    prompts = {name: index for index, name in enumerate(triples.prompts)}
    targets = {name: index for index, name in enumerate(triples.targets)}
    place = dict(triples.by_mlp())
    # Rounding may have a prompt use other experts in this scan, whose neurons bring nothing of the probability in it.
    values = np.full(len(triples.neg), np.nan if triples.routing is None else 0.0)
    columns = ["prompt_id", "target", "layer", "expert", "integrated_gradients"]
    columns = [name for name in columns if name in run.schemas["integrated_gradients"].names]
    with reading(run):
        for batch in run.table("integrated_gradients").to_batches(columns=columns, batch_size=256):
            if not batch.num_rows:
                continue
            lists = batch["integrated_gradients"]
            flat, size_r = lists.flatten().to_numpy(), pc.list_value_length(lists).to_numpy()
            mlps = (own.tolist() for own in mlp_of_rows(batch))
            keys = zip(batch["prompt_id"].to_pylist(), batch["target"].to_pylist(), *mlps, strict=True)
            for (prompt, target, layer, expert), end, size in zip(keys, np.cumsum(size_r), size_r, strict=True):
                own = place.get((prompts.get(prompt, -1), targets.get(target, -1), layer, expert))
                if own is not None:
                    values[own] = flat[end - size + triples.neuron[own]]
    return values
