"""Sets of neurons: pairs and triples, layers that differ in size and have experts, order, digests, what is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from neg_service.errors import ConfigurationError
from neg_service.layer_neurons import ALWAYS_ON, NO_EXPERT, LayerNeurons
from neg_service.neurons import NeuronSet, require_existing, rows_of

UNEQUAL = [2, 0, 3]
# No experts; four of two neurons beside an MLP of three that is always on; two experts of one neuron alone.
MIXTURE = [LayerNeurons(5), LayerNeurons(3, 4, 2, 2), LayerNeurons(0, 2, 1, 1)]


def test_pairs_are_a_set_in_the_order_of_layer_and_neuron() -> None:
    found = NeuronSet.from_pairs([[2, 1], [0, 39], [2, 0]])
    assert found.tolist() == [[0, 39], [2, 0], [2, 1]]
    assert found.layers == [0, 2]
    assert found.of_layer(2).tolist() == [0, 1]
    assert found.expert.tolist() == [NO_EXPERT] * 3
    assert not found.has_experts
    assert {column.dtype for column in (found.layer, found.expert, found.neuron)} == {np.dtype(np.int64)}
    assert len(found) == 3


def test_triples_stand_after_the_neurons_of_no_expert() -> None:
    found = NeuronSet.from_pairs([[1, 0, 3], [1, 7, None], [1, 9, 0], [0, 1, 5], [1, 4, ALWAYS_ON]])
    # Ordered by layer, then expert: of none, of what is always on, of those with a number.
    assert found.tolist() == [[0, 1, 5], [1, 7, None], [1, 4, -1], [1, 9, 0], [1, 0, 3]]
    assert found.names() == [(0, 1, 5), (1, 7), (1, 4, -1), (1, 9, 0), (1, 0, 3)]
    # In memory the expert stands before the neuron.
    assert found.rows.tolist() == [[0, 5, 1], [1, NO_EXPERT, 7], [1, -1, 4], [1, 0, 9], [1, 3, 0]]
    assert found.keys == [(0, 5), (1, NO_EXPERT), (1, -1), (1, 0), (1, 3)]
    assert found.has_experts
    # The same number in another expert is another neuron.
    assert len(NeuronSet.from_pairs([[0, 2, 1], [0, 2, 3], [0, 2, None]])) == 3


def test_an_expert_of_none_in_the_middle_is_understood_as_it_was_once_written() -> None:
    # Beside triples of today, in whose last place the expert stands.
    found = NeuronSet.from_pairs([[0, None, 39], [0, 38, None], [2, 1, 4], [0, 37, 0]])
    assert found.rows.tolist() == [[0, NO_EXPERT, 38], [0, NO_EXPERT, 39], [0, 0, 37], [2, 4, 1]]
    for neuron in ([0, None, None], [None, 1, None], [None, None, 1]):
        with pytest.raises(ConfigurationError, match="must be a list of"):
            NeuronSet.from_pairs([neuron])


def test_all_neurons_of_layers_of_unequal_size() -> None:
    assert NeuronSet.all_of(range(3), UNEQUAL).tolist() == [[0, 0], [0, 1], [2, 0], [2, 1], [2, 2]]
    assert NeuronSet.all_of([2], UNEQUAL).tolist() == [[2, 0], [2, 1], [2, 2]]
    assert len(NeuronSet.all_of([1], UNEQUAL)) == 0


def test_all_neurons_of_layers_with_experts_are_those_of_every_expert_and_of_what_is_always_on() -> None:
    assert NeuronSet.all_of([0, 1], MIXTURE).names() == [
        *((0, n) for n in range(5)),
        *((1, n, -1) for n in range(3)),
        *((1, n, expert) for expert in range(4) for n in range(2)),
    ]
    # Experts alone.
    assert NeuronSet.all_of([2], MIXTURE).names() == [(2, 0, 0), (2, 0, 1)]
    assert len(NeuronSet.all_of(range(3), MIXTURE)) == sum(own.total for own in MIXTURE)


def test_the_digest_of_pairs_is_that_of_their_json_and_does_not_know_their_order() -> None:
    # As runs have named their lists before neurons had experts.
    pairs = [[0, 3], [1, 2]]
    digest = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
    assert NeuronSet.from_pairs(pairs).sha256 == NeuronSet.from_pairs(pairs[::-1]).sha256 == digest
    assert NeuronSet.from_pairs([[0, 3, None], [1, 2, None]]).sha256 == digest
    others = [[[0, 3]], [[0, 3], [1, 3]], [[0, 3, 0], [1, 2, 0]]]
    assert len({digest, *(NeuronSet.from_pairs(other).sha256 for other in others)}) == 4


def test_sets_of_the_same_neurons_are_equal_wherever_they_are_from() -> None:
    one, other = NeuronSet.from_pairs([[1, 2], [0, 3]]), NeuronSet.from_pairs([[0, 3], [1, 2]], source="a.csv")
    assert one == other
    assert hash(one) == hash(other)
    assert one != NeuronSet.from_pairs([[0, 3]])
    assert one != [[0, 3], [1, 2]]
    assert repr(one) == "NeuronSet(2 in 2 layers)"


def test_a_set_knows_which_of_the_given_rows_is_where() -> None:
    found, place = NeuronSet.distinct(rows_of([[2, 1], [0, 5], [2, 1]]))
    assert found.tolist() == [[0, 5], [2, 1]]
    assert place.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "neurons",
    [
        NeuronSet.from_pairs([[2, 1], [0, 39]]),
        NeuronSet.from_pairs([[2, 1, 4], [0, 39, None]]),
        NeuronSet.from_pairs([[2, 1, -1], [2, 1, 0], [0, 39, None]]),
        NeuronSet.all_of(range(3), MIXTURE),
        NeuronSet.by_task({"b": NeuronSet.from_pairs([[0, 1]]), "a": NeuronSet.from_pairs([[1, 3, 2], [0, 1, 0]])}),
    ],
)
def test_a_set_comes_back_from_parquet_arrow_and_pickle(neurons: NeuronSet) -> None:
    for back in (
        NeuronSet.from_parquet(neurons.to_parquet()),
        NeuronSet.from_arrow(neurons.to_arrow()),
        pickle.loads(pickle.dumps(neurons)),
    ):
        assert back == neurons
        assert back.tolist() == neurons.tolist()
    assert neurons.to_arrow()["expert"].null_count == int((neurons.expert == NO_EXPERT).sum())


def test_a_table_in_any_order_gives_the_same_set() -> None:
    shuffled = pa.table({"neuron": [1, 39], "layer": pa.array([2, 0], pa.int16())})
    assert NeuronSet.from_arrow(shuffled).tolist() == [[0, 39], [2, 1]]


def test_rows_of_a_table_that_name_one_neuron_are_one_of_the_set() -> None:
    # As in a table of results: one row for each prompt.
    rows = {"layer": [2, 0, 2], "neuron": [1, 39, 1]}
    assert NeuronSet.from_arrow(pa.table(rows)).tolist() == [[0, 39], [2, 1]]
    experts = pa.table(rows | {"expert": pa.array([None, None, 4], pa.int32())})
    assert NeuronSet.from_arrow(experts).names() == [(0, 39), (2, 1), (2, 1, 4)]
    by_task = NeuronSet.from_arrow(pa.table(rows | {"task": ["a", "a", "b"]}))
    assert by_task.tolist() == [["a", 0, 39], ["a", 2, 1], ["b", 2, 1]]


def test_sets_by_task_are_one_set_and_each_of_them() -> None:
    sets = {"b": NeuronSet.from_pairs([[0, 1], [2, 3]]), "a": NeuronSet.from_pairs([[2, 3]])}
    found = NeuronSet.by_task(sets)
    assert found.tolist() == [["a", 2, 3], ["b", 0, 1], ["b", 2, 3]]
    assert found.tasks == ["a", "b"]
    assert found.of_task("b") == sets["b"].__class__.by_task({"b": sets["b"]})
    assert found.of_task("b").of_layer(2).tolist() == [3]
    assert len(found.of_task("c")) == 0
    # Without tasks it is that of each.
    assert sets["a"].of_task("anything") is sets["a"]
    assert found.sha256 != NeuronSet.by_task({"a": sets["b"], "b": sets["a"]}).sha256


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "neurons.list: the choice is empty"),
        ([[0, 1], [2]], r"neurons.list=\[\[0, 1\], \[2\]\]: must be a list of \(layer, index\) pairs"),
        ([[0, 1, 2, 3]], "must be a list of"),
        ([[0, 1, 2], [0]], r"\(layer, index\) pairs or \(layer, index, expert\) triples of whole numbers"),
        ([[0, None]], "must be a list of"),
        ([[None, 0, 1]], "must be a list of"),
        ([[0, True, 1]], "must be a list of"),
        ([[0, 1.0, 2]], "must be a list of"),
        ("0,1", "must be a list of"),
        ([[0, 1], [3, 4], [0, 1]], r"neurons.list: \(0, 1\) is given twice"),
        ([[0, 2, 1], [0, 2, 1]], r"\(0, 2, 1\) is given twice"),
        ([[0, 2, -1], [0, 2, -1]], r"\(0, 2, -1\) is given twice"),
        ([[0, None, 2], [0, 2, None]], r"\(0, 2\) is given twice"),
        ([[0, 2, 2**70]], r"\(0, 2, 1180591620717411303424\) does not exist"),
        ([[0, 2**70]], r"\(0, 1180591620717411303424\) does not exist"),
    ],
)
def test_what_is_no_set_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        NeuronSet.from_pairs(given)


@pytest.mark.parametrize(
    ("neuron", "sizes", "message"),
    [
        ([3, 0], [4, 4, 4], r"\(3, 0\) does not exist; the model has layers 0 to 2 and neurons 0 to 3"),
        ([0, 4], [4, 4, 4], r"\(0, 4\) does not exist; the model has layers 0 to 2 and neurons 0 to 3"),
        ([0, 2], UNEQUAL, r"\(0, 2\) does not exist; the model has layers 0 to 2 and layer 0 neurons 0 to 1"),
        ([1, 0], UNEQUAL, r"\(1, 0\) does not exist"),
        ([7, 0], UNEQUAL, r"\(7, 0\) does not exist; the model has layers 0 to 2$"),
        ([-1, 0], [4], r"\(-1, 0\) does not exist"),
        ([2, 1, 0], UNEQUAL, r"neurons: \(2, 1, 0\) does not exist; layer 2 has no experts"),
        ([0, 2**70], [4], r"\(0, 1180591620717411303424\) does not exist"),
        # A pair alone is not enough where there are experts; what there is, is told.
        (
            [1, 0],
            MIXTURE,
            r"\(1, 0\) needs an expert, \(layer, neuron, expert\): layer 1 has experts 0 to 3 of 2 neurons, or -1 for "
            r"its MLP that is always on \(3 neurons\)$",
        ),
        ([2, 0], MIXTURE, r"\(2, 0\) needs an expert, .*: layer 2 has experts 0 to 1 of 1 neurons$"),
        ([1, 0, 4], MIXTURE, r"\(1, 0, 4\) does not exist; layer 1 has experts 0 to 3 of 2 neurons, or -1 for"),
        ([1, 0, -3], MIXTURE, r"\(1, 0, -3\) does not exist; layer 1 has experts 0 to 3"),
        # A neuron too many: of an expert, and of the MLP that is always on.
        ([1, 2, 0], MIXTURE, r"\(1, 2, 0\) does not exist; layer 1 has experts 0 to 3 of 2 neurons"),
        ([1, 3, -1], MIXTURE, r"\(1, 3, -1\) does not exist; .* its MLP that is always on \(3 neurons\)$"),
        # Where nothing is always on.
        ([2, 0, -1], MIXTURE, r"\(2, 0, -1\) does not exist; layer 2 has experts 0 to 1 of 1 neurons$"),
        ([0, 1, 2], MIXTURE, r"\(0, 1, 2\) does not exist; layer 0 has no experts"),
        ([0, 5], MIXTURE, r"\(0, 5\) does not exist; the model has layers 0 to 2 and layer 0 neurons 0 to 4$"),
        ([3, 0, 0], MIXTURE, r"\(3, 0, 0\) does not exist; the model has layers 0 to 2$"),
        # Of equal layers with experts no number of neurons is told for those that there are not.
        ([2, 0], [MIXTURE[1]] * 2, r"\(2, 0\) does not exist; the model has layers 0 to 1$"),
    ],
)
def test_a_neuron_that_the_model_has_not_is_named(
    neuron: list[int], sizes: Sequence[int | LayerNeurons], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        require_existing(rows_of([neuron]), sizes)


def test_the_first_neuron_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"\(1, 2, 3\) does not exist"):
        require_existing(rows_of([[1, 1, 3], [1, 2, 3], [9, 9, 9]]), MIXTURE)


def test_neurons_of_unequal_layers_exist() -> None:
    assert NeuronSet.all_of(range(3), UNEQUAL).in_model(UNEQUAL) == NeuronSet.all_of(range(3), UNEQUAL)
    with pytest.raises(ConfigurationError, match=r"neurons.list: \(2, 2\) does not exist"):
        NeuronSet.from_pairs([[2, 2]]).in_model([3, 3, 2], "neurons.list")


def test_neurons_of_experts_exist() -> None:
    everything = NeuronSet.all_of(range(3), MIXTURE)
    assert everything.in_model(MIXTURE) == everything
    # In the order in which they were given, as people name them and as rows.
    given = [[1, 2, -1], [0, 4, None], [1, 1, 3]]
    assert require_existing(rows_of(given), MIXTURE).tolist() == [[1, -1, 2], [0, NO_EXPERT, 4], [1, 3, 1]]


def test_the_only_mlp_of_a_layer_may_be_named_as_always_on() -> None:
    given = [[0, 3, -1], [1, 2, -1]]
    assert require_existing(rows_of(given), MIXTURE).tolist() == [[0, NO_EXPERT, 3], [1, -1, 2]]
    found = NeuronSet.from_pairs(given).in_model(MIXTURE)
    assert found == NeuronSet.from_pairs([[0, 3, None], [1, 2, -1]])
    assert found.names() == [(0, 3), (1, 2, -1)]
    # In a model without experts they are pairs again.
    assert NeuronSet.from_pairs([[0, 3, -1]]).in_model([4]).tolist() == [[0, 3]]


def test_two_names_of_one_neuron_are_one_and_in_order() -> None:
    # The only MLP of a layer is always on, too.
    assert NeuronSet.from_pairs([[0, 5, None], [0, 3, -1]]).in_model([8]).tolist() == [[0, 3], [0, 5]]
    with pytest.raises(ConfigurationError, match=r"\(0, 5\) is given twice"):
        NeuronSet.from_pairs([[0, 5, None], [0, 5, -1]]).in_model([8])
    with pytest.raises(ConfigurationError, match=r"\(1, 0, -2\) does not exist: experts are from 0, or -1"):
        rows_of([[1, 0, -2]])


def test_pairs_and_triples_may_stand_beside_each_other() -> None:
    # As a set of layers with and without experts names its neurons.
    mixed = NeuronSet.from_pairs([(0, 1), (1, 2, 3)])
    assert mixed.names() == [(0, 1), (1, 2, 3)]
    assert NeuronSet.from_pairs(mixed.names()) == mixed
