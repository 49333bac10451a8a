"""Which neurons act on a prompt, and where their values stand: there and back."""

from __future__ import annotations

import numpy as np

from neg_service.layer_neurons import ALWAYS_ON, NO_EXPERT
from neg_service.neurons import NeuronSet
from neg_service.slots import Slots

# Of one prompt: a layer of three neurons; experts 1 and 4 of two neurons beside an MLP of four; expert 0 of two alone.
SLOTS = Slots(np.array([0, 2, 2, 2, 5]), np.array([NO_EXPERT, 1, 4, ALWAYS_ON, 0]), np.array([3, 2, 2, 4, 2]))
NAMES = [
    *((0, n) for n in range(3)),
    *((2, n, 1) for n in range(2)),
    *((2, n, 4) for n in range(2)),
    *((2, n, -1) for n in range(4)),
    *((5, n, 0) for n in range(2)),
]


def test_neurons_stand_one_behind_the_other() -> None:
    assert SLOTS.m == len(NAMES) == 13
    assert SLOTS.start.tolist() == [0, 3, 5, 7, 11, 13]
    assert SLOTS.of_neuron.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 4, 4]
    rows = SLOTS.rows_at(np.arange(13))
    assert rows.tolist() == [
        [layer, NO_EXPERT if not expert else expert[0], neuron] for layer, neuron, *expert in NAMES
    ]
    # At any places, in their order.
    assert SLOTS.rows_at(np.array([12, 0, 7])).tolist() == [[5, 0, 1], [0, NO_EXPERT, 0], [2, ALWAYS_ON, 0]]


def test_neurons_are_found_where_they_stand() -> None:
    everything, place_m = NeuronSet.distinct(SLOTS.rows_at(np.arange(13)))
    assert sorted(everything.names()) == sorted(NAMES)
    # A set has what is always on before the experts, values have it behind them.
    assert everything.names() != NAMES
    place_n = SLOTS.places_of(everything)
    assert [NAMES[place] for place in place_n] == everything.names()
    assert place_n[place_m].tolist() == list(range(13))
    few = NeuronSet.from_pairs([[5, 1, 0], [2, 0, 4], [0, 2, None]])
    assert SLOTS.places_of(few).tolist() == [2, 5, 12]


def test_a_neuron_of_an_expert_that_is_not_used_stands_nowhere() -> None:
    # Nor one of a layer that is not measured.
    asked = NeuronSet.from_pairs([[2, 0, 0], [2, 0, 1], [2, 1, 3], [5, 0, 0], [5, 0, 1], [7, 0, 0]])
    assert SLOTS.places_of(asked).tolist() == [-1, 3, -1, 11, -1, -1]
    nothing = SLOTS.places_of(asked.take(np.array([], np.int64)))
    assert nothing.tolist() == []


def test_layers_without_experts_are_in_the_given_order() -> None:
    slots = Slots.of_layers({1: 2, 4: 3})
    assert slots.rows_at(np.arange(slots.m)).tolist() == NeuronSet.all_of([1, 4], [0, 2, 0, 0, 3]).rows.tolist()
    assert slots.places_of(NeuronSet.from_pairs([[4, 2], [1, 0]])).tolist() == [0, 4]


def test_by_layer_and_slot_each_neuron_has_a_place_of_its_own() -> None:
    layer_m, slot_m = SLOTS.grid([0, 2, 5])
    assert layer_m.tolist() == [0] * 3 + [1] * 8 + [2] * 2
    assert slot_m.tolist() == [*range(3), *range(8), *range(2)]
