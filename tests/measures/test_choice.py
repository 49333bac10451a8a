"""Which neurons: drawn, ranked, listed, and refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from neg_service.config import NeuronsConfig
from neg_service.errors import ConfigurationError
from neg_service.layer_neurons import ALWAYS_ON, NO_EXPERT, LayerNeurons
from neg_service.measures.choice import (
    check_choice,
    chosen_neurons,
    count_of,
    described,
    identity_of_choice,
    n_used,
    resolved,
    strongest_neurons,
    with_list_read,
)
from neg_service.neurons import NeuronSet
from neg_service.slots import Slots
from tests.refusals import ANY, refused

SIZES = [40, 40, 40]
# No experts; four of which a token uses two, beside an MLP that is always on; two of which it uses one.
MIXTURE = [LayerNeurons(40), LayerNeurons(30, 4, 20, 2), LayerNeurons(0, 2, 20, 1)]
EVERYTHING = {
    (0, NO_EXPERT): 40,
    (1, ALWAYS_ON): 30,
    **{(1, expert): 20 for expert in range(4)},
    **{(2, expert): 20 for expert in range(2)},
}


def choose(**given: Any) -> list[list[int]]:
    config = with_list_read(NeuronsConfig(**given))
    check_choice(config, SIZES)
    found = chosen_neurons(config, SIZES)
    assert len(found) == count_of(config, SIZES)
    return found.tolist()


@pytest.mark.parametrize("choose", ["all", "sample", "top"])
def test_layers_without_neurons_are_refused_only_where_no_other_is_chosen(choose: Any) -> None:
    hybrid = [0, 40, LayerNeurons(0, 2, 20, 1), 0]
    for layers in ([0], [0, 3]):
        with refused(ConfigurationError, "neurons.layers", layers, "there are some in 1, 2"):
            check_choice(NeuronsConfig(layers, choose=choose, count=5), hybrid)
    check_choice(NeuronsConfig([0, 1], choose=choose, count=5), hybrid)


def test_a_sample_of_a_hybrid_is_drawn_from_layers_that_have_neurons() -> None:
    drawn = chosen_neurons(NeuronsConfig(choose="sample", count=5, per="layer"), [0, 40, 0, 30])
    assert Counter(drawn.layer.tolist()) == {1: 5, 3: 5}


def test_all_neurons_of_all_or_some_layers() -> None:
    assert choose() == [[layer, n] for layer in range(3) for n in range(40)]
    assert choose(layers=[2]) == [[2, n] for n in range(40)]


def test_a_sample_is_seeded_without_repeats_and_the_same_whatever_other_layers_are_chosen() -> None:
    found = choose(choose="sample", count=7, seed=1)
    assert found == choose(choose="sample", count=7, seed=1)
    assert found != choose(choose="sample", count=7, seed=2)
    assert [sum(layer == own for layer, _ in found) for own in range(3)] == [7, 7, 7]
    assert len({tuple(pair) for pair in found}) == 21
    assert [pair for pair in found if pair[0] == 1] == choose(choose="sample", count=7, seed=1, layers=[1])
    # Each layer draws for itself.
    assert [n for layer, n in found if layer == 0] != [n for layer, n in found if layer == 1]


def test_a_sample_in_all_is_spread_over_the_chosen_layers() -> None:
    found = choose(choose="sample", count=60, per="model", layers=[0, 2])
    assert len({tuple(pair) for pair in found}) == 60
    assert {layer for layer, _ in found} == {0, 2}
    assert found == sorted(found)


def test_a_list_inline_or_in_a_file(tmp_path: Path) -> None:
    assert choose(choose="list", list=[[2, 1], [0, 39]]) == [[0, 39], [2, 1]]
    # As in a table of results, with other columns, and a neuron once for each prompt.
    table = pa.table({"layer": [2, 0, 2], "neuron": [1, 39, 1], "neg": [0.1, 0.2, 0.3]})
    pq.write_table(table, tmp_path / "n.parquet")
    pyarrow.csv.write_csv(table, tmp_path / "n.csv")
    (tmp_path / "n.jsonl").write_text('{"layer": 2, "neuron": 1}\n{"layer": 0, "neuron": 39}\n')
    for name in ("n.parquet", "n.csv", "n.jsonl"):
        assert choose(choose="list", list=str(tmp_path / name)) == [[0, 39], [2, 1]]


def test_a_folder_of_results_is_all_its_parts(tmp_path: Path) -> None:
    for shard, neuron in enumerate((1, 39, 1)):
        pq.write_table(pa.table({"layer": [2], "neuron": [neuron]}), tmp_path / f"shard-{shard:06d}.parquet")
    assert choose(choose="list", list=str(tmp_path)) == [[2, 1], [2, 39]]
    (tmp_path / "empty").mkdir()
    with refused(ConfigurationError, "neurons.list", says=r"be a folder of \.parquet files"):
        choose(choose="list", list=str(tmp_path / "empty"))


def test_the_strongest_and_ties_go_to_the_lower_neuron() -> None:
    strength = np.zeros((2, 5))
    strength[0, 3] = strength[1, 0] = 2.0
    strength[1, 4] = 5.0
    assert strongest_neurons(Slots.of_layers({1: 5, 4: 5}), strength.ravel(), 2).tolist() == [[1, 3], [4, 4]]


def test_choices_of_layers_that_differ_in_size() -> None:
    sizes = [2, 5, 3]

    def of(**given: Any) -> list[list[int]]:
        config = NeuronsConfig(**given)
        check_choice(config, sizes)
        found = chosen_neurons(config, sizes)
        assert len(found) == count_of(config, sizes)
        assert found.in_model(sizes) == found
        return found.tolist()

    assert of() == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2], [1, 3], [1, 4], [2, 0], [2, 1], [2, 2]]
    assert of(layers=[0, 2]) == [[0, 0], [0, 1], [2, 0], [2, 1], [2, 2]]
    assert [layer for layer, _ in of(choose="sample", count=2)] == [0, 0, 1, 1, 2, 2]
    assert of(choose="sample", count=10, per="model") == of()
    assert of(choose="list", list=[[1, 4], [0, 1]]) == [[0, 1], [1, 4]]
    strength_m = np.array([1.0, 9.0, 0.0, 0.0, 0.0, 0.0, 9.0, 2.0, 1.0, 0.0])
    assert strongest_neurons(Slots.of_layers(dict(enumerate(sizes))), strength_m, 3).tolist() == [
        [0, 1],
        [1, 4],
        [2, 0],
    ]
    with pytest.raises(
        ConfigurationError, match=r"neurons\.count=3: the choice must be from 1 to 2, the neurons of a l"
    ):
        check_choice(NeuronsConfig(choose="sample", count=3), sizes)
    with pytest.raises(ConfigurationError, match=r"\(0, 2\) does not exist; .* layer 0 neurons 0 to 1"):
        check_choice(NeuronsConfig(choose="list", list=[[0, 2]]), sizes)


def of_mixture(**given: Any) -> NeuronSet:
    config = with_list_read(NeuronsConfig(**given))
    check_choice(config, MIXTURE)
    found = chosen_neurons(config, MIXTURE)
    assert found.in_model(MIXTURE) == found
    assert chosen_neurons(resolved(config, MIXTURE), MIXTURE) == found
    return found


def counts_of(found: NeuronSet) -> dict[tuple[int, int], int]:
    """How many neurons of each (layer, expert)."""
    return Counter(zip(found.layer.tolist(), found.expert.tolist(), strict=True))


def test_all_neurons_with_experts_are_counted_as_those_that_act_on_a_prompt() -> None:
    assert counts_of(of_mixture()) == EVERYTHING
    assert counts_of(of_mixture(layers=[2])) == {(2, 0): 20, (2, 1): 20}
    # Of layer 1 the MLP and two of four experts, of layer 2 one of two.
    assert count_of(NeuronsConfig(), MIXTURE) == 40 + (30 + 2 * 20) + 20
    assert count_of(NeuronsConfig([2]), MIXTURE) == 20
    # Of a list all are told, and of those of experts a prompt uses 2 of 4 (see MIXTURE).
    rows = [(0, NO_EXPERT, 1), *((1, n % 4, n) for n in range(8)), (1, ALWAYS_ON, 2)]
    of_list = NeuronsConfig(choose="list", list=NeuronSet.distinct(np.array(rows))[0])
    assert (count_of(of_list, MIXTURE), n_used(of_list, MIXTURE)) == (10, 6)


def test_a_sample_is_of_each_expert_and_of_each_mlp() -> None:
    found = of_mixture(choose="sample", count=7, seed=1)
    assert counts_of(found) == dict.fromkeys(EVERYTHING, 7)
    assert len(set(found.names())) == len(found) == 8 * 7
    assert found == of_mixture(choose="sample", count=7, seed=1)
    assert found != of_mixture(choose="sample", count=7, seed=2)
    # Whatever other layers are chosen; and of a layer without experts as if no layer had some.
    alone = of_mixture(choose="sample", count=7, seed=1, layers=[1])
    assert alone.names() == [name for name in found.names() if name[0] == 1]
    assert found.of_layer(0).tolist() == [n for layer, n in choose(choose="sample", count=7, seed=1) if layer == 0]
    # Each expert draws for itself.
    draws = {key: tuple(found.neuron[(found.rows[:, :2] == key).all(1)].tolist()) for key in EVERYTHING}
    assert len(set(draws.values())) == 8
    # The smallest of all says how many there may be.
    with refused(ConfigurationError, "neurons.count", "21", "must be from 1 to 20, the neurons of an expert or an MLP"):
        of_mixture(choose="sample", count=21)
    with refused(ConfigurationError, "neurons.count", "41", "must be from 1 to 40, the neurons of a layer"):
        of_mixture(choose="sample", count=41, layers=[0])


def test_a_sample_in_all_is_of_all_experts_neurons() -> None:
    found = of_mixture(choose="sample", count=100, per="model")
    assert len(set(found.names())) == len(found) == 100
    assert found.rows.tolist() == sorted(found.rows.tolist())
    assert set(counts_of(found)) == set(EVERYTHING)
    assert found == of_mixture(choose="sample", count=100, per="model")
    # All that there are: 40 + 30 + 4·20 + 2·20.
    assert of_mixture(choose="sample", count=190, per="model") == of_mixture()
    assert set(counts_of(of_mixture(choose="sample", count=100, per="model", layers=[1]))) == {
        key for key in EVERYTHING if key[0] == 1
    }
    with refused(ConfigurationError, "neurons.count", "191", "from 1 to 190, the neurons of the chosen layers"):
        of_mixture(choose="sample", count=191, per="model")


def test_of_a_sample_of_experts_about_as_many_are_measured_as_a_prompt_uses() -> None:
    # All of the MLPs' 7 each, half of the experts' 4·7 and 2·7.
    assert count_of(NeuronsConfig(choose="sample", count=7), MIXTURE) == 2 * 7 + 2 * 7 + 7
    everything = NeuronsConfig(choose="sample", count=190, per="model")
    assert count_of(everything, MIXTURE) == count_of(NeuronsConfig(), MIXTURE)
    # Of a list each is told.
    listed = NeuronsConfig(choose="list", list=[[2, 0, 0], [2, 0, 1], [2, 1, 1]])
    assert count_of(listed, MIXTURE) == 3


def test_the_strongest_of_experts_are_those_that_act_on_a_prompt() -> None:
    # A prompt that uses experts 1 and 3 of layer 1, and expert 0 of layer 2.
    slots = Slots(np.array([0, 1, 1, 1, 2]), np.array([NO_EXPERT, 1, 3, ALWAYS_ON, 0]), np.array([40, 20, 20, 30, 20]))
    strength_m = np.zeros(slots.m)
    strength_m[39] = strength_m[40 + 20] = strength_m[40 + 20 + 20 + 29] = 2.0
    strength_m[-1] = 5.0
    assert strongest_neurons(slots, strength_m, 4).names() == [(0, 39), (1, 29, -1), (1, 0, 3), (2, 19, 0)]
    # Of equals those that stand before.
    assert strongest_neurons(slots, strength_m, 3).names() == [(0, 39), (1, 0, 3), (2, 19, 0)]
    assert count_of(NeuronsConfig(choose="top", count=4), MIXTURE) == 4
    # More than act on a prompt there never are.
    check_choice(NeuronsConfig(choose="top", count=130), MIXTURE)
    with refused(
        ConfigurationError, "neurons.count", "131", "from 1 to 130, the neurons of the chosen layers that act on a pro"
    ):
        check_choice(NeuronsConfig(choose="top", count=131), MIXTURE)
    with refused(ConfigurationError, "neurons.count", "41", "from 1 to 40, the neurons of the chosen layers$"):
        check_choice(NeuronsConfig(choose="top", count=41, layers=[0]), MIXTURE)


def test_a_list_of_experts_neurons_inline_or_in_a_file(tmp_path: Path) -> None:
    expected = [(0, 39), (1, 2, -1), (1, 2, 3), (2, 0, 1)]
    inline = of_mixture(choose="list", list=[[2, 0, 1], [1, 2, 3], [0, 39, None], [1, 2, -1]])
    assert inline.names() == expected
    assert of_mixture(choose="list", list=inline) == inline
    columns = {"layer": [2, 1, 0, 1], "expert": [1, 3, None, -1], "neuron": [0, 2, 39, 2]}
    pq.write_table(pa.table(columns), tmp_path / "n.parquet")
    (tmp_path / "n.csv").write_text("layer,neuron,expert\n2,0,1\n1,2,3\n0,39,\n1,2,-1\n")
    (tmp_path / "n.jsonl").write_text(
        '{"layer": 2, "neuron": 0, "expert": 1}\n{"layer": 1, "neuron": 2, "expert": 3}\n'
        '{"layer": 0, "neuron": 39}\n{"layer": 1, "neuron": 2, "expert": -1}\n'
    )
    for name in ("n.parquet", "n.csv", "n.jsonl"):
        assert of_mixture(choose="list", list=str(tmp_path / name)) == inline, name
    # The MLP of a layer without experts is always on as well.
    assert of_mixture(choose="list", list=[[0, 39, -1], [1, 2, -1]]).names() == [(0, 39), (1, 2, -1)]


def test_the_choice_among_experts_is_told_in_words() -> None:
    assert described(NeuronsConfig(), MIXTURE) == "130 in 3 layers (those of experts that a prompt uses)"
    assert described(NeuronsConfig(choose="sample", count=7), MIXTURE) == (
        "about 35 in 3 layers: 7 of each expert and MLP, seed 0"
    )
    assert described(NeuronsConfig(choose="sample", count=190, per="model"), MIXTURE) == (
        "about 130 in 3 layers: 190 of them all, seed 0"
    )
    assert described(NeuronsConfig([0], choose="sample", count=7), MIXTURE) == "7 in 1 layer: 7 of each layer, seed 0"
    assert described(NeuronsConfig(choose="list", list=[[2, 0, 1]]), MIXTURE) == "1 in 1 layer: as listed"


def test_the_identity_of_experts_neurons_is_that_of_none_others() -> None:
    lists = ([[0, 3, 0], [1, 2, 0]], [[0, 3, 1], [1, 2, 0]], [[0, 3, -1], [1, 2, 0]], [[0, 3], [1, 2]])
    found = [identity_of_choice(NeuronsConfig(choose="list", list=own), 2) for own in lists]
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


def test_what_is_resolved_is_drawn_once() -> None:
    sample = NeuronsConfig(choose="sample", count=7, seed=1)
    found = resolved(sample, SIZES)
    assert isinstance(found.list, NeuronSet)
    assert found.list == chosen_neurons(sample, SIZES)
    assert chosen_neurons(found, SIZES) is found.list
    assert identity_of_choice(found, 3) == identity_of_choice(sample, 3)
    for follows in (NeuronsConfig(), NeuronsConfig(choose="top", count=3)):
        assert resolved(follows, SIZES) is follows


def test_only_what_decides_the_neurons_is_part_of_the_identity() -> None:
    assert identity_of_choice(NeuronsConfig(seed=5, count=3, over="dataset"), 2) == {"layers": [0, 1]}
    one = identity_of_choice(NeuronsConfig(choose="list", list=[[1, 2], [0, 3]]), 2)
    assert one == identity_of_choice(NeuronsConfig(choose="list", list=[[0, 3], [1, 2]]), 2)
    assert one != identity_of_choice(NeuronsConfig(choose="list", list=[[0, 3], [1, 1]]), 2)
    samples = [identity_of_choice(NeuronsConfig(choose="sample", count=3, seed=seed), 2) for seed in (0, 1)]
    assert samples[0] != samples[1]


def test_the_choice_is_told_in_words() -> None:
    assert described(NeuronsConfig(choose="sample", count=2, seed=4), SIZES) == (
        "6 in 3 layers: 2 of each layer, seed 4"
    )
    assert described(NeuronsConfig(choose="top", count=9, over="dataset"), SIZES) == (
        "9 in 3 layers: the strongest over the data set"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1, 2]], r"\(1, 2\) needs an expert, .*: layer 1 has experts 0 to 3 of 20 neurons, or -1 for its MLP"),
        ([[2, 2]], r"\(2, 2\) needs an expert, .*: layer 2 has experts 0 to 1 of 20 neurons$"),
        ([[1, 2, 4]], r"\(1, 2, 4\) does not exist; layer 1 has experts 0 to 3"),
        ([[1, 20, 3]], r"\(1, 20, 3\) does not exist; layer 1 has experts 0 to 3 of 20 neurons"),
        ([[2, 0, -1]], r"\(2, 0, -1\) does not exist; layer 2 has experts 0 to 1"),
        ([[0, 2, 1]], r"\(0, 2, 1\) does not exist; layer 0 has no experts"),
        (NeuronSet.from_pairs([[1, 2]]), r"\(1, 2\) needs an expert"),
        ([[1, 2, 3], [1, 2, 3]], r"\(1, 2, 3\) is given twice"),
    ],
)  # fmt: skip
def test_bad_lists_of_experts_neurons_are_refused(given: Any, message: str) -> None:
    with refused(ConfigurationError, "neurons.list", says=message):
        of_mixture(choose="list", list=given)


@pytest.mark.parametrize(
    ("given", "refusal"),
    [
        ({"choose": "best"}, ("neurons.choose", "best", "one of all, sample, top, list")),
        ({"choose": "sample", "count": 1, "per": "head"}, ("neurons.per", "head")),
        ({"choose": "top", "count": 1, "over": "time"}, ("neurons.over", "time")),
        (
            {"choose": "sample", "count": 0},
            ("neurons.count", "0", "the choice must be from 1 to 40, the neurons of a layer"),
        ),
        ({"choose": "sample", "count": 41}, ("neurons.count", "41", "the choice must be from 1 to 40")),
        (
            {"choose": "sample", "count": 121, "per": "model"},
            ("neurons.count", "121", "from 1 to 120, the neurons of the chosen layers"),
        ),
        ({"choose": "top", "count": 121}, ("neurons.count", "121", "the choice must be from 1 to 120")),
        ({"choose": "top", "count": 50, "layers": [1]}, ("neurons.count", "50", "from 1 to 40")),
        ({"choose": "list", "list": []}, ("neurons.list", ANY, "the choice is empty")),
        (
            {"choose": "list", "list": [[3, 0]]},
            ("neurons.list", ANY, r"\(3, 0\) does not exist; the model has layers 0 to 2"),
        ),
        ({"choose": "list", "list": [[0, 1], [0, 1]]}, ("neurons.list", ANY, r"\(0, 1\) is given twice")),
        (
            {"choose": "list", "list": [[0, 1]], "layers": [1]},
            ("neurons.list", ANY, "has neurons of layer 0, which neurons.layers"),
        ),
        ({"choose": "list", "list": 7}, ("neurons.list", "7", "a list of")),
        ({"choose": "list", "list": [[0, 1.5]]}, ("neurons.list", ANY, "must be a list of")),
        ({"choose": "list", "list": [[0, 1], [2]]}, ("neurons.list", ANY, "must be a list of")),
        ({"choose": "list", "list": [[0, True]]}, ("neurons.list", "[[0, True]]", "triples of whole numbers")),
        ({"choose": "list", "list": [[False, True]]}, ("neurons.list", ANY, "must be a list of")),
        ({"choose": "list", "list": [[0, "1"]]}, ("neurons.list", ANY, "must be a list of")),
        ({"choose": "list", "list": [[0, None]]}, ("neurons.list", ANY, "must be a list of")),
        ({"choose": "list", "list": [[0, float("nan")]]}, ("neurons.list", ANY, "must be a list of")),
        (
            {"choose": "list", "list": [[0, 2**70]]},
            ("neurons.list", ANY, r"\(0, 1180591620717411303424\) does not exist"),
        ),
        ({"choose": "list", "list": [[-1, 0]]}, ("neurons.list", ANY, r"\(-1, 0\) does not exist")),
        (
            {"choose": "list", "list": "README.md"},
            ("neurons.list", "README.md", "must end in .csv, .jsonl, .parquet, be a folder"),
        ),
        ({"choose": "list", "list": "nowhere.csv"}, ("neurons.list", "nowhere.csv", "cannot be read")),
    ],
)
def test_bad_choices_are_refused(given: dict[str, Any], refusal: tuple[Any, ...]) -> None:
    with refused(ConfigurationError, *refusal):
        choose(**given)


def test_a_file_without_the_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "n.csv").write_text("layer,index\n0,1\n")
    with refused(ConfigurationError, "neurons.list", says="needs whole numbers in a column 'neuron'"):
        choose(choose="list", list=str(tmp_path / "n.csv"))


def test_a_sample_is_drawn_whatever_list_stands_beside_it() -> None:
    # Its fingerprint says count and seed, and nothing of a list.
    sample = NeuronsConfig(choose="sample", count=2)
    other = NeuronsConfig(choose="sample", count=2, list=NeuronSet.from_pairs([[0, 1]]))
    drawn = resolved(sample, [40, 40]).list
    assert len(drawn) == 4
    assert resolved(other, [40, 40]).list == drawn
    assert resolved(resolved(sample, [40, 40]), [40, 40]).list == drawn
