"""Sampled (prompt, target, neuron) triples: their NEG as a sweep measured it, and what each estimator says of it.

Of prompts that say which answer is right, the right one's rows alone; of others all targets.

Axes: I triples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from neg_service import schema
from neg_service.measures.builtin.baselines import random_draw
from neg_service.measures.shifts import chosen_grid, given_grid
from neg_service.storage.reader import Run, reading
from neg_service.studies.linearity.quality import Booleans, Doubles, Integers


@dataclass(frozen=True)
class Triples:
    """Triples with their NEG and what estimates it, each [I], in the order of prompts, targets, layers and neurons.

    prompt, target: indices into `prompts` and `targets`. noise: what a single |Δp| has to exceed. estimates: by the
    estimator's name.
    """

    prompts: tuple[str, ...]
    targets: tuple[str, ...]
    prompt: Integers
    target: Integers
    layer: Integers
    neuron: Integers
    neg: Doubles
    r: Doubles
    r2: Doubles
    noise: Doubles
    is_resolved: Booleans
    estimates: dict[str, Doubles]

    def by_layer(self) -> Iterator[tuple[tuple[int, int, int], slice]]:
        """The triples of each (prompt, target, layer), which lie together."""
        key = np.stack([self.prompt, self.target, self.layer], 1)
        starts = np.flatnonzero(np.r_[[True] * min(1, len(key)), (key[1:] != key[:-1]).any(1)])
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(key)], strict=True):
            prompt, target, layer = key[start].tolist()
            yield (prompt, target, layer), slice(start, end)


def triples_of(sweep: Run, estimators: Sequence[str], seed: int) -> Triples:
    """The triples of a sweep, with those estimates that came with it; `seed` is of the estimator `random`."""
    names = ["prompt_id", "target", "target_index", "layer", "neuron", "neg", "r", "r2", "resolution", "is_resolved"]
    with reading(sweep):
        table = sweep.table("sweep", [*names, "neurgrad", "gradient", "activation"], schema.RIGHT).to_table()
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
        noise=noise_of_changes(sweep, column("resolution")),
        is_resolved=table["is_resolved"].to_numpy(),
        estimates={name: values for name, values in made.items() if name in estimators},
    )
    if "random" in estimators:
        triples.estimates["random"] = _random(triples, seed)
    return triples


def noise_of_changes(sweep: Run, resolution_i: Doubles) -> Doubles:
    """What a single |Δp| has to exceed, from the resolution of the NEGs, which are weighted sums of several."""
    measure = sweep.config["measure"]
    if measure["grid"] == "coarse":
        grid = chosen_grid("coarse", None, measure["max_shift"], measure["step"])
    else:
        grid = given_grid(measure["shifts"])
    return resolution_i / grid.noise_gain


def _random(triples: Triples, seed: int) -> Doubles:
    """The baseline `random` of the triples' neurons."""
    values = np.empty(len(triples.neg))
    n_neurons = int(triples.neuron.max(initial=-1)) + 1
    for (prompt, target, layer), own in triples.by_layer():
        drawn = random_draw(seed, triples.prompts[prompt], triples.targets[target], layer, n_neurons)
        values[own] = drawn[triples.neuron[own]]
    return values


def integrals_of(run: Run, triples: Triples) -> Doubles:
    """The integrated gradients of the triples' neurons, read part by part."""
    prompts = {name: index for index, name in enumerate(triples.prompts)}
    targets = {name: index for index, name in enumerate(triples.targets)}
    place = dict(triples.by_layer())
    values = np.full(len(triples.neg), np.nan)
    columns = ["prompt_id", "target", "layer", "integrated_gradients"]
    with reading(run):
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
