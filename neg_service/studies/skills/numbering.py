"""Neurons as numbers through all layers and experts; layer·N + index in models without experts.

Numbers are what rankings, overlaps and predictions are computed with; tables, edits and lists have layer, expert and
neuron.

Axes: G MLPs and experts, S neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from neg_service.layer_neurons import LayerNeurons
from neg_service.neurons import Ints, NeuronSet
from neg_service.slots import Slots
from neg_service.storage.reader import Run
from neg_service.studies.tables import expert_or_none


class Numbering:
    """Numbers of neurons, ascending by layer, expert (the MLP that is always on first) and neuron."""

    def __init__(self, layers: Sequence[LayerNeurons]) -> None:
        mlps = [(layer, expert, size) for layer, own in enumerate(layers) for expert, size in own.mlps]
        self._all = Slots(*np.array(mlps, np.int64).reshape(-1, 3).T)
        self._place = {(layer, expert): g for g, (layer, expert, _) in enumerate(mlps)}
        self.has_experts = any(own.n_experts for own in layers)

    @classmethod
    def of_run(cls, run: Run) -> Numbering:
        """Of a run's model; runs of before experts were measured have equal layers without any."""
        model = run.about["model"]
        if "layer_neurons" in model:
            return cls([LayerNeurons(*own) for own in model["layer_neurons"]])
        n_layers = model["layers"] if "layers" in model else 1 + max(run.config["neurons"]["layers"])
        return cls([LayerNeurons(int(model["neurons_a_layer"]))] * int(n_layers))

    def of_slots(self, slots: Slots) -> Ints:
        """The numbers of all neurons of some MLPs and experts, in their order."""
        mlps = zip(slots.layer.tolist(), slots.expert.tolist(), slots.size.tolist(), strict=True)
        starts = [(self._all.start[self._place[layer, expert]], size) for layer, expert, size in mlps]
        return np.concatenate([np.empty(0, np.int64), *(np.arange(start, start + size) for start, size in starts)])

    def of_set(self, neurons: NeuronSet) -> Ints:
        """The numbers of the neurons of a set, ascending."""
        return self._all.places_of(neurons)

    def rows(self, numbers_s: Ints) -> Ints:
        """Rows (layer, expert, neuron) [S, 3] of neurons."""
        place_s = np.searchsorted(self._all.start, numbers_s, "right") - 1
        neuron_s = numbers_s - self._all.start[place_s]
        return np.stack([self._all.layer[place_s], self._all.expert[place_s], neuron_s], 1)

    def set_of(self, numbers_s: Ints) -> NeuronSet:
        """The neurons as a set."""
        return NeuronSet.distinct(self.rows(numbers_s))[0]

    def names(self, numbers_s: Ints) -> list[list[int | None]]:
        """The neurons in their order as edits name them: layer and neuron, and of models with experts the expert."""
        rows = self.rows(numbers_s).tolist()
        if not self.has_experts:
            return [[layer, neuron] for layer, _, neuron in rows]
        return [[layer, neuron, expert_or_none(expert)] for layer, expert, neuron in rows]

    def columns(self, numbers_s: Ints) -> list[dict[str, Any]]:
        """What names each neuron in a row of a table; of models with experts the expert too, None of an only MLP."""
        rows = self.rows(numbers_s).tolist()
        if not self.has_experts:
            return [{"layer": layer, "neuron": neuron} for layer, _, neuron in rows]
        return [
            {"layer": layer, "expert": expert_or_none(expert), "neuron": neuron} for layer, expert, neuron in rows
        ]  # fmt: skip
