"""Which neurons act on a prompt, and where their values stand: all MLPs, and the experts that its readout token uses.

Axes: G MLPs and experts, M neurons of all of these, one behind the other, n neurons asked for, L layers, F slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neg_service.layer_neurons import NO_EXPERT
from neg_service.neurons import Ints, Neurons, NeuronSet


@dataclass(frozen=True, eq=False)
class Slots:
    """The MLPs and experts that act on a prompt [G], ordered by layer, experts ascending and what is always on last.

    layer, expert, size: of each. Their neurons stand one behind the other along an axis M.
    """

    layer: Ints
    expert: Ints
    size: Ints

    @classmethod
    def of_layers(cls, sizes: Mapping[int, int]) -> Slots:
        """Of layers without experts, which are the same for every prompt."""
        return cls(
            np.array(list(sizes), np.int64), np.full(len(sizes), NO_EXPERT, np.int64), np.array(list(sizes.values()))
        )

    @cached_property
    def start(self) -> Ints:
        """Where the neurons of each begin [G + 1]; the last is M."""
        return np.concatenate([[0], np.cumsum(self.size)])

    @property
    def m(self) -> int:
        """How many neurons there are."""
        return int(self.start[-1])

    @cached_property
    def of_neuron(self) -> Ints:
        """The number of the MLP or expert of each neuron [M]."""
        return np.repeat(np.arange(len(self.size)), self.size)

    def grid(self, layers: Sequence[int]) -> tuple[Ints, Ints]:
        """Where each neuron stands in an array by layer and slot [L, F]: the layer's place, and the slot, each [M]."""
        layer_m = self.layer[self.of_neuron]
        is_first_m = np.concatenate([[True], layer_m[1:] != layer_m[:-1]])
        start_m = np.maximum.accumulate(np.where(is_first_m, np.arange(self.m), 0))
        return np.searchsorted(layers, layer_m), np.arange(self.m) - start_m

    def rows_at(self, place_n: NDArray[Any]) -> Neurons:
        """Rows (layer, expert, neuron) [n, 3] of the neurons at some places along M."""
        own = self.of_neuron[place_n]
        return np.stack([self.layer[own], self.expert[own], place_n - self.start[own]], 1)

    def places_of(self, neurons: NeuronSet) -> Ints:
        """Where each of some neurons stands along M; -1 of one whose expert was not chosen [n]."""
        known = {key: place for place, key in enumerate(zip(self.layer.tolist(), self.expert.tolist(), strict=True))}
        key_n2 = np.stack([neurons.layer, neurons.expert], 1)
        key_u2, of_n = np.unique(key_n2, axis=0, return_inverse=True)
        own_u = np.array([known.get(tuple(key), -1) for key in key_u2.tolist()], np.int64)
        own_n = own_u[of_n.reshape(-1)]
        return np.where(own_n < 0, -1, self.start[np.maximum(own_n, 0)] + neurons.neuron)
